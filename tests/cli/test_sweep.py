"""`lorica train --sweep` and `--find-lr`: the whole command on a tiny model folder."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from lorica.cli.main import main
from lorica.cli.parse import WrongUse
from lorica.cli.sweep import values


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A model folder and a data file."""
    spec = importlib.util.spec_from_file_location("letters", Path(__file__).parents[1] / "train" / "conftest.py")
    letters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(letters)
    path = tmp_path_factory.mktemp("task")
    letters.make_model().save_pretrained(path / "model")
    letters.make_tok().save_pretrained(path / "model")
    rows = [{"prompt": row.prompt, "completion": row.completion} for row in letters.make_rows()]
    (path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path / "model"), str(path / "letters.jsonl")


SHORT = ["--steps", "6", "--batch", "4", "-r", "2", "--dtype", "fp32", "--sample-len", "3"]


def test_a_grid_is_trained_ranked_and_left_as_runs(task, tmp_path, capsys):
    out = tmp_path / "s"
    assert main(["train", *task, *SHORT, "-o", str(out), "--sweep", "r=1,2", "lr=1e-3,1e-2"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    names = ["rank1-lr1e-3", "rank1-lr0_01", "rank2-lr1e-3", "rank2-lr0_01"]
    assert lines[0].split()[:3] == ["member", "held", "out"]
    assert sorted(line.split()[0] for line in lines[1:5]) == sorted(names)
    losses = [float(line.split()[1]) for line in lines[1:5]]
    assert losses == sorted(losses)
    picked = lines[6].split(":")[0]
    assert picked in names and "the lowest held-out loss" in lines[6]
    assert lines[-1].startswith(f"next:  lorica chat {out / picked}")
    assert all((out / name / "best" / "adapter_model.safetensors").exists() for name in names)
    assert main(["plot", *(str(out / name) for name in names), "-o", str(tmp_path / "all.png")]) == 0
    for name in names:
        assert f"{name}   held out " in said.err
    (planned,) = [line for line in said.err.splitlines() if line.startswith("plan    ")]
    assert "B of " in planned and "of updates" in planned
    assert re.search(r"tok/s   peak [\d.]+ [GM]B$", lines[-2])


def test_json_is_one_object_and_a_member_repeats_alone(task, tmp_path, capsys):
    out = tmp_path / "s"
    assert main(["train", *task, *SHORT, "-o", str(out), "--json", "-q", "--sweep", "r=1,3"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert said.err == ""
    assert {member["name"]: member["swept"] for member in told["members"]} == {
        "rank1": {"rank": 1}, "rank3": {"rank": 3}
    }  # fmt: skip
    again = tmp_path / "again"
    assert main(["train", "-c", str(out / "rank3" / "run.toml"), "-o", str(again), "--json", "-q"]) == 0
    alone = json.loads(capsys.readouterr().out)
    (member,) = (member for member in told["members"] if member["name"] == "rank3")
    assert alone["after"] == pytest.approx(member["after"], rel=1e-5)
    assert alone["trainable"] == member["trainable"]


def test_a_rate_is_found_said_and_trained_with(task, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *task, *SHORT, "-o", str(out), "--find-lr", "--lr", "0.01"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[1:6]].count("lr0_01") == 1
    assert said[6].startswith("lr 0.") and "held-out loss" in said[6]
    found = float(said[6].split()[1].rstrip(":"))
    assert found in (0.0016, 0.004, 0.01, 0.025, 0.062, 0.063)
    assert f"lr = {found!r}\n" in (out / "run.toml").read_text()
    assert "steps = 6\n" in (out / "run.toml").read_text()
    assert (tmp_path / "run-lr" / "sweep.json").exists()


def test_a_dry_run_finds_the_rate_and_leaves_nothing(task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *task, *SHORT, "--find-lr", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert any(line.startswith("lr 0.0") and "held-out loss" in line for line in said.out.splitlines())
    assert "steps   6 = " in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_sweep_shows_its_header(task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *task, "--sweep", "seed=0,1", "targets=q_proj+v_proj,mlp", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "4 adapters in one pass:" in said.out
    lines = [line.strip() for line in said.err.splitlines()]
    assert sum(line.startswith("seed1-targetsq_proj_v_proj   r 8, alpha 16 (x2), q_proj,v_proj") for line in lines) == 1
    assert sum(line.startswith("plan") and " of updates" in line for line in lines) == 1
    assert list(tmp_path.iterdir()) == []


def test_values_have_the_types_of_their_settings():
    parts = ["r=1", "2", "lr=1e-4", "3e+0", "targets=q_proj+v_proj", "mlp", "betas=0.9+0.95", "schedule=cosine"]
    assert values(parts) == {
        "rank": [1, 2],
        "lr": [1e-4, 3.0],
        "targets": ["q_proj,v_proj", "mlp"],
        "betas": [(0.9, 0.95)],
        "schedule": ["cosine"],
    }


@pytest.mark.parametrize(
    "parts, fault",
    [
        (["rnak=1"], "there is no setting 'rnak'; did you mean 'rank'?"),
        (["dtype=fp32", "bf16"], "dtype is the same for all members: give it as --dtype"),
        (["rank=1", "two"], "rank is 'two'; it must be a whole number"),
        (["schedule=cosin"], "it must be linear, cosine, constant"),
        (["1"], "'1' belongs to no setting"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_is_loaded(parts, fault, task, capsys):
    with pytest.raises(WrongUse, match=fault.replace("?", "\\?")):
        values(parts)
    assert main(["train", "no-such-model", task[1], "--sweep", ",".join(parts)]) == 2
    assert fault in capsys.readouterr().err


def test_values_that_cannot_be_used_are_refused_with_their_member(task, tmp_path, capsys):
    assert main(["train", *task, "-o", str(tmp_path / "s"), "--sweep", "rank=0,2"]) == 1
    assert "rank0: rank is 0; it must be above 0" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("more", [["--from", "runs/x"], ["--find-lr"], ["--resume", "runs/x"]])
def test_flags_that_do_not_go_together_are_wrong_use(more, task, capsys):
    assert main(["train", *task, *more, "--sweep", "r=1,2"]) == 2
    assert "leave" in capsys.readouterr().err
