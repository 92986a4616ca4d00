"""`lorica eval X [DATA] --compare base,Y`: loss and exact match with confidence intervals, side by side."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lorica.cli.parse import Common, WrongUse

if TYPE_CHECKING:
    from lorica.models import Opened
    from lorica.tasks import Task


@dataclass(kw_only=True)
class Settings(Common):
    """Measure X on DATA: loss, perplexity and, where rows have an answer, how many it gives exactly (white space
    aside); of a classifier accuracy, F1 and Matthews, of a regressor Pearson and Spearman. -o FILE keeps the numbers
    and every answer as JSON."""

    x: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="X")]
    """A model, an adapter or a run."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")] = ""
    """Rows, as for train (of a folder, its test part, else its valid part). Default: the rows that run X held out."""
    compare: str = ""
    """What to measure beside X: base, and adapters or runs of the same base model, with commas between."""
    limit: int = 0
    """Measure on this many rows, drawn by a fixed seed; 0 for all."""
    max_new: int | None = None
    """Longest answer in tokens. Default: a few more than the longest right one."""
    batch: int = 16
    """Prompts answered at once."""
    loss_only: bool = False
    """Measure the loss only; answers take most of the time."""
    max_len: int | None = None
    """Longer rows are cut on the right for the loss (tokens). Default: as run X was trained, else 2,048."""
    map: str = ""
    """Columns of a table: prompt=body,completion=category. Default: as run X was trained, if it is a run."""
    prompt: str = ""
    """A template over columns for the prompt: 'Classify: {body}'."""
    completion: str = ""
    """A template over columns for the answer: '{category}'."""
    system: str = ""
    """A system message for rows without one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the base: auto is bf16 where the device computes it natively, else fp32."""
    quantize: Literal["auto", "none", "nf4", "int8"] = "auto"
    """How the base's linear layers are kept: auto is as an adapter was trained."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Measure every contender and print them side by side."""
    from lorica import evaluate, models
    from lorica.cli.terminal import progress
    from lorica.tasks import task_of

    if settings.batch < 1 or settings.limit < 0 or (settings.max_new or 1) < 1:
        raise WrongUse("--batch and --max-new must be 1 or more, --limit 0 or more")
    if not settings.data and not trained_with(settings.x):
        raise WrongUse(f"DATA is missing (it may be left out for a run only, and {settings.x} is none)")
    max_len = settings.max_len or trained_with(settings.x).get("max_len", 2048)
    others = [part.strip() for part in settings.compare.split(",") if part.strip()]
    with progress(settings.quiet or settings.json) as tell:
        how = {"dtype": settings.dtype, "device": settings.device, "quantize": settings.quantize}
        opened = models.open_thing(settings.x, progress=tell, **how)
        task = task_of(opened.model)
        contenders = evaluate.line_up(opened, settings.x, others)
        max_len = min(max_len, task.limit) - evaluate.inserted(opened, contenders)
        rows, what, notes = _given(settings, task) if settings.data else _held_out(settings, opened, task)
        if settings.limit and settings.limit < len(rows):
            chosen = sorted(random.Random(0).sample(range(len(rows)), settings.limit))
            rows, what = [rows[place] for place in chosen], f"{what}, {settings.limit:,} of {len(rows):,} rows"
        scores = []
        for contender in contenders:
            with evaluate.selected(opened, contender):
                scores.append(
                    task.score(
                        opened.model,
                        opened.tok,
                        rows,
                        name=contender.name,
                        answers=not settings.loss_only,
                        max_len=max_len,
                        max_new=settings.max_new,
                        batch=settings.batch,
                        tell=tell,
                    )
                )
    result = _result(what, scores, notes)
    if settings.out:
        from lorica.files import write_atomic

        write_atomic(Path(settings.out), json.dumps(result | {"given": _answers(scores)}, indent=2) + "\n")
    if settings.json:
        return result
    _say(settings, result)
    return 0


def trained_with(thing: str) -> dict[str, Any]:
    """The settings of a run, its data and model among them; nothing where `thing` is no run."""
    from lorica.doors import place
    from lorica.train.folder import SETTINGS, read_settings

    path = place(thing)
    return read_settings(path) if (path / SETTINGS).is_file() else {}


def _columns(settings: Settings) -> dict[str, str | None]:
    """How columns become rows: as the flags say or, if none is given, as the run did."""
    from lorica.tasks import columns_of

    given = columns_of(settings)
    return given if any(given.values()) else {name: trained_with(settings.x).get(name) or None for name in given}


def _given(settings: Settings, task: Task) -> tuple[list[Any], str, list[str]]:
    """Rows, what they are, and what was left out of them."""
    found = task.read(settings.data, _columns(settings))
    for name, part in (("test", found.test), ("valid", found.valid)):
        if part:
            return part, f"{settings.data} ({name})", []
    return found.rows, settings.data, found.faults


def _held_out(settings: Settings, opened: Opened, task: Task) -> tuple[list[Any], str, list[str]]:
    """All rows that a run held out, also beyond its `eval_rows`; refused where its data has changed since."""
    from lorica import data
    from lorica.errors import LoricaError
    from lorica.tasks import columns_of
    from lorica.train.examples import prepare
    from lorica.train.settings import TrainSettings

    trained = trained_with(settings.x)
    if not (source := trained.get("data")):
        raise LoricaError(f"{settings.x} was trained on data in memory: give DATA")
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    before = TrainSettings(**{key: value for key, value in trained.items() if key in known})
    if prepare(source, opened.tok, before, task).fingerprint() != trained["made"]["data_sha256"]:
        raise LoricaError(
            f"{source} is not what {settings.x} was trained on any more, so what it held out is not known: give DATA"
        )
    found = task.read(source, columns_of(before))
    rows = found.valid or data.split(found.rows, fraction=before.held_out)[1]
    if not rows:
        raise LoricaError(f"{settings.x} held nothing out: give DATA")
    return rows, f"{source} (held out by {settings.x})", []


def _result(what: str, scores: list[Any], notes: list[str]) -> dict[str, Any]:
    """All numbers as one object for `--json`."""
    from lorica.evaluate import against

    *others, x = scores
    classes = {score.name: score.classes() for score in scores}
    return {
        "data": what,
        "measures": list(x.measures),
        "results": [score.summary() for score in scores],
        "differences": [against(x, other) for other in others],
        "classes": {name: [row._asdict() for row in rows] for name, rows in classes.items() if rows},
        "notes": list(dict.fromkeys([*notes, *(note for score in scores for note in score.notes)])),
    }


def _answers(scores: list[Any]) -> list[dict[str, Any]]:
    """For each row the right answer and what each contender said."""
    first = scores[0]
    return [
        {"where": where, "reference": right} | {score.name: score.answers[place] for score in scores}
        for place, (where, right) in enumerate(zip(first.asked, first.references, strict=True))
    ]


def _say(settings: Settings, result: dict[str, Any]) -> None:
    from lorica.cli.terminal import say, table

    results, measures = result["results"], result["measures"]
    read = f"   {results[-1]['tokens']:,} loss tokens" if "tokens" in results[-1] else ""
    say(f"{result['data']}   {results[-1]['rows']:,} rows{read}")
    for note in result["notes"]:
        say(f"note: {note}")
    head = ["", "loss", "95 %", *(["ppl"] if read else []), *(word for name in measures for word in (name, "95 %"))]
    table([*head, *(["n"] if "answers" in results[-1] else [])], [_cells(each, measures) for each in results])
    if result["differences"]:
        say()
        head = ["difference", "loss", "95 %", *(word for name in measures for word in (name, "95 %"))]
        table(head, [_change(each, measures) for each in result["differences"]])
    if result["classes"]:
        say()
        _say_classes(result)
    say()
    if settings.out:
        say(f"{settings.out}   the numbers and every answer")
    say(f"next:  lorica chat {settings.x}")


# Shares of the rows, which are read as percentages.
_SHARES = ("exact", "accuracy")


def _cells(found: dict[str, Any], measures: list[str]) -> list[str]:
    cells = [found["name"], f"{found['loss']:.3f}", f"{found['loss_low']:.3f} to {found['loss_high']:.3f}"]
    if "perplexity" in found:
        cells.append(f"{found['perplexity']:,.2f}")
    for name in measures:
        how = ".1%" if name in _SHARES else ".3f"
        value, low, high = (format(found[f"{name}{end}"], how) for end in ("", "_low", "_high"))
        cells += [value, f"{low} to {high}"]
    return [*cells, f"{found['answers']:,}"] if "answers" in found else cells


def _change(found: dict[str, Any], measures: list[str]) -> list[str]:
    cells = [f"{found['name']} - {found['against']}"]
    for name in ("loss", *measures):
        times, how = (100, "+.1f") if name in _SHARES else (1, "+.3f")
        value, low, high = (format(times * found[f"{name}{end}"], how) for end in ("", "_low", "_high"))
        cells += [f"{value} points" if name in _SHARES else value, f"{low} to {high}"]
    return cells


def _say_classes(result: dict[str, Any]) -> None:
    """Each answer with its support, the F1 of every contender, and precision and recall of X."""
    from lorica.cli.terminal import table

    *others, (name, own) = result["classes"].items()
    head = ["answer", "n", "precision", "recall", f"F1 {name}", *(f"F1 {other}" for other, _ in others)]
    rows = [
        [_label(row["label"]), f"{row['support']:,}"]
        + [f"{row[key]:.2f}" for key in ("precision", "recall", "f1")]
        + [f"{there[place]['f1']:.2f}" for _, there in others]
        for place, row in enumerate(own)
    ]
    means = [f"{sum(row['f1'] for row in there) / len(there):.2f}" for there in (own, *(there for _, there in others))]
    table(head, [*rows, ["mean", "", "", "", *means]])


def _label(text: str) -> str:
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if len(shown) <= 40 else shown[:37] + "..."
