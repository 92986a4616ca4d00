"""The one error type that is meant to be read by a person: what, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 60  # lines of an error: enough to see what they have in common


class LoricaError(ValueError):
    """A fault in what was handed in. The commands print its text alone and exit with 1; any other error is ours."""


def all_faults(title: str, faults: Iterable[str]) -> LoricaError:
    """One error that lists every fault, so that mending the input takes one round and not many."""
    lines = list(faults)
    if len(lines) > _SHOWN:  # the last line is often what to do
        lines = [*lines[: _SHOWN - 2], f"... and {len(lines) - _SHOWN + 1:,} more", lines[-1]]
    return LoricaError("\n".join([title, *(f"  {line}" for line in lines)]))


def shown(value: object, longest: int = 80) -> str:
    """A value out of a file as an error quotes it: cut where it is long, without what a terminal would obey."""
    if isinstance(value, str):
        text = repr(value[:longest])
        return text if len(value) <= longest else f"{text[:-1]}...{text[-1]}"
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= longest else f"{text[:longest]}..."


def visible(text: str) -> str:
    """Text as a terminal may have it: what it would obey, or cannot write, is written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known word closest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
