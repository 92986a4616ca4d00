"""What is printed where: progress and notes on stderr, results on stdout, plain lines when not a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)


def speaks() -> bool:
    """Whether this process prints results: the first of those that were started together (torchrun's RANK)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """One line of the result, as it is."""
    print(text, file=sys.stdout, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Columns of results on stdout: the first (or `left` of them) to the left, numbers to the right."""
    widths = [max(len(str(row[place])) for row in [head, *rows]) for place in range(len(head))]
    for row in [head, *rows]:
        cells = [
            f"{cell:<{width}}" if place < left else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str, float, float], None]]:
    """Yield ``tell(what, done, total)``: a bar on a terminal, one line for each new `what` elsewhere."""
    if quiet:
        yield lambda what, done, total: None
        return
    if not console.is_terminal:
        told: set[str] = set()

        def line(what: str, done: float, total: float) -> None:
            if what not in told:
                told.add(what)
                console.print(what, markup=False)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(what: str, done: float, total: float) -> None:
            for other, task in tasks.items():
                bars.update(task, visible=other == what)
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)  # type: ignore[arg-type]

        yield bar


def size(count: float) -> str:
    """Bytes for a person: 9.8 MB."""
    for unit, unit_size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= unit_size:
            return f"{count / unit_size:,.1f} {unit}"
    return f"{count:.0f} B"
