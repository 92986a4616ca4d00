"""The whole story on a real model: load, measure, fine-tune, measure again, merge, unmerge, switch.

The task: a function's signature and a request in, one Python call out. A row counts as solved if its call parses and
the benchmark it comes from accepts the name and every argument. No function that is tested was trained on.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import lorica
from lorica import data, evaluate, models
from lorica.data import Record, bfcl
from lorica.train import Run, train
from lorica.train.memory import peak_rss_bytes
from lorica.train.settings import TrainSettings

MODEL = "smollm2-135m"
NOTE = "the rows are a public benchmark's (BFCL), used here to demonstrate; this is no claim about that benchmark"
MAX_NEW = 64  # the longest right answer has 61 tokens
SWITCHES = 21

Tell = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Measured:
    """A model on the test rows: loss in nats per token of the right answer; share solved with its 95 % interval."""

    loss: float
    metric: float
    low: float
    high: float
    parses: float
    rows: int
    answers: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Everything but the answers."""
        return {key: value for key, value in asdict(self).items() if key != "answers"}


def quickstart(
    settings: TrainSettings, *, rows: int = 50, out: str | None = None, tell: Tell, report: Callable[[Any], None] | None
) -> dict[str, Any]:
    """Run it all; returns what the command prints.

    Args:
        settings: of the training.
        rows: test rows that are answered.
        out: the run folder; default the next one under `runs/`.
        tell: called with what is being done, how much of it is done, and how much there is.
        report: called with every event of the training.
    """
    began = time.perf_counter()
    folder = models.fetch_wheel(**bfcl.WHEEL, progress=tell)
    model, tok = models.load(MODEL, dtype=settings.dtype, device=settings.device, progress=tell)
    about = models.describe(model)
    learn, test = bfcl.rows(folder)
    test = test[:rows]
    before = measure(model, tok, test, test, "base model answers", tell)
    shown = [bfcl.with_examples(row, learn[:2]) for row in test]
    few_shot = measure(model, tok, test, shown, "base model answers, two examples in the prompt", tell)
    run = train(model, tok, learn, settings, out=out, report=report)
    count = lorica.count(model)
    merging = _merging(model, tok, test)
    after = measure(model, tok, test, test, "tuned model answers", tell)
    lorica.unmerge(model)
    unmerge_exact = _digest(model) == merging.pop("digest")
    return {
        "model": about.title,
        "dtype": about.dtype,
        "run": str(run.path),
        "trainable": count.trainable,
        "total": count.total,
        "share": count.share,
        "adapter_bytes": (run.path / "best" / "adapter_model.safetensors").stat().st_size,
        "model_bytes": about.nbytes,
        "train_rows": len(learn),
        "before": before.summary(),
        "few_shot": few_shot.summary(),
        "after": after.summary(),
        "answers": _side_by_side(test, before, after),
        **merging,
        "unmerge_exact": unmerge_exact,
        "switch_ms": _switch_ms(model),
        "train_seconds": run.seconds,
        "seconds": time.perf_counter() - began,
        "peak_rss_bytes": peak_rss_bytes(),
        "note": NOTE,
        "next": _next(run),
    }


def measure(model: Any, tok: Any, rows: Sequence[Record], asked: Sequence[Record], what: str, tell: Tell) -> Measured:
    """Loss of the right answers to `asked`, and how many of the model's own `rows` accept."""
    loss = evaluate.loss(model, data.encode(asked, tok).examples).loss
    prompts = [data.prompt_ids(row, tok)[0] for row in asked]
    answers = evaluate.generate(
        model, tok, prompts, max_new=MAX_NEW, batch=25, progress=lambda done, total: tell(what, done, total)
    )
    solved = sum(map(bfcl.correct, rows, answers))
    low, high = evaluate.wilson(solved, len(rows))
    parses = sum(map(bfcl.parses, answers)) / len(rows)
    return Measured(loss, solved / len(rows), low, high, parses, len(rows), tuple(answers))


def _merging(model: Any, tok: Any, rows: Sequence[Record]) -> dict[str, Any]:
    """Merge, compared on the beginnings of ten requests."""
    prompts = [data.prompt_ids(row, tok)[0] for row in rows[:10]]
    shortest = min(map(len, prompts))
    digest = _digest(model)
    report = lorica.merge(
        model, check={"input_ids": torch.tensor([ids[:shortest] for ids in prompts], device=model.device)}
    )
    return {
        "digest": digest,
        "max_logit_diff_merged": report.max_logit_diff,
        "same_top_merged": report.same_top,
        "kept_bytes": report.kept_bytes,
    }


def _digest(model: Any) -> str:
    """Of every bit of the weights that are in place."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _switch_ms(model: Any) -> float:
    """Median time to take the adapter off or put it on, unmerged."""
    taken = []
    for place in range(SWITCHES):
        began = time.perf_counter()
        lorica.select(model, None if place % 2 == 0 else "default")
        taken.append(1000 * (time.perf_counter() - began))
    lorica.select(model, "default")
    return statistics.median(taken)


def _side_by_side(rows: Sequence[Record], base: Measured, tuned: Measured) -> list[dict[str, Any]]:
    """The first three rows of the test set, whatever came of them."""
    return [
        {
            "prompt": row.prompt,
            "base": base.answers[place],
            "tuned": tuned.answers[place],
            "solved": bfcl.correct(row, tuned.answers[place]),
        }
        for place, row in enumerate(rows[:3])
    ]


def _next(run: Run) -> list[str]:
    return [
        f"lorica chat {run.path}",
        f"lorica merge {run.path} -o merged",
        f"lorica train {MODEL} yours.jsonl",
    ]
