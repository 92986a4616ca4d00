"""`train`: a model, data and settings -> a run folder with the best and the last adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lorica import patch
from lorica.adapter import Adapter
from lorica.errors import LoricaError, all_faults
from lorica.files import write_atomic
from lorica.formats.card import card
from lorica.train import curve, folder, guards, processes
from lorica.train.memory import peak_bytes, peak_rss_bytes
from lorica.train.settings import TrainSettings
from lorica.train.setup import ready
from lorica.train.sitting import Report, Sitting, Stop

PATIENCE = 1.0  # seconds


@dataclass(frozen=True)
class Run:
    """What a training came to.

    Attributes:
        path: the run folder.
        adapter: the best one (by `settings.best_by`; the last where nothing was held out), which the model keeps.
        settings: as used, every rule resolved.
        steps: updates made, of `planned`; fewer after an early stop.
        best_step: the update that `adapter` is of.
        before, after: held-out loss (nats per token) of the model as it came and with `adapter`; None without rows.
        measures_before, measures: what else the task measured then: accuracy, ... (none of language models).
        seconds: over all sittings.
        peak_rss_bytes: of this process.
        notes: what was left out and why.
    """

    path: Path
    adapter: Adapter
    settings: TrainSettings
    steps: int
    planned: int
    best_step: int
    before: float | None
    after: float | None
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()
    measures_before: Mapping[str, float] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)


class Interrupted(KeyboardInterrupt):
    """A training that was asked to stop, after its state was saved in `path`."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}; continue with: lorica train --resume {path}")
        self.path, self.step = path, step


def train(
    model: nn.Module,
    tok: Any,
    data: Any,
    settings: TrainSettings | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    start: str = "",
    report: Report | None = None,
) -> Run:
    """Train the model's active adapter, or one made from the settings where it has none.

    Args:
        model, tok: as `lorica.load` gives them; trained on the device and in the dtype where the model is. One of
            several processes loads them inside `processes.joined`.
        data: see `examples.prepare`.
        settings: default `TrainSettings()`; not with `resume`, which takes the run's own.
        out: the run folder, which must not hold anything; default the next ``runs/0001-name``.
        resume: a run folder to continue from where its state was saved, to the bit.
        start: where the adapter on the model came from, for the record.
        report: called with every event of metrics.jsonl and samples.jsonl as it happens; default silence.

    Returns:
        The run. The model has the best weights, unmerged, and its former mode.

    Raises:
        LoricaError: settings or data that cannot be used, a guard of law 7, or a resume of something else.
        Interrupted: Ctrl-C or SIGTERM; the update at hand is finished and saved. A second Ctrl-C ends at once.
    """
    if resume is not None:
        if settings is not None or out is not None:
            raise LoricaError("a resumed run keeps its settings and its folder: give neither settings nor out")
        settings = settings_of(resume)
    prepared, settings = ready(model, tok, data, settings or TrainSettings(), start)
    accelerator = processes.accelerator_for(model)
    name = Path(prepared.source).stem or Path(getattr(model.config, "_name_or_path", "")).stem  # type: ignore[union-attr, arg-type]
    path = Path(resume) if resume is not None else processes.agreed_folder(accelerator, out, name)
    was_training = model.training
    sitting = Sitting(model, tok, prepared, settings, path, accelerator, start, report or _silence)
    try:
        with stoppable() as stop:
            if not sitting.go(stop, resuming=resume is not None):
                raise Interrupted(path, sitting.here.step)
            return _finish(sitting)
    finally:
        sitting.close()
        model.train(was_training)


def settings_of(run: str | Path) -> TrainSettings:
    """The settings of an unfinished run, to resume it. LoricaError for a finished one, and for what is no run."""
    values = folder.read_settings(Path(run))
    if folder.finished(Path(run)):
        raise LoricaError(f"{run} is finished, so there is nothing to resume; start a new run with --from {run}")
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    settings = TrainSettings(**{key: value for key, value in values.items() if key in known})
    if faults := settings.check():
        raise all_faults(f"{Path(run) / folder.SETTINGS} cannot be used:", faults)
    return settings


def _silence(event: object) -> None:
    """The report of a library: none."""


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Let the first SIGINT or SIGTERM set a flag; a second one interrupts at once.

    With several processes, what follows within `PATIENCE` is the same request: a terminal sends Ctrl-C to each of them,
    and the program that started them passes it on.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    patience = PATIENCE if processes.several() else 0.0

    def ask(number: int, frame: object) -> None:
        if not stop.wanted:
            stop.wanted, stop.since = True, time.monotonic()
        elif time.monotonic() - stop.since >= patience:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(sitting: Sitting) -> Run:
    """The best weights on the model; then picture, card and the line that marks the run as finished."""
    here = sitting.here
    guards.changed(sitting.adapter(), here.step)
    if not sitting.data.held:
        here.best_step = here.step
        sitting.save_adapter("best")
    sitting.accelerator.wait_for_everyone()
    adapter = Adapter.load(sitting.path / "best")
    patch.installed(sitting.model).put(adapter.tensors)
    told: dict[str, Any] = {
        "steps": here.step,
        "planned": sitting.steps,
        "best_step": here.best_step,
        "before": here.before,
        "after": here.best,
        "measures_before": here.measures_before,
        "measures": here.measures,
        "seconds": sitting.elapsed(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    notes = _write(sitting, told) if sitting.main else []
    return Run(sitting.path, adapter, sitting.settings, **told, notes=tuple(notes))


def _write(sitting: Sitting, told: dict[str, Any]) -> list[str]:
    notes = []
    try:
        curve.draw([sitting.path], sitting.path / "curve.png")
    except LoricaError as missing:
        notes.append(f"no curve.png: {missing}")
    about = sitting.facts() | told | {"run": sitting.path.name, "curve": not notes}
    write_atomic(sitting.path / "README.md", card(about))
    sitting.log(folder.METRICS, {"kind": "end"} | told | {"peak_bytes": peak_bytes(sitting.device), "notes": notes})
    if sitting.settings.keep == "adapter":
        shutil.rmtree(sitting.path / "state", ignore_errors=True)
    return notes
