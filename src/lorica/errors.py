"""The one error type that is meant to be read by a person: what, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoricaError(ValueError):
    """A fault in what was handed in. The commands print its text alone and exit with 1; any other error is ours."""


def all_faults(title: str, faults: Iterable[str]) -> LoricaError:
    """One error that lists every fault, so that mending the input takes one round and not many."""
    return LoricaError("\n".join([title, *(f"  {fault}" for fault in faults)]))


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known word closest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
