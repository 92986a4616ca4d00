"""`lorica generate X in.jsonl -o out.jsonl`: answer many rows, in order, and go on where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lorica.cli.eval import trained_with
from lorica.cli.parse import Common, WrongUse

if TYPE_CHECKING:
    from lorica.evaluate import Answering
    from lorica.models import Opened
    from lorica.tasks import Task


# What --map calls the columns of answers, which rows that wait for one do not have.
_ANSWERS = ("completion", "output", "label", "score")


@dataclass(kw_only=True)
class Settings(Common):
    """Answer every row of DATA with X. Each row comes back as a line of JSON with the answer added (of a classifier the
    label and all probabilities), in order; without -o on stdout. A run that was stopped goes on when the same line is
    typed again."""

    x: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="X")]
    """A model, an adapter or a run."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Rows, as for train, but answers may be missing; or a .txt file with a prompt on each line."""
    max_new: int = 256
    """Longest answer in tokens."""
    batch: int = 16
    """Prompts answered at once."""
    temperature: float = 0.0
    """0 takes the likeliest tokens; above, tokens are drawn."""
    seed: int = 0
    """Seed of the drawing."""
    column: str = "output"
    """Name of the answers in the rows that come back."""
    unmerged: bool = False
    """Leave the adapter beside the weights; by default it is folded into them first, which is faster."""
    map: str = ""
    """Columns of a table: prompt=body. Default: as run X was trained, if it is a run."""
    prompt: str = ""
    """A template over columns for the prompt: 'Classify: {body}'."""
    system: str = ""
    """A system message for rows without one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the base: auto is bf16 where the device computes it natively, else fp32."""
    quantize: Literal["auto", "none", "nf4", "int8"] = "auto"
    """How the base's linear layers are kept: auto is as an adapter was trained."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Answer what is not answered yet."""
    from lorica import models, patch
    from lorica.cli.terminal import console, progress
    from lorica.tasks import task_of

    if settings.batch < 1 or settings.max_new < 1 or settings.temperature < 0:
        raise WrongUse("--batch and --max-new must be 1 or more, --temperature 0 or more")
    began = time.perf_counter()
    rows = _rows(settings)
    with progress(settings.quiet or settings.json) as tell:
        how = {"dtype": settings.dtype, "device": settings.device, "quantize": settings.quantize}
        opened = models.open_thing(settings.x, progress=tell, **how)
        task = task_of(opened.model)
        job = task.answering(
            rows,
            _asked(settings, rows, task),
            opened.tok,
            column=settings.column,
            max_new=settings.max_new,
            batch=settings.batch,
            temperature=settings.temperature,
            seed=settings.seed,
        )
        made = _made(settings, opened, job)
        if _merges(settings, opened):
            patch.merge(opened.model, keep=False, check=False)

        def shown(done: int, total: int) -> None:
            tell("answers", done, total)

        there = 0
        answered: list[dict[str, Any]] = []
        if settings.out:
            there = job.write(opened.model, opened.tok, settings.out, made, shown)
        else:
            for lines in job.lines(opened.model, opened.tok, progress=shown):
                answered += _passed_on(lines, settings.json)
    seconds = time.perf_counter() - began
    if settings.json:
        told = {"rows": len(rows), "answered": len(rows) - there, "seconds": seconds}
        return told | ({"out": settings.out} if settings.out else {"answers": answered})
    parts = [f"{len(rows):,} rows"] + [f"{there:,} of them were there already"] * bool(there) + [f"{seconds:.1f} s"]
    follow = f"next:  lorica eval {settings.x} DATA" if settings.out else "next:  add -o out.jsonl to keep them"
    if settings.out:
        parts.insert(0, settings.out)
    if not settings.quiet:
        console.print("   ".join(parts), markup=False)
        console.print(follow, markup=False)
    return 0


def _passed_on(lines: list[str], kept: bool) -> list[dict[str, Any]]:
    """A chunk on stdout, or as objects where one object is printed at the end."""
    if kept:
        return [json.loads(line) for line in lines]
    print("\n".join(lines), file=sys.stdout, flush=True)
    return []


def _rows(settings: Settings) -> list[dict[str, Any]]:
    """The rows as they came; a line of text is a row with a prompt."""
    from lorica import doors
    from lorica.data.tables import read_source
    from lorica.errors import LoricaError

    if _is_text(settings):
        columns = _columns(settings)
        if columns["map"] or columns["prompt"]:
            raise LoricaError(f"{settings.data}: lines of text have no columns: leave out --map and --prompt")
        text = doors.text(doors.place(settings.data), doors.LOG_BYTES)
        if lines := [line for line in text.split("\n") if line.strip()]:
            return [{"prompt": line} for line in lines]
        raise LoricaError(f"{settings.data}: has no line of text")
    parts, _ = read_source(settings.data)
    if len(parts) > 1:
        raise LoricaError(f"{settings.data} has several parts ({', '.join(parts)}): name the file, or the split")
    return [row for _, row in parts["train"]]


def _is_text(settings: Settings) -> bool:
    from lorica import doors

    path = doors.place(settings.data)
    return path.suffix.lower() == ".txt" and path.is_file()


def _asked(settings: Settings, rows: list[dict[str, Any]], task: Task) -> list[Any]:
    """Each row as something to answer."""
    columns = _columns(settings)
    if _is_text(settings):
        return [task.asked(row["prompt"], columns["system"] or "") for row in rows]
    return task.read(settings.data, columns, answers=False).rows


def _columns(settings: Settings) -> dict[str, str | None]:
    """How columns become prompts: as the flags say or, if none is given, as run X did."""
    given = {name: getattr(settings, name) for name in ("map", "prompt", "system")}
    if not any(given.values()):
        trained = trained_with(settings.x)
        given = {name: trained.get(name, "") for name in given}
        # Rows that wait for their answer have no column of answers.
        asked = (part for part in given["map"].split(",") if part.split("=")[0].strip() not in _ANSWERS)
        given["map"] = ",".join(asked)
    return {name: value or None for name, value in given.items()}


def _merges(settings: Settings, opened: Opened) -> bool:
    """Whether the answers come from merged weights: what cannot be merged answers as it is."""
    return not settings.unmerged and opened.adapter is not None and not opened.adapter.method.unmergeable


def _made(settings: Settings, opened: Opened, job: Answering) -> dict[str, Any]:
    """All that the answers depend on."""
    from lorica import patch

    rows = json.dumps([job.rows, job.prompts], sort_keys=True, default=str).encode()
    return {
        "rows_sha256": hashlib.sha256(rows).hexdigest(),
        "model": opened.base,
        "model_fingerprint": patch.fingerprint(opened.model),
        "adapter_sha256": opened.adapter.sha256 if opened.adapter else None,
        "merged": _merges(settings, opened),
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        **{name: getattr(job, name) for name in ("column", "max_new", "temperature", "seed")},
        # Drawn tokens follow the batch. The likeliest do not, so that a run out of memory may go on with a smaller one.
        **({"batch": job.batch} if job.temperature > 0 else {}),
    }
