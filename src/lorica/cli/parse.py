"""Flags, a TOML file and defaults -> one settings dataclass, merged here and nowhere else: flag > file > default.

A command's dataclass is its schema, its defaults, its flags, its help and its file. tyro renders the help. The values
are read here, because two things are wanted that it does not give: every fault of a command line and of a file in one
message, and for each value where it came from.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import tyro

from lorica.doors import toml
from lorica.errors import LoricaError, nearest

POSITIONAL = typing.get_args(tyro.conf.Positional[str])[1]
# What people call these elsewhere.
SYNONYMS = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "batch_size": "batch",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "max_length": "max_len",
    "max_seq_length": "max_len",
    "warmup_ratio": "warmup",
    "max_new_tokens": "max_new",
    "output": "out",
    "output_dir": "out",
    "lr_scheduler_type": "schedule",
}


class WrongUse(Exception):
    """A command line or a settings file that cannot be read; the text lists every fault. Exit code 2."""


@dataclass(kw_only=True)
class Common:
    """What every command takes."""

    config: Annotated[str, tyro.conf.arg(aliases=["-c"])] = ""
    """A TOML file of settings; flags win over it."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""
    """Where the result goes."""
    json: bool = False
    """Print one JSON object instead of text."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """Print results only, no progress."""
    dry_run: bool = False
    """Print every value and where it came from, and what would be done; do nothing."""
    debug: bool = False
    """Show where an error happened."""


@dataclass(frozen=True)
class _Field:
    """One setting: its attribute, its names on the command line, its type."""

    name: str
    flags: tuple[str, ...]
    type: Any
    positional: bool
    required: bool


S = TypeVar("S", bound=Common)


def parse(settings: type[S], argv: Sequence[str], prog: str) -> tuple[S, dict[str, str]]:
    """The settings, and for each field where its value came from: `flag`, a file's name, or `default`.

    Raises `WrongUse` with all faults; prints help and exits where `--help` is among the arguments.
    """
    if "-h" in argv or "--help" in argv:
        tyro.cli(settings, args=["--help"], prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    fields = list(_fields(settings))
    faults: list[str] = []
    flags = _from_flags(fields, list(argv), faults)
    filed = _from_file(fields, flags.get("config", ""), faults)
    for field in fields:
        if field.required and field.name not in flags and field.name not in filed:
            faults.append(f"{field.name.upper()} is missing")
    if faults:
        raise WrongUse("\n".join([*faults, f"see {prog} --help"]))
    source = Path(flags.get("config", "")).name
    sources = {
        field.name: "flag" if field.name in flags else source if field.name in filed else "default" for field in fields
    }
    return settings(**(filed | flags)), sources


def _fields(settings: type) -> Iterator[_Field]:
    hints = typing.get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        hint: Any = hints[field.name]
        marks: tuple[Any, ...] = ()
        while typing.get_origin(hint) is Annotated:
            hint, *more = typing.get_args(hint)
            marks = (*marks, *more)
        named = next((mark for mark in marks if hasattr(mark, "aliases")), None)
        long = (named.name if named and named.name else field.name).replace("_", "-")
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        flags = (f"--{long}", *(named.aliases or () if named else ()))
        yield _Field(field.name, flags, hint, POSITIONAL in marks, required)


def _from_flags(fields: list[_Field], argv: list[str], faults: list[str]) -> dict[str, Any]:
    by_flag = {flag: field for field in fields for flag in field.flags if not field.positional}
    loose: list[str] = []
    texts: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    while argv:
        word = argv.pop(0)
        if word == "--":
            loose += argv
            break
        if not word.startswith("-") or word == "-" or _is_number(word):
            loose.append(word)
            continue
        name, equals, text = word.partition("=")
        name = name if not name.startswith("--") else name.replace("_", "-")
        field = by_flag.get(name)
        if (
            field is None
            and name.startswith("--no-")
            and (field := by_flag.get(f"--{name[5:]}"))
            and field.type is bool
        ):
            values[field.name] = False
        elif field is None:
            faults.append(f"unknown flag {name}{_near(name, by_flag)}")
            if not equals and argv and not argv[0].startswith("-"):
                argv.pop(0)  # most likely its value; a second complaint about that would help nobody
        elif field.type is bool and not equals:
            values[field.name] = True
        elif equals:
            texts.setdefault(field.name, []).append(text)
        elif not argv or (argv[0].startswith("--") and len(argv[0]) > 2):
            faults.append(f"{name} needs a value")
        else:
            texts.setdefault(field.name, []).append(argv.pop(0))
            while _is_many(field.type) and argv and not argv[0].startswith("-"):
                texts[field.name].append(argv.pop(0))
    _place_loose([field for field in fields if field.positional], loose, texts, faults)
    for field in fields:
        if field.name in texts:
            given = texts[field.name]
            label = field.name.upper() if field.positional else field.flags[0]
            values |= _checked(field, given if _is_many(field.type) else given[-1], label, faults)
    return values


def _place_loose(fields: list[_Field], loose: list[str], texts: dict[str, list[str]], faults: list[str]) -> None:
    for field in fields:
        if _is_many(field.type):
            if loose:
                texts[field.name] = loose[:]
            loose.clear()
        elif loose:
            texts[field.name] = [loose.pop(0)]
    if loose:
        takes = " ".join(field.name.upper() for field in fields) or "no THING"
        faults.append(f"not understood: {' '.join(loose)} (this command takes {takes})")


def _from_file(fields: list[_Field], path: str, faults: list[str]) -> dict[str, Any]:
    if not path:
        return {}
    try:
        found = toml(Path(path))
    except LoricaError as fault:
        faults.append(str(fault))
        return {}
    # A run's own file also records what came of it, in a table; settings are never tables.
    by_name = {spelt: field for field in fields for spelt in (field.name, field.flags[0][2:].replace("-", "_"))}
    values: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            continue
        if (field := by_name.get(key.replace("-", "_"))) is None:
            faults.append(f"{path}: unknown setting {key!r}{_near(key, by_name)}")
        else:
            values |= _checked(field, value, f"{path}: {key}", faults)
    return values


def _checked(field: _Field, value: Any, label: str, faults: list[str]) -> dict[str, Any]:
    try:
        return {field.name: typed(field.type, value)}
    except ValueError as fault:
        faults.append(f"{label} is {value!r}; {fault}")
        return {}


def typed(hint: Any, value: Any) -> Any:
    """A value of the type `hint` from text or from TOML; ValueError says what it must be."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        (hint,) = (each for each in inside if each is not type(None))
        return None if value in (None, "none") else typed(hint, value)
    if origin is Literal:
        if value not in inside:
            raise ValueError(f"it must be {', '.join(map(str, inside))}{nearest(str(value), map(str, inside))}")
        return value
    if origin is tuple:
        parts = [part for text in (value if isinstance(value, list | tuple) else [value]) for part in _split(text)]
        if inside[-1] is not Ellipsis and len(parts) != len(inside):
            raise ValueError(f"it must be {len(inside)} values")
        return tuple(typed(inside[0], part) for part in parts)
    if hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if hint is str and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = hint(value) if not (hint is int and isinstance(value, float) and value != int(value)) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None:
            raise ValueError(f"it must be a {'whole number' if hint is int else 'number'}")
        return number
    if not isinstance(value, hint):
        raise ValueError(f"it must be {'text' if hint is str else 'true or false' if hint is bool else hint.__name__}")
    return value


def _split(text: Any) -> list[Any]:
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(text, str) else [text]


def _is_many(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _near(name: str, known: dict[str, _Field]) -> str:
    bare = name.lstrip("-").replace("-", "_")
    if (meant := SYNONYMS.get(bare)) and (flag := next((each for each in known if each.lstrip("-") == meant), None)):
        return f"; here it is {flag}"
    return nearest(name, known).replace("'", "")
