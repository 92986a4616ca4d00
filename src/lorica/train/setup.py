"""What stands before the first update: the adapter on the model, the settings resolved, the facts to print."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from lorica import __version__, patch
from lorica.adapter import Adapter
from lorica.errors import LoricaError, all_faults
from lorica.evaluate.agreement import missing
from lorica.geometry import correction
from lorica.lowrank import LoRA
from lorica.methods import entry
from lorica.models import draw_head
from lorica.targets import FRESH, Target, head_parameters, resolve
from lorica.tasks import Task, task_of
from lorica.train import guards, start
from lorica.train.examples import Prepared, prepare
from lorica.train.forecast import forecast
from lorica.train.recipe import in_words, method_of, settings_of
from lorica.train.settings import (
    DEFAULT_EPOCHS,
    METHOD_FIELDS,
    TrainSettings,
    default_lr,
    measured_every,
    number_of_steps,
)

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def ready(
    model: nn.Module, tok: Any, data: Any, settings: TrainSettings, origin: str = ""
) -> tuple[Prepared, TrainSettings]:
    """Check the settings, encode the data, equip the model: everything that can be wrong, before anything is written.

    Returns the examples and the settings with every rule applied. `origin`: where the adapter on the model came from.
    """
    task = task_of(model)
    if faults := settings.check() or _task_faults(task, _adopted(model, settings)):
        raise all_faults("these settings cannot be used:", faults)
    prepared = prepare(data, tok, _adopted(model, settings), task)
    guards.labelled(prepared.train, "training")
    guards.labelled(prepared.held, "held-out")
    equip(model, settings)
    guards.something(patch.trainable(model))
    prepared.give(model)
    if start.wants(model):
        passes = task.passes(model, tok, prepared.given, settings.label_smoothing)
        start.at_gradient(model, passes, prepared.given, settings)
    return prepared, resolved(model, settings, prepared, origin)


def preview(model: nn.Module, tok: Any, data: Any, settings: TrainSettings) -> dict[str, Any]:
    """The `facts` of a training that is not made. The model gets the adapter that would be trained."""
    prepared, settings = ready(model, tok, data, settings)
    ahead = forecast(model, {patch.active(model) or "": (prepared, settings)})
    return facts(model, tok, prepared, settings) | ahead.facts()


def equip(model: nn.Module, settings: TrainSettings) -> None:
    """Put the settings' method on a model without an adapter; on one with an adapter, check that they do not differ."""
    if not patch.adapters(model):
        set_seed(settings.seed)
        draw_head(model, settings.seed)
        patch.inject(model, method_of(settings), settings.targets, also=head_parameters(model))
        return
    if patch.state_of(model).merged:  # type: ignore[union-attr]
        raise LoricaError(f"the adapter {patch.active(model)!r} is merged; unmerge the model to train it")
    selected = patch.installed(model).selected
    if cold := [name for name in getattr(model, FRESH, ()) if name not in selected]:
        raise all_faults("the head is new, and the adapter on the model does not train it:", sorted(cold))
    there, default = _settings_of(model, settings), TrainSettings()
    faults = [
        f"{name} is {getattr(settings, name)!r}, on the model {there.get(name)!r}"
        for name in METHOD_FIELDS
        if getattr(settings, name) not in (getattr(default, name), there.get(name))
    ]
    if faults:
        raise all_faults("the model has an adapter already, and the settings are of another one:", faults)


def _adopted(model: nn.Module, settings: TrainSettings) -> TrainSettings:
    """The settings with the method that is on the model, if one is."""
    return dataclasses.replace(settings, **_settings_of(model, settings)) if patch.adapters(model) else settings


def resolved(model: nn.Module, settings: TrainSettings, data: Prepared, origin: str = "") -> TrainSettings:
    """The settings with every rule applied: rate, length, measurements, format, and the method that is on the model."""
    found: dict[str, Any] = _settings_of(model, settings)
    if settings.lr is None:
        found["lr"] = suited_lr(model, dataclasses.replace(settings, method=found["method"]))
    if settings.steps is None and settings.epochs is None:
        found["epochs"] = DEFAULT_EPOCHS
    steps = number_of_steps(settings, len(data.given))
    found["eval_every"] = measured_every(settings, steps)
    found["dtype"] = DTYPES.get(_dtype(model), "auto")
    task = task_of(model)
    # `classify` takes the labels of the rows; `auto` alone finds a head that came with the model or the adapter again.
    brought = task.labels and settings.task == "auto" and (origin or not getattr(model, FRESH, ()))
    found["task"] = "auto" if brought else task.name
    return dataclasses.replace(settings, **found)


def about(model: nn.Module, tok: Any) -> dict[str, str]:
    """What an adapter says of itself: what its task knows of it, and by what it was trained."""
    said = task_of(model).about(model, tok) | {"lorica": __version__}
    return {key: text for key, text in said.items() if text}


def facts(model: nn.Module, tok: Any, data: Prepared, settings: TrainSettings) -> dict[str, Any]:
    """What is about to happen, for the header, the log and the card. `settings` are resolved.

    `detail` are the method's settings in words; only LoRA has a rank, alpha, scale and targets.
    """
    installed, count = patch.installed(model), patch.count(model)
    steps = number_of_steps(settings, len(data.given))
    first, task = data.train[0], task_of(model)
    return {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,  # type: ignore[union-attr]
        "parameters": count.total,
        "dtype": settings.dtype,
        "device": str(next(model.parameters()).device),
        "method": "dora" if settings.dora else settings.method,
        "detail": in_words(installed.method, settings.targets),
        "unmergeable": installed.method.unmergeable,
        **_update(installed.method, settings),
        "layers": len(installed.targets or {path for path, _ in installed.patches}),
        "trainable": count.trainable,
        "share": count.share,
        "adapter_bytes": 4 * sum(tensor.numel() for tensor in installed.values().values()),
        "data": data.source,
        "train": len(data.train),
        "held_out": len(data.held),
        "held_out_all": data.held_all,
        "notes": data.notes,
        "steps": steps,
        "epochs": round(steps / math.ceil(len(data.given) / settings.batch), 2),
        "batch": settings.batch,
        "lr": settings.lr,
        "lr_from": _lr_from(model, settings),
        "schedule": settings.schedule,
        "eval_every": settings.eval_every,
        "seed": settings.seed,
        "task": task.name,
        "labels": data.counts or dict.fromkeys(task.labels, None),
        "unit": task.unit,
        "best_by": settings.best_by,
        "example": {"where": first.where, "runs": task.shown(first, tok)},
    }


def _task_faults(task: Task, settings: TrainSettings) -> list[str]:
    """Settings that ask for another task than the model's, or for what its task has not."""
    faults = []
    if settings.task not in ("auto", task.name):
        wanted = "lorica.load(..., labels=[...])" if settings.task != "lm" else "a decoder as it is"
        faults.append(f"task is {settings.task!r}, and this model is made for {task.name!r}: load {wanted}")
    if settings.best_by not in ("loss", *task.measures):
        known = ", ".join(("loss", *task.measures))
        faults.append(f"best_by is {settings.best_by!r}; for task {task.name!r} it must be one of: {known}")
    elif settings.best_by == "spearman" and (lacking := missing(len(task.labels))):
        faults.append(f"best_by is {settings.best_by!r}: {lacking}")
    if task.name == "regress" and settings.label_smoothing:
        faults.append(f"label_smoothing is {settings.label_smoothing:g}, and a number has no labels to smooth")
    return faults


def _settings_of(model: nn.Module, settings: TrainSettings) -> dict[str, Any]:
    """The adapter on a model as settings that would make it again; its targets as in `settings` where these fit."""
    installed = patch.installed(model)
    told = settings_of(installed.method)
    if not installed.method.takes_targets:
        return told
    targets = settings.targets
    if not _fit(model, targets, installed.targets):
        short = ",".join(json.loads(Adapter.of(model).meta["target_modules"]))
        targets = short if _fit(model, short, installed.targets) else ",".join(map(str, installed.targets))
    return told | {"targets": targets}


def _update(method: patch.Method, settings: TrainSettings) -> dict[str, Any]:
    if not isinstance(method, LoRA):
        return {}
    return {
        "rank": method.r,
        "alpha": method.alpha,
        "scale": method.scale_of(""),
        "targets": settings.targets,
    }


def _fit(model: nn.Module, targets: str, installed: Sequence[Target]) -> bool:
    """Whether a specification means the targets that are on the model."""
    try:
        return set(resolve(model, targets)) == set(installed)
    except LoricaError:
        return False


def _dtype(model: nn.Module) -> torch.dtype:
    """The format of most of the base."""
    sizes: dict[torch.dtype, int] = {}
    for _, parameter in patch.base_parameters(model):
        if not parameter.is_floating_point():
            continue  # packed: what it is computed in is the format of the rest
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.__getitem__)


def _lr_from(model: nn.Module, settings: TrainSettings) -> str:
    hidden, times, factor = width(model), entry(settings.method).lr, _correction(model, settings)
    if not hidden or settings.lr != suited_lr(model, settings):
        return "as given" + (f", B's {settings.lr_ratio:g} times that" if settings.lr_ratio != 1 else "")
    rule = f"{f'{times:g} x ' if times != 1 else ''}5e-4 (2000 / {hidden:,})^0.775"
    return rule if factor == 1 else f"{rule} x {factor:.2g}, so that the first update is as large as plain LoRA's"


def suited_lr(model: nn.Module, settings: TrainSettings) -> float:
    """The default rate for the adapter on a model: `default_lr`, corrected for what changes its first update."""
    if (hidden := width(model)) is None:
        raise LoricaError("this model's config names no hidden_size, from which lr would follow: give an lr")
    return float(f"{default_lr(hidden, settings.method) * _correction(model, settings):.2g}")


def _correction(model: nn.Module, settings: TrainSettings) -> float:
    """See `geometry.correction`."""
    starts = (getattr(each, "start", None) for each in patch.installed(model).patches.values())
    return correction([start for start in starts if start is not None], settings.lr_ratio)


def width(model: nn.Module) -> int | None:
    """The hidden size, where the model's config names one."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
