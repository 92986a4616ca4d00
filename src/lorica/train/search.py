"""`find_lr`: a few rates tried for a few updates, all in one pass, before the training itself.

Short trials favour high rates: what noise they leave is paid for later. So among rates that are equally good for all
that is known, the lowest is taken.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from torch import nn

from lorica import patch
from lorica.errors import LoricaError
from lorica.train import many
from lorica.train.grid import name_of
from lorica.train.member import Report
from lorica.train.settings import TrainSettings
from lorica.train.setup import equip, suited_lr

FACTORS = (0.16, 0.4, 1.0, 2.5, 6.25)
STEPS = 40
ROWS = 128
MEASUREMENTS = 4


def trials(model: nn.Module, settings: TrainSettings) -> dict[str, TrainSettings]:
    """The trainings to try: `settings` at `FACTORS` times their rate (or the default one), at most 40 updates each."""
    centre = settings.lr
    if centre is None:
        if there := patch.adapters(model):
            raise LoricaError(f"the model has an adapter already ({', '.join(there)}); eject it first")
        equip(model, settings)
        centre = suited_lr(model, settings)
        patch.eject(model)
    steps = min(STEPS, settings.steps or STEPS)
    short = dataclasses.replace(
        settings,
        steps=steps,
        epochs=None,
        eval_every=math.ceil(steps / MEASUREMENTS),
        eval_rows=min(settings.eval_rows or ROWS, ROWS),
        early_stop=0,
        keep="adapter",
    )
    rates = [float(f"{factor * centre:.2g}") for factor in FACTORS]
    return {name_of({"lr": rate}): dataclasses.replace(short, lr=rate) for rate in rates}


def find_lr(
    model: nn.Module,
    tok: Any,
    data: Any,
    settings: TrainSettings,
    *,
    out: str | Path | None = None,
    report: Report | None = None,
) -> tuple[float, many.Sweep]:
    """A peak rate for `settings` on these data, and the sweep that found it; arguments as for `many.train`.

    The model is left without an adapter. LoricaError where no rate can be told, with the reason.
    """
    sweep = many.train(model, tok, data, trials(model, settings), out=out, report=report)
    patch.eject(model)
    if not sweep.pick:
        raise LoricaError(f"no learning rate was found: {sweep.why} (see {sweep.path})")
    return next(row.lr for row in sweep.rows if row.name == sweep.pick), sweep
