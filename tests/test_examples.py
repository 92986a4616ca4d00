"""The examples run as they stand, on any model; the help pages say what the commands say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from model_files import save

ROOT = Path(__file__).parent.parent
ARGUMENTS = {
    "train_from_rows": ["OUT", "2"],
    "merge_and_unmerge": [],
    "switch_adapters": [],
    "sweep": ["OUT", "2"],
    "evaluate": ["2"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs(name, base, tmp_path, monkeypatch, capsys):
    path = ROOT / "examples" / f"{name}.py"
    rest = [str(tmp_path / "out") if word == "OUT" else word for word in ARGUMENTS[name]]
    monkeypatch.setattr(sys, "argv", [str(path), str(base), *rest])
    runpy.run_path(str(path), run_name="__main__")
    told = capsys.readouterr().out
    assert told.strip()
    if name == "merge_and_unmerge":
        assert "every weight as before: True" in told


def test_there_are_five_and_each_fits_on_a_screen():
    found = sorted((ROOT / "examples").glob("*.py"))
    assert {path.stem for path in found} == set(ARGUMENTS)
    assert all(path.read_text().count("\n") < 40 for path in found)


def test_the_help_pages_are_not_stale(monkeypatch):
    for name in ("COLUMNS", "NO_COLOR", "TERM"):
        monkeypatch.setenv(name, "")  # so that what the page sets is taken back
    page = runpy.run_path(str(ROOT / "docs" / "help.py"))
    assert page["PAGE"].read_text() == page["page"](), "run: python docs/help.py"
