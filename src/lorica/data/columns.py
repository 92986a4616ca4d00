"""Any table as prompt and completion: `--map prompt=body,completion=category`, or templates over its columns.

`--prompt 'Classify: {body}'` and `--completion '{category}'` fill `{column}` from each row (`{{` and `}}` are literal
braces; `\\n` and `\\t` typed in a shell mean newline and tab). A value that is not text is written as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lorica.errors import LoricaError, all_faults, nearest

KNOWN = (
    "messages", "tools", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "system"
)  # fmt: skip
ANSWERS = (
    "completion", "response", "answer", "output", "target", "label", "category", "class", "ref", "reference", "reply",
    "summary", "sql", "chosen", "translation",
)  # fmt: skip
FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Columns:
    """How the columns of a table become the keys of a known format. `renames` is target -> column."""

    renames: dict[str, str] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, map: str | None, prompt: str | None, completion: str | None) -> Columns:
        """From the flags as typed; every fault of `map` in one LoricaError."""
        renames, faults = {}, []
        for part in filter(None, (piece.strip() for piece in (map or "").split(","))):
            target, equals, column = (side.strip() for side in part.partition("="))
            if not equals or not column:
                faults.append(f"{part!r}: expected key=column")
            elif target not in KNOWN:
                faults.append(f"{part!r}: unknown key {target!r}{nearest(target, KNOWN)}; known: {', '.join(KNOWN)}")
            else:
                renames[target] = column
        templates = {key: _unescape(text) for key, text in (("prompt", prompt), ("completion", completion)) if text}
        faults += [f"{key} is given twice: by --map and by --{key}" for key in templates if key in renames]
        if faults:
            raise all_faults("--map cannot be used:", faults)
        return cls(renames, templates)

    def __bool__(self) -> bool:
        return bool(self.renames or self.templates)

    def check(self, there: Iterable[str]) -> None:
        """LoricaError where a flag names a column that no row has; it lists the columns and the line to type."""
        there = list(there)
        wanted = [*self.renames.values(), *(name for text in self.templates.values() for name in _fields(text))]
        absent = [name for name in dict.fromkeys(wanted) if name not in there]
        faults = [f"unknown column {name!r}{nearest(name, there)}" for name in absent]
        if faults:
            raise all_faults("the table has other columns:", [*faults, *help_lines(there)])

    def apply(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row under the known keys. A key that no flag names keeps its own column, if the table has it."""
        kept = {key: row[key] for key in KNOWN if key in row}
        renamed = {key: row.get(column) for key, column in self.renames.items()}
        filled = {key: _fill(text, row) for key, text in self.templates.items()}
        structured = ("messages", "conversations", "tools")
        as_text = {key: value if key in structured else text_of(value) for key, value in renamed.items()}
        return {**kept, **as_text, **filled}

    @property
    def targets(self) -> set[str]:
        """The keys that the flags speak of; the format is looked for among those that use one of them."""
        return {*self.renames, *self.templates}


def text_of(value: Any) -> str:
    """A cell as text: text as it is, nothing for null, everything else as JSON (3, true, ["a"])."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def help_lines(there: Iterable[str]) -> list[str]:
    """The columns there are, and a `--map` line to type, with the likeliest columns filled in."""
    there = list(there)
    lowered = {name.lower(): name for name in reversed(there)}
    answer = next((lowered[name] for name in ANSWERS if name in lowered), there[-1] if there else "COLUMN")
    asked = next((name for name in there if name != answer), "COLUMN")
    return [f"columns: {', '.join(there) or 'none'}", f"type, for example: --map prompt={asked},completion={answer}"]


def _fields(text: str) -> list[str]:
    return [found.group(1) for found in FIELD.finditer(text) if found.group(1) is not None]


def _fill(text: str, row: dict[str, Any]) -> str:
    def value(found: re.Match[str]) -> str:
        return text_of(row.get(found.group(1))) if found.group(1) is not None else found.group()[0]

    return FIELD.sub(value, text)


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def needs_completion(there: Iterable[str]) -> LoricaError:
    """The error for a `--prompt` without an answer to learn."""
    there = list(there)
    line = "add, for example: --completion '{" + (there[-1] if there else "COLUMN") + "}'"
    title = "a prompt is given, but no completion, and the table has no column of that name"
    return all_faults(title, [f"columns: {', '.join(there)}", line])
