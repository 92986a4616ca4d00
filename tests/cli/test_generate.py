"""`lorica generate`: rows in, rows out."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorica import data, evaluate, models
from lorica.cli.main import main

QUICK = ["--dtype", "fp32", "--max-new", "6"]


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A model folder and an adapter."""
    spec = importlib.util.spec_from_file_location("small", Path(__file__).parents[1] / "evaluate" / "conftest.py")
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    path = tmp_path_factory.mktemp("things")
    base = small.make_folder(path / "model")
    return base, small.make_adapter(base, path / "adapter", 1)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def answered(thing, rows, **how):
    opened = models.open_thing(thing, dtype="fp32")
    prompts = [data.prompt_ids(row, opened.tok)[0] for row in rows]
    return evaluate.generate(opened.model, opened.tok, prompts, max_new=6, **how)


def test_each_row_comes_back_in_order_with_its_answer(things, tmp_path, capsys):
    rows = [{"id": i, "prompt": "ab" * (i * 5 % 7) + str(i)} for i in range(9)]
    source, out = written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["generate", things[1], source, "-o", str(out), *QUICK]) == 0
    expected = answered(things[1], [data.Record("pair", prompt=row["prompt"]) for row in rows])
    assert read(out) == [{**row, "output": answer} for row, answer in zip(rows, expected, strict=True)]
    assert expected != answered(things[0], [data.Record("pair", prompt=row["prompt"]) for row in rows])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == f"next:  lorica eval {things[1]} DATA"


def test_merged_and_unmerged_answer_alike(things, tmp_path):
    source = written(tmp_path / "in.jsonl", [{"prompt": text} for text in ("one", "two", "three")])
    for name, more in (("a", []), ("b", ["--unmerged"])):
        assert main(["generate", things[1], source, "-o", str(tmp_path / name), *QUICK, *more]) == 0
    assert read(tmp_path / "a") == read(tmp_path / "b")
    made = [json.loads((tmp_path / f"{name}.made.json").read_text())["merged"] for name in "ab"]
    assert made == [True, False]


def test_rows_of_any_format_and_lines_of_text_are_prompts(things, tmp_path):
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    sources = {
        "chat.jsonl": ([{"messages": asked}], data.Record("chat", messages=asked)),
        "answered.jsonl": (
            [{"messages": [*asked, {"role": "assistant", "content": "old"}]}], data.Record("chat", messages=asked)
        ),
        "alpaca.jsonl": ([{"instruction": "do", "input": "it"}], data.Record("pair", prompt="do\n\nit")),
        "text.jsonl": ([{"text": "once"}], data.Record("text", text="once")),
    }  # fmt: skip
    for name, (rows, record) in sources.items():
        out = tmp_path / f"out-{name}"
        assert main(["generate", things[0], written(tmp_path / name, rows), "-o", str(out), *QUICK]) == 0
        assert read(out) == [{**rows[0], "output": answered(things[0], [record])[0]}]
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    assert main(["generate", things[0], str(tmp_path / "lines.txt"), "-o", str(tmp_path / "out.jsonl"), *QUICK]) == 0
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == ["one", "two"]


def test_a_template_over_columns_makes_the_prompt(things, tmp_path):
    source = written(tmp_path / "in.jsonl", [{"body": "x", "id": 7}])
    argv = ["generate", things[0], source, "-o", str(tmp_path / "out"), *QUICK, "--prompt", "Classify: {body}"]
    assert main([*argv, "--system", "s"]) == 0
    expected = answered(things[0], [data.Record("pair", prompt="Classify: x", system="s")])
    assert read(tmp_path / "out") == [{"body": "x", "id": 7, "output": expected[0]}]


def test_a_run_brings_its_own_columns(things, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "best").symlink_to(things[1])
    (run / "run.toml").write_text('map = "prompt=body,completion=label"\nsystem = "s"\n')
    source = written(tmp_path / "in.jsonl", [{"body": "x"}])
    assert main(["generate", str(run), source, "-o", str(tmp_path / "out"), *QUICK]) == 0
    expected = answered(things[1], [data.Record("pair", prompt="x", system="s")])
    assert read(tmp_path / "out") == [{"body": "x", "output": expected[0]}]


def test_without_out_rows_go_to_stdout_and_json_is_one_object(things, tmp_path, capsys):
    source = written(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert main(["generate", things[0], source, *QUICK]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["a", "b"]
    assert main(["generate", things[0], source, *QUICK, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["answers"] == lines
    assert said.err == ""


def test_what_is_wrong_is_said_before_a_file_is_made(things, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    source = written(tmp_path / "in.jsonl", [{"instruction": "a", "output": "b"}])
    assert main(["generate", things[0], source, "-o", str(out)]) == 1
    assert "--column answer" in capsys.readouterr().err
    assert main(["generate", things[0], source, "-o", str(out), "--batch", "0"]) == 2
    (tmp_path / "empty.txt").touch()
    assert main(["generate", things[0], str(tmp_path / "empty.txt"), "-o", str(out)]) == 1
    assert not out.exists()


def test_other_rows_settings_or_weights_do_not_continue_a_file(things, tmp_path, capsys):
    out = str(tmp_path / "out.jsonl")
    source = written(tmp_path / "in.jsonl", [{"prompt": "a"}])
    argv = ["generate", things[1], source, "-o", out, *QUICK]
    assert main(argv) == 0
    assert main(argv) == 0
    assert "1 of them were there already" in capsys.readouterr().err
    assert main([*argv, "--seed", "3", "--max-new", "7"]) == 1
    told = capsys.readouterr().err
    assert "seed was 0, is 3" in told and "max_new was 6, is 7" in told
    assert main(["generate", things[0], source, "-o", out, *QUICK]) == 1
    assert "adapter_sha256" in capsys.readouterr().err
    written(tmp_path / "in.jsonl", [{"prompt": "b"}])
    assert main(argv) == 1
    assert "rows_sha256" in capsys.readouterr().err


def test_another_batch_continues_likeliest_answers_but_not_drawn_ones(things, tmp_path, capsys):
    source = written(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    likeliest = ["generate", things[0], source, "-o", str(tmp_path / "likeliest"), *QUICK]
    drawn = ["generate", things[0], source, "-o", str(tmp_path / "drawn"), *QUICK, "--temperature", "1"]
    assert main(likeliest) == main(drawn) == 0
    assert main([*likeliest, "--batch", "1"]) == 0
    capsys.readouterr()
    assert main([*drawn, "--batch", "1"]) == 1
    assert "batch was 16, is 1" in capsys.readouterr().err


def test_kill_nine_and_the_same_line_again_give_the_same_file(things, tmp_path):
    source = written(tmp_path / "in.jsonl", [{"prompt": f"{i}" * (1 + i % 5)} for i in range(64)])
    quick = ["--dtype", "fp32", "--max-new", "60", "--batch", "4"]
    assert main(["generate", things[0], source, "-o", str(tmp_path / "whole"), *quick]) == 0
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "lorica", "generate", things[0], source, "-o", str(out), *quick]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL)
    while not (out.exists() and out.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert out.read_bytes() != (tmp_path / "whole").read_bytes()
    assert main(argv[3:]) == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
