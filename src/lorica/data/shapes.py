"""Which of the five formats are these rows, and what is each of them as a `Record`?

The format is found from the keys of ALL rows: each row belongs to the first format of `SHAPES` whose keys it has (so
a chat set with a `prompt` column beside `messages` is chat). Rows of several formats are an error, not a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorica.data.columns import Columns, help_lines, needs_completion, text_of
from lorica.data.records import Record
from lorica.data.tables import Row
from lorica.doors import parsed
from lorica.errors import LoricaError, all_faults, nearest, shown

SHOWN = 20
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip


def to_records(
    rows: list[Row], columns: Columns, system: str | None, answers: bool
) -> tuple[list[Record], str, list[str]]:
    """`(records, format, faults)`: every row that cannot be used is a fault with its place.

    `system` is for rows that have no system prompt of their own. With `answers` off, rows to be answered are enough.
    LoricaError where no row at all has a known format: it prints the columns and the `--map` line to type.
    """
    there = list(dict.fromkeys(name for _, row in rows for name in row))
    columns.check(there)
    shapes = [shape for shape in SHAPES if not columns or columns.targets & {*shape.needs, *shape.may}]
    sorted_rows: dict[str, list[Row]] = {}
    for where, raw in rows:
        row = columns.apply(raw) if columns else raw
        shape = next((shape for shape in shapes if shape.fits(row, answers)), None)
        sorted_rows.setdefault(shape.name if shape else "", []).append((where, row))
    strangers = sorted_rows.pop("", [])
    if not sorted_rows:
        if "prompt" in columns.targets:
            raise needs_completion(there)
        known = ", ".join(f"{shape.name}: {' + '.join(shape.needs)}" for shape in SHAPES)
        hints = [*help_lines(there), "or, to tell labels apart or predict a score: --task classify, --task regress"]
        raise all_faults(f"the columns are of no known format ({known})", hints)
    faults = [f"{where}: no known format; it has {_keys(row)}" for where, row in strangers]
    if len(sorted_rows) > 1:
        faults += [f"{len(some)} rows are {name}, the first at {some[0][0]}" for name, some in sorted_rows.items()]
        return [], "mixed", [*faults, "put each format into a file of its own"]
    [(name, usable)] = sorted_rows.items()
    records, bad = _convert(usable, next(shape for shape in SHAPES if shape.name == name), system)
    return records, f"mapped to {name}" if columns else name, faults + bad


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(shown(key).strip("'") for key in list(row)[:SHOWN]) or "no keys"


def shorten(faults: list[str]) -> list[str]:
    """The first faults, and how many more there are."""
    more = len(faults) - SHOWN
    return faults if more <= 0 else [*faults[:SHOWN], f"... and {more:,} more"]


def _convert(rows: list[Row], shape: Shape, system: str | None) -> tuple[list[Record], list[str]]:
    records, faults = [], []
    for where, row in rows:
        try:
            record = shape.read(row, where, system or "")
            record.key.encode()
        except UnicodeEncodeError:
            faults.append(f"{where}: holds half of a character (a lone surrogate such as \\ud83d); mend the text")
        except LoricaError as error:
            faults.append(f"{where}: {error}")
        else:
            records.append(record)
    return records, faults


@dataclass(frozen=True)
class Shape:
    """One format: the keys it needs, those it may have, the key that only an answer has, and how a row is read."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    answer: str
    read: Callable[[dict[str, Any], str, str], Record]

    def fits(self, row: dict[str, Any], answers: bool) -> bool:
        return all(key in row for key in self.needs if answers or key != self.answer)


def _chat(row: dict[str, Any], where: str, system: str, key: str = "messages") -> Record:
    raw = _parsed(row[key])
    if not isinstance(raw, list) or not raw:
        raise LoricaError(f"'{key}' is not a list of messages")
    messages = [_message(message, number) for number, message in enumerate(raw, 1)]
    system = _text(row, "system") or system
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    tools = _parsed(row.get("tools")) or None
    if tools is not None and not isinstance(tools, list):
        raise LoricaError("'tools' is not a list of function descriptions")
    return Record("chat", messages=messages, tools=tools, where=where)


def _sharegpt(row: dict[str, Any], where: str, system: str) -> Record:
    return _chat(row, where, system, "conversations")


def _pair(row: dict[str, Any], where: str, system: str) -> Record:
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    return Record("pair", prompt=prompt, completion=completion, system=_text(row, "system") or system, where=where)


def _alpaca(row: dict[str, Any], where: str, system: str) -> Record:
    prompt = "\n\n".join(filter(None, (_text(row, "instruction"), _text(row, "input"))))
    system = _text(row, "system") or system
    return Record("pair", prompt=prompt, completion=_text(row, "output"), system=system, where=where)


def _plain(row: dict[str, Any], where: str, system: str) -> Record:
    if system:
        raise LoricaError("a system prompt has no place in plain text rows; leave out --system")
    return Record("text", text=_text(row, "text"), where=where)


SHAPES = (
    Shape("chat", ("messages",), ("tools",), "", _chat),
    Shape("sharegpt", ("conversations",), ("tools",), "", _sharegpt),
    Shape("pair", ("prompt", "completion"), (), "completion", _pair),
    Shape("alpaca", ("instruction", "output"), ("input",), "output", _alpaca),
    Shape("text", ("text",), (), "", _plain),
)


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, list | dict):
        hint = "; a list of messages belongs under 'messages'" if key in ("prompt", "completion") else ""
        raise LoricaError(f"'{key}' is a {type(value).__name__}, not text{hint}")
    return text_of(value)


def _message(message: Any, number: int) -> dict[str, Any]:
    """One message with `role` and text `content`; sharegpt's `from` and `value` are the same thing by other names."""
    if not isinstance(message, dict):
        raise LoricaError(f"message {number} is a {type(message).__name__}, not an object")
    role = message.get("role", message.get("from"))
    role = SHAREGPT.get(str(role), role)
    if role not in ROLES:
        known = f"{nearest(str(role), ROLES)}; known: {', '.join(ROLES)}"
        raise LoricaError(f"message {number} has the role {shown(role)}{known}")
    content = message.get("content", message.get("value"))
    rest = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
    if calls := _parsed(rest.get("tool_calls")):
        if not isinstance(calls, list):
            raise LoricaError(f"message {number} has tool calls that are not a list")
        rest["tool_calls"] = [_tool_call(call, number) for call in calls]
    elif content is None and role != "assistant":
        raise LoricaError(f"message {number} ({role}) has no content")
    return {"role": role, "content": _content(content, number), **rest}


def _content(content: Any, number: int) -> str:
    """Text, or the texts of a list of parts; a picture or a sound is refused, not lost."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise LoricaError(f"message {number} has content that is not text")
    return "".join(part["text"] for part in parts)


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """Templates want the arguments as an object; the usual chat format writes them as a JSON string."""
    if not isinstance(call, dict):
        raise LoricaError(f"message {number} has a tool call that is not an object")
    function = call.get("function")
    if isinstance(function, dict) and "arguments" in function:
        return {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
    return call


def _parsed(value: Any) -> Any:
    """JSON kept as text (in CSV cells, and in many hub sets' `tools`), or the value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parsed(value)
    except ValueError:
        return value
