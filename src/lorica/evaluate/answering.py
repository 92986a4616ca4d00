"""Answers to many rows in a file: in order, a chunk at a time, and continued where a killed run stopped.

`out.jsonl` grows by whole chunks of lines. Beside it `out.jsonl.made.json` says what the answers depend on: a run with
other rows, another model or other settings does not add to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica import doors
from lorica.errors import LoricaError, all_faults
from lorica.evaluate.generation import generate
from lorica.files import write_atomic

# Batches to a chunk: enough prompts for lengths to be sorted, and seconds of work that a kill can cost.
BATCHES = 4
# Of a model, prompts and a progress to report to: what is added to each row.
Judge = Callable[[Any, Sequence[Any], Callable[[int, int], None]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Answering:
    """Rows with their prompts (token ids), and how they are answered: each row comes back with `column` added.

    The answers to a chunk depend on nothing before it, so a continued run writes what an uninterrupted one would.
    `judge` answers prompts in another way than by text, and adds the columns `beside` too.
    """

    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    column: str = "output"
    max_new: int = 128
    batch: int = 16
    temperature: float = 0.0
    seed: int = 0
    judge: Judge | None = None
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_new < 1:
            raise LoricaError(f"batch is {self.batch} and max_new is {self.max_new}; both must be 1 or more")
        for column in (self.column, *self.beside):
            if taken := sum(column in row for row in self.rows):
                raise LoricaError(
                    f"{taken:,} rows have a column {column!r} already; choose another for the answers, "
                    f"such as --column answer"
                )

    @property
    def chunk(self) -> int:
        """Rows to a chunk."""
        return self.batch * BATCHES

    def lines(
        self, model: Any, tok: Any, first: int = 0, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[list[str]]:
        """The rows from `first` on (a multiple of `chunk`) as lines of JSON, a chunk at a time."""
        for start in range(first, len(self.rows), self.chunk):
            part = slice(start, start + self.chunk)

            def shown(done: int, of: int, start: int = start) -> None:
                if progress:
                    progress(start + done, len(self.rows))

            both = zip(self.rows[part], self._answers(model, tok, part, shown), strict=True)
            yield [json.dumps({**row, **answer}, ensure_ascii=False, default=str) for row, answer in both]

    def _answers(self, model: Any, tok: Any, part: slice, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """What is added to each row of a chunk."""
        if self.judge is not None:
            return self.judge(model, self.prompts[part], progress)
        texts = generate(
            model,
            tok,
            self.prompts[part],
            max_new=self.max_new,
            batch=self.batch,
            temperature=self.temperature,
            seed=self.seed + part.start,
            progress=progress,
        )
        return [{self.column: text} for text in texts]

    def write(
        self,
        model: Any,
        tok: Any,
        out: str | Path,
        made: dict[str, Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Answer what `out` lacks; returns how many rows it had already.

        `made` says what the answers depend on. LoricaError where `out` was made otherwise, or by something else.
        """
        out = Path(out)
        there = self._there(out, made)
        with open(out, "ab") as file:
            for lines in self.lines(model, tok, there, progress):
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        return there

    def _there(self, out: Path, made: dict[str, Any]) -> int:
        """Rows that `out` has already. What is left of an unfinished chunk is cut off."""
        about = out.with_name(f"{out.name}.made.json")
        if not out.exists() or not out.stat().st_size:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(about, json.dumps(made, indent=2, ensure_ascii=False) + "\n")
            return 0
        if not about.is_file():
            raise LoricaError(f"{out} is there already and was not made by this command; give another -o, or remove it")
        before = doors.json_object(about)
        faults = [
            f"{key} was {before.get(key)!r}, is {made.get(key)!r}"
            for key in {**before, **made}
            if before.get(key) != made.get(key)
        ]
        if faults:
            raise all_faults(f"{out} was made otherwise; give another -o, or remove it:", faults)
        content = out.read_bytes()
        whole = content.count(b"\n")
        keep = whole if whole >= len(self.rows) else whole - whole % self.chunk
        size = len(b"".join(content.splitlines(keepends=True)[:keep]))
        if size < len(content):
            os.truncate(out, size)
        return keep
