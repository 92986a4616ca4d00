"""`lorica train --sweep` and `--find-lr`: many adapters in one pass, ranked."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.cli.parse import WrongUse, typed
from lorica.train.settings import TrainSettings

if TYPE_CHECKING:
    from lorica.cli.train import Settings
    from lorica.train.many import Sweep


def check(settings: Settings) -> None:
    """Raise `WrongUse` where --sweep or --find-lr cannot be meant as given; before anything is loaded."""
    if not settings.sweep and not settings.find_lr:
        return
    if settings.resume or settings.from_:
        raise WrongUse("--sweep and --find-lr start from the base: leave --resume and --from away")
    if settings.task in ("classify", "regress"):
        raise WrongUse(
            f"--sweep and --find-lr train language models; with --task {settings.task} train one after another"
        )
    if settings.sweep and settings.find_lr:
        raise WrongUse("--find-lr is a sweep by itself: leave it or --sweep away")
    if settings.sweep:
        values(settings.sweep)


def values(parts: Sequence[str]) -> dict[str, list[Any]]:
    """``("r=1", "2", "lr=1e-4")``, as the command line splits a sweep at its commas, to ``{"rank": [1, 2], ...}``.

    A ``+`` stands for the comma of a value that has one. `WrongUse` with all faults.
    """
    from lorica.train.grid import ALIASES, refused

    hints = typing.get_type_hints(TrainSettings)
    found: dict[str, list[Any]] = {}
    faults: list[str] = []
    key = ""
    for part in parts:
        name, equals, text = part.partition("=")
        if equals:
            key = ALIASES.get(name.strip().replace("-", "_"), name.strip().replace("-", "_"))
            if fault := refused(key):
                faults.append(fault)
        elif not key:
            faults.append(f"{part!r} belongs to no setting")
        text = text if equals else part
        if key not in hints or refused(key):
            continue
        try:
            hint = hints[key]
            # Only these have values with commas in them; a number may have a plus sign.
            value = typed(hint, text.replace("+", ",") if hint in (str, tuple[float, float]) else text)
            found.setdefault(key, []).append(value)
        except ValueError as fault:
            faults.append(f"{key} is {text!r}; {fault}")
    if faults:
        raise WrongUse("\n".join(["--sweep is KEY=A,B KEY=C,D ...", *dict.fromkeys(faults)]))
    return found


def run(settings: Settings, base: TrainSettings, model: Any, tok: Any) -> int | dict[str, Any]:
    """Train the grid and rank it; 130 after Ctrl-C, when everything is saved."""
    from lorica.cli.terminal import console
    from lorica.train import many
    from lorica.train.grid import members

    grid = members(base, values(settings.sweep))
    code = 0
    try:
        with _board(settings) as report:
            swept = many.train(model, tok, settings.data, grid, out=settings.out or None, report=report)
    except many.Interrupted as stopped:
        console.print(str(stopped), markup=False)
        swept, code = stopped.sweep, 130
    if settings.json and not code:
        return result(swept)
    _say(swept)
    return code


def plan(settings: Settings, base: TrainSettings, model: Any, tok: Any) -> None:
    """The header of what `run` would do."""
    from lorica.cli.terminal import say
    from lorica.train import many
    from lorica.train.grid import members

    grid = members(base, values(settings.sweep))
    say(f"{len(grid)} adapters in one pass:")
    with _board(settings) as report:
        for name, facts in many.preview(model, tok, settings.data, grid).items():
            if report:
                report({"kind": "start", "member": name} | facts)


def found(settings: Settings, base: TrainSettings, model: Any, tok: Any, keep: bool = True) -> TrainSettings:
    """`base` at the rate that a short sweep finds, which is printed; its folder is kept beside the run's."""
    from lorica.cli.terminal import console, say
    from lorica.train.ranking import cells
    from lorica.train.search import find_lr

    with contextlib.ExitStack() as stack:
        out = f"{settings.out}-lr" if settings.out else None
        if not keep:
            out = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "lr")
        with _board(settings) as report:
            lr, swept = find_lr(model, tok, settings.data, base, out=out, report=report)
    if settings.json:
        console.print(f"lr {lr:g}: {swept.why}", markup=False)
    else:
        _table(cells(swept.rows))
        say(f"lr {lr:g}: {swept.why}" + (f"   {swept.path}" if keep else ""))
        say()
    return dataclasses.replace(base, lr=lr)


def result(swept: Sweep) -> dict[str, Any]:
    """A sweep as one object for `--json`."""
    rows = [
        dataclasses.asdict(row)
        | {"worse": row.worse._asdict() if row.worse else None, "run": str(swept.path / row.name)}
        for row in swept.rows
    ]
    told: dict[str, Any] = {"sweep": str(swept.path), "pick": swept.pick, "why": swept.why, "members": rows}
    told |= {"seconds": swept.seconds, "tokens": swept.tokens, "peak_rss_bytes": swept.peak_rss_bytes}
    return told | {"notes": list(swept.notes)}


def _say(swept: Sweep) -> None:
    from lorica.cli.terminal import say
    from lorica.train.ranking import cells
    from lorica.train.report import duration, size

    _table(cells(swept.rows))
    say()
    say(f"{swept.pick}: {swept.why}" if swept.pick else swept.why)
    for note in swept.notes:
        say(f"note: {note}")
    pace = f"{swept.tokens / swept.seconds:,.0f} tok/s" if swept.seconds else ""
    took = f"{duration(swept.seconds)}   {pace}   peak {size(swept.peak_rss_bytes)}"
    say(f"{swept.path}   README.md   sweep.json   {took}")
    if swept.pick:
        say(f"next:  lorica chat {swept.path / swept.pick}      lorica eval {swept.path / swept.pick} test.jsonl")
    else:
        say(f"next:  lorica plot {swept.path / swept.rows[0].name}")


def _table(rows: Sequence[Sequence[str]]) -> None:
    from lorica.cli.terminal import table

    table(rows[0], rows[1:])


@contextlib.contextmanager
def _board(settings: Settings) -> Iterator[Any]:
    """A `report` for `many.train`: a header, a line for each member that ends, and a bar on a terminal."""
    from lorica.cli.terminal import console, progress

    if settings.quiet:
        yield None
        return
    with progress(quiet=not console.is_terminal) as bar:
        yield _Board(bar)


class _Board:
    """Takes the events of all members."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.steps: dict[str, int] = {}
        self.done = 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one event; kinds that have nothing to show are passed over."""
        if show := getattr(self, f"_{event['kind']}", None):
            show(event["member"], event)

    def _start(self, member: str, event: Mapping[str, Any]) -> None:
        from lorica.train.report import number, planned

        if not self.steps:
            self._line(f"model   {event['model']}   {number(event['parameters'])} {event['dtype']}   {event['device']}")
            held = f"{event['held_out']:,} held out"
            self._line(f"data    {Path(event['data']).name or 'examples'}   {event['train']:,} train, {held}")
            for label, text in planned(event):
                self._line(f"{label:<8}{text}")
            if "run" in event:
                self._line(f"out     {Path(event['run']).parent}")
        self.steps[member] = event["steps"]
        rate = f"lr {event['lr']:g} {event['schedule']}"
        what = f"{event['detail']}, {number(event['trainable'])}"
        self._line(f"        {member}   {what}   {rate}   {event['steps']:,} steps")

    def _step(self, member: str, event: Mapping[str, Any]) -> None:
        self.done += 1
        self.bar("training", self.done, sum(self.steps.values()))

    def _note(self, member: str, event: Mapping[str, Any]) -> None:
        self._line(f"{member}   taken out: {event['text']}")

    def _end(self, member: str, event: Mapping[str, Any]) -> None:
        loss = (
            "nothing held out" if event["after"] is None else f"held out {event['before']:.4f} -> {event['after']:.4f}"
        )
        self._line(f"{member}   {loss}   best step {event['best_step']:,} of {event['steps']:,}")

    def _line(self, text: str) -> None:
        from lorica.cli.terminal import console

        console.print(text, markup=False, highlight=False, soft_wrap=True)
