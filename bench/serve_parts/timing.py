"""Contenders in turn within one process, so that they share a moment of the machine."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from measure import summary

clock = time.perf_counter


def count_cpu_time() -> None:
    """Measure this process's CPU time from now on, where others share the cores."""
    global clock
    clock = time.process_time


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = clock()
    call()
    return clock() - began


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, or of each of its steps, once to warm up and then `repeats` times in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            gc.collect()
            seconds = call()
            each = seconds if isinstance(seconds, list) else [seconds]
            if turn:
                found[name] += each
                print(f"{turn}/{repeats} {name:36} {statistics.median(each):.3f} s", file=sys.stderr, flush=True)
    return found


def beside(
    base: Callable[[], float], other: Callable[[], float], repeats: int
) -> tuple[float, list[float], list[float]]:
    """Each call of one between two of another, so that they bear a machine that others use.

    The median of the ratios, and the seconds of the base and of the other; each is called once before, to warm up.
    """
    base(), other()
    took = [(base(), other(), base()) for _ in range(repeats)]
    ratio = statistics.median(2 * each / (before + after) for before, each, after in took)
    return ratio, [each for before, _, after in took for each in (before, after)], [each for _, each, _ in took]


def rates(found: dict[str, list[float]], amount: float) -> dict[str, Any]:
    """A row for each: `amount` per second."""
    return {name: summary(amount / seconds for seconds in each) for name, each in found.items()}


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    """Seconds of each."""
    return {name: statistics.median(each) for name, each in found.items()}
