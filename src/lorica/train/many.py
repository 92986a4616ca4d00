"""Several adapters trained in one pass: they share the frozen base and every forward, and nothing else.

    sweep = many.train(model, tok, "support.jsonl", {"r4": TrainSettings(rank=4), "r8": TrainSettings(rank=8)})

Each round draws the next batch of every member that still has updates to make and lays all of them end to end, those
of one member together, in packs of the size that the machine likes. A token is changed only by its own member's
factors, so the gradients never mix, and one backward pass of

    sum_m (1 / N_m) sum_i l_mi          N_m predicted tokens in the update of member m, with losses l_mi

gives each member exactly its own. Then each clips, checks and steps by itself: its result is the one of `lorica.train`
with the same settings (law 5). A member that ends, or whose loss is no number, leaves; the others do not notice.

With batches that fill no pack by themselves this is faster than one after another, and never slower otherwise.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from lorica import patch
from lorica.data import Example
from lorica.data.pack import divided, micro_tokens
from lorica.errors import LoricaError, all_faults
from lorica.evaluate.causal import evaluating
from lorica.passes import Passes
from lorica.train import guards, ranking, start
from lorica.train.examples import Prepared, labels_in, prepare
from lorica.train.folder import new
from lorica.train.forecast import arranged, forecast
from lorica.train.loop import loss_scales
from lorica.train.member import Drawn, Member, Report
from lorica.train.memory import peak_rss_bytes, relieve
from lorica.train.ranking import Row
from lorica.train.recipe import method_of
from lorica.train.run import stoppable
from lorica.train.settings import TrainSettings
from lorica.train.setup import about, facts, resolved
from lorica.train.sharing import own_dropout, unusable
from lorica.train.sitting import Stop

# What decides which examples a member gets from a source.
_READING = ("map", "prompt", "completion", "system", "held_out", "max_len", "eval_rows")
REFUSED = "these adapters cannot be trained together:"
_BASE = ""  # an owner without patches


@dataclass(frozen=True)
class Sweep:
    """What came of a training of many.

    Attributes:
        path: the folder: a run folder per member, sweep.json, README.md, pictures.
        rows: the members, best first.
        pick: the member to go on with, empty where none can be told; `why` says it in words.
        seconds: in all; `tokens` read by all members; `peak_rss_bytes` of this process.
        notes: what was left out and why.
    """

    path: Path
    rows: tuple[Row, ...]
    pick: str
    why: str
    seconds: float
    tokens: int
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()


class Interrupted(KeyboardInterrupt):
    """A training of many that was asked to stop, after every member was saved; `sweep` is how far it came."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(f"stopped; continue a member alone with: lorica train --resume {sweep.path}/MEMBER")
        self.sweep = sweep


def train(
    model: nn.Module,
    tok: Any,
    data: Any,
    members: Mapping[str, TrainSettings],
    *,
    out: str | Path | None = None,
    report: Report | None = None,
) -> Sweep:
    """Train one adapter per entry of `members` on one base, together.

    Args:
        model, tok: as `lorica.load` gives them, without an adapter.
        data: what all are trained on (see `examples.prepare`), or a dict with the data of each member.
        members: the settings of each by name (letters, digits, _ and -). They may differ in all but `SHARED`;
            `sample` is not looked at.
        out: the folder, which must not hold anything; default the next ``runs/0001-name``.
        report: called with every event of the members' metrics.jsonl, with their name as `member`.

    Returns:
        The sweep. The model has every member's adapter with its best weights, and the picked one is active.

    Raises:
        LoricaError: with every member that cannot be part of it and why; the model is then as it was.
        Interrupted: Ctrl-C or SIGTERM, after the round at hand and with everything saved.
    """
    began = time.monotonic()
    together = _together(model, tok, data, members)
    name = getattr(model.config, "_name_or_path", "")  # type: ignore[union-attr]
    source = next(iter(together.sets.values())).source
    path = new(out, f"{Path(source or name).stem}-sweep")
    was_training = model.training
    try:
        together.open(path, report or _silence)
        with stoppable() as stop, arranged(model, together.ahead):
            whole = together.go(stop)
        rows = ranking.ranked(together.members, members)
        pick, why = ranking.pick(rows)
        patch.select(model, pick or None)
        told: dict[str, Any] = {
            "seconds": round(time.monotonic() - began, 3),
            "tokens": sum(member.here.tokens for member in together.members),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        known = {"model": name, "data": source} | together.ahead.facts() | told
        notes = (*together.notes, *ranking.write(path, rows, pick, why, known))
    finally:
        together.close()
        model.train(was_training)
    sweep = Sweep(path, tuple(rows), pick, why, **told, notes=notes)
    if not whole:
        raise Interrupted(sweep)
    return sweep


def preview(model: nn.Module, tok: Any, data: Any, members: Mapping[str, TrainSettings]) -> dict[str, dict[str, Any]]:
    """What each member of a training that is not made would say at its start. The model gets their adapters."""
    return _together(model, tok, data, members).facts


def _together(model: nn.Module, tok: Any, data: Any, members: Mapping[str, TrainSettings]) -> _Together:
    if faults := unusable(model, data, members):
        raise all_faults(REFUSED, faults)
    return _Together(model, tok, _sets(tok, data, members), members)


class _Together:
    """The members, and the passes that they share."""

    def __init__(
        self, model: nn.Module, tok: Any, sets: Mapping[str, Prepared], members: Mapping[str, TrainSettings]
    ) -> None:
        self.model, self.sets = model, sets
        self.settings: dict[str, TrainSettings] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.members: list[Member] = []
        self.meta = about(model, tok)
        first = next(iter(members.values()))
        try:
            if faults := self._injected(members):
                raise all_faults(REFUSED, faults)
            pads = (tok.pad_token_id, tok.eos_token_id, 0)
            examples = [
                example for each in {id(each): each for each in sets.values()}.values() for example in each.train
            ]
            pad = next(pad for pad in pads if pad is not None)
            self.passes = Passes(model, examples, pad, first.label_smoothing)
            if faults := self._unmixable(examples) or self._resolved(tok, members):
                raise all_faults(REFUSED, faults)
        except LoricaError:
            if patch.adapters(model):
                patch.eject(model)
            raise
        self.ahead = forecast(model, {name: (sets[name], each) for name, each in self.settings.items()})
        self.facts = {name: each | self.ahead.facts() for name, each in self.facts.items()}
        self.notes = (own,) if (own := own_dropout(model)) else ()
        self.budget = micro_tokens(next(model.parameters()).device, self.passes.dtype)
        self.micro, self.seed = first.micro, first.seed

    def _injected(self, members: Mapping[str, TrainSettings]) -> list[str]:
        faults = []
        for name, settings in members.items():
            # Each starts from the random state in which it would start alone.
            set_seed(settings.seed)
            try:
                patch.inject(self.model, method_of(settings), settings.targets, name)
            except LoricaError as fault:
                faults.append(f"{name}: {fault}")
        return faults

    def _resolved(self, tok: Any, members: Mapping[str, TrainSettings]) -> list[str]:
        """Let each start where it starts, and apply every rule to its settings."""
        faults = []
        for name, settings in members.items():
            patch.select(self.model, name)
            if start.wants(self.model):
                start.at_gradient(self.model, self.passes, self.sets[name].train, settings)
            try:
                self.settings[name] = resolved(self.model, settings, self.sets[name])
                self.facts[name] = facts(self.model, tok, self.sets[name], self.settings[name])
            except LoricaError as fault:
                faults.append(f"{name}: {fault}")
        return faults

    def open(self, path: Path, report: Report) -> None:
        """Make the members' run folders and measure the base."""
        for name, settings in self.settings.items():
            folder = path / name
            folder.mkdir()
            self.members.append(
                Member(name, self.model, self.sets[name], settings, self.facts[name], self.meta, folder, report)
            )
        # Every member starts as the base, which is measured once for each set of rows.
        bases: dict[int, tuple[float, list[tuple[float, int]]]] = {}
        for member in self.members:
            if member.data.held and id(member.data) not in bases:
                (bases[id(member.data)],) = self._losses([(_BASE, member.data.held)])
            neutral = getattr(patch.installed(self.model, member.name).method, "neutral", True)
            own = member.data.held and not neutral
            at_start = self._losses([(member.name, member.data.held)])[0][0] if own else None
            member.begin(bases.get(id(member.data)), at_start)

    def go(self, stop: Stop) -> bool:
        """Train until the last member ends; False if stopped before on request, with everything saved."""
        turn = 0
        while live := [member for member in self.members if member.live]:
            turn += 1
            set_seed(random.Random(f"{self.seed}:{turn}:0").getrandbits(31))
            self._round(live)
            self._measure([member for member in live if not member.fault and member.due()])
            for member in live:
                if not member.fault and member.complete():
                    with _own_fault(member):
                        member.finish()
                elif not member.fault and stop.wanted:
                    member.save()
                elif not member.fault:
                    member.save_if_due()
            if stop.wanted:
                return not any(member.live for member in self.members)
        return True

    def close(self) -> None:
        """Close what the members hold open."""
        for member in self.members:
            member.close()

    def _round(self, live: Sequence[Member]) -> None:
        """One update of each member, from gradients of passes that they share."""
        began = time.perf_counter()
        drawn = {member: member.draw() for member in live}
        self.model.train()
        for scale in loss_scales(self.passes.dtype):
            losses = self._backward(live, [drawn[member] for member in live], scale)
            spent = (time.perf_counter() - began) / sum(drawn[member].tokens for member in live)
            again = []
            for member, loss in zip(live, losses, strict=True):
                with _own_fault(member):
                    if not member.update(loss, drawn[member], spent * drawn[member].tokens, scale):
                        again.append(member)
            if not again:
                return
            live = again

    def _backward(self, live: Sequence[Member], drawn: Sequence[Drawn], scale: float) -> list[float]:
        """The gradients of what some members drew, times `scale`, and each one's loss."""
        laid = [(k, i) for k, each in enumerate(drawn) for i in range(len(each.examples))]
        losses = torch.zeros(len(live), dtype=torch.float64)
        for member in live:
            member.optimizer.clear()
        for piece in divided([len(drawn[k].examples[i].ids) for k, i in laid], self.budget, self.micro):
            here = [laid[place] for place in piece]
            weights = [1 / drawn[k].labels for k, _ in here]
            with self.passes(
                self.model,
                [drawn[k].examples[i] for k, i in here],
                weights=weights,
                keys=[drawn[k].keys[i] for k, i in here],
                owners=[live[k].name for k, _ in here],
            ) as (loss, nats):
                (loss * scale).backward()
            relieve()
            losses.index_add_(0, torch.tensor([k for k, _ in here]), nats.double().cpu() * torch.tensor(weights))
        return losses.tolist()

    def _measure(self, due: Sequence[Member]) -> None:
        found = self._losses([(member.name, member.data.held) for member in due])
        for member, (loss, rows) in zip(due, found, strict=True):
            member.measured(loss, rows)

    @torch.no_grad()
    def _losses(self, asked: Sequence[tuple[str, Sequence[Example]]]) -> list[tuple[float, list[tuple[float, int]]]]:
        """Nats per labelled token of some owners, each on its own rows; and ``(nats, labels)`` of each row."""
        laid = [
            (k, i)
            for k, (_, held) in enumerate(asked)
            for i in sorted(range(len(held)), key=lambda i: -len(held[i].ids))
        ]
        rows: list[list[tuple[float, int]]] = [[(0.0, 0)] * len(held) for _, held in asked]
        with evaluating(self.model), self._unsmoothed():
            for piece in divided([len(asked[k][1][i].ids) for k, i in laid], self.budget, self.micro):
                here = [laid[place] for place in piece]
                examples = [asked[k][1][i] for k, i in here]
                with self.passes(self.model, examples, owners=[asked[k][0] for k, _ in here]) as (_, nats):
                    for (k, i), example, value in zip(here, examples, nats.tolist(), strict=True):
                        rows[k][i] = (value, labels_in([example]))
        return [(math.fsum(nats for nats, _ in each) / sum(count for _, count in each), each) for each in rows]

    @contextlib.contextmanager
    def _unsmoothed(self) -> Iterator[None]:
        """What is measured is the likelihood, whatever is trained."""
        smooth, self.passes.smooth = self.passes.smooth, 0.0
        try:
            yield
        finally:
            self.passes.smooth = smooth

    def _unmixable(self, examples: Sequence[Example]) -> list[str]:
        """What keeps members of this model from sharing a pass, known once the kernels have tried it."""
        quick = self.passes.quick
        if quick is None:
            return [f"{', '.join(self.sets)}: this model takes no packs ({self.passes.note}); train one after another"]
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        faults = []
        for name in self.sets:
            paths = dict.fromkeys(path for path, _ in patch.installed(self.model, name).patches)
            layers = {path: self.model.get_submodule(path) for path in paths}
            for path in paths:
                if layers[path] is head:
                    faults.append(f"{name}: {path} is the output head, which sees labelled tokens only")
            if outside := [path for path in paths if layers[path] not in quick.forwards and layers[path] is not head]:
                kinds = ", ".join(sorted({type(layers[path]).__name__ for path in outside}))
                faults.append(f"{name}: {outside[0]} is no matrix that the kernels know ({len(outside):,} of {kinds})")
        return faults or self._entangled([examples[0], examples[0]])

    @torch.no_grad()
    def _entangled(self, pair: Sequence[Example]) -> list[str]:
        """Whether the model itself mixes the tokens of a pack: a loss over all of them, or layers that see a choice."""
        names = list(self.sets)
        with evaluating(self.model):
            try:
                with self.passes(self.model, pair, weights=[1.0, 1.0], owners=[_BASE, names[0]]) as (loss, nats):
                    added = float(loss) - float(nats.sum())
            except LoricaError as fault:
                return [f"{', '.join(names)}: {fault}"]
        if abs(added) > 1e-4 * abs(float(loss)):
            return [f"{', '.join(names)}: this model adds a loss over all tokens ({added:.3g}, a router's?)"]
        return []


@contextlib.contextmanager
def _own_fault(member: Member) -> Iterator[None]:
    """Let a fault of one member take it out, and leave the others as they are."""
    try:
        yield
    except LoricaError as fault:
        member.take_out(fault)


def _sets(tok: Any, data: Any, members: Mapping[str, TrainSettings]) -> dict[str, Prepared]:
    """The examples of each member; those that read the same in the same way share them."""
    made: dict[tuple, Prepared] = {}
    sets = {}
    for name, settings in members.items():
        own = data[name] if isinstance(data, Mapping) else data
        key = (str(own) if isinstance(own, str | Path) else id(own), *(getattr(settings, key) for key in _READING))
        if key not in made:
            made[key] = prepare(own, tok, settings)
            guards.labelled(made[key].train, "training")
            guards.labelled(made[key].held, "held-out")
        sets[name] = made[key]
    return sets


def _silence(event: object) -> None:
    """The report of a library: none."""
