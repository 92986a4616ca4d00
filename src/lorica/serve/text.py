"""Tokens -> text as it comes: never half a character, never a word past a stop string.

A token's text depends on its neighbours: some tokenizers drop the space of the first token they decode, and a character
outside ASCII may span several tokens. So a new token is decoded together with the few before it, beginning with the
prompt's last ones, and what is new is the difference.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

# Of the prompt, decoded in front of the answer: enough for a space that depends on what stands before it.
_SEED = 6
# A character is at most four tokens of a byte each; after so many without one, these bytes are no text.
_PENDING = 8
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Detokenizer:
    """The text of one answer, token by token."""

    def __init__(self, tok: Any, prompt: Sequence[int]) -> None:
        backend = getattr(tok, "backend_tokenizer", None)
        # transformers' own decode does the same around it, and takes twice as long.
        self._text = (
            functools.partial(backend.decode, skip_special_tokens=True)
            if backend is not None
            else functools.partial(tok.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        self._ids = list(prompt[-_SEED:])
        self._start, self._read = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that is certain now that `token` has come; empty inside a character."""
        self._ids.append(token)
        return self._new(whole=len(self._ids) - self._read >= _PENDING)

    def end(self) -> str:
        """What is left when no token will come: a character of which some bytes are missing."""
        return self._new(whole=True)

    def _new(self, whole: bool) -> str:
        before = self._text(self._ids[self._start : self._read])
        text = self._text(self._ids[self._start :])
        if text == before and not text.endswith("\ufffd"):  # tokens without text, of which nothing has to be kept
            del self._ids[self._read :]
        if len(text) <= len(before) or (text.endswith("\ufffd") and not whole):
            return ""
        self._ids = self._ids[self._read :]
        self._start, self._read = 0, len(self._ids)
        return text[len(before) :]


@dataclass
class StopStrings:
    """Text up to the string that is complete first. What may be the beginning of one is held back until it is known."""

    stops: Sequence[str]
    found: bool = False
    _held: str = field(default="", init=False)

    def add(self, text: str) -> str:
        """What may be shown after `text` has come. Once `found`, nothing more is to be added."""
        self._held += text
        found = [(place + len(stop), place) for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.found = True
            return self._let(min(found)[1])
        return self._let(len(self._held) - max((self._begun(stop) for stop in self.stops), default=0))

    def end(self) -> str:
        """What was held back, when no more text will come."""
        return self._let(len(self._held))

    def _let(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown

    def _begun(self, stop: str) -> int:
        """Length of the longest end of the held text with which `stop` begins."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


def token_bytes(tok: Any, token: int) -> bytes:
    """The bytes that a token stands for, those of half a character among them."""
    piece = tok.convert_ids_to_tokens(token)
    if piece is None or token in tok.all_special_ids or token in tok.added_tokens_decoder:
        return (piece or "").encode()
    if byte := _BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    if _is_byte_level(tok):
        return bytes(_unicode_to_bytes()[char] for char in piece)
    return piece.replace("\u2581", " ").encode()


def token_text(tok: Any, token: int) -> str:
    """A token by itself, as OpenAI writes it: its text, or its bytes where they are no text."""
    raw = token_bytes(tok, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _is_byte_level(tok: Any) -> bool:
    backend = getattr(tok, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


@functools.cache
def _unicode_to_bytes() -> dict[str, int]:
    return {char: byte for byte, char in bytes_to_unicode().items()}
