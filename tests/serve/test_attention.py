"""Keys that are kept from step to step are those of the pages, whoever comes, goes and grows."""

from __future__ import annotations

import pytest
import torch

from lorica.serve.attention import Kept, Piece, Single

HEADS, DIM, PLACES = 2, 4, 400


class Pages:
    """A layer's keys and values, and the places of each request's, scattered."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.tensors = [torch.randn(PLACES, HEADS, DIM, generator=self.generator) for _ in "kv"]
        self.free = torch.randperm(PLACES, generator=self.generator).tolist()
        self.of: dict[str, list[int]] = {}

    def step(self, kept: Kept, who: list[str]) -> Single:
        """Each request adds a key; `found` and `wanted` are what layers attend of it, and what the pages have."""
        for id in who:
            self.of.setdefault(id, []).append(self.free.pop())
        places = [torch.tensor(self.of[id]) for id in who]
        each = Single.of(
            [(Piece(i, i + 1, id), at) for i, (id, at) in enumerate(zip(who, places, strict=True))], places[0], kept
        )
        new = [pages[torch.stack([at[-1] for at in places])] for pages in self.tensors]
        self.found = [x for layer in range(2) for x in kept.side_by_side(layer, each, self.tensors, new)]
        self.wanted = [[pages[at].transpose(0, 1) for at in places] for pages in self.tensors] * 2
        return each


@pytest.mark.parametrize("seed", range(4))
def test_kept_keys_are_those_of_the_pages_whoever_comes_and_goes(seed):
    choice = torch.Generator().manual_seed(seed)
    pages, kept, who = Pages(), Kept(10_000), ["a", "b"]
    for turn in range(60):
        each = pages.step(kept, who)
        for found, wanted in zip(pages.found, pages.wanted, strict=True):
            assert found.shape == (len(who), HEADS, each.longest, DIM)
            assert all(torch.equal(x[:, : y.shape[1]], y) for x, y in zip(found, wanted, strict=True))
        if torch.rand(1, generator=choice) < 0.2:
            who = who[::-1] if torch.rand(1, generator=choice) < 0.3 else [*who[1:], f"new{turn}"]


def test_only_what_a_step_adds_is_read_from_then_on():
    pages, kept = Pages(), Kept(10_000)
    pages.step(kept, ["a", "b"])
    for seen in pages.tensors:
        seen[:] = float("nan")
    for id in "ab":
        pages.of[id].append(pages.free.pop())
    places = [torch.tensor(pages.of[id]) for id in "ab"]
    parts = [(Piece(i, i + 1, id), at) for i, (id, at) in enumerate(zip("ab", places, strict=True))]
    each = Single.of(parts, places[0], kept)
    new = [torch.ones(2, HEADS, DIM), torch.ones(2, HEADS, DIM)]
    assert each.kept and all(x.isfinite().all() for x in each.kept.side_by_side(0, each, pages.tensors, new))


def test_beyond_its_room_nothing_is_kept():
    pages, kept = Pages(), Kept(80)
    assert pages.step(kept, ["a", "b"]).kept is kept  # room for 33 each
    assert pages.step(kept, ["a", "b", "c"]).kept is None
    assert pages.step(kept, ["a"]).kept is kept
