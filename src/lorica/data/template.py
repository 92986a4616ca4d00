"""The one place where rows become text: through the model's own chat template, or plainly where it has none."""

from __future__ import annotations

from typing import Any

from lorica.data.records import Record
from lorica.errors import LoricaError


def render_chat(
    messages: list[dict[str, Any]], tok: Any, add_generation_prompt: bool = False, tools: list[Any] | None = None
) -> str:
    """`messages` as the model's template writes them; with `add_generation_prompt`, up to where an answer begins.

    The text holds its own special tokens (often a BOS too): tokenise it with `text_ids`, which adds none. LoricaError
    where the tokenizer has no template, or where its template refuses the messages, with the template's reason.
    """
    if not tok.chat_template:
        raise LoricaError(
            "this tokenizer has no chat template, so chat rows cannot be written for it; "
            "use an instruction-tuned model, or rows of prompt and completion"
        )
    try:
        return tok.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program, and may fail as any does
        roles = ", ".join(message["role"] for message in messages) or "no message"
        raise LoricaError(f"the model's chat template refuses these messages ({roles}): {error}") from error


def templated(row: Record, tok: Any) -> bool:
    """Whether `row` goes through the chat template: chat always, pairs where there is one, text never."""
    return row.kind == "chat" or (row.kind == "pair" and bool(tok.chat_template))


def plain_prompt(row: Record) -> str:
    """What stands before the completion of a pair that is joined plainly: system and prompt, or the prompt alone."""
    return f"{row.system}\n\n{row.prompt}" if row.system else row.prompt


def text_ids(texts: list[str], tok: Any) -> list[list[int]]:
    """Token ids of each text, nothing added: special tokens only where the text spells them."""
    if not texts:
        return []
    return tok(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def bos_ids(tok: Any) -> list[int]:
    """The BOS token as a list where this tokenizer itself puts one before plain text, else nothing."""
    bos = tok.bos_token_id
    return [bos] if bos is not None and tok("a")["input_ids"][:1] == [bos] else []


def prompt_ids(row: Record, tok: Any) -> tuple[list[int], str]:
    """`(ids, reference)`: all tokens before the last answer, ready to generate from, and the text of that answer.

    A row that ends without an answer gives everything and "". A text row is its own prompt. For an answer that is a
    tool call the reference is what the template writes for it.
    """
    if not templated(row, tok):
        text = row.text if row.kind == "text" else plain_prompt(row)
        return bos_ids(tok) + text_ids([text], tok)[0], row.completion
    messages = row.turns()
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    before = messages[:-1] if answered else messages
    head = render_chat(before, tok, True, row.tools)
    ids = text_ids([head], tok)[0]
    if not answered:
        return ids, ""
    if not messages[-1].get("tool_calls"):
        return ids, messages[-1]["content"]
    whole = text_ids([render_chat(messages, tok, False, row.tools)], tok)[0]
    return ids, tok.decode(whole[len(ids) :], skip_special_tokens=True)
