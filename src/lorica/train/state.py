"""What a resume needs, in one file: it is replaced in one step, so a crash leaves the old state or the new one.

`state/state.safetensors` holds the masters and moments of the optimizer; its header, as JSON, holds `State`. The random
state is not in it, since every update makes its own (`loop`); nor are the rates, a function of the update's number.

The order of writing makes the folder consistent at any moment: first the logs are pushed to the disk, then the state,
which says how long they are, then best/ and last/. What is newer than the state is cut off or written again on resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica import doors, tensorfiles
from lorica.errors import all_faults, shown
from lorica.train.folder import METRICS, SAMPLES

FILE = Path("state") / "state.safetensors"


@dataclass
class State:
    """Where a training stands after update `step`, measurements included.

    `before`, `best`: held-out loss of step 0 and of `best_step`, `measures_before` and `measures` what else the task
    measured then; `stale`: measurements since then without a better one.
    `tokens`: read so far; `seconds`: spent so far, over all sittings; `logs`: length of each log in bytes.
    `data`, `base`: fingerprints of what it belongs to; `sampler`: position in the order of the rows.
    """

    step: int = 0
    before: float | None = None
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    tokens: int = 0
    seconds: float = 0.0
    measures_before: dict[str, float] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    data: str = ""
    base: str = ""
    sampler: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)


def write(folder: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Replace the state of the run in `folder`."""
    tensorfiles.write(folder / FILE, tensors, dataclasses.asdict(state))


def read(folder: Path) -> tuple[State, dict[str, Tensor]] | None:
    """The state of the run in `folder`, or None where it was stopped before there was one."""
    path = folder / FILE
    if not path.exists():
        return None
    raw, metadata = tensorfiles.read(path)
    told = doors.object_in(metadata.get("lorica", "{}"), f"the header of {path}")
    faults = [f"{key} is missing" for key in _KINDS if key not in told] + doors.faults_of(told, _KINDS)
    faults += [f"{shown(key)} is not known" for key in told if key not in _KINDS]
    tensors = tensorfiles.floats(raw, faults)
    if not faults:
        faults = _log_faults(folder, told["logs"])
    if faults:
        raise all_faults(f"{path} is damaged or of another version; start a new run:", faults)
    return State(**told), tensors


def _log_faults(folder: Path, lengths: Mapping[str, int]) -> list[str]:
    """A log is never shorter than the state says, since it reaches the disk first."""
    found = {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in lengths}
    return [
        f"{name} has {size:,} bytes, and had {lengths[name]:,}" for name, size in found.items() if size < lengths[name]
    ]


def _is_measured(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))  # a NaN was measured so


_COUNT = (doors.is_count, "a whole number from 0 up")
_SIZE = (lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0, _COUNT[1])
_TEXT = (lambda value: isinstance(value, str), "text")
_LOGS = (METRICS, SAMPLES)
_MEASURES = (
    lambda value: isinstance(value, dict) and all(_is_measured(each) for each in value.values()),
    "numbers by measure",
)
_KINDS: dict[str, Any] = {
    "step": _COUNT,
    "before": (_is_measured, "a number"),
    "best": (_is_measured, "a number"),
    "best_step": _COUNT,
    "stale": _COUNT,
    "tokens": _SIZE,
    "seconds": (lambda value: doors.is_number(value) and value >= 0, "a number from 0 up"),
    "measures_before": _MEASURES,
    "measures": _MEASURES,
    "data": _TEXT,
    "base": _TEXT,
    "sampler": (
        lambda value: (
            isinstance(value, dict)
            and (not value or value.keys() == {"n", "batch", "seed", "epoch", "position"})
            and all(isinstance(each, int) for each in value.values())
            and all(doors.is_count(value.get(key, 0)) for key in ("n", "batch", "epoch", "position"))
        ),
        "a position in the order of the rows",
    ),
    "logs": (
        lambda value: isinstance(value, dict) and all(key in _LOGS and _SIZE[0](value[key]) for key in value),
        f"lengths of {' and '.join(_LOGS)}",
    ),
}
