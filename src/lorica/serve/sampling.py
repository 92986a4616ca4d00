"""From logits to tokens, each request by its own settings.

Greedy rows are chosen together; the others one by one, by inverting the cumulative distribution at one number drawn
from the request's own generator, so that a seed gives its tokens whatever else is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.serve.engine import Sampling, Token

_MANY = 1024  # likeliest tokens looked at before all of them are sorted


class Chooser:
    """One request's settings and where its random numbers have got to."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.random = random.Random(sampling.seed) if sampling.temperature else None


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Token | None]:
    """A token for each row of ``logits [n, vocab]``; None for a row that is not all numbers."""
    best, likeliest = logits.max(-1)
    # A NaN is the largest of its row, so this sees every fault without another pass.
    good, ids = best.isfinite().tolist(), likeliest.tolist()
    tokens: list[Token | None] = []
    for row, (fine, id, chooser) in enumerate(zip(good, ids, choosers, strict=True)):
        if fine and chooser.random is not None:
            id = _drawn(logits[row], chooser.sampling, chooser.random.random())
        tokens.append(_told(logits[row], id, chooser.sampling.logprobs) if fine else None)
    return tokens


def _drawn(logits: Tensor, sampling: Sampling, u: float) -> int:
    """The token at ``u`` in [0, 1) of the distribution that temperature, top_k and top_p leave."""
    vocab = logits.shape[0]
    # The largest is put at 0, so that a tiny temperature makes no inf - inf.
    scaled = (logits.double() - logits.max()) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return _at(torch.softmax(scaled, 0), u)
    count = min(sampling.top_k or _MANY, vocab)
    values, ids = scaled.topk(count)
    whole = torch.logsumexp(values if sampling.top_k else scaled, 0)
    shares = (values - whole).exp()
    if not sampling.top_k and float(shares.sum()) < sampling.top_p and count < vocab:
        values, ids = scaled.sort(descending=True)
        shares = (values - whole).exp()
    if sampling.top_p < 1:
        # A token stays while the likelier ones together have not reached top_p; the first always does.
        keep = shares.cumsum(0) - shares < sampling.top_p
        shares, ids = shares[keep], ids[keep]
    return int(ids[_at(shares, u)])


def _at(shares: Tensor, u: float) -> int:
    sums = shares.cumsum(0)
    place = torch.searchsorted(sums, u * float(sums[-1]), right=True)
    return min(int(place), shares.shape[0] - 1)


def _told(logits: Tensor, id: int, top: int | None) -> Token:
    if top is None:
        return Token(id)
    logs = torch.log_softmax(logits.float(), 0)
    values, ids = logs.topk(top) if top else (logs[:0], logs[:0])
    return Token(id, float(logs[id]), tuple(zip(map(int, ids.tolist()), values.tolist(), strict=True)))
