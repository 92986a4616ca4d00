"""Answers: batched like one by one, stopped where they end, streamed without broken characters."""

from __future__ import annotations

import warnings

import pytest
import torch

from lorica import LoricaError, evaluate
from lorica.evaluate.generation import _pieces

ASKED = [
    "hi",
    "a much longer question than the others are",
    "?",
    "what is it",
    "no",
    "seven words are enough for a test",
]


@pytest.fixture
def prompts(tok):
    return [tok(text)["input_ids"] for text in ASKED]


def by_hand(model, ids, steps, stops):
    """Greedy decoding without cache, padding or batch."""
    ids = list(ids)
    said = []
    for _ in range(steps):
        with torch.no_grad():
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in stops:
            break
        ids.append(token)
        said.append(token)
    return said


@pytest.mark.parametrize("which", ["model", "gpt2"])
def test_a_batch_answers_as_each_prompt_alone(which, request, tok, prompts):
    model = request.getfixturevalue(which)
    stops = evaluate.stop_ids(model, tok)
    expected = [tok.decode(by_hand(model, ids, 20, stops)) for ids in prompts]
    assert len(set(expected)) == len(expected)
    for batch in (1, 4, 16):
        assert evaluate.generate(model, tok, prompts, max_new=20, batch=batch) == expected


def test_an_answer_ends_at_every_kind_of_stop_token(model, tok, prompts):
    """The model's own list, the tokenizer's end, and the end of a turn, which neither of them knows."""
    free = by_hand(model, prompts[1], 20, ())
    for place in (3, 5):
        stop = free[place]
        upto = free[: free.index(stop)]
        model.generation_config.eos_token_id = [0, stop]
        assert evaluate.generate(model, tok, [prompts[1]], max_new=20) == [tok.decode(upto)]
    model.generation_config.eos_token_id = None
    assert evaluate.stop_ids(model, tok) == [tok.eos_token_id, tok.convert_tokens_to_ids("<|im_end|>")]


def test_a_stop_token_is_found_whatever_the_template_calls_it(model, retok):
    model.generation_config.eos_token_id = None
    odd = retok("{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_start|>' }}{% endfor %}")
    assert odd.convert_tokens_to_ids("<|im_start|>") in evaluate.stop_ids(model, odd)
    assert evaluate.stop_ids(model, retok(None)) == [odd.eos_token_id]
    unclosed = retok("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    assert evaluate.stop_ids(model, unclosed) == [odd.eos_token_id]


def test_the_models_recommended_sampling_does_not_touch_greedy_answers(model, tok, prompts, capfd):
    expected = evaluate.generate(model, tok, prompts, max_new=12)
    recommended = {"do_sample": True, "temperature": 2.0, "top_k": 3, "repetition_penalty": 5.0, "max_length": 10}
    model.generation_config.update(**recommended)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate.generate(model, tok, prompts, max_new=12) == expected
        assert "".join(evaluate.stream(model, tok, prompts[0], max_new=12)) == expected[0]
    assert capfd.readouterr() == ("", "")
    assert model.generation_config.top_k == 3


def test_the_seed_decides_what_is_drawn_and_leaves_the_random_state_alone(model, tok, prompts):
    state = torch.random.get_rng_state()
    drawn = [evaluate.generate(model, tok, prompts, max_new=12, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_special_tokens_and_the_prompt_are_not_in_the_text(model, tok):
    special = tok.convert_tokens_to_ids("<|im_start|>")
    with torch.no_grad():
        model.lm_head.weight[special] *= 40
    texts = evaluate.generate(model, tok, [[special, *tok("hi")["input_ids"]]], max_new=8, temperature=1.0)
    assert "<|" not in texts[0] and not texts[0].startswith("hi")


def test_a_prompt_near_the_last_position_shortens_its_own_answer_only(gpt2, tok):
    long = tok("x" * 60)["input_ids"]
    short = tok("hi")["input_ids"]
    stops = evaluate.stop_ids(gpt2, tok)
    expected = [tok.decode(by_hand(gpt2, long, 4, stops)), tok.decode(by_hand(gpt2, short, 20, stops))]
    assert evaluate.generate(gpt2, tok, [long, short], max_new=20) == expected
    with pytest.raises(LoricaError, match="1 of 2 prompts leave no room .* 64 positions; the longest has 64 tokens"):
        evaluate.generate(gpt2, tok, [short, [5] * 64], max_new=20)


def test_an_empty_prompt_starts_from_the_end_of_text(model, tok):
    (answer,) = evaluate.generate(model, tok, [[]], max_new=5)
    assert answer == tok.decode(by_hand(model, [tok.pad_token_id], 5, evaluate.stop_ids(model, tok)))
    assert evaluate.generate(model, tok, []) == []


def test_the_pieces_of_a_stream_join_to_the_answer(model, tok, prompts):
    expected = evaluate.generate(model, tok, prompts, max_new=30)
    for ids, answer in zip(prompts, expected, strict=True):
        assert "".join(evaluate.stream(model, tok, ids, max_new=30)) == answer


def test_no_piece_ends_inside_a_character(tok):
    text = "na\u00efve \u4f60\u597d \U0001f600!\n  two  spaces"
    pieces = list(_pieces(tok(text)["input_ids"], tok))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(text)
    cut_off = tok("a\U0001f600")["input_ids"][:-1]
    assert list(_pieces(cut_off, tok)) == ["a", "\ufffd"]


def test_a_stream_that_is_closed_stops_the_model_and_restores_it(model, tok, prompts):
    model.train()
    own = model.generation_config
    pieces = evaluate.stream(model, tok, prompts[0], max_new=400, temperature=3.0)
    next(pieces)
    pieces.close()
    assert model.training and model.generation_config is own


def test_a_fault_while_streaming_reaches_the_reader(model, tok, monkeypatch):
    def broken(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(MemoryError, match="no room"):
        list(evaluate.stream(model, tok, [5, 6]))
