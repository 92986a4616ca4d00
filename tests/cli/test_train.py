"""`lorica train`: the whole command on a tiny model folder, and what `kill -9` does to it."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorica.cli.main import main

FINAL = [
    f"{which}/{name}" for which in ("best", "last") for name in ("adapter_model.safetensors", "adapter_config.json")
]


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


PRELOADED = [
    "lorica.cli.main", "lorica.cli.train", "lorica.train.run", "lorica.models", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama",
]  # fmt: skip


def final(run):
    return {name: (Path(run) / name).read_bytes() for name in FINAL}


def logged(run):
    """The log without what the clock and the memory say."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    told = {
        "kind",
        "step",
        "loss",
        "lr",
        "norm",
        "tokens",
        "labels",
        "held_out",
        "best",
        "before",
        "after",
        "best_step",
    }
    return [{key: value for key, value in line.items() if key in told} for line in lines]


def test_a_run_prints_header_rows_and_the_next_command(task, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", *task, *SHORT, "-o", out]) == 0
    said = capsys.readouterr()
    for label in ("model", "data", "method", "steps", "lr", "out"):
        assert f"{label:<8}" in said.err
    assert "r 2, alpha 16 (x8), all-linear" in said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("held out ")
    assert f"{out}   adapter " in lines[-2]
    assert lines[-1].startswith(f"next:  lorica chat {out}")


def test_json_is_one_object(task, tmp_path, capsys):
    assert main(["train", *task, *SHORT, "-o", str(tmp_path / "run"), "--json", "-q"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert said.err == ""
    assert result["steps"] == 6
    assert result["after"] < result["before"]
    assert result["trainable"] * 4 == result["adapter_bytes"]


def test_a_dry_run_shows_sources_and_the_header_and_writes_nothing(task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *task, *SHORT, "--dry-run"]) == 0
    said = capsys.readouterr()
    words = {line.split()[0]: line.split() for line in said.out.splitlines() if line}
    assert words["rank"] == ["rank", "2", "flag"]
    assert words["alpha"] == ["alpha", "16.0", "default"]
    assert "5e-4 (2000 / 16)^0.775" in said.err
    assert any(line.startswith("plan ") and " of updates" in line for line in said.err.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_the_settings_of_a_run_repeat_it(task, tmp_path, capsys):
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    assert main(["train", *task, *SHORT, "--dropout", "0.2", "--seed", "3", "-o", first]) == 0
    assert main(["train", "-c", f"{first}/run.toml", "-o", again]) == 0
    assert final(first) == final(again)
    assert logged(first) == logged(again)


def test_from_starts_with_the_weights_and_a_fresh_optimizer(task, tmp_path, capsys):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main(["train", *task, *SHORT, "-o", first, "--json", "-q"]) == 0
    assert main(["train", *task, "--steps", "2", "--from", first, "-o", second, "--json", "-q", "--dtype", "fp32"]) == 0
    told = capsys.readouterr().out
    one, two = (json.loads(part) for part in (told[: told.index("}\n") + 1], told[told.index("}\n") + 1 :]))
    assert two["before"] == pytest.approx(one["after"], rel=1e-5)
    assert two["steps"] == 2


def test_wrong_use_is_told_with_exit_code_2(task, tmp_path, capsys):
    assert main(["train", task[0]]) == 2
    assert "DATA" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path), "--lr", "1e-3", "--rank", "3"]) == 2
    assert "leave away: rank, lr" in capsys.readouterr().err
    assert main(["train", *task, "--ranc", "4"]) == 2
    assert "--rank" in capsys.readouterr().err


def test_faults_of_the_input_are_told_with_exit_code_1(task, tmp_path, capsys):
    assert main(["train", *task, "--batch", "0", "--warmup", "2"]) == 1
    told = capsys.readouterr().err
    assert "batch is 0" in told
    assert "warmup is 2.0" in told
    assert main(["train", "--resume", str(tmp_path)]) == 1
    assert "is not a run" in capsys.readouterr().err


def test_resuming_a_finished_run_says_so(task, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", *task, *SHORT, "-o", run]) == 0
    before = {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()}
    assert main(["train", "--resume", run]) == 1
    assert "is finished" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()} == before


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(task, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = [*SHORT[2:], "--steps", "150", "--eval-every", "150", "--sample", "0"]
    code = "import sys; from lorica.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *task, *flags, "-o", str(run)], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 5,' in (run / "metrics.jsonl").read_text())
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"lorica train --resume {run}" in told
    assert main(["train", "--resume", str(run), "-q"]) == 0
    assert main(["train", *task, *flags, "-o", str(whole), "-q"]) == 0
    assert final(run) == final(whole)
    assert logged(run) == logged(whole)


def test_kill_at_random_moments_gives_the_bytes_of_the_uninterrupted_run(task, tmp_path):
    """Five runs, each killed at some moment, two of them once more while resumed."""
    # Imported once: each run is then a fork, ready in no time, and a process of its own all the same.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    flags = [*SHORT[2:], "--steps", "40", "--eval-every", "10", "--dropout", "0.1", "--save-every", "0", "-q"]
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert finished(context, ["train", *task, *flags, "-o", str(whole)]) == 0
    length = time.monotonic() - began
    drawn, reached = random.Random(7), []
    for place in range(5):
        run = tmp_path / f"killed-{place}"
        for attempt in range(1 + place % 2):
            arguments = ["--resume", str(run)] if attempt else [*task, *flags, "-o", str(run)]
            process = context.Process(target=main, args=(["train", *arguments],))
            process.start()
            wait_for((run / "run.toml").exists)
            time.sleep(drawn.uniform(0, 0.7 * length))
            process.kill()
            process.join()
            reached.append(process.exitcode == -signal.SIGKILL and len(logged(run)))
        assert finished(context, ["train", "--resume", str(run), "-q"]) in (0, 1)  # 1: it had come to its end
        assert final(run) == final(whole)
        assert logged(run) == logged(whole)
    assert len(set(reached)) > 2, "the moments were all alike"


def finished(context, arguments):
    """The exit code of a command in a process of its own."""
    process = context.Process(target=_exit_with, args=(arguments,))
    process.start()
    process.join(120)
    return process.exitcode


def _exit_with(arguments):
    sys.exit(main(arguments))


def wait_for(there, seconds=60.0):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
