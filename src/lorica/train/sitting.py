"""One sitting of a run: begin or continue, update, measure, save, until the end or until someone asks to stop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from lorica import __version__, methods, patch
from lorica.adapter import Adapter
from lorica.data import Sampler
from lorica.errors import all_faults
from lorica.tasks import task_of
from lorica.train import folder, guards, processes, state
from lorica.train.examples import Prepared
from lorica.train.forecast import Forecast, arranged, forecast
from lorica.train.loop import Update, updates
from lorica.train.memory import peak_bytes
from lorica.train.optimizer import Optimizer
from lorica.train.settings import TrainSettings, number_of_steps
from lorica.train.setup import about, facts

Report = Callable[[Mapping[str, Any]], None]


@dataclass
class Stop:
    """Whether someone asked to stop, and since when (`time.monotonic`)."""

    wanted: bool = False
    since: float = 0.0


@dataclass
class Sitting:
    """The parts of a run, and where it stands. `settings` are resolved, `start` names the adapter it began from."""

    model: nn.Module
    tok: Any
    data: Prepared
    settings: TrainSettings
    path: Path
    accelerator: Accelerator
    start: str
    report: Report
    here: state.State = field(default_factory=state.State)
    logs: dict[str, folder.Log] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.settings.eval_every is not None, "settings are resolved before a sitting"
        self.every = self.settings.eval_every
        self.steps = number_of_steps(self.settings, len(self.data.given))
        self.main = self.accelerator.is_main_process
        self.device = next(self.model.parameters()).device
        self.task = task_of(self.model)
        self.ahead = self._forecast()
        # What reads the base's weights comes first: sharding takes them away.
        self.blank = dataclasses.replace(Adapter.of(self.model, meta=about(self.model, self.tok)), tensors={})
        smooth = self.settings.label_smoothing
        self.passes = self.task.passes(self.model, self.tok, self.data.given, smooth)
        self.prints = {"data": self.data.fingerprint(), "base": self.blank.meta["base_fingerprint"]}
        processes.alike(self.accelerator, **self.prints)
        if processes.sharding():
            processes.shard(self.model, self.accelerator)
        self.parameters, self.held = patch.trainable(self.model), patch.installed(self.model).held()
        broadcast(list(self.held.values()))  # the optimizer does so with what is trained
        self.optimizer = Optimizer(self.parameters, self.settings, self.accelerator.num_processes)
        self.sampler = Sampler(len(self.data.given), self.settings.batch, self.settings.seed)
        self.began = self.saved = time.monotonic()

    def go(self, stop: Stop, resuming: bool) -> bool:
        """Train; False if stopped before the end on request, with everything saved."""
        saved = state.read(self.path) if resuming else None
        if saved is None:
            self._begin()
        else:
            self._continue(*saved)
        watch = guards.Gradients(self.parameters)
        with arranged(self.model, self.ahead):
            return self._train(stop, watch)

    def _train(self, stop: Stop, watch: guards.Gradients) -> bool:
        try:
            for update in self._updates():
                watch.check(last=update.step == self.steps)
                self._note(update)
                late = time.monotonic() - self.saved >= self.settings.save_every
                wanted, due = processes.agreed(self.accelerator, stop.wanted, late)
                measured = update.step % self.every == 0 or update.step == self.steps
                better = self._measure() if measured else False
                if measured or due or wanted:
                    self._save(better)
                if self._stale():
                    break
                if wanted and update.step < self.steps:
                    # Where one process ends with a fault, the others are ended too, perhaps while they write.
                    self.accelerator.wait_for_everyone()
                    return False
        except guards.NotFinite:
            self.save_adapter("last")
            self.accelerator.wait_for_everyone()
            raise
        return True

    def facts(self) -> dict[str, Any]:
        """See `setup.facts`."""
        known = facts(self.model, self.tok, self.data, self.settings) | self.ahead.facts()
        if (count := self.accelerator.num_processes) > 1:
            known["device"] = f"{count} x {self.device.type}{', sharded' if processes.sharding() else ''}"
        return known

    def adapter(self) -> Adapter:
        """A snapshot of the weights as they are."""
        values = patch.installed(self.model).values()
        tensors = {name: value.to("cpu", torch.float32, copy=True) for name, value in values.items()}
        return dataclasses.replace(self.blank, tensors=MappingProxyType(tensors))

    def log(self, name: str, event: Mapping[str, Any]) -> None:
        """Add an event to a log and pass it on; the main process only."""
        if self.main:
            self.logs[name].add(event)
            self.report(event)

    def save_adapter(self, name: str) -> None:
        """Write the weights as they are to best/ or last/."""
        if self.main and self.here.step:
            self.adapter().save(self.path / name)

    def elapsed(self) -> float:
        """Seconds of all sittings so far."""
        return round(time.monotonic() - self.began, 3)

    def close(self) -> None:
        """Close the logs and free the gradients."""
        for log in self.logs.values():
            log.close()
        self.optimizer.close()

    def _forecast(self) -> Forecast:
        """The plan, by which all processes compute activations again or none does."""
        ahead = forecast(self.model, {patch.active(self.model) or "": (self.data, self.settings)})
        (again,) = processes.agreed(self.accelerator, ahead.checkpointing)
        return dataclasses.replace(ahead, checkpointing=again)

    def _begin(self) -> None:
        self.here.data, self.here.base = self.prints["data"], self.prints["base"]
        fixed = {"data_sha256": self.here.data, "base_fingerprint": self.here.base, "lorica": __version__}
        labels = {"labels": list(self.task.labels)} if self.task.labels else {}
        known = self.facts()
        name = getattr(self.model.config, "_name_or_path", "")  # type: ignore[union-attr]
        origin = {"model": name, "data": self.data.source, "from": self.start}
        if self.main:
            named = {key: text for key, text in origin.items() if text}
            folder.write_settings(self.path, named | self.settings.values(), fixed | labels)
            self._open({})
        self.log(folder.METRICS, {"kind": "start", "run": str(self.path), "first": 0} | known | fixed)
        self._measure()
        self._save(better=False)

    def _continue(self, saved: state.State, tensors: Mapping[str, Tensor]) -> None:
        words = {"data": "the examples (rows, chat template or max_len)", "base": "the weights of the base model"}
        if faults := [f"{words[key]} changed" for key, now in self.prints.items() if now != getattr(saved, key)]:
            raise all_faults(f"{self.path} cannot be continued:", [*faults, "bring them back, or start a new run"])
        self.here = saved
        self.optimizer.restore(tensors)
        for name, start in self.held.items():
            start.copy_(tensors[name])
        self.sampler.restore(saved.sampler)
        self.began -= saved.seconds
        if self.main:
            self._open(saved.logs)
            self.report({"kind": "start", "run": str(self.path), "first": saved.step} | self.facts())
        # A crash may have come between the state and the adapters that belong to it.
        self._save_adapters(better=saved.best_step == saved.step)

    def _open(self, lengths: Mapping[str, int]) -> None:
        for name in (folder.METRICS, folder.SAMPLES):
            self.logs[name] = folder.Log(self.path / name, lengths.get(name, 0))

    def _updates(self) -> Iterator[Update]:
        if self._stale():
            return iter(())
        if self.passes.note and not self.here.step:
            self.log(folder.METRICS, {"kind": "note", "text": self.passes.note})
        return updates(
            self.model,
            self.optimizer,
            self.data.given,
            self.sampler,
            self.settings,
            accelerator=self.accelerator,
            first=self.here.step + 1,
            steps=self.steps,
            passes=self.passes,
        )

    def _note(self, update: Update) -> None:
        self.here.step = update.step
        self.here.tokens += update.tokens
        now = {"elapsed": self.elapsed(), "memory": peak_bytes(self.device)}
        self.log(folder.METRICS, {"kind": "step"} | dataclasses.asdict(update) | now)

    def _measure(self) -> bool:
        """Held-out loss and samples; returns whether it is the best so far. Step zero does not compete."""
        here = self.here
        if not self.data.held:
            return False
        loss, measures = self.task.measure(self.model, self.data.held)
        if here.step == 0:
            here.before, here.measures_before = self._of_the_base(loss), measures
        better = here.step > 0 and self._better(loss, measures)
        if better:
            here.best, here.measures, here.best_step, here.stale = loss, measures, here.step, 0
        elif here.step:
            here.stale += 1
        event = {"kind": "eval", "step": here.step, "held_out": loss, "best": better, "elapsed": self.elapsed()}
        self.log(folder.METRICS, event | measures)
        asked = self.data.held[: self.settings.sample]
        for found in self.task.samples(self.model, self.tok, asked, self.settings.sample_len):
            self.log(folder.SAMPLES, {"kind": "sample", "step": here.step} | found)
        return better

    def _of_the_base(self, loss: float) -> float:
        """The base's held-out loss, where step zero has `loss`; a method that starts elsewhere says so (law 1)."""
        entry, starts = methods.entry(self.settings.method), patch.installed(self.model).method
        if getattr(starts, "neutral", entry.neutral):
            return loss
        with patch.disabled(self.model):
            base, _ = self.task.measure(self.model, self.data.held)
        what = self.settings.method if not entry.neutral else f"init={self.settings.init}"
        text = f"{what} does not start as the base: held out {base:.3f} without it, {loss:.3f} with it"
        self.log(folder.METRICS, {"kind": "note", "text": text})
        return base

    def _better(self, loss: float, measures: Mapping[str, float]) -> bool:
        """Whether a measurement is better than the best so far, or there is none that is a number."""
        by, here = self.settings.best_by, self.here
        if by == "loss":
            return here.best is None or math.isnan(here.best) or loss < here.best
        best = here.measures.get(by, math.nan)
        return math.isnan(best) or measures[by] > best

    def _stale(self) -> bool:
        return bool(self.settings.early_stop) and self.here.stale >= self.settings.early_stop

    def _save(self, better: bool) -> None:
        self.here.sampler, self.here.seconds = self.sampler.state(), self.elapsed()
        self.saved = time.monotonic()
        if self.main:
            self.here.logs = {name: log.length() for name, log in self.logs.items()}
            state.write(self.path, self.here, self.optimizer.state() | self.held)
        self._save_adapters(better)

    def _save_adapters(self, better: bool) -> None:
        for name in ("best", "last") if better else ("last",):
            self.save_adapter(name)
