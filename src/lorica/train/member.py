"""One of several adapters in training: its rows, its optimizer, where it stands, and its run folder.

The folder is an ordinary run: `lorica plot`, `chat` and `eval` take it, and one that was stopped is continued alone
with `lorica train --resume`, to the same weights.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lorica import __version__, patch
from lorica.adapter import Adapter
from lorica.data import Example, Sampler
from lorica.errors import LoricaError
from lorica.files import write_atomic
from lorica.formats.card import card
from lorica.train import folder, guards, state
from lorica.train.examples import Prepared, labels_in
from lorica.train.loop import Update, dropout_keys
from lorica.train.memory import peak_bytes, peak_rss_bytes
from lorica.train.optimizer import Optimizer
from lorica.train.settings import TrainSettings, number_of_steps, rate

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Drawn:
    """The examples of one update, longest first, with the seeds of their dropout; `labels` is its normaliser."""

    examples: list[Example]
    keys: list[int]
    labels: int
    tokens: int


@dataclass(eq=False)
class Member:
    """An adapter that lives on `model` under `name`. `settings` are resolved; `facts` are those of `setup.facts`.

    `rows` are ``(nats, labels)`` of each held-out row at the best measurement, `last` is the loss of the last one;
    `fault` says why it was taken out.
    """

    name: str
    model: nn.Module
    data: Prepared
    settings: TrainSettings
    facts: Mapping[str, Any]
    meta: Mapping[str, str]
    path: Path
    report: Report
    here: state.State = field(default_factory=state.State)
    rows: list[tuple[float, int]] = field(default_factory=list)
    last: float | None = None
    fault: str = ""

    def __post_init__(self) -> None:
        self.parameters = patch.trainable(self.model, self.name)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = Optimizer(self.parameters, self.settings)
        self.sampler = Sampler(len(self.data.train), self.settings.batch, self.settings.seed)
        self.steps = number_of_steps(self.settings, len(self.data.train))
        self.device = next(self.model.parameters()).device
        self.watch = guards.Gradients(self.parameters)
        self.ended = False
        self.began = self.saved = time.monotonic()

    @property
    def live(self) -> bool:
        """Whether it still has updates to make."""
        return not self.fault and not self.ended

    def begin(self, before: tuple[float, list[tuple[float, int]]] | None, at_start: float | None) -> None:
        """Write the settings and open the log.

        Args:
            before: the base's held-out loss, and what it is made of.
            at_start: the member's own, if it does not start as the base.
        """
        self.here.data, self.here.base = self.data.fingerprint(), patch.fingerprint(self.model)
        fixed = {"data_sha256": self.here.data, "base_fingerprint": self.here.base, "lorica": __version__}
        name = getattr(self.model.config, "_name_or_path", "")  # type: ignore[union-attr]
        named = {key: text for key, text in (("model", name), ("data", self.data.source)) if text}
        folder.write_settings(self.path, named | self.settings.values(), fixed)
        self.logs = {name: folder.Log(self.path / name) for name in (folder.METRICS, folder.SAMPLES)}
        self.log({"kind": "start", "run": str(self.path), "first": 0} | dict(self.facts) | fixed)
        if before is not None:
            self.here.before, self.rows = before
            said = {"held_out": before[0]} if at_start is None else {"held_out": at_start, "base": before[0]}
            self.log({"kind": "eval", "step": 0} | said | {"best": False, "elapsed": self.elapsed()})

    def draw(self) -> Drawn:
        """The examples of the next update."""
        drawn = next(self.sampler)
        keys = dropout_keys(self.settings.seed, self.here.step + 1, drawn)
        batch = sorted(zip((self.data.train[i] for i in drawn), keys, strict=True), key=lambda each: -len(each[0].ids))
        examples = [example for example, _ in batch]
        tokens = sum(len(example.ids) for example in examples)
        return Drawn(examples, [key for _, key in batch], labels_in(examples), tokens)

    def update(self, loss: float, drawn: Drawn, seconds: float, scale: float) -> bool:
        """Clip and step at its own rate, from the gradients that are there; LoricaError where it must be taken out.

        Args:
            loss: of what was drawn.
            seconds: its share of the passes.
            scale: what the loss was multiplied by.

        Returns:
            Whether it was made: not where a gradient is no number and may be one at a smaller scale.
        """
        began = time.perf_counter()
        settings, step = self.settings, self.here.step + 1
        norm = float(self.optimizer.clip(settings.clip, scale))
        if scale > 1 and not math.isfinite(norm):
            return False
        guards.finite(step, loss, norm)
        assert settings.lr is not None, "settings are resolved before a member"
        lr = rate(step, self.steps, settings.lr, settings.schedule, settings.warmup)
        self.optimizer.step(lr)
        seconds += time.perf_counter() - began
        self.watch.check(last=step == self.steps)
        self.here.step = step
        self.here.tokens += drawn.tokens
        made = Update(step, loss, lr, norm, drawn.tokens, drawn.labels, seconds)
        now = {"elapsed": self.elapsed(), "memory": peak_bytes(self.device)}
        self.log({"kind": "step"} | dataclasses.asdict(made) | now)
        return True

    def due(self) -> bool:
        """Whether it is to be measured after the update it just made."""
        every = self.settings.eval_every
        return bool(self.data.held) and (self.here.step == self.steps or bool(every and self.here.step % every == 0))

    def measured(self, loss: float, rows: list[tuple[float, int]]) -> None:
        """Take down a measurement; the best weights are kept in best/."""
        here = self.here
        self.last = loss
        better = here.best is None or math.isnan(here.best) or loss < here.best
        if better:
            here.best, here.best_step, here.stale, self.rows = loss, here.step, 0, rows
        else:
            here.stale += 1
        self.log({"kind": "eval", "step": here.step, "held_out": loss, "best": better, "elapsed": self.elapsed()})
        if better:
            self._save_adapter("best")

    def complete(self) -> bool:
        """Whether its last update is made, or `early_stop` ends it."""
        stale = bool(self.settings.early_stop) and self.here.stale >= self.settings.early_stop
        return stale or self.here.step == self.steps

    def save(self) -> None:
        """Write the state from which it can be continued alone, and last/."""
        self.here.sampler, self.here.seconds = self.sampler.state(), self.elapsed()
        self.here.logs = {name: log.length() for name, log in self.logs.items()}
        self.saved = time.monotonic()
        state.write(self.path, self.here, self.optimizer.state() | patch.installed(self.model, self.name).held())
        self._save_adapter("last")

    def save_if_due(self) -> None:
        """`save`, where the last time is long enough ago."""
        if time.monotonic() - self.saved >= self.settings.save_every:
            self.save()

    def take_out(self, fault: LoricaError) -> None:
        """End it early; last/ holds the weights from before the fault."""
        self.fault = str(fault)
        self.log({"kind": "note", "text": self.fault})
        self._save_adapter("last")
        self.optimizer.close()

    def finish(self) -> None:
        """Put the best weights on the model, write the card and the line that marks the run as finished."""
        here = self.here
        guards.changed(Adapter.of(self.model, self.name), here.step)
        if self.settings.keep == "all":
            self.save()
        else:
            self._save_adapter("last")
        if not self.data.held:
            here.best_step = here.step
            self._save_adapter("best")
        self.take_best()
        told = {
            "steps": here.step,
            "planned": self.steps,
            "best_step": here.best_step,
            "before": here.before,
            "after": here.best,
            "seconds": self.elapsed(),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        about = dict(self.facts) | told | {"run": self.path.name, "curve": False}
        write_atomic(self.path / "README.md", card(about))
        self.log({"kind": "end"} | told | {"peak_bytes": peak_bytes(self.device), "notes": []})
        self.ended = True
        self.optimizer.close()

    def take_best(self) -> None:
        """Give the model the weights in best/, where there are any."""
        if not (self.path / "best").exists():
            return
        patch.installed(self.model, self.name).put(Adapter.load(self.path / "best").tensors)

    def log(self, event: Mapping[str, Any]) -> None:
        """Add an event to metrics.jsonl and pass it on with the member's name."""
        self.logs[folder.METRICS].add(event)
        self.report({"member": self.name} | dict(event))

    def elapsed(self) -> float:
        """Seconds since it began, those in which its neighbours were trained among them."""
        return round(time.monotonic() - self.began, 3)

    def close(self) -> None:
        """Close the logs and free the gradients."""
        for log in getattr(self, "logs", {}).values():
            log.close()
        self.optimizer.close()

    def _save_adapter(self, name: str) -> None:
        if self.here.step:
            Adapter.of(self.model, self.name, self.meta).save(self.path / name)
