"""`lorica eval`: the table, the object, and what a run knows of its own data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from lorica import Adapter, data, evaluate, models
from lorica.cli.main import main

TRAIN = ["--steps", "30", "--batch", "8", "-r", "4", "--lr", "0.02", "--dtype", "fp32", "--sample", "0", "-q"]


@pytest.fixture(scope="module")
def letters():
    """The tiny task of the training tests."""
    spec = importlib.util.spec_from_file_location("letters", Path(__file__).parents[1] / "train" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task(letters, tmp_path_factory):
    """A model folder, a table whose columns must be named, and a run on it."""
    path = tmp_path_factory.mktemp("task")
    letters.make_model().save_pretrained(path / "model")
    letters.make_tok().save_pretrained(path / "model")
    rows = [{"q": row.prompt, "a": "yes" if i % 3 else "no"} for i, row in enumerate(letters.make_rows(60))]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [str(path / name) for name in ("model", "rows.jsonl", "run")]
    columns = ["--map", "prompt=q,completion=a", "--held-out", "0.2"]
    assert main(["train", *names[:2], *TRAIN, *columns, "-o", names[2]]) == 0
    return path


def evaluated(capsys, *argv):
    """The object that the command prints."""
    assert main(["eval", *map(str, argv), "--dtype", "fp32", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out)


def test_base_and_tuned_stand_side_by_side_with_their_difference(task, capsys):
    found = evaluated(capsys, task / "run", task / "rows.jsonl", "--compare", "base")
    base, tuned = found["results"]
    assert (base["name"], tuned["name"], tuned["rows"]) == ("base", "run", 60)
    assert tuned["loss_high"] < base["loss_low"]
    assert tuned["exact_low"] > base["exact_high"]
    assert tuned["perplexity"] < base["perplexity"]
    (gap,) = found["differences"]
    assert (gap["name"], gap["against"]) == ("run", "base")
    assert gap["loss"] == pytest.approx(tuned["loss"] - base["loss"])
    assert gap["exact_low"] > 0
    assert [row["label"] for row in found["classes"]["run"]] == ["yes", "no"]


def test_the_numbers_are_those_of_the_library(task, capsys):
    (found,) = evaluated(capsys, task / "run", task / "rows.jsonl")["results"]
    opened = models.open_thing(task / "run", dtype="fp32")
    rows = data.read(task / "rows.jsonl", map="prompt=q,completion=a").rows
    expected = evaluate.loss(opened.model, data.encode(rows, opened.tok).examples)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    prompts, references = zip(*(data.prompt_ids(row, opened.tok) for row in rows), strict=True)
    said = evaluate.generate(opened.model, opened.tok, prompts, max_new=11)
    assert found["exact"] == pytest.approx(sum(evaluate.exact_match(said, references)) / 60)


def test_without_data_a_run_is_measured_on_what_it_held_out(task, capsys):
    found = evaluated(capsys, task / "run", "--compare", "base")
    log = [json.loads(line) for line in (task / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found["data"] == f"{task / 'rows.jsonl'} (held out by {task / 'run'})"
    base, tuned = found["results"]
    assert tuned["rows"] == 12
    assert base["loss"] == pytest.approx(log[-1]["before"], rel=1e-6)
    assert tuned["loss"] == pytest.approx(log[-1]["after"], rel=1e-6)


def test_rows_that_changed_since_the_run_are_not_called_held_out(task, tmp_path, capsys):
    rows, moved = task / "rows.jsonl", tmp_path / "rows.jsonl"
    moved.write_text(rows.read_text() + '{"q": "new=", "a": "yes"}\n')
    run = tmp_path / "run"
    run.mkdir()
    Adapter.load(task / "run" / "best").save(run / "best")
    (run / "run.toml").write_text((task / "run" / "run.toml").read_text().replace(str(rows), str(moved)))
    assert main(["eval", str(run), "--dtype", "fp32"]) == 1
    assert "what it held out is not known: give DATA" in capsys.readouterr().err


def test_only_a_run_knows_its_data(task, capsys):
    for thing in (task / "model", task / "run" / "best"):
        assert main(["eval", str(thing)]) == 2
        assert "DATA is missing" in capsys.readouterr().err
    assert main(["eval", str(task / "run"), "--batch", "0"]) == 2


def test_flags_win_over_the_columns_of_the_run(task, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text('{"ask": "ab=", "say": "no"}\n{"ask": "b=", "say": "yes"}\n')
    assert main(["eval", str(task / "run"), str(other)]) == 1
    assert "columns: ask, say" in capsys.readouterr().err
    found = evaluated(capsys, task / "run", other, "--map", "prompt=ask,completion=say")
    assert found["results"][0]["rows"] == 2


def test_the_test_part_of_a_folder_is_measured(task, tmp_path, capsys):
    for name, count in (("train", 5), ("valid", 4), ("test", 3)):
        rows = [{"prompt": f"{name}{'c' * i}=", "completion": "yes"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluated(capsys, task / "model", tmp_path)
    assert (found["data"], found["results"][0]["rows"]) == (f"{tmp_path} (test)", 3)


def test_rows_left_out_are_noted(task, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a=", "completion": "b"}\n' * 2 + '{"prompt": "b=", "completion": "c"}\n')
    found = evaluated(capsys, task / "model", source)
    assert found["notes"] == ["1 duplicate dropped: rows.jsonl:2 (as rows.jsonl:1)"]
    assert found["results"][0]["rows"] == 2


def test_a_limit_draws_the_same_rows_each_time(task, capsys):
    rows = (task / "rows.jsonl", "--map", "prompt=q,completion=a", "--limit", 7)
    first = evaluated(capsys, task / "model", *rows)
    assert first["results"][0]["rows"] == 7
    assert first == evaluated(capsys, task / "model", *rows)
    assert first["results"][0]["loss"] != evaluated(capsys, task / "model", *rows[:-1], 6)["results"][0]["loss"]


def test_the_page_has_a_table_classes_and_the_next_command(task, capsys):
    assert main(["eval", str(task / "run"), str(task / "rows.jsonl"), "--compare", "base", "--dtype", "fp32"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith(f"{task / 'rows.jsonl'}   60 rows   ")
    assert lines[1].split() == ["loss", "95", "%", "ppl", "exact", "95", "%", "n"]
    assert [line.split()[0] for line in lines[2:4]] == ["base", "run"]
    assert any(line.startswith("run - base") and "points" in line for line in lines)
    assert any(line.split()[:2] == ["yes", "40"] for line in lines)
    assert lines[-1] == f"next:  lorica chat {task / 'run'}"
    assert "run: answers" in said.err


def test_loss_only_answers_nothing(task, capsys, monkeypatch):
    monkeypatch.setattr("lorica.evaluate.comparison.generate", None)
    argv = [str(task / "run"), str(task / "rows.jsonl"), "--loss-only", "--compare", "base"]
    (_, found) = evaluated(capsys, *argv)["results"]
    assert "exact" not in found
    assert main(["eval", *argv, "-q", "--dtype", "fp32"]) == 0
    said = capsys.readouterr()
    assert "exact" not in said.out and said.err == ""


def test_out_keeps_every_answer(task, tmp_path, capsys):
    out = tmp_path / "answers.json"
    found = evaluated(capsys, task / "run", task / "rows.jsonl", "--compare", "base", "-o", out)
    kept = json.loads(out.read_text())
    given = kept.pop("given")
    assert kept == found
    assert len(given) == 60
    assert given[1].keys() == {"where", "reference", "base", "run"}
    assert sum(row["run"].split() == row["reference"].split() for row in given) == found["results"][1]["exact"] * 60
