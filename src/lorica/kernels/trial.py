"""Which of two ways is faster on this machine, by trying both."""

from __future__ import annotations

import time
from collections.abc import Callable


def pays(usual: Callable[[], object], other: Callable[[], object], gain: float, repeats: int = 5) -> bool:
    """Whether `other` is more than `gain` times as fast: the least seconds of some turns, so that a busy moment of the
    machine does not decide."""
    ways = (usual, other)
    best = [float("inf")] * 2
    for turn in range(repeats + 1):
        for place, way in enumerate(ways):
            began = time.perf_counter()
            way()
            if turn:  # the first call of a shape also plans it
                best[place] = min(best[place], time.perf_counter() - began)
    return best[0] > gain * best[1]
