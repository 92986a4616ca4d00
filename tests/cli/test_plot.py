"""`lorica plot`: pictures from metrics.jsonl alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lorica.cli.main import main


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    made = []
    for name, end in (("0001-a", 1.0), ("0002-b", 2.0)):
        path = tmp_path / name
        path.mkdir()
        events = [{"kind": "start", "model": "m", "rank": 8, "targets": "qv", "lr": 1e-3}]
        events += [{"kind": "eval", "step": 0, "held_out": 4.0, "best": False}]
        events += [{"kind": "step", "step": step, "loss": 4 - (4 - end) * step / 20} for step in range(1, 21)]
        events += [{"kind": "eval", "step": 20, "held_out": end, "best": True}]
        (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"kind": "st')
        made.append(str(path))
    return made


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_one_or_more_runs_are_drawn(runs, tmp_path, capsys, name, start):
    assert main(["plot", *runs, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(start)
    assert capsys.readouterr().out == f"{tmp_path / name}\n"


def test_the_picture_tells_the_runs_apart_and_names_their_best(runs, tmp_path):
    assert main(["plot", *runs, "-o", str(tmp_path / "a.svg")]) == 0
    text = (tmp_path / "a.svg").read_text()
    for label in ("0001-a training", "0001-a held out, best 1.000", "0002-b held out, best 2.000"):
        assert f"<!-- {label} -->" in text


def test_json_names_the_picture(runs, tmp_path, capsys):
    assert main(["plot", runs[0], "-o", str(tmp_path / "a.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"picture": str(tmp_path / "a.png"), "runs": runs[:1]}


def test_what_is_no_run_is_an_error(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 1
    assert "has no metrics.jsonl" in capsys.readouterr().err


def test_a_run_without_an_update_is_an_error(runs, tmp_path, capsys):
    (tmp_path / "0001-a" / "metrics.jsonl").write_text('{"kind": "start"}\n')
    assert main(["plot", *runs]) == 1
    assert "no update yet" in capsys.readouterr().err


def test_an_unknown_kind_of_picture_is_an_error(runs, tmp_path, capsys):
    assert main(["plot", *runs, "-o", str(tmp_path / "a.gif")]) == 1
    assert ".png, .svg, .pdf" in capsys.readouterr().err


def test_without_matplotlib_the_install_line_is_shown(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", *runs, "-o", str(tmp_path / "a.png")]) == 1
    assert 'pip install "lorica[plot]"' in capsys.readouterr().err
