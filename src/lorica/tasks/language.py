"""Language modelling: rows of text, the loss of the labelled tokens, answers that are generated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lorica import data, evaluate
from lorica.data import Encoded, Example, Record, Records
from lorica.evaluate import Score
from lorica.evaluate.causal import require
from lorica.passes import Passes


@dataclass(frozen=True)
class Language:
    """The task of a model that continues text. A row is a `Record`."""

    name: ClassVar[str] = "lm"
    labels: ClassVar[tuple[str, ...]] = ()
    limit: ClassVar[int] = 1 << 30  # of tokens in a text; whether a model has places for them, `insertion` asks
    measures: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "nats per token"

    def read(self, source: str | Path, columns: Mapping[str, str | None], answers: bool = True) -> Records:
        """See `data.read`."""
        return data.read(source, **columns, answers=answers)

    def encode(self, rows: Sequence[Record], tok: Any, max_len: int) -> Encoded:
        """See `data.encode`."""
        return data.encode(rows, tok, max_len)

    def passes(self, model: Any, tok: Any, examples: Sequence[Example], smooth: float = 0.0) -> Passes:
        """See `Passes`."""
        if model.get_output_embeddings() is None:
            require(model)
        pads = (tok.pad_token_id, tok.eos_token_id, 0)
        return Passes(model, examples, next(token for token in pads if token is not None), smooth)

    def measure(self, model: Any, examples: Sequence[Example]) -> tuple[float, dict[str, float]]:
        """The loss of examples while training; there is no other measure."""
        return evaluate.loss(model, examples).loss, {}

    def samples(self, model: Any, tok: Any, examples: Sequence[Example], length: int) -> list[dict[str, str]]:
        """Examples as prompts, each with the right answer and the model's own of at most `length` tokens."""
        asked = [question_and_answer(example) for example in examples]
        texts = evaluate.generate(model, tok, [ids for ids, _ in asked], max_new=length) if asked else []
        found = []
        for (ids, answer), text in zip(asked, texts, strict=True):
            prompt, reference = (tok.decode(part, skip_special_tokens=True) for part in (ids, answer))
            found.append({"prompt": prompt, "reference": reference, "text": text})
        return found

    def score(self, model: Any, tok: Any, rows: Sequence[Record], **how: Any) -> Score:
        """See `evaluate.measure`."""
        return evaluate.measure(model, tok, rows, **how)

    def talk(self, model: Any, tok: Any, **how: Any) -> evaluate.Talk:
        """See `evaluate.Talk`."""
        return evaluate.Talk(evaluate.Here(model, tok), **how)

    def asked(self, line: str, system: str) -> Record:
        """A line of text as a prompt."""
        return Record("pair", prompt=line, system=system)

    def answering(
        self, rows: Sequence[dict[str, Any]], asked: Sequence[Record], tok: Any, **how: Any
    ) -> evaluate.Answering:
        """Rows to be answered with text; see `evaluate.Answering`."""
        return evaluate.Answering(rows, [data.prompt_ids(record, tok)[0] for record in asked], **how)

    def shown(self, example: Example, tok: Any) -> list[tuple[str, bool]]:
        """The example as text in runs, learnt or not."""
        return data.marked(example, tok)

    def notes(self, train: Sequence[Example], held: Sequence[Example]) -> list[str]:
        """What a person should know of the examples as a whole."""
        return []

    def counts(self, examples: Sequence[Example]) -> dict[str, int]:
        """How many examples each label has; there are no labels."""
        return {}

    def about(self, model: Any, tok: Any) -> dict[str, str]:
        """What an adapter says of itself: the chat template and stop tokens it was trained with."""
        stops = [tok.decode([token]) for token in evaluate.stop_ids(model, tok)]
        return {"chat_template": tok.chat_template or "", "stop_tokens": json.dumps(stops)}


def question_and_answer(example: Example) -> tuple[list[int], list[int]]:
    """What to generate from, and what is expected: an example's ids before and in its last run of labels.

    Text that is learnt from its beginning is cut in the middle.
    """
    end = max(i for i, flag in enumerate(example.loss) if flag) + 1
    start = end
    while start and example.loss[start - 1]:
        start -= 1
    if start <= 1:
        start = max(1, end // 2)
    return example.ids[:start], example.ids[start:end]
