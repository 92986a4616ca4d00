"""What the plan says of a training that is about to start, what it decides, and what it says if memory runs out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorica import patch, plan
from lorica.errors import LoricaError, all_faults
from lorica.models import machine
from lorica.tasks import task_of
from lorica.train.examples import Prepared
from lorica.train.settings import TrainSettings, number_of_steps

# What building or tracing a model of an unusual kind raises; it is trained all the same, without a plan.
_NO_PLAN = (LoricaError, RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError)


@dataclass(frozen=True)
class Forecast:
    """Peak `total_bytes` of `available` ones and `seconds` of all updates, as planned; None where there is no plan.

    `why` says why there is none, where that is known.
    """

    checkpointing: bool
    available: int
    total_bytes: int | None = None
    seconds: float | None = None
    work: plan.Work | None = None
    process: int = 0
    why: str = ""

    def facts(self) -> dict[str, Any]:
        """For the header and the log."""
        return {
            "predicted_bytes": self.total_bytes,
            "predicted_seconds": self.seconds,
            "available_bytes": self.available,
            "no_plan": self.why,
            "checkpointing": self.checkpointing,
        }


def forecast(model: Any, members: Mapping[str, tuple[Prepared, TrainSettings]]) -> Forecast:
    """The plan for a training of one adapter, or of several in one pass; `members` by the name each has on the model.

    What is trained, its gradients and the optimizer's state are sums over the members, activations are those of the
    fullest pack that they share. Activations are kept unless that does not fit, or the settings say otherwise.
    """
    device = next(model.parameters()).device
    available, process = _memory(model, device)
    settings = next(iter(members.values()))[1]
    wanted = settings.checkpointing == "on"
    if task_of(model).name != "lm":
        return Forecast(wanted, available, why="memory and time are forecast for language models only")
    asked = []
    for name, (data, each) in members.items():
        here = dataclasses.replace(each, device=str(device))
        method, steps = patch.installed(model, name).method, number_of_steps(each, len(data.given))
        asked.append(plan.Asked(here, data.given, method, steps))
    try:
        work = plan.work_of(*asked)
        rate = machine.step_rate(work.dtype, str(device))
        found = plan.predict(model.config, work, process, rate, type(model))
        if settings.checkpointing == "auto" and found.memory.total > available:
            again = dataclasses.replace(work, checkpointing=True)
            found = plan.predict(model.config, again, process, rate, type(model))
    except _NO_PLAN as fault:
        return Forecast(wanted, available, why=f"{type(fault).__name__} {(str(fault).splitlines() or [''])[0]}".strip())
    # The plan is of one update; time goes by the tokens of all.
    seconds = found.seconds and found.seconds / found.tokens * sum(each.tokens for each in asked)
    return Forecast(found.checkpointing, available, found.memory.total, seconds, work, process)


def _memory(model: Any, device: torch.device) -> tuple[int, int]:
    """Bytes that this process may hold with the model, and those that it holds without."""
    every = [*model.parameters(), *(each for _, each in patch.base_parameters(model))]  # the base's too, if displaced
    weights = sum(each.numel() * each.element_size() for each in {id(each): each for each in every}.values())
    _read(model)
    available, held = machine.room(device)
    return (available + weights, 0) if device.type == "cuda" else (available, max(0, held - weights))


@contextlib.contextmanager
def arranged(model: Any, ahead: Forecast) -> Iterator[None]:
    """Have the model compute activations again, if that was decided, for the length of a block; explain a lack."""
    if ahead.checkpointing:
        plan.checkpoint(model)
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if not isinstance(fault, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(fault):
            raise
        raise _short(model, ahead) from fault
    finally:
        if ahead.checkpointing:
            plan.keep_activations(model)


def _short(model: Any, ahead: Forecast) -> LoricaError:
    if ahead.work is None:
        return LoricaError("out of memory: try --micro 1, --checkpointing on, or a smaller --max-len")
    planned = f"{(ahead.total_bytes or 0) / 1e9:.1f} GB were planned of {ahead.available / 1e9:.1f}"
    changes = plan.advice(model.config, ahead.work, min(ahead.available, (ahead.total_bytes or 0) // 2), ahead.process)
    return all_faults(
        f"out of memory ({planned}); what lowers it:", [f"{flag}  {n / 1e9:.1f} GB" for flag, n in changes]
    )


def _read(model: nn.Module) -> None:
    """Have all weights in memory: a checkpoint that is mapped is read in when it is first used."""
    for parameter in model.parameters():
        parameter.detach().flatten()[:: 4096 // parameter.element_size()].sum()
