"""`lorica train MODEL DATA`: fine-tune; `--resume RUN` continues, `--from ADAPTER` starts anew from weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lorica.cli import sweep
from lorica.cli.parse import Common, WrongUse
from lorica.train.settings import TrainSettings

if TYPE_CHECKING:
    from lorica.train import Run


@dataclass(kw_only=True)
class Settings(TrainSettings, Common):
    """Fine-tune MODEL on DATA. The result is a run folder, which works wherever a model does."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = ""
    """A built-in alias, a hub id, a folder or a .gguf file."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")] = ""
    """A .jsonl, .json, .csv or .parquet file, a folder with train/valid/test files, or a hub id (user/name:split)."""
    rank: Annotated[int, tyro.conf.arg(aliases=["-r"])] = 8
    """Rank of the update, r in the paper."""
    resume: str = ""
    """Continue this run, to the bit, with its own settings and data; alone on the line."""
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Start from the weights of this adapter or run, with a fresh optimizer."""
    sweep: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=A,B...")] = ()
    """Train every combination of some settings in one pass and rank them: r=1,2,4,8 lr=1e-4,3e-4 (a + inside a value
    stands for its comma: targets=q_proj+v_proj,mlp)."""
    find_lr: bool = False
    """First try five rates for 40 updates in one pass, then train with the best; with --dry-run only print it."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Train and say what came of it; 130 after Ctrl-C, when the state is saved."""
    from lorica.cli.terminal import speaks
    from lorica.train.processes import joined

    if not speaks():
        warnings.simplefilter("ignore")  # the first process gives the same ones
    job = _job(settings)
    with joined(job.settings.device):
        return _run(settings, job)


def _run(settings: Settings, job: _Job) -> int | dict[str, Any]:
    from lorica.cli.terminal import console, speaks
    from lorica.train import Interrupted, train

    model, tok = _loaded(job)
    if settings.sweep:
        return sweep.run(settings, job.settings, model, tok)
    if settings.find_lr:
        job.how["settings"] = sweep.found(settings, job.settings, model, tok)
    try:
        with _reporting(settings) as report:
            ended = train(model, tok, job.data, start=job.start, report=report, **job.how)
    except Interrupted as stopped:
        if speaks():
            console.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
        return 130
    if not speaks():
        return 0
    if settings.json:
        return _result(ended)
    _say(ended)
    return 0


def plan(settings: Settings) -> None:
    """The header of what `run` would do: model and data are read, nothing is trained or written."""
    from lorica.cli.terminal import console, speaks
    from lorica.train.report import show_header
    from lorica.train.setup import preview

    if not speaks():
        return
    job = _job(settings)
    model, tok = _loaded(job)
    if settings.sweep:
        sweep.plan(settings, job.settings, model, tok)
        return
    if settings.find_lr:
        job.settings = sweep.found(settings, job.settings, model, tok, keep=False)
    show_header(console, "lorica train --dry-run", preview(model, tok, job.data, job.settings))


@dataclass
class _Job:
    """What is to be trained: `how` are the arguments of `train` that make it a new run or a resumed one."""

    model: str
    data: str
    start: str
    settings: TrainSettings
    how: dict[str, Any]
    labels: tuple[str, ...] = ()  # those of the run that is resumed


def _job(settings: Settings) -> _Job:
    from lorica.errors import LoricaError, all_faults
    from lorica.train.folder import read_settings
    from lorica.train.run import settings_of

    sweep.check(settings)
    if not settings.resume:
        if not settings.model or not settings.data:
            raise WrongUse("MODEL and DATA are needed: lorica train MODEL DATA (or --resume RUN)")
        chosen = TrainSettings(**settings.values())
        if faults := chosen.check():
            raise all_faults("these settings cannot be used:", faults)
        how = {"settings": chosen, "out": settings.out or None}
        start = str(Path(settings.from_).resolve()) if Path(settings.from_).exists() else settings.from_
        return _Job(settings.model, settings.data, start if settings.from_ else "", chosen, how)
    plain = Settings().values() | {"model": "", "data": "", "from": "", "out": Settings().out}
    given = settings.values() | {
        "model": settings.model, "data": settings.data, "from": settings.from_, "out": settings.out
    }  # fmt: skip
    if other := [name for name, value in given.items() if value != plain.get(name)]:
        raise WrongUse(f"--resume continues a run as it is; leave away: {', '.join(other)}")
    path = Path(settings.resume)
    chosen = settings_of(path)
    there = read_settings(path)
    if not there.get("model") or not there.get("data"):
        raise LoricaError(
            f"{path} was trained on data or a model in memory: resume it from Python with train(resume=...)"
        )
    labels = tuple(there.get("made", {}).get("labels", ()))
    return _Job(there["model"], there["data"], there.get("from", ""), chosen, {"resume": path}, labels)


def _loaded(job: _Job) -> tuple[Any, Any]:
    from lorica.errors import LoricaError
    from lorica.models import open_thing
    from lorica.tasks import columns_of, labels_in

    how = {name: getattr(job.settings, name) for name in ("dtype", "device", "quantize")}
    labels = job.labels or labels_in(job.settings.task, job.data, columns_of(job.settings))
    opened = open_thing(job.model, adapter=job.start or None, labels=labels, **how)
    if opened.adapter and not job.start:
        raise LoricaError(
            f"{job.model} is an adapter on {opened.base}: lorica train {opened.base} DATA --from {job.model}"
        )
    return opened.model, opened.tok


@contextlib.contextmanager
def _reporting(settings: Settings) -> Iterator[Any]:
    from lorica.cli.terminal import console, speaks
    from lorica.train.report import Terminal

    if settings.quiet or not speaks():
        yield None
        return
    with Terminal(console) as report:
        yield report


def _result(ended: Run) -> dict[str, Any]:
    """The run as one object for `--json`."""
    return {
        "run": str(ended.path),
        "before": ended.before,
        "after": ended.after,
        **({"measures": dict(ended.measures)} if ended.measures else {}),
        "steps": ended.steps,
        "best_step": ended.best_step,
        "trainable": sum(tensor.numel() for tensor in ended.adapter.tensors.values()),
        "adapter_bytes": ended.adapter.nbytes,
        "adapter_sha256": ended.adapter.sha256,
        "seconds": ended.seconds,
        "peak_rss_bytes": ended.peak_rss_bytes,
        "notes": list(ended.notes),
    }


def _say(ended: Run) -> None:
    from lorica.cli.terminal import say
    from lorica.train.report import duration, size

    measured = "nothing held out" if ended.after is None else f"held out {ended.before:.3f} -> {ended.after:.3f}"
    measured += "".join(
        f"   {name} {ended.measures_before[name]:.3f} -> {value:.3f}" for name, value in ended.measures.items()
    )
    say(f"{measured}   {duration(ended.seconds)}   peak {size(ended.peak_rss_bytes)}")
    if ended.after is not None and ended.before is not None and not ended.after < ended.before:
        say("the held-out loss did not get better: look at the data (lorica data), or try another lr")
    if ended.steps < ended.planned:
        say(f"stopped early, after step {ended.steps:,} of {ended.planned:,}")
    for note in ended.notes:
        say(f"note: {note}")
    picture = "   curve.png" if (ended.path / "curve.png").exists() else ""
    say(f"{ended.path}   adapter {size(ended.adapter.nbytes)}   best step {ended.best_step:,}{picture}   README.md")
    say(f"next:  lorica chat {ended.path}      lorica eval {ended.path} test.jsonl")
