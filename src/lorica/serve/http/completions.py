"""Answers as OpenAI writes them: chat and plain completions, whole and as the events of a stream."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorica.serve.engine import Token
from lorica.serve.http.shapes import nats
from lorica.serve.text import token_bytes, token_text


@dataclass
class Piece:
    """What came of one choice: text, and the tokens that are now shown, each with the length of text before it."""

    choice: int
    text: str = ""
    tokens: list[tuple[Token, int]] = field(default_factory=list)
    finish: str | None = None

    def join(self, later: Piece) -> None:
        """Add what came after it."""
        self.text += later.text
        self.tokens += later.tokens
        self.finish = later.finish


@dataclass(frozen=True)
class Envelope:
    """What is around the choices, the same in all events of one answer; `kind` is of a whole one, `part` of events."""

    kind: str
    part: str
    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return self._body(self.kind, choices) | {"usage": usage}

    def event(self, choices: list[dict[str, Any]], with_usage: bool, usage: dict[str, Any] | None = None) -> str:
        """One event. Where the client wants `with_usage`, every event has it, all but the last one null."""
        body = self._body(self.part, choices) | ({"usage": usage} if with_usage else {})
        return json.dumps(body, separators=(",", ":"))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class Shape(Protocol):
    """One of the two forms of an answer."""

    envelope: Envelope
    logprobs: int | None  # how many alternatives are told beside each token; None: nothing

    def opening(self, choice: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its text."""
        ...

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A piece in a stream."""
        ...

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        ...


class TextShape:
    """/v1/completions."""

    def __init__(self, tok: Any, model: str, logprobs: int | None) -> None:
        self._tok, self.logprobs = tok, logprobs
        self.envelope = Envelope("text_completion", "text_completion", model, f"cmpl-{uuid.uuid4().hex}")

    def opening(self, choice: int) -> None:
        return None

    def delta(self, piece: Piece) -> dict[str, Any]:
        return self.choice(piece)

    def choice(self, piece: Piece) -> dict[str, Any]:
        told = None if self.logprobs is None else self._told(piece)
        return {"index": piece.choice, "text": piece.text, "logprobs": told, "finish_reason": piece.finish}

    def _told(self, piece: Piece) -> dict[str, Any]:
        tokens = [token for token, _ in piece.tokens]
        tops = [{token_text(self._tok, id): nats(value) for id, value in token.top} for token in tokens]
        return {
            "tokens": [token_text(self._tok, token.id) for token in tokens],
            "token_logprobs": [nats(token.logprob) for token in tokens],
            "top_logprobs": tops if self.logprobs else None,
            "text_offset": [start for _, start in piece.tokens],
        }


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, tok: Any, model: str, logprobs: int | None) -> None:
        self._tok, self.logprobs = tok, logprobs
        self.envelope = Envelope("chat.completion", "chat.completion.chunk", model, f"chatcmpl-{uuid.uuid4().hex}")

    def opening(self, choice: int) -> dict[str, Any]:
        return {"index": choice, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.choice, "delta": {"content": piece.text} if piece.text else {}} | self._rest(piece)

    def choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.choice, "message": message} | self._rest(piece)

    def _rest(self, piece: Piece) -> dict[str, Any]:
        if self.logprobs is None:
            return {"logprobs": None, "finish_reason": piece.finish}
        tokens = [
            self._told(token.id, token.logprob) | {"top_logprobs": [self._told(*other) for other in token.top]}
            for token, _ in piece.tokens
        ]
        return {"logprobs": {"content": tokens}, "finish_reason": piece.finish}

    def _told(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = list(token_bytes(self._tok, token))
        return {"token": token_text(self._tok, token), "logprob": nats(logprob), "bytes": raw}
