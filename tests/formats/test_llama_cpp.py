"""llama.cpp itself reads our GGUF adapter and says what lorica says. Needs xllamacpp here, or in LORICA_LLAMA_CPP."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent.parent / "bench"
pytestmark = [pytest.mark.peer, pytest.mark.slow]


@pytest.fixture
def llama_cpp(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import llama_cpp
    from measure import DATA

    if not (DATA / "e2e" / "train.jsonl").is_file():
        pytest.skip(f"no E2E rows in {DATA}; say where they are: LORICA_DATA")
    return llama_cpp


@pytest.fixture
def python():
    """An interpreter that has xllamacpp."""
    if given := os.environ.get("LORICA_LLAMA_CPP"):
        return given
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed; LORICA_LLAMA_CPP names an interpreter that has it")
    return sys.executable


def test_its_greedy_text_is_ours(llama_cpp, python, tmp_path):
    found = llama_cpp.compare(tmp_path, steps=12, prompts=10, tokens=24, dtype="fp32", python=python)
    assert found["ratios"]["same text"] >= 0.9, found["results"]
    assert found["ratios"]["changed by the adapter"] >= 0.9
