"""The method among the settings of a training: made from them, and told from a method again."""

from __future__ import annotations

from typing import Any

from lorica import methods
from lorica.lowrank import LoRA
from lorica.patch import Method
from lorica.train.settings import TrainSettings, pairs, words


def method_of(settings: TrainSettings) -> Method:
    """The method that the settings describe."""
    if settings.method == "lora":
        return _lora(settings)
    entry = methods.entry(settings.method)
    given = {name: getattr(settings, name) for name in entry.reads if name != "targets"}
    return entry.kind(**{name: value for name, value in given.items() if value is not None})


def settings_of(method: Method) -> dict[str, Any]:
    """The settings that would make a method again, but for its targets."""
    if isinstance(method, LoRA):
        return _told(method)
    entry = methods.of(method)
    told = {name: getattr(method, name) for name in entry.reads if name != "targets"}
    return {"method": entry.name} | told


def in_words(method: Method, targets: str) -> str:
    """The settings for a header: ``r 8, alpha 16 (x2), all-linear``."""
    if isinstance(method, LoRA):
        return f"r {method.r}, alpha {method.alpha:g} (x{method.scale_of(''):g}), {targets}"
    return methods.in_words(method)


def _lora(settings: TrainSettings) -> LoRA:
    return LoRA(
        r=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        scaling=settings.scaling,
        init=settings.init,
        bias=settings.bias,
        ranks={key: int(value) for key, value in pairs(settings.ranks).items()},
        alphas=pairs(settings.alphas),
        modules_to_save=words(settings.modules_to_save),
        token_rows=[int(part) for part in words(settings.token_rows)],
        tied=settings.tied,
        dora=settings.dora,
    )


def _told(method: LoRA) -> dict[str, Any]:
    return {
        "method": "lora",
        "rank": method.r,
        "alpha": method.alpha,
        "dropout": method.dropout,
        "scaling": method.scaling,
        "init": method.init,
        "bias": method.bias,
        "ranks": _pairs(method.ranks),
        "alphas": _pairs(method.alphas),
        "modules_to_save": ",".join(method.modules_to_save),
        "token_rows": ",".join(map(str, method.token_rows)),
        "tied": method.tied,
        "dora": method.dora,
    }


def _pairs(values: Any) -> str:
    return ",".join(f"{key}={value:g}" for key, value in values.items())
