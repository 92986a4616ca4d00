"""Regular expressions that come from files and flags: compiled once, matched in bounded time.

A pattern such as ``(a|aa)+$b`` takes time that doubles with each letter of a name, in Python's own engine without end.
`regex` (which transformers brings) can be told to stop.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import regex

from lorica.errors import LoricaError, shown

LONGEST = 4096  # characters of a pattern
SECONDS = 1.0  # to match one name; a pattern that anybody means takes microseconds
_MOST = 4_000_000
_PLAIN = re.compile(r"[\w.-]+")


def check(pattern: str) -> None:
    """LoricaError where a text is no pattern."""
    _compiled(pattern)


def exactly(name: str) -> str:
    """A pattern that matches this name: the name itself, as far as it holds no signs of patterns."""
    return name if _PLAIN.fullmatch(name) else re.escape(name)


def ends(pattern: str, name: str) -> bool:
    """Whether a pattern matches the end of a name from a dot on, or all of it, as PEFT's rank_pattern."""
    if not _PLAIN.fullmatch(pattern):
        return fits(rf"(.*\.)?({pattern})", name)
    # The usual one is itself a name, in which a dot stands for any character.
    start = len(name) - len(pattern)
    there = start == 0 or (start > 0 and name[start - 1] == ".")
    return there and all(sign in (".", letter) for sign, letter in zip(pattern, name[start:], strict=True))


def require_few(patterns: int, names: int, where: object) -> None:
    """LoricaError where so many patterns, each to be tried on so many names, would take long."""
    if patterns * names > _MOST:
        raise LoricaError(f"{where}: {patterns:,} patterns and names are too many for {names:,} layers")


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern matches a whole name. LoricaError for what is no pattern, or would take too long."""
    try:
        return _compiled(pattern).fullmatch(name, timeout=SECONDS) is not None
    except TimeoutError as fault:
        raise LoricaError(
            f"the pattern {shown(pattern)} took more than {SECONDS:g} s on {shown(name)}, since it can match in too"
            " many ways; write it without repetitions inside repetitions"
        ) from fault


@functools.lru_cache(maxsize=1 << 16)
def _compiled(pattern: str) -> Any:
    try:
        if len(pattern) > LONGEST:
            raise ValueError(f"it has {len(pattern):,} characters; at most {LONGEST:,} are taken")
        return regex.compile(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError) as fault:
        raise LoricaError(f"{shown(pattern)} is no regular expression: {fault or type(fault).__name__}") from fault
