"""What a resume needs, in one file: it is replaced in one step, so a crash leaves the old state or the new one.

`state/state.safetensors` holds the masters and moments of the optimizer; its header, as JSON, holds `State`. The random
state is not in it, since every update makes its own (`loop`); nor are the rates, a function of the update's number.

The order of writing makes the folder consistent at any moment: first the logs are pushed to the disk, then the state,
which says how long they are, then best/ and last/. What is newer than the state is cut off or written again on resume.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lorica.errors import LoricaError
from lorica.files import write_atomic

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
    header = {"lorica": json.dumps(dataclasses.asdict(state))}
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_atomic(folder / FILE, save(contiguous, metadata=header))


def read(folder: Path) -> tuple[State, dict[str, Tensor]] | None:
    """The state of the run in `folder`, or None where it was stopped before there was one."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = State(**json.loads((file.metadata() or {})["lorica"]))
            return state, {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, TypeError, ValueError) as fault:
        raise LoricaError(f"{path} is damaged or of another version: {fault}; start a new run") from fault
