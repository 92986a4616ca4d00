"""The run folder: numbered and never overwritten, its settings, its logs.

run.toml         every setting, resolved; `lorica train -c run.toml` repeats the run
best/ last/      adapters in PEFT's layout: lowest held-out loss, and newest
metrics.jsonl    one object per line: start, step, eval, end; the only source of plots
samples.jsonl    held-out prompts answered while training
state/           for --resume
curve.png README.md
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica import doors
from lorica.errors import LoricaError, shown
from lorica.files import write_atomic

SETTINGS, METRICS, SAMPLES = "run.toml", "metrics.jsonl", "samples.jsonl"
RUNS = Path("runs")
# What its readers need of each kind of event.
_FIELDS: dict[str, dict[str, Any]] = {
    "step": {"step": int, "loss": int | float},
    "eval": {"step": int, "held_out": int | float, "best": bool},
    "end": {"steps": int, "best_step": int, "seconds": int | float},
    "sample": {"step": int, "prompt": str, "reference": str, "text": str},
}


def new(out: str | Path | None, name: str) -> Path:
    """Make the folder of a new run: `out`, which must not hold anything yet, or the next ``runs/0001-name``."""
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            hint = f"continue it with --resume {folder}, or " if (folder / SETTINGS).exists() else ""
            raise LoricaError(f"{folder} is there already, and a run overwrites nothing; {hint}give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    RUNS.mkdir(exist_ok=True)
    short = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:40] or "run"
    number = max((int(found[0]) for path in RUNS.iterdir() if (found := re.match(r"\d+", path.name))), default=0)
    while True:
        number += 1
        folder = RUNS / f"{number:04d}-{short}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def write_settings(folder: Path, values: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Write run.toml: `values` as settings; what they were applied to (fingerprints, versions) in a table `made`."""
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    lines += ["", "[made]", *(f"{key} = {_toml(text)}" for key, text in made.items())]
    write_atomic(folder / SETTINGS, "\n".join(lines) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`, and the table `made`."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise LoricaError(f"{folder} is not a run: it has no {SETTINGS}")
    settings = doors.toml(path)
    made = settings.get("made", {})
    if not isinstance(made, dict) or not all(isinstance(each, str) or doors.is_words(each) for each in made.values()):
        raise LoricaError(f"{path}: what it was made from (made) must be a table of texts and lists of texts")
    return settings


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a log. A last line that a crash cut short is left out."""
    if not path.is_file():
        raise LoricaError(f"{path.parent} has no {path.name}: it is not a run, or one that has not begun")
    events = doors.json_lines(path, "kind")
    for number, event in enumerate(events, 1):
        wrong = [
            f"{key} is {shown(event.get(key))}"
            for key, kind in _FIELDS.get(event["kind"], {}).items()
            if not isinstance(event.get(key), kind)
        ]
        if wrong:
            raise LoricaError(f"{path}:{number} is no {event['kind']} of a run: {', '.join(wrong)}")
    return events


def finished(folder: Path) -> bool:
    """Whether the run in `folder` came to its end."""
    path = Path(folder) / METRICS
    return path.is_file() and any(event["kind"] == "end" for event in read_log(path))


class Log:
    """A file of JSON lines that grows."""

    def __init__(self, path: Path, length: int = 0) -> None:
        """Open `path`, cut to its first `length` bytes."""
        self.file = open(path, "ab")
        self.file.truncate(length)

    def add(self, event: Mapping[str, Any]) -> None:
        """Append one line, visible to readers at once."""
        self.file.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def length(self) -> int:
        """Bytes so far, all of them pushed to the disk."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A JSON string is a TOML string but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    assert isinstance(value, int | float), value
    return repr(value)
