"""Sampling: each request by its own settings, and by its own seed alone."""

from __future__ import annotations

import math
from collections import Counter

import torch

from lorica.serve.engine import Sampling
from lorica.serve.sampling import Chooser, choose

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


def drawn(sampling: Sampling, count: int = 1000, logits=LOGITS) -> Counter:
    chooser = Chooser(sampling)
    return Counter(choose(logits[None], [chooser])[0].id for _ in range(count))


def test_greedy_takes_the_likeliest_whatever_else_is_set():
    assert drawn(Sampling(1, top_k=3, top_p=0.5, seed=1), 20) == {1: 20}


def test_draws_follow_the_distribution():
    for temperature in (0.5, 1.0, 2.0):
        counts = drawn(Sampling(1, temperature=temperature, seed=0))
        wanted = torch.softmax(LOGITS / temperature, 0)
        assert all(abs(counts[id] / 1000 - wanted[id].item()) < 0.06 for id in range(5))


def test_top_k_and_top_p_leave_what_they_say():
    assert set(drawn(Sampling(1, temperature=1, top_k=2, seed=0))) == {1, 3}
    shares = torch.softmax(LOGITS, 0)
    just = float(shares[1] + shares[3])
    assert set(drawn(Sampling(1, temperature=1, top_p=just - 1e-4, seed=0))) == {1, 3}
    assert set(drawn(Sampling(1, temperature=1, top_p=just + 1e-4, seed=0))) == {1, 3, 2}
    assert set(drawn(Sampling(1, temperature=1, top_p=1e-9, seed=0))) == {1}
    # After top_k, top_p is of what is left.
    assert set(drawn(Sampling(1, temperature=1, top_k=2, top_p=0.74, seed=0))) == {1, 3}
    assert set(drawn(Sampling(1, temperature=1, top_k=2, top_p=0.73, seed=0))) == {1}


def test_a_flat_distribution_is_not_cut_where_looking_at_the_likeliest_stops():
    counts = drawn(Sampling(1, temperature=1, top_p=0.9, seed=0), 800, torch.zeros(4096))
    assert len(counts) > 600


def test_a_seed_gives_its_tokens_whatever_the_neighbours():
    wanted = Sampling(1, temperature=1, top_p=0.95, seed=7)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 50, generator=generator)
    alone = Chooser(wanted)
    first = [choose(rows[i][None], [alone])[0].id for i in range(12)]
    mixed, other = Chooser(wanted), Chooser(Sampling(1, temperature=2))
    second = [choose(torch.stack([rows[-1], rows[i]]), [other, mixed])[1].id for i in range(12)]
    assert first == second
    assert [
        choose(rows[i][None], [c])[0].id for c in [Chooser(Sampling(1, temperature=1, seed=8))] for i in range(12)
    ] != first


def test_log_probabilities_are_of_the_model_before_temperature():
    token = choose(LOGITS[None], [Chooser(Sampling(1, temperature=0.1, logprobs=3, seed=0))])[0]
    logs = torch.log_softmax(LOGITS, 0)
    assert math.isclose(token.logprob, logs[token.id].item(), rel_tol=1e-5)
    assert [id for id, _ in token.top] == [1, 3, 2]
    assert choose(LOGITS[None], [Chooser(Sampling(1, logprobs=0))])[0].top == ()
    assert choose(LOGITS[None], [Chooser(Sampling(1))])[0].logprob is None


def test_only_the_row_that_is_no_number_is_refused():
    bad = LOGITS.clone()
    bad[2] = float("nan")
    rows = torch.stack([LOGITS, bad, torch.full((5,), float("inf"))])
    tokens = choose(rows, [Chooser(Sampling(1))] * 3)
    assert tokens[0].id == 1 and tokens[1] is None and tokens[2] is None


def test_a_tiny_temperature_is_greedy_and_breaks_nothing():
    for settings in ({"top_p": 0.9}, {"top_k": 3}, {}):
        assert drawn(Sampling(1, temperature=1e-320, seed=0, **settings), 20) == {1: 20}
