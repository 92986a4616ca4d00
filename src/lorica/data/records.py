"""One row of training data, whatever file it came from, and what reading a source brings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """One normalised row.

    `kind` says which fields speak: "chat" (`messages`, `tools`), "pair" (`prompt`, `completion`, `system`) or "text"
    (`text`). `where` is "file.jsonl:12". `extra` is carried along for a metric and never shown to the model.
    """

    kind: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    text: str = ""
    system: str = ""
    tools: list[Any] | None = None
    where: str = ""
    extra: dict[str, Any] | None = None

    def turns(self) -> list[dict[str, Any]]:
        """The row as chat messages; a pair is one exchange. Not for text rows."""
        if self.kind == "chat":
            return self.messages
        system = [{"role": "system", "content": self.system}] if self.system else []
        answer = [{"role": "assistant", "content": self.completion}] if self.completion else []
        return [*system, {"role": "user", "content": self.prompt}, *answer]

    @property
    def key(self) -> str:
        """The content alone: equal for exact duplicates, wherever they stand."""
        content = [self.kind, self.messages, self.prompt, self.completion, self.text, self.system, self.tools]
        return json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)

    @property
    def lacks_answer(self) -> bool:
        """Nothing to learn from: no completion or text, no assistant turn, or an assistant turn that says nothing."""
        if self.kind == "pair":
            return not self.completion.strip()
        if self.kind == "text":
            return not self.text.strip()
        answers = [message for message in self.messages if message["role"] == "assistant"]
        return not answers or any(says_nothing(message) for message in answers)


@dataclass
class Records:
    """Rows to train on (`Record`, or `LabelledRow`) and, where the source has them, its own `valid` and `test` rows.

    `faults` are the things put right while reading (rows dropped, with count and lines); what could not be put right
    is an error instead. `duplicates` and `empty` count the dropped rows over all parts.
    """

    rows: list[Any]
    format: str
    faults: list[str] = field(default_factory=list)
    valid: list[Any] | None = None
    test: list[Any] | None = None
    duplicates: int = 0
    empty: int = 0

    def __len__(self) -> int:
        return len(self.rows)


def says_nothing(message: dict[str, Any]) -> bool:
    """Whether an assistant message has neither text nor a tool call."""
    return not str(message.get("content") or "").strip() and not message.get("tool_calls")
