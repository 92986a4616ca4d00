"""The quickstart's set: a function signature and a request in, one Python call out.

From the Berkeley Function Calling Leaderboard (Apache-2.0), as the wheel `bfcl-eval` carries it: the parts
`simple_python` (400 requests, one function each) and `multiple` (200; only the function that is called is shown, which
makes them the same task). They are a benchmark's rows: good for a demonstration with functions held out, and for no
claim about the benchmark.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.data.calls import accepts, parse_call
from lorica.data.records import Record
from lorica.errors import LoricaError

PARTS = ("simple_python", "multiple")
FOLDER = "bfcl_eval/data"
WHEEL: dict[str, Any] = {
    "project": "bfcl-eval",
    "version": "2026.3.23",
    "sha256": "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    "members": {
        f"{folder}/BFCL_v4_{part}.json": None for part in PARTS for folder in (FOLDER, f"{FOLDER}/possible_answer")
    },
    "size": 1_925_664,
}
TYPES = {"string": "str", "integer": "int", "boolean": "bool", "array": "list", "any": "str"}


def rows(folder: str | Path, *, test: int = 120, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """`(train, test)` pairs from the unpacked members of `WHEEL` in `folder`; no function name is in both.

    Repeated requests are dropped. About `test` rows are held out (all rows of a function go together); both lists are
    shuffled, the same way for the same seed. LoricaError if the files are not those of the pinned wheel.
    """
    by_request: dict[str, Record] = {}
    for record in _records(Path(folder)):
        by_request.setdefault(record.prompt.split("\n", 1)[1], record)
    shuffled = list(by_request.values())
    random.Random(seed).shuffle(shuffled)
    held: dict[str, None] = {}
    for record in shuffled:
        if sum(row.extra["name"] in held for row in shuffled if row.extra) >= test:
            break
        held[_payload(record)["name"]] = None
    train = [row for row in shuffled if _payload(row)["name"] not in held]
    return train, [row for row in shuffled if _payload(row)["name"] in held]


def with_examples(row: Record, examples: Sequence[Record]) -> Record:
    """`row` as a chat with worked examples before its request: what the base model can do without training.

    The examples' answers carry no loss, so the loss is that of the same answer as in `row`.
    """
    shown: list[dict[str, Any]] = []
    for example in examples:
        shown.append({"role": "user", "content": example.prompt})
        shown.append({"role": "assistant", "content": example.completion, "weight": 0})
    return replace(row, kind="chat", messages=[*shown, *row.turns()], prompt="", completion="")


def correct(row: Record, text: str) -> bool:
    """Whether `text` is one Python call that the benchmark accepts as the answer to `row` (see `calls.accepts`)."""
    call = parse_call(text)
    payload = _payload(row)
    return call is not None and accepts(
        call, payload["name"], payload["parameters"], payload["required"], payload["answers"]
    )


def parses(text: str) -> bool:
    """Whether `text` is one Python call at all."""
    return parse_call(text) is not None


def _payload(row: Record) -> dict[str, Any]:
    if row.extra is None or "answers" not in row.extra:
        raise LoricaError(f"{row.where or 'this row'} has no possible answers to compare with; it is not of this set")
    return row.extra


def _records(folder: Path) -> Iterator[Record]:
    for part in PARTS:
        name = f"BFCL_v4_{part}.json"
        asked = _lines(folder / FOLDER / name)
        answers = {line["id"]: line["ground_truth"] for line in _lines(folder / FOLDER / "possible_answer" / name)}
        for number, line in enumerate(asked, 1):
            [(function, possible)] = answers[line["id"]][0].items()
            schema = next(shown for shown in line["function"] if shown["name"] == function)
            yield _record(schema, line["question"][0][-1]["content"].strip(), possible, f"{name}:{number}")


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise LoricaError(f"{path}: not the file of {WHEEL['project']} {WHEEL['version']} ({error})") from error


def _record(schema: dict[str, Any], request: str, possible: dict[str, list[Any]], where: str) -> Record:
    properties, required = schema["parameters"]["properties"], schema["parameters"]["required"]
    shown = ", ".join(_parameter(name, properties[name], name in required) for name in properties)
    wanted = {name: _first(options) for name, options in possible.items() if name in required or "" not in options}
    arguments = ", ".join(f"{name}={wanted[name]!r}" for name in properties if name in wanted)
    extra = {"name": schema["name"], "parameters": list(properties), "required": required, "answers": possible}
    prompt, completion = f"{schema['name']}({shown})\n{request}", f"{schema['name']}({arguments})"
    return Record("pair", prompt=prompt, completion=completion, where=where, extra=extra)


def _parameter(name: str, schema: dict[str, Any], required: bool) -> str:
    inner = schema.get("items", {}).get("type")
    kind = TYPES.get(schema["type"], schema["type"])
    if inner:
        kind += f"[{TYPES.get(inner, inner)}]"
    if "enum" in schema:
        kind = " | ".join(map(repr, schema["enum"]))
    return f"{name}: {kind}" if required else f"{name}: {kind} = {schema.get('default')!r}"


def _first(options: list[Any]) -> Any:
    """The first possible value; inside a dict, the first of each key that may not be left out."""
    value = next(option for option in options if option != "")
    return _settled(value)


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _first(options) for key, options in value.items() if "" not in options}
    if isinstance(value, list):
        return [_settled(item) for item in value]
    return value
