"""`lorica data DATA -m MODEL`: what the model will see, with the tokens that carry loss marked."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lorica.cli.parse import Common
from lorica.errors import visible

if TYPE_CHECKING:
    from lorica.data import Encoded, Records
    from lorica.tasks import Task


@dataclass(kw_only=True)
class Settings(Common):
    """Show what training on DATA would look like for a model: counts, lengths, faults and one marked example."""

    data: tyro.conf.Positional[str]
    """A .jsonl, .json, .csv or .parquet file, a folder with train/valid/test files, or a hub id (user/name:split)."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = ""
    """The model whose tokenizer and chat template are used; without it only the rows are looked at."""
    task: Literal["auto", "lm", "classify", "regress"] = "auto"
    """What would be learnt: text (lm), a label (classify) or a score (regress); auto: text."""
    map: str = ""
    """Names of columns, for a table of another format: prompt=body,completion=category; text=body,label=kind."""
    prompt: str = ""
    """A prompt made of columns: 'Classify: {body}'."""
    completion: str = ""
    """The answer made of columns: '{category}'."""
    system: str = ""
    """A system prompt for rows that have none."""
    max_len: int = 2048
    """Longer rows are cut on the right, or dropped where no answer would be left (tokens)."""
    example: int = 1
    """Which example to show, counted from 1."""


def run(settings: Settings) -> dict[str, Any]:
    """Read, encode, print; returns everything as one object for `--json`."""
    from lorica import models
    from lorica.tasks import columns_of, task_for

    task = task_for(settings.task, settings.data, columns_of(settings), settings.model)
    found = task.read(settings.data, columns_of(settings))
    result: dict[str, Any] = {
        "data": settings.data,
        "format": found.format,
        "rows": {"train": len(found), "valid": len(found.valid or []), "test": len(found.test or [])},
        "duplicates": found.duplicates,
        "empty": found.empty,
        "faults": found.faults,
    }
    _say_rows(settings, found)
    if settings.model:
        tok = models.load_tokenizer(settings.model)
        encoded: Any = task.encode(found.rows, tok, settings.max_len)
        shown = encoded.examples[min(max(settings.example, 1), len(encoded.examples)) - 1]
        runs = task.shown(shown, tok)
        encoded.report.notes += task.notes(encoded.examples, [])
        if task.labels:
            result["labels"] = task.counts(encoded.examples)
        result["tokens"] = {**asdict(encoded.report), "loss_share": encoded.report.loss_share}
        result["example"] = {"where": shown.where, "runs": [{"text": text, "loss": learnt} for text, learnt in runs]}
        if not settings.json:
            _say_labels(task, encoded)
            _say_tokens(settings, encoded, runs, shown.where)
    _say_next(settings)
    return result


def _say_rows(settings: Settings, found: Records) -> None:
    from lorica.cli.terminal import say

    if settings.json:
        return
    parts = [f"{len(found):,} row" + "s" * (len(found) != 1)]
    parts += [f"{len(rows):,} {name}" for name, rows in (("valid", found.valid), ("test", found.test)) if rows]
    say(f"{settings.data}   {found.format}   {'   '.join(parts)}")
    for fault in found.faults:
        say(f"{'dropped':<10}{fault}")


def _say_labels(task: Task, encoded: Any) -> None:
    """How often each label occurs, or what the scores are like."""
    from lorica.cli.terminal import say

    if counts := task.counts(encoded.examples):
        shares = (f"{visible(name)} {count:,} ({count / len(encoded.examples):.0%})" for name, count in counts.items())
        say(f"{'labels':<10}" + "   ".join(shares))
    elif task.labels:
        scores = sorted(example.target for example in encoded.examples)
        said = {"min": scores[0], "median": scores[len(scores) // 2], "max": scores[-1]}
        say(f"{'scores':<10}" + "   ".join(f"{name} {value:g}" for name, value in said.items()))


def _say_tokens(settings: Settings, encoded: Encoded, runs: list[tuple[str, bool]], where: str) -> None:
    from lorica.cli.terminal import say

    report = encoded.report
    lengths = {"median": report.median, "p95": report.p95, "max": report.longest, "in all": report.tokens}
    say(f"{'tokens':<10}" + "   ".join(f"{name} {value:,}" for name, value in lengths.items()))
    if settings.task in ("auto", "lm"):
        say(f"{'loss on':<10}{report.loss_share:.0%} of tokens ({report.learnt:,})")
    for note in report.notes:
        say(f"{'note':<10}{note}")
    say(f"{'example':<10}{where}")
    say(_marked(runs))


def _marked(runs: list[tuple[str, bool]]) -> str:
    """Loss tokens in colour on a terminal, in brackets elsewhere; what a terminal would obey is shown, not sent."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\x1b[1;32m", "\x1b[0m") if colour else ("\u27e6", "\u27e7")
    shown = ((visible(text), learnt) for text, learnt in runs)
    return "".join(f"{before}{text}{after}" if learnt else text for text, learnt in shown)


def _say_next(settings: Settings) -> None:
    from lorica.cli.terminal import say

    if settings.json:
        return
    flags = {
        "--task": settings.task if settings.task != "auto" else "",
        "--map": settings.map,
        "--prompt": settings.prompt,
        "--completion": settings.completion,
    }
    given = [part for flag, value in {**flags, "--system": settings.system}.items() if value for part in (flag, value)]
    if settings.model:
        say(f"next:  {shlex.join(['lorica', 'train', settings.model, settings.data, *given])}")
    else:
        say(f"next:  {shlex.join(['lorica', 'data', settings.data, *given])} -m MODEL")
