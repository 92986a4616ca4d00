"""Examples laid end to end in one row: no padding, positions from 0 in each, and which of them predict a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.data.encoding import Example
from lorica.kernels.precision import in_tiles

# On a CPU more does not make a product faster, only what is kept larger; less reads all weights once more per update.
CPU_MICRO_TOKENS = 1024
# Where it multiplies bf16 in tiles, reading them is what takes the time.
MICRO_TOKENS = 2048
# A GPU waits for its host until a pass is this long, which what is kept has to leave room for: the memory of a GPU in
# bytes, and the tokens of a pass from there on.
GPU_MICRO_TOKENS = ((48e9, 8192), (20e9, 4096), (0, MICRO_TOKENS))


@dataclass(frozen=True)
class Pack:
    """T tokens of some documents, of which n predict a label.

    Attributes:
        input_ids: ``[1, T]``.
        position_ids: ``[1, T]``, from 0 in each document.
        lengths: tokens of each document.
        kept: ``[n]`` positions in the row whose next token is a label.
        wanted: ``[n]`` those next tokens.
        counts: labels of each document; they sum to n.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    kept: Tensor
    wanted: Tensor
    counts: tuple[int, ...]


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> Pack:
    """Lay examples end to end, in their order."""
    ids: list[int] = []
    places: list[int] = []
    kept: list[int] = []
    wanted: list[int] = []
    counts = []
    for example in examples:
        found = [i for i, flag in enumerate(example.loss) if flag and i]
        kept += [len(ids) + i - 1 for i in found]
        wanted += [example.ids[i] for i in found]
        counts.append(len(found))
        ids += example.ids
        places += range(len(example.ids))
    row, positions, at, goal = (torch.tensor(each, dtype=torch.long).to(device) for each in (ids, places, kept, wanted))
    lengths = tuple(len(example.ids) for example in examples)
    return Pack(row[None], positions[None], lengths, at, goal, tuple(counts))


def micro_tokens(device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of a forward pass on a device, in the number format of the base; the same whenever a run is resumed."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return next(tokens for least, tokens in GPU_MICRO_TOKENS if memory >= least)
    slow = device.type in ("cpu", "meta") and not in_tiles(dtype)
    return CPU_MICRO_TOKENS if slow else MICRO_TOKENS


def packs(
    batch: Sequence[Example], micro: int | None, processes: int = 1, tokens: int = MICRO_TOKENS
) -> list[list[int]]:
    """Divide one update's examples into packs of at most `tokens` tokens and `micro` examples; places in `batch`.

    As few packs as do, equally full: the longest first, each to the emptiest pack. All `processes` get equally many,
    taking every `processes`-th; an empty one fills up.
    """
    lengths = [len(example.ids) for example in batch]
    rows = min(micro or len(batch), math.ceil(len(batch) / processes))
    # A row longer than a pack is one by itself, and takes no room that would have to be filled.
    count = max(math.ceil(sum(min(length, tokens) for length in lengths) / tokens), math.ceil(len(batch) / rows))
    while True:
        pieces = _spread_out(lengths, count, rows)
        if count >= len(batch) or all(sum(lengths[i] for i in piece) <= tokens or len(piece) == 1 for piece in pieces):
            return pieces + [[] for _ in range(-len(pieces) % processes)]
        count += 1


def _spread_out(lengths: Sequence[int], count: int, rows: int) -> list[list[int]]:
    pieces: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        emptiest = min((k for k in range(count) if len(pieces[k]) < rows), key=held.__getitem__)
        pieces[emptiest].append(place)
        held[emptiest] += lengths[place]
    return pieces


def divided(lengths: Sequence[int], tokens: int, micro: int | None = None) -> list[list[int]]:
    """Cut a row of documents, in their order, into packs of at most `tokens` tokens and `micro` documents.

    As few packs as do, equally full; a document longer than `tokens` is one by itself. Returns their places.
    """
    fewest = len(_filled(lengths, tokens, micro))
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        if len(_filled(lengths, middle, micro)) > fewest:
            low = middle + 1
        else:
            high = middle
    return _filled(lengths, low, micro)


def _filled(lengths: Sequence[int], tokens: int, micro: int | None) -> list[list[int]]:
    pieces: list[list[int]] = []
    held = 0
    for place, length in enumerate(lengths):
        if not pieces or held + length > tokens or len(pieces[-1]) == micro:
            pieces.append([])
            held = 0
        pieces[-1].append(place)
        held += length
    return pieces
