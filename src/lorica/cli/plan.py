"""`lorica plan MODEL [DATA]`: will it fit, how long will it take, and what to change if it does not."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

from lorica.cli.parse import Common, WrongUse
from lorica.train.settings import TrainSettings

if TYPE_CHECKING:
    from lorica.plan import Asked, Prediction, Work


@dataclass(kw_only=True)
class Settings(TrainSettings, Common):
    """Memory and time of a training before anything is loaded, from shapes alone; the settings are those of train."""

    model: tyro.conf.Positional[str] = ""
    """A built-in alias, a folder, a .gguf file, a hub id, or gpt3-175b, the largest model of the paper."""
    data: tyro.conf.Positional[str] = ""
    """What would be trained on; without it, rows of --len tokens."""
    len: int = 512
    """Tokens of a row, without DATA; all of them are predicted then."""
    params: Literal["none", "paper"] = "none"
    """Without MODEL; paper: every parameter count that the paper prints, beside its formula and the injected model."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Predict, print; returns everything as one object for `--json`."""
    if settings.params == "paper":
        from lorica.cli import params

        return params.show(settings.json)
    if not settings.model:
        raise WrongUse("MODEL is missing\nsee lorica plan --help")
    if settings.task not in ("auto", "lm"):
        raise WrongUse(f"memory and time are planned for language models only, not for --task {settings.task}")

    from lorica import counts, plan
    from lorica.cli.terminal import table
    from lorica.models import machine
    from lorica.train.recipe import in_words, method_of

    config = plan.config_of(settings.model)
    method = method_of(settings)
    asked = _asked(settings, method)
    work = plan.work_of(asked)
    device = machine.resolve_device(settings.device)
    available, process = machine.room(device)
    found, fits = plan.fitting(config, work, available, process)
    work = dataclasses.replace(work, checkpointing=found.checkpointing)
    every = {f"{settings.method} {in_words(method, settings.targets)}, {work.dtype}": work} | _others(work)
    rates = {each.dtype: machine.step_rate(each.dtype, str(device)) for each in every.values()}
    rows = {name: plan.predict(config, each, process, rates[each.dtype]) for name, each in every.items()}
    found = next(iter(rows.values()))
    changes = [] if fits else plan.advice(config, work, available, process)
    tokens = asked.tokens if settings.data else None
    told = {
        "model": settings.model,
        "parameters": found.parameters,
        "trainable": found.trainable,
        "available_bytes": available,
        "fits": fits,
        "steps": asked.steps if settings.data else None,
        "update_tokens": found.tokens,
        "gemm_flops": machine.gemm_peak(work.dtype, str(device)),
        "plans": {name: _plain(each, tokens) for name, each in rows.items()},
        "advice": [{"change": flag, "total_bytes": total} for flag, total in changes],
    }
    claims = counts.gpt3_claims() if settings.model == plan.GPT3 else []
    if claims:
        told["paper"] = [dict(zip(("what", "how", "number", "paper"), claim, strict=True)) for claim in claims]
    if settings.json:
        return told
    head = ("", "weights", "trained", "gradients", "Adam", "activations", "process", "in all", "an update")
    table(head, [_row(name, each) for name, each in rows.items()])
    _say_rest(settings, told, asked, found)
    for what, how, number, paper in claims:
        _say_claim(what, how, number, paper)
    return told


def _asked(settings: Settings, method: Any) -> Asked:
    """The training: on the data, or a single update on rows of --len tokens."""
    from lorica import models, plan
    from lorica.insertion import Insertion
    from lorica.train.examples import prepare
    from lorica.train.settings import number_of_steps

    if not settings.data:
        return plan.Asked(settings, [plan.row(settings.len)] * settings.batch, method, 1)
    prepared = prepare(settings.data, models.load_tokenizer(settings.model), settings)
    own = Insertion(0, *getattr(method, "inserts", (0, 0)))
    given = [each for example in prepared.train for each in own.examples(example)]
    return plan.Asked(settings, given, method, number_of_steps(settings, len(given)))


def _others(work: Work) -> dict[str, Work]:
    """What else could be done: the same in other formats, with activations computed again, and full fine-tuning."""
    found = {"  with checkpointing": dataclasses.replace(work, checkpointing=True)}
    if work.dtype == "fp32":
        found["  on a bf16 base"] = dataclasses.replace(work, dtype="bf16")
    if work.quantize == "none":
        found["  on an int8 base"] = dataclasses.replace(work, quantize="int8", dtype="bf16")
        found["  on an nf4 base"] = dataclasses.replace(work, quantize="nf4", dtype="bf16")
    found[f"full fine-tuning, {work.dtype}"] = dataclasses.replace(work, method=None, quantize="none")
    return found


def _row(name: str, found: Prediction) -> tuple[str, ...]:
    from lorica.cli.terminal import size

    memory = found.memory
    parts = (memory.weights, memory.trained, memory.gradients, memory.optimizer, memory.activations, memory.process)
    return (name, *(size(part) for part in parts), size(memory.total), _time(found.seconds))


def _plain(found: Prediction, tokens: float | None) -> dict[str, Any]:
    whole = {"seconds": found.seconds / found.tokens * tokens} if tokens and found.seconds else {}
    return dataclasses.asdict(found) | {"total_bytes": found.memory.total} | {"run": whole}


def _say_rest(settings: Settings, told: dict[str, Any], asked: Asked, found: Prediction) -> None:
    from lorica.cli.terminal import say, size

    share = found.trainable / found.parameters
    rows = f"{settings.batch} rows of {settings.len:,} tokens"
    if settings.data:
        longest = max(len(example.ids) for example in asked.examples)
        rows = f"the one with the fullest pack; of {len(asked.examples):,} rows the longest has {longest:,} tokens"
    say()
    say(f"{'model':<8}{found.parameters:,} parameters, {found.trainable:,} trained ({share:.3%})")
    say(f"{'update':<8}{rows}: {found.tokens:,} tokens, {found.flops / 1e9:,.0f} GFLOP")
    if found.seconds and settings.data:
        say(f"{'run':<8}{asked.steps:,} updates, about {_time(found.seconds / found.tokens * asked.tokens)}")
    words = "fits" if told["fits"] else "does not fit"
    how = " with checkpointing" if found.checkpointing else ""
    say(f"{'memory':<8}{words}{how}: {size(found.memory.total)} of {size(told['available_bytes'])}")
    for change in told["advice"]:
        say(f"{'':<8}{change['change']:<20}{size(change['total_bytes'])}")
    if told["fits"] and settings.data:
        say(f"next:  {shlex.join(['lorica', 'train', settings.model, settings.data])}")
    elif told["fits"]:
        say(f"next:  lorica plan {shlex.quote(settings.model)} DATA")


def _say_claim(what: str, how: str, number: float, paper: str) -> None:
    from lorica.cli.terminal import say

    shown = f"{number:,.0f}"
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= scale:
            shown = f"{number / scale:,.1f} {unit}"
            break
    say(f"{what:<20}{shown:>10}   {how:<52} paper: {paper}")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
