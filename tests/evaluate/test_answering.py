"""Answers in a file: in order, the same bytes after any kill, and never mixed with another run's."""

from __future__ import annotations

import json

import pytest

from lorica import LoricaError, evaluate
from lorica.evaluate import Answering

MADE = {"model": "m", "seed": 0}


@pytest.fixture
def job(tok):
    rows = [{"id": i, "text": "x" * (i * 7 % 11) + str(i)} for i in range(21)]
    prompts = [tok(row["text"])["input_ids"] for row in rows]
    return Answering(rows, prompts, max_new=6, batch=2)


def test_rows_come_back_in_order_with_their_answers(job, model, tok, tmp_path):
    out = tmp_path / "sub" / "out.jsonl"
    told = []
    assert job.write(model, tok, out, MADE, lambda done, total: told.append((done, total))) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    expected = evaluate.generate(model, tok, job.prompts, max_new=6, batch=2)
    assert lines == [{**row, "output": answer} for row, answer in zip(job.rows, expected, strict=True)]
    assert told[-1] == (21, 21) and told == sorted(told)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_killed_run_goes_on_to_the_same_bytes(job, model, tok, tmp_path, temperature):
    job = Answering(job.rows, job.prompts, max_new=6, batch=2, temperature=temperature)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    job.write(model, tok, whole, MADE)
    full = whole.read_bytes()
    for size in (0, 1, len(full) // 3, len(full) // 2, len(full) - 1, len(full)):
        job.write(model, tok, out, MADE)
        out.write_bytes(full[:size])
        there = job.write(model, tok, out, MADE)
        assert out.read_bytes() == full
        lines = full[:size].count(b"\n")
        assert there == (lines if lines == 21 else lines - lines % job.chunk)


def test_a_finished_file_costs_no_generation(job, model, tok, tmp_path, monkeypatch):
    job.write(model, tok, tmp_path / "out.jsonl", MADE)
    monkeypatch.setattr("lorica.evaluate.answering.generate", None)
    assert job.write(model, tok, tmp_path / "out.jsonl", MADE) == 21


def test_a_file_that_was_made_otherwise_is_left_as_it_is(job, model, tok, tmp_path):
    out = tmp_path / "out.jsonl"
    job.write(model, tok, out, MADE)
    before = out.read_bytes()
    with pytest.raises(LoricaError, match=r"seed was 0, is 1\n.*rows was None, is 'new'"):
        job.write(model, tok, out, {**MADE, "seed": 1, "rows": "new"})
    assert out.read_bytes() == before
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text("mine\n")
    with pytest.raises(LoricaError, match="was not made by this command"):
        job.write(model, tok, foreign, MADE)
    assert foreign.read_text() == "mine\n"


def test_an_empty_file_may_be_filled(job, model, tok, tmp_path):
    (tmp_path / "out.jsonl").touch()
    assert job.write(model, tok, tmp_path / "out.jsonl", MADE) == 0


def test_an_answer_never_replaces_a_column(job):
    with pytest.raises(LoricaError, match="21 rows have a column 'id' already.*--column"):
        Answering(job.rows, job.prompts, column="id")
    with pytest.raises(LoricaError, match="batch is 0"):
        Answering(job.rows, job.prompts, batch=0)
