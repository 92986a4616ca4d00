"""Which characters of a row are to be learnt: the difference between two renderings.

Most chat templates do not mark the assistant's part, so it is found from outside, for each assistant turn i:

    head = render(messages[:i], add_generation_prompt=True)     what the model is given when it has to answer
    done = render(messages[:i+1])                               the same, answered
    done[len(head):]                                            the answer and the token that closes it

Rules, each of them tested:
1. The closing special token is learnt; white space that a template writes after it is not.
2. A template may write an earlier turn differently once the talk goes on (Qwen3 drops the thinking). Then `done` is no
   prefix of the whole, and that turn becomes a piece of its own, worded as the model will meet it.
3. Where `head` is no prefix of `done` (a generation prompt that opens a thought which an answered turn lacks), learning
   starts where the two part, and the report says so; if not even the messages before are a prefix, the row is refused.
4. An assistant message with `"weight": 0` is context only.
5. Nothing after the last learnt character is kept: it could not be learnt from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorica.data.records import Record
from lorica.data.template import plain_prompt, render_chat, templated
from lorica.errors import LoricaError


@dataclass
class Piece:
    """A text and the character ranges of it to learn, ascending. `plain` texts get BOS and a learnt EOS when encoded.

    `parted` and `unclosed` count the spans under rule 3 and those that no special token closes.
    """

    text: str
    spans: list[tuple[int, int]]
    where: str
    plain: bool = False
    parted: int = 0
    unclosed: int = 0


def closers(tok: Any) -> tuple[str, ...]:
    """The tokenizer's special and added tokens: what may close a turn."""
    added = {str(token) for token in tok.added_tokens_decoder.values()} | set(tok.all_special_tokens)
    return tuple(sorted(token for token in added if token.strip()))


def pieces(row: Record, tok: Any, closing: tuple[str, ...]) -> list[Piece]:
    """The texts of one row with their learnt ranges; usually one, more under rule 2, none if nothing is to be learnt.

    `closing` is what `closers` gives. LoricaError with the place where the template refuses the row or rewrites what
    stands before an answer.
    """
    if not templated(row, tok):
        head = plain_prompt(row) if row.kind == "pair" else ""
        text = head + (row.completion if row.kind == "pair" else row.text)
        return [Piece(text, [(len(head), len(text))], row.where, plain=True)]
    try:
        return _chat_pieces(row, tok, closing)
    except LoricaError as error:
        raise LoricaError(f"{row.where}: {error}") from error


def _chat_pieces(row: Record, tok: Any, closing: tuple[str, ...]) -> list[Piece]:
    messages = row.turns()
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]
    if not turns:
        return []
    last = turns[-1]
    whole = render_chat(messages[: last + 1], tok, False, row.tools)
    found: list[Piece] = []
    main = Piece("", [], row.where)
    for i in turns:
        done = whole if i == last else render_chat(messages[: i + 1], tok, False, row.tools)
        start, parted = _start(messages, i, done, row, tok)
        bare = done.rstrip()
        closed = len(bare) > start and bare.endswith(closing)
        end = len(bare) if closed else len(done)
        piece = main if whole.startswith(done[:end]) else Piece("", [], row.where)
        piece.text = done[:end]
        piece.spans.append((start, end))
        piece.parted += parted
        piece.unclosed += not closed
        if piece is not main:
            found.append(piece)
    return [*found, main]


def _start(messages: list[dict[str, Any]], i: int, done: str, row: Record, tok: Any) -> tuple[int, bool]:
    """Where turn `i` starts in `done`, and whether that is short of the generation prompt (rule 3)."""
    head = render_chat(messages[:i], tok, True, row.tools)
    if done.startswith(head):
        return len(head), False
    before = render_chat(messages[:i], tok, False, row.tools)
    if not done.startswith(before):
        raise LoricaError(
            f"the model's chat template rewrites what stands before message {i + 1} once it is answered, so it cannot "
            "be told which part the model writes; use another template, or split the talk at that message"
        )
    return shared(head, done), True


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
