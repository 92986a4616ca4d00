"""Held-out loss: every labelled token counts once, however the rows are batched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.data import Example, collate
from lorica.errors import LoricaError
from lorica.evaluate.causal import evaluating, require
from lorica.insertion import edited
from lorica.kernels.labelled import IGNORED, positions, takes_positions


@dataclass(frozen=True)
class LossResult:
    """A loss in nats per labelled token, over `tokens` such tokens in `rows` rows.

    `per_row` holds each row's sum of nats and number of labelled tokens, in the order of the rows.
    """

    loss: float
    tokens: int
    rows: int
    per_row: list[tuple[float, int]]

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> LossResult:
    """The mean negative log-likelihood of the labelled tokens, of examples as the active adapter is to read them.

    Args:
        batch_tokens: tokens of a forward pass, padding included; it changes memory and speed, not the result.
        progress: called with what is done and how much there is.

    The model's mode is left as it was.
    """
    require(model)
    if not examples:
        raise LoricaError("there are no rows to measure the loss on")
    own = edited(model, examples)
    read = list(chain.from_iterable(own))
    rows = [row for row, some in enumerate(own) for _ in some]
    per_row: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    done = 0
    with evaluating(model) as device:
        for places in in_batches([len(example.ids) for example in read], batch_tokens):
            # Padded on the right, where causal attention never looks back from a real token: any id pads.
            batch = {key: value.to(device) for key, value in collate([read[i] for i in places], 0).items()}
            sums, counts = _nats(model, batch)
            for place, total, count in zip(places, sums.tolist(), counts.tolist(), strict=True):
                before = per_row[rows[place]]
                per_row[rows[place]] = (before[0] + total, before[1] + count)
            done += len(places)
            if progress:
                progress(done, len(read))
    tokens = sum(count for _, count in per_row)
    if not tokens:
        raise LoricaError("no token of these rows is labelled, so there is no loss to measure")
    return LossResult(math.fsum(total for total, _ in per_row) / tokens, tokens, len(examples), per_row)


def _nats(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Each row's sum of nats (fp64) and number of labelled tokens; logits are widened at labelled tokens only."""
    kept = positions(batch["labels"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if takes_positions(model):
        logits = model(**inputs, logits_to_keep=kept).logits
    else:
        logits = model(**inputs).logits[:, kept]
    wanted = batch["labels"][:, kept + 1]
    labelled = wanted != IGNORED
    nats = F.cross_entropy(logits[labelled].float(), wanted[labelled], reduction="none").cpu().double()
    counts = labelled.sum(1).cpu()
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, rows, nats), counts


def in_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of rows of like length, as many together as the budget holds padded; at least one."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[place] > budget:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
