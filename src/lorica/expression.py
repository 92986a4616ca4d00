"""Expressions over adapters, ``truncate(0.5*a + 0.5*b, r=8)``: read without being run, every fault shown where it is.

a, runs/first, 'my-lora'   an adapter: a name that was given for one, a path, or either in quotes. A word with a
                           slash in it is a path, and a - inside it belongs to it: put spaces around minus
0.5*a + b - 2*(a - b)      sums, differences and multiples
truncate(a, r=8)           also energy=0.99: see `Adapter.truncate`
ties(a, b, density=0.5)    see `Adapter.ties`
dare(a, b, density=0.5, seed=0)
cat(a, b)                  the sum by another name
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorica.adapter import Adapter
from lorica.errors import LoricaError, nearest

FUNCTIONS: dict[str, tuple[Callable[..., Adapter], tuple[str, ...]]] = {
    "truncate": (Adapter.truncate, ("r", "energy")),
    "ties": (Adapter.ties, ("density",)),
    "dare": (Adapter.dare, ("density", "seed")),
    "cat": (lambda *adapters: sum(adapters[1:], adapters[0]), ()),
}
_SIGNS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.USub: operator.neg,
    ast.UAdd: lambda value: value,
}
# A quoted text, to be left alone; or a word that Python would not take for one: with a slash, or a dot after a letter.
_WORDS = re.compile(r"'[^']*'|\"[^\"]*\"|((?:[\w.@~][\w.@~-]*)?/[\w.@~][\w./@~-]*|[^\W\d]\w*(?:\.\w+)+)")


@dataclass
class Composed:
    """What came of an expression.

    Attributes:
        adapter: the result.
        parts: the adapters in it by name, in order.
        cuts: of every truncation, as it is written, the share of the energy ``|dW|^2`` that it took away.
    """

    adapter: Adapter
    parts: dict[str, Adapter]
    cuts: dict[str, float] = field(default_factory=dict)


def compose(text: str, things: Mapping[str, str], read: Callable[[str], Adapter]) -> Composed:
    """The adapter that an expression stands for.

    Args:
        things: what names stand for: paths, runs, hub ids. Other words are taken for these themselves.
        read: how one is opened.
    """
    try:
        return _compose(_Reader(" ".join(text.split())), things, read)
    except (RecursionError, OverflowError) as fault:
        raise LoricaError(
            "this expression cannot be computed: it is nested too deep, or a number is too big"
        ) from fault


def _compose(reader: _Reader, things: Mapping[str, str], read: Callable[[str], Adapter]) -> Composed:
    tree = reader.tree()
    if (kind := reader.kind(tree)) == "number":
        reader.fault(tree, "this is a number; an adapter was expected")
    parts: dict[str, Adapter] = {}
    for name, node in reader.names.items():
        try:
            parts[name] = read(_source(name, things))
            parts[name].inner(parts[name])  # raises for what is no low-rank update
        except LoricaError as fault:
            reader.fault(node, str(fault))
    for name in things.keys() - reader.names.keys():
        reader.faults.append(f"{name}={things[name]} is not in the expression{nearest(name, reader.names)}")
    if reader.faults or kind is None:
        raise LoricaError("\n".join(["this expression cannot be computed:", *reader.faults]))
    done = Composed(next(iter(parts.values())), parts)
    done.adapter = reader.value(tree, done)
    return done


def _source(name: str, things: Mapping[str, str]) -> str:
    if name in things or "/" in name or Path(name).expanduser().exists():
        return things.get(name, name)
    here = sorted(path.name for path in Path().iterdir())
    dashed = next((each for each in here if each.startswith(f"{name}-")), "")
    meant = f"; {dashed!r} is there: write it in quotes" if dashed else nearest(name, [*things, *here])
    given = f"names: {', '.join(map('='.join, things.items()))}" if things else "no name was given, NAME=PATH"
    raise LoricaError(f"nothing here is called {name!r}{meant} ({given})")


class _Reader:
    """One expression: its tree, the adapters in it, and what is wrong."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.names: dict[str, ast.AST] = {}
        self.faults: list[str] = []

    def tree(self) -> ast.expr:
        """The syntax tree; words that are no Python names are hidden from it behind underscores of the same length."""
        masked = _WORDS.sub(lambda match: "_" * len(match[0].encode()) if match[1] else match[0], self.text)
        try:
            return ast.parse(masked, mode="eval").body
        except SyntaxError as fault:
            place = max(0, min((fault.offset or 1) - 1, len(self.text)))
            raise LoricaError(f"this expression cannot be read: {_shown(self.text, place, 1, fault.msg)}") from fault
        except (ValueError, RecursionError, MemoryError) as fault:
            raise LoricaError(f"this expression cannot be read: {fault}") from fault

    def source(self, node: ast.AST) -> str:
        """The text of a node."""
        return self.text.encode()[node.col_offset : node.end_col_offset].decode()  # type: ignore[attr-defined]

    def fault(self, node: ast.AST, what: str) -> None:
        """Note what is wrong with a node."""
        start = len(self.text.encode()[: node.col_offset].decode())  # type: ignore[attr-defined]
        self.faults.append(_shown(self.text, start, len(self.source(node)), what))

    def kind(self, node: ast.expr) -> str | None:
        """`number` or `adapter`; None where that is not known, because something in it is wrong."""
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return "number"
        if isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            self.names.setdefault(self.name(node), node)
            return "adapter"
        if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
            return self.kind(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
            return self.both(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.call(node)
        self.fault(node, "only names, numbers, + - *, parentheses and functions are understood")
        return None

    def both(self, node: ast.BinOp) -> str | None:
        """The kind of a sum or product."""
        left, right = self.kind(node.left), self.kind(node.right)
        if left is None or right is None:
            return None
        if isinstance(node.op, ast.Mult):
            if left == right == "adapter":
                self.fault(node, "a product of two adapters is no adapter")
                return None
            return "adapter" if "adapter" in (left, right) else "number"
        if left != right:
            self.fault(node, "an adapter and a number cannot be added; * multiplies")
            return None
        return left

    def call(self, node: ast.Call) -> str | None:
        """The kind of a function's result."""
        name = self.source(node.func)
        if name not in FUNCTIONS:
            self.fault(node.func, f"no function is called {name!r}{nearest(name, FUNCTIONS)}: {', '.join(FUNCTIONS)}")
        before = len(self.faults)
        for argument in node.args:
            if self.kind(argument) == "number":
                self.fault(argument, "an adapter was expected")
        if not node.args or (name == "truncate" and len(node.args) > 1):
            self.fault(node, "truncate takes one adapter" if node.args else f"{name} takes an adapter")
        for keyword in node.keywords if name in FUNCTIONS else ():
            options = FUNCTIONS[name][1]
            if keyword.arg not in options:
                known = f"its options: {', '.join(options)}" if options else "it has no options"
                self.fault(
                    keyword, f"{name} has no option {keyword.arg!r}{nearest(keyword.arg or '', options)}; {known}"
                )
            elif self.kind(keyword.value) != "number":
                self.fault(keyword, f"{keyword.arg} takes a number")
        return "adapter" if name in FUNCTIONS and len(self.faults) == before else None

    def name(self, node: ast.AST) -> str:
        """The adapter that a node names."""
        return node.value if isinstance(node, ast.Constant) else self.source(node)  # type: ignore[return-value]

    def value(self, node: ast.expr, done: Composed) -> Any:
        """The number or adapter that a node stands for; `kind` has found nothing wrong with it."""
        if isinstance(node, ast.Constant) and not isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return _SIGNS[type(node.op)](self.value(node.operand, done))
        if isinstance(node, ast.BinOp):
            return _SIGNS[type(node.op)](self.value(node.left, done), self.value(node.right, done))
        if not isinstance(node, ast.Call):
            return done.parts[self.name(node)]
        function, _ = FUNCTIONS[self.source(node.func)]
        adapters = [self.value(argument, done) for argument in node.args]
        made = function(*adapters, **{each.arg: self.value(each.value, done) for each in node.keywords if each.arg})
        if function is Adapter.truncate:
            done.cuts[self.source(node)] = energy_cut(adapters[0], made)
        return made


def energy_cut(before: Adapter, after: Adapter) -> float:
    """The share of ``|dW|^2`` that a truncation took away."""
    whole = before.inner(before)
    return max(0.0, 1 - after.inner(after) / whole) if whole else 0.0


def _shown(text: str, start: int, length: int, what: str) -> str:
    return f"{what}\n    {text}\n    {' ' * start}{'^' * max(1, length)}"
