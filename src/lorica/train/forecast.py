"""What the plan says of a training that is about to start, what it decides, and what it says if memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
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


def forecast(model: Any, data: Prepared, settings: TrainSettings) -> Forecast:
    """The plan for this training. Activations are kept unless that does not fit, or the settings say otherwise."""
    device = next(model.parameters()).device
    every = [*model.parameters(), *(each for _, each in patch.base_parameters(model))]  # the base's too, if displaced
    weights = sum(each.numel() * each.element_size() for each in {id(each): each for each in every}.values())
    if device.type == "cuda":
        available, process = torch.cuda.mem_get_info(device)[0] + weights, 0
    else:
        process = max(0, _resident(model) - weights)
        available = psutil.virtual_memory().available + process + weights
    wanted = settings.checkpointing == "on"
    if task_of(model).name != "lm":
        return Forecast(wanted, available, why="memory and time are forecast for language models only")
    try:
        work = plan.work_of(model.config, settings, data.given, patch.installed(model).method)
        peak = machine.gemm_peak(work.dtype, str(device))
        found = plan.predict(model.config, work, process, peak, type(model))
        if settings.checkpointing == "auto" and found.memory.total > available:
            found, _ = plan.fitting(model.config, work, available, process)
    except _NO_PLAN:
        return Forecast(wanted, available)
    steps = number_of_steps(settings, len(data.given))
    # The plan is of an update of the longest rows; time goes by all of them.
    share = sum(len(example.ids) for example in data.given) / len(data.given) * settings.batch / found.tokens
    seconds = found.seconds * steps * share if found.seconds else None
    return Forecast(found.checkpointing or wanted, available, found.memory.total, seconds, work, process)


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


def _resident(model: nn.Module) -> int:
    """Bytes that this process holds in memory, with all weights: a checkpoint that is mapped is read in first."""
    for parameter in model.parameters():
        parameter.detach().flatten()[:: 4096 // parameter.element_size()].sum()
    return psutil.Process().memory_info().rss
