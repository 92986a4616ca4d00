"""Is this text one Python call, and would the benchmark accept it? Parsed as a syntax tree, never run."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PUNCTUATION = re.compile(r"[ ,./\-_*^]")
_REFUSED = object()


@dataclass(frozen=True)
class Call:
    """A call as written: a dotted name, values by position and by keyword. A value that is no literal is refused."""

    name: str
    positional: list[Any]
    keywords: dict[str, Any]


def parse_call(text: str) -> Call | None:
    """The one call that `text` is, or None: `math.gcd(a=12, b=-3)`. A dotted name is called; no `*`, no `**`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(node, ast.Call) or not (name := _dotted(node.func)):
        return None
    names = [keyword.arg for keyword in node.keywords]
    if None in names or len(set(names)) < len(names) or any(isinstance(value, ast.Starred) for value in node.args):
        return None
    return Call(name, [_literal(v) for v in node.args], {str(k.arg): _literal(k.value) for k in node.keywords})


def accepts(
    call: Call, name: str, parameters: list[str], required: list[str], answers: Mapping[str, list[Any]]
) -> bool:
    """Whether `call` is right: the name, no unknown or missing argument, each value among those of `answers`.

    `answers` is parameter -> possible values, with "" among them where it may be left out, as the benchmark writes
    them. Its rules for values: text is compared without case, spaces and ,./-_*^; an int does for a float; a bool is
    not an int; in a dict each key has possible values of its own. Unlike there, ints do for floats inside lists too,
    and a tuple does for a list.
    """
    if call.name != name or len(call.positional) > len(parameters):
        return False
    given = dict(zip(parameters, call.positional, strict=False))
    if given.keys() & call.keywords.keys():
        return False
    given |= call.keywords
    return not set(required) - given.keys() and _accepts_all(given, answers)


def _accepts_all(given: Mapping[str, Any], answers: Mapping[str, list[Any]]) -> bool:
    if given.keys() - answers.keys():
        return False
    missing = (options for key, options in answers.items() if key not in given)
    return all("" in options for options in missing) and all(
        any(_same(value, option) for option in _values(answers[key])) for key, value in given.items()
    )


def _values(options: list[Any]) -> list[Any]:
    """The options that are values: "" among other kinds than text only says that the argument may be left out."""
    texts = all(isinstance(option, str) for option in options)
    return [option for option in options if texts or option != ""]


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(value, dict) and _accepts_all(value, wanted)
    if isinstance(wanted, list):
        return isinstance(value, list | tuple) and len(value) == len(wanted) and all(map(_same, value, wanted))
    if isinstance(wanted, str):
        return isinstance(value, str) and _plain(value) == _plain(wanted)
    if isinstance(wanted, float):
        return type(value) in (int, float) and math.isclose(value, wanted, rel_tol=1e-9)
    return type(value) is type(wanted) and value == wanted


def _plain(text: str) -> str:
    return _PUNCTUATION.sub("", text).lower().replace("'", '"')


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError, SyntaxError):
        return _REFUSED
