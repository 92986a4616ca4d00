"""Text of tokens as they come: whole characters, right spaces, nothing of a stop string."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lorica.serve.text import Detokenizer, StopStrings, token_bytes, token_text

from .fake import ids

TEXT = "Grüße, 東京 \U0001f600 e\u0301nd\n"


def words() -> PreTrainedTokenizerFast:
    """A tokenizer that drops the space of the first token that it decodes, as Llama 2's does."""
    vocab = {"\u2581The": 0, "\u2581cat": 1, "s": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "</s>": 6}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def said(tok, prompt, tokens):
    words = Detokenizer(tok, prompt)
    return [*map(words.add, tokens), words.end()]


def test_pieces_join_to_the_text_and_never_end_inside_a_character(tok):
    pieces = said(tok, ids("Prompt:"), ids(TEXT))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[2:5] == ["", "ü", ""]  # two bytes, shown with the second


def test_a_first_word_keeps_its_space_after_a_prompt_and_not_without_one():
    tok = words()
    assert said(tok, [0], [1, 2])[:2] == [" cat", "s"]
    assert "".join(said(tok, [], [1, 2])) == "cats"
    assert "".join(said(tok, [0], [3, 4, 5])) == "€"


def test_special_tokens_are_no_text(tok):
    assert "".join(said(tok, ids("x"), [*ids("a"), 257, *ids("b")])) == "ab"


def test_a_character_that_never_comes_whole_is_shown_at_the_end_or_after_some_tokens(tok):
    assert said(tok, [], [*ids("a"), 0xE2, 0x82])[-1] == "\ufffd"
    pieces = said(tok, [], [0x80] * 30)
    assert sum(bool(piece) for piece in pieces) > 2
    assert set("".join(pieces)) == {"\ufffd"}


def test_a_token_alone_is_its_text_or_its_bytes(tok):
    assert token_text(tok, ord("a")) == "a"
    assert token_text(tok, 32) == " "
    assert token_text(tok, 0xC3) == "bytes:\\xc3"
    assert token_bytes(tok, 0xC3) == b"\xc3"
    assert token_text(tok, 257) == "</s>"
    assert token_bytes(words(), 3) == b"\xe2"
    assert token_text(words(), 1) == " cat"


def cut(text: str, stops: list[str]) -> str:
    """What is to be shown of a text: all before the stop string that is complete first."""
    return text[
        : min([(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text], default=(0, None))[1]
    ]


def test_text_ends_before_the_first_stop_string_however_it_comes():
    random_ = random.Random(0)
    for _ in range(300):
        text = "".join(random_.choices("ab\n", k=12))
        stops = ["".join(random_.choices("ab\n", k=random_.randint(1, 4))) for _ in range(random_.randint(0, 3))]
        held, shown = StopStrings(stops), ""
        left = text
        while left and not held.found:
            size = random_.randint(1, 3)
            shown, left = shown + held.add(left[:size]), left[size:]
            assert text.startswith(shown)
        shown += "" if held.found else held.end()
        assert shown == cut(text, stops), (text, stops)
        assert held.found == any(stop in text for stop in stops)


@pytest.mark.parametrize(("pieces", "shown"), [(["on", "e EN", "D"], ["on", "e ", ""]), (["EN", "try"], ["", "ENtry"])])
def test_only_what_may_begin_a_stop_string_is_held_back(pieces, shown):
    held = StopStrings(["END"])
    assert [held.add(piece) for piece in pieces] == shown


def test_many_tokens_without_text_leave_the_next_character_whole(tok):
    assert "".join(said(tok, ids("x"), [*ids("a"), *[257] * 20, *ids("\U0001f980 ok")])) == "a\U0001f980 ok"
