"""`lorica chat`: single answers, lines from a pipe, slash commands, and a terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorica import data, evaluate, models
from lorica.cli.main import main

QUICK = ["--dtype", "fp32", "--max-new", "8"]


@pytest.fixture(scope="module")
def small():
    spec = importlib.util.spec_from_file_location("small", Path(__file__).parents[1] / "evaluate" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def things(small, tmp_path_factory):
    """A model folder and an adapter."""
    path = tmp_path_factory.mktemp("things")
    base = small.make_folder(path / "model")
    return base, small.make_adapter(base, path / "adapter", 1)


def answer(thing, *messages, system=""):
    opened = models.open_thing(thing, dtype="fp32")
    rows = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, messages, strict=False)]
    rows = [{"role": "system", "content": system}, *rows] if system else rows
    ids, _ = data.prompt_ids(data.Record("chat", messages=rows), opened.tok)
    return evaluate.generate(opened.model, opened.tok, [ids], max_new=8)[0]


@pytest.fixture
def typed(monkeypatch, capsys):
    """A function: lines on stdin -> (exit code, stdout, stderr)."""

    def typed(argv, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", *argv, *QUICK])
        said = capsys.readouterr()
        return code, said.out, said.err

    return typed


def test_one_prompt_gives_its_answer_alone_on_stdout(things, typed):
    tuned, plain = answer(things[1], "hi"), answer(things[0], "hi")
    assert tuned != plain
    code, out, err = typed([things[1], "--prompt", "hi"])
    assert (code, out) == (0, f"{tuned}\n")
    assert err.splitlines() == ["tuned: " + f"next:  lorica eval {things[1]} DATA --compare base"]
    assert typed([things[1], "--prompt", "hi", "--base", "-q"]) == (0, f"{plain}\n", "")
    code, out, err = typed([things[0], "--prompt", "hi"])
    assert out == f"{plain}\n" and err.startswith("model: ")


def test_lines_of_a_pipe_are_one_talk(things, typed):
    first = answer(things[1], "hi")
    second = answer(things[1], "hi", first, "and")
    code, out, _ = typed([things[1]], "hi", "", "and")
    assert (code, out) == (0, f"{first}\n{second}\n")


def test_base_toggles_and_every_answer_says_whose_it_is(things, typed):
    _, out, err = typed([things[1], "--json"], "hi", "/base", "/retry", "/base", "/reset", "hi")
    turns = json.loads(out)["turns"]
    tuned, plain = answer(things[1], "hi"), answer(things[0], "hi")
    assert [(turn["by"], turn["answer"]) for turn in turns] == [("tuned", tuned), ("base", plain), ("tuned", tuned)]
    assert [turn["prompt"] for turn in turns] == ["hi"] * 3
    assert "base answers" in err and "tuned answers" in err
    assert "no adapter on this model" in typed([things[0]], "/base")[2]


def test_system_sets_and_takes_away_the_system_prompt(things, typed):
    with_it, without = answer(things[1], "hi", system="be brief"), answer(things[1], "hi")
    _, out, _ = typed([things[1]], "/system be brief", "hi", "/reset", "/system", "hi")
    assert out == f"{with_it}\n{without}\n"
    assert typed([things[1], "--system", "be brief", "--prompt", "hi"])[1] == f"{with_it}\n"


def test_a_run_is_talked_to_with_the_system_prompt_it_was_trained_with(things, typed, tmp_path):
    (tmp_path / "best").symlink_to(things[1])
    (tmp_path / "run.toml").write_text('system = "be brief"\n')
    assert typed([str(tmp_path), "--prompt", "hi"])[1] == f"{answer(things[1], 'hi', system='be brief')}\n"


def test_saved_talks_are_rows_to_train_on(things, typed, tmp_path):
    path = tmp_path / "talks"
    _, out, err = typed([things[1], "-o", str(path)], "hi", f"/save {path}", "/reset", "ho")
    assert err.count(f"added to {path}.jsonl") == 2
    rows = data.read(f"{path}.jsonl").rows
    assert [row.messages[0]["content"] for row in rows] == ["hi", "ho"]
    assert "".join(f"{row.messages[-1]['content']}\n" for row in rows) == out


def test_an_unknown_command_names_the_nearest_and_the_talk_goes_on(things, typed):
    code, out, err = typed([things[1]], "/bas", "/save", "/help", " /hi", "/quit", "unread")
    assert code == 0
    assert "unknown command /bas; did you mean /base?" in err
    assert "/save needs the name of a file" in err
    assert all(f"/{name}" in err for name in ("base", "retry", "system", "save", "reset", "help", "quit"))
    assert out == f"{answer(things[1], '/hi')}\n"


def test_a_model_without_a_template_continues_and_says_so_once(small, tmp_path, typed):
    base = small.make_folder(tmp_path / "plain", template=None)
    opened = models.open_thing(base, dtype="fp32")
    prompts = [opened.tok(text)["input_ids"] for text in ("one", "two")]
    expected = evaluate.generate(opened.model, opened.tok, prompts, max_new=8)
    _, out, err = typed([base], "one", "two")
    assert out == "".join(f"{text}\n" for text in expected)
    assert err.count("no chat template") == 1


def test_what_cannot_be_answered_is_said_and_the_talk_goes_on(things, typed):
    code, out, err = typed([things[1]], "x" * 600, "hi")
    assert code == 0
    assert "leave no room for an answer" in err
    assert out == f"{answer(things[1], 'hi')}\n"
    assert typed([things[1], "--prompt", "x" * 600])[0] == 1
    assert typed([things[1], "--temperature", "-1"])[0] == 2


def test_on_a_terminal_it_prompts_streams_and_ctrl_c_stops_an_answer_only(things):
    """A real pseudo-terminal: the model would go on for minutes if Ctrl-C did not stop it."""
    master, slave = pty.openpty()
    flags = ["--dtype", "fp32", "--max-new", "480", "--temperature", "5"]
    argv = [sys.executable, "-m", "lorica", "chat", things[1], *flags]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "TERM": "dumb"}
    process = subprocess.Popen(
        argv, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    said = b""

    def until(text):
        nonlocal said
        limit = time.monotonic() + 60
        while text not in said and time.monotonic() < limit:
            said += os.read(master, 4096)
        assert text in said, said
        before, _, said = said.partition(text)
        return before

    until(b"> ")
    os.write(master, b"hi\n")
    until(b"tuned: ")
    os.read(master, 10)
    os.write(master, b"\x03")
    assert len(until(b"> ")) < 4000
    os.write(master, b"/base\n")
    until(b"base answers")
    until(b"> ")
    os.write(master, b"\x04")
    until(b"next:  lorica eval")
    assert process.wait(timeout=60) == 0
    os.close(master)
