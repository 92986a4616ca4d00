"""Where the special tokens of a prefix method come in: the active adapter's edit of prompts and examples.

Their ids are those from the vocabulary's size on: first the prefix, then the infix. Everything that gives a model rows
to read does it through this file (training, losses, answers), so the base, an adapter without special tokens and one
with them each read their own.

    decoder    p_1 .. p_lp  prompt  i_1 .. i_li  completion          section 5.1
    encoder    [CLS]  p_1 .. p_lp  text  i_1 .. i_li                 [CLS] stays first: heads read position 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

from torch import nn

from lorica import patch
from lorica.data import LabelledExample
from lorica.errors import LoricaError
from lorica.targets import input_embedding

_POSITIONS = ("wpe", "position_embeddings", "embed_positions")


@dataclass(frozen=True)
class Insertion:
    """Special tokens: `prefix` of them after the first `kept` tokens of a text, `infix` of them after the prompt.

    `first` is the id of the first one: the size of the vocabulary.
    """

    first: int
    prefix: int
    infix: int
    kept: int = 0

    @property
    def size(self) -> int:
        """How many tokens come in."""
        return self.prefix + self.infix

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """A text that is to be continued, or classified."""
        middle = self.first + self.prefix
        infix = range(middle, middle + self.infix)
        return [*ids[: self.kept], *range(self.first, middle), *ids[self.kept :], *infix]

    def examples(self, example: Any) -> list[Any]:
        """An example to learn from. With an infix, one for each answer in it: as the model will meet it.

        LoricaError where an infix has no place, because the example is learnt from its beginning.
        """
        if isinstance(example, LabelledExample):
            return [replace(example, ids=self.prompt(example.ids), segments=self._segments(example.segments))]
        if not self.infix:
            loss = [*example.loss[: self.kept], *[False] * self.prefix, *example.loss[self.kept :]]
            return [replace(example, ids=self.prompt(example.ids), loss=loss)]
        found = []
        for start, stop in _answers(example.loss):
            if start <= 1:
                raise LoricaError(
                    f"{example.where or 'this text'} is learnt from its beginning, so there is no prompt that an infix"
                    " could follow: give --infix 0"
                )
            prompt, answer = self.prompt(example.ids[:start]), example.ids[start:stop]
            loss = [False] * len(prompt) + [True] * len(answer)
            found.append(replace(example, ids=prompt + answer, loss=loss))
        return found

    def _segments(self, numbers: list[int]) -> list[int]:
        """Those of `prompt`: special tokens are of the text that they stand beside."""
        before, after = numbers[:1] * self.prefix, numbers[-1:] * self.infix
        return [*numbers[: self.kept], *before, *numbers[self.kept :], *after]


def insertion(model: nn.Module) -> Insertion | None:
    """What the active adapter inserts; None for nothing."""
    if patch.active(model) is None:
        return None
    prefix, infix = getattr(patch.installed(model).method, "inserts", (0, 0))
    if not prefix + infix:
        return None
    return Insertion(input_embedding(model).num_embeddings, prefix, infix, kept=0 if _causal(model) else 1)  # type: ignore


def edited(model: nn.Module, examples: Sequence[Any]) -> list[list[Any]]:
    """Each example, labelled or not, as the active adapter is to read it; usually one, see `Insertion.examples`.

    LoricaError for those that are longer than the table of the model's positions.
    """
    own = insertion(model)
    found = [own.examples(example) if own else [example] for example in examples]
    most = positions(model)
    long = [each for each in chain.from_iterable(found) if most is not None and len(each.ids) > most]
    if long:
        with_them = f", {own.size} special tokens among them," if own else ""
        raise LoricaError(
            f"{len(long):,} of {len(examples):,} rows are longer{with_them} than the {most:,} positions of"
            f" {type(model).__name__} (the longest {max(len(each.ids) for each in long):,}; first: {long[0].where}):"
            f" give --max-len {most:,}"
        )
    return found


def asked(model: nn.Module, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Each prompt as the active adapter is to read it."""
    own = insertion(model)
    return [own.prompt(ids) for ids in prompts] if own else list(prompts)


def positions(model: nn.Module) -> int | None:
    """How many tokens a model can read that looks positions up in a table; None for one that does not."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rsplit(".", 1)[-1] in _POSITIONS:
            # RoBERTa counts positions from behind the padding's, OPT from 2.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - (getattr(module, "offset", 0) or before)
    return None


def _answers(loss: Sequence[bool]) -> list[tuple[int, int]]:
    """``(start, stop)`` of every run of tokens to learn."""
    runs, place = [], 0
    for learnt, run in groupby(loss):
        stop = place + len(list(run))
        if learnt:
            runs.append((place, stop))
        place = stop
    return runs


def _causal(model: Any) -> bool:
    """Whether tokens see only those before them."""
    return model.can_generate() or any(getattr(module, "is_causal", False) for module in model.modules())
