"""Classification and regression of one text or a pair, by transformers' models for sequence classification."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica import patch
from lorica.data import Encoded, LabelledExample, LabelledRow, Records, encode_labelled, read_labelled
from lorica.data.sequences import balance, counts
from lorica.evaluate import Answering
from lorica.evaluate.agreement import MEASURES, missing
from lorica.evaluate.judgement import Judgement
from lorica.evaluate.judging import judge, outputs_of, row_losses
from lorica.evaluate.verdicts import Verdicts, told
from lorica.targets import FRESH


@dataclass(frozen=True)
class Sequences:
    """The task of a model that tells `labels` apart, or predicts a number where there is only one.

    `limit` is the longest sequence that the model takes, in tokens, `inserts` of them special tokens of the active
    adapter. A row is a `LabelledRow`.
    """

    labels: tuple[str, ...]
    limit: int
    inserts: int = 0

    @property
    def name(self) -> str:
        """`classify` or `regress`."""
        return "regress" if len(self.labels) == 1 else "classify"

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what is measured beside the loss."""
        return MEASURES[self.name]

    @property
    def unit(self) -> str:
        """What the loss is in."""
        return "nats per row" if self.name == "classify" else "mean squared error"

    def read(self, source: str | Path, columns: Mapping[str, str | None], answers: bool = True) -> Records:
        """See `data.read_labelled`."""
        return read_labelled(source, self.name, map=columns.get("map"), answers=answers)

    def encode(self, rows: Sequence[LabelledRow], tok: Any, max_len: int, known: bool = True) -> Encoded:
        """See `data.encode_labelled`."""
        limit = min(max_len, self.limit, tok.model_max_length)
        return encode_labelled(rows, tok, self.labels, limit, known)

    def passes(self, model: Any, tok: Any, examples: Sequence[LabelledExample], smooth: float = 0.0) -> SequencePasses:
        """See `SequencePasses`."""
        return SequencePasses(model, tok.pad_token_id, smooth)

    def measure(self, model: Any, examples: Sequence[LabelledExample]) -> tuple[float, dict[str, float]]:
        """The loss of examples and how well the answers agree, while training."""
        found = Verdicts.of(examples, judge(model, examples), self.labels)
        return found.loss, found.measured()

    def samples(self, model: Any, tok: Any, examples: Sequence[LabelledExample], length: int) -> list[dict[str, str]]:
        """Examples with the right answer and the model's own."""
        if not examples:
            return []
        found = Verdicts.of(examples, judge(model, examples), self.labels)
        both = zip(examples, found.references, found.answers, strict=True)
        return [
            {"prompt": tok.decode(each.ids, skip_special_tokens=True), "reference": right, "text": said}
            for each, right, said in both
        ]

    def score(
        self, model: Any, tok: Any, rows: Sequence[LabelledRow], *, name: str, max_len: int, tell: Any, **_: Any
    ) -> Verdicts:
        """Outputs beside what is right, for `lorica eval`."""
        encoded = self.encode(rows, tok, max_len)
        examples: Any = encoded.examples
        said = judge(model, examples, progress=lambda done, total: tell(name, done, total))
        new = "its head is new and was drawn at random" if getattr(model, FRESH, ()) and not patch.active(model) else ""
        notes = [*encoded.report.notes, missing(len(self.labels)), f"{name}: {new}" if new else ""]
        return Verdicts.of(examples, said, self.labels, name, list(filter(None, notes)))

    def say(self, model: Any, tok: Any, texts: Sequence[str]) -> dict[str, Any]:
        """What the model says of one text or a pair: a label with all probabilities, or a score."""
        row = LabelledRow(tuple(texts), None)
        examples: Any = self.encode([row], tok, self.limit - self.inserts, known=False).examples
        return told(judge(model, examples)[0], self.labels)

    def talk(self, model: Any, tok: Any, **_: Any) -> Judgement:
        """The model asked one text at a time."""
        return Judgement(model, lambda texts: self.say(model, tok, texts))

    def asked(self, line: str, system: str) -> LabelledRow:
        """A line of text as a row without its label."""
        return LabelledRow((line,), None)

    def answering(
        self,
        rows: Sequence[dict[str, Any]],
        asked: Sequence[LabelledRow],
        tok: Any,
        *,
        column: str,
        batch: int,
        **_: Any,
    ) -> Answering:
        """Rows to be judged: each gets its label and all probabilities, or its score."""

        def judged(model: Any, examples: Sequence[Any], progress: Any) -> list[dict[str, Any]]:
            said = [told(outputs, self.labels) for outputs in judge(model, examples, progress=progress)]
            return [{column if key in ("label", "score") else key: each[key] for key in each} for each in said]

        prompts: Any = self.encode(asked, tok, self.limit - self.inserts, known=False).examples
        beside = ("probabilities",) if self.name == "classify" else ()
        return Answering(rows, prompts, column=column, batch=batch, judge=judged, beside=beside)

    def shown(self, example: LabelledExample, tok: Any) -> list[tuple[str, bool]]:
        """The example as text, and what is learnt of it."""
        right = self.labels[int(example.target)] if self.name == "classify" else f"{example.target:g}"
        return [(tok.decode(example.ids) + " -> ", False), (right, True)]

    def notes(self, train: Sequence[LabelledExample], held: Sequence[LabelledExample]) -> list[str]:
        """What a person should know of the examples as a whole: uneven classes, and measures that cannot be had."""
        lacking = [note] if (note := missing(len(self.labels))) else []
        return lacking + (balance(train, held, self.labels) if self.name == "classify" else [])

    def counts(self, examples: Sequence[LabelledExample]) -> dict[str, int]:
        """How many examples each label has; none for numbers."""
        return counts(examples, self.labels) if self.name == "classify" else {}

    def about(self, model: Any, tok: Any) -> dict[str, str]:
        """What an adapter says of itself: the labels."""
        return {"labels": json.dumps(self.labels)}


class SequencePasses:
    """The loss of labelled examples under a model; used as `Passes` is.

    Rows are padded, since a head reads each row of a batch at a place of its own, which a pack has not. An update is
    the sum of row losses over its rows however it is cut (law 4), the model's own dropout aside.
    """

    quick = None
    note = "batches are padded, rows of like length together"

    def __init__(self, model: Any, pad_id: int, smooth: float = 0.0) -> None:
        self.model, self.pad_id, self.smooth = model, pad_id, smooth
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype

    @contextlib.contextmanager
    def __call__(
        self, model: nn.Module, examples: Sequence[Any], keys: Sequence[int] = ()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The mean loss of the rows, and each row's; the backward pass belongs into the block."""
        outputs = outputs_of(model, examples, self.pad_id, self.model)
        targets = torch.tensor([example.target for example in examples], device=outputs.device)
        losses = row_losses(outputs, targets, self.smooth)
        yield losses.mean(), losses.detach()


def longest(model: Any) -> int:
    """How many tokens of a sequence a model has positions for."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    for path, module in model.named_modules():
        # RoBERTa and its kin number the positions from after the padding's on.
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return positions
