"""A conversation: what the model is given at each turn, and who answers."""

from __future__ import annotations

import contextlib

import pytest

import lorica
from lorica import LoricaError, evaluate, models
from lorica.data import Record, prompt_ids


@pytest.fixture
def opened(two):
    return models.open_thing(two[0], dtype="fp32")


@pytest.fixture
def talk(opened):
    return evaluate.Talk(evaluate.Here(opened.model, opened.tok), max_new=12)


def said(pieces):
    return "".join(pieces)


def alone(talk, messages):
    """The greedy answer to messages."""
    ids, _ = prompt_ids(Record("chat", messages=messages), talk.speaker.tok)
    return evaluate.generate(talk.speaker.model, talk.speaker.tok, [ids], max_new=12)[0]


def test_each_turn_is_given_the_whole_talk(talk):
    first = said(talk.ask("hi"))
    second = said(talk.ask("more"))
    user = [{"role": "user", "content": text} for text in ("hi", "more")]
    assert first == alone(talk, user[:1])
    assert second == alone(talk, [user[0], {"role": "assistant", "content": first}, user[1]])
    talk.reset()
    assert said(talk.ask("more")) == alone(talk, user[1:])


def test_the_system_prompt_is_in_front_and_outlives_a_reset(talk):
    talk.system = "be brief"
    said(talk.ask("hi"))
    talk.reset()
    answer = said(talk.ask("hi"))
    assert answer == alone(talk, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}])
    assert [message["role"] for message in talk.row()["messages"]] == ["system", "user", "assistant"]


def test_toggling_answers_as_base_and_as_tuned(talk):
    user = [{"role": "user", "content": "hi"}]
    tuned = alone(talk, user)
    with lorica.disabled(talk.speaker.model):
        plain = alone(talk, user)
    assert plain != tuned
    assert talk.tuned and said(talk.ask("hi")) == tuned
    talk.reset()
    talk.toggle()
    assert not talk.tuned and said(talk.ask("hi")) == plain
    talk.toggle()
    assert talk.tuned


def test_a_retry_is_the_other_models_answer_or_another_one(talk):
    tuned = said(talk.ask("hi"))
    talk.toggle()
    plain = said(talk.retry())
    with lorica.disabled(talk.speaker.model):
        assert plain == alone(talk, [{"role": "user", "content": "hi"}])
    drawn = [said(talk.retry()), said(talk.retry())]
    assert len({tuned, plain, *drawn}) == 4
    assert [message["content"] for message in talk.messages] == ["hi", drawn[-1]]


def test_a_stopped_answer_is_remembered_as_far_as_it_came(talk):
    with contextlib.closing(talk.ask("hi")) as pieces:
        first = next(pieces)
    assert talk.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}]


def test_without_a_template_each_prompt_is_continued_by_itself(talk):
    talk.speaker.tok.chat_template = None
    said(talk.ask("one"))
    answer = said(talk.ask("two"))
    (expected,) = evaluate.generate(
        talk.speaker.model, talk.speaker.tok, [talk.speaker.tok("two")["input_ids"]], max_new=12
    )
    assert talk.plain and answer == expected
    assert talk.row() == {"prompt": "two", "completion": answer}


def test_what_cannot_be_done_is_an_error_and_changes_nothing(talk, base):
    for use in (talk.row, talk.retry):
        with pytest.raises(LoricaError, match="nothing"):
            use()
    talk.speaker.tok.chat_template = "{{ raise_exception('not today') }}"
    with pytest.raises(LoricaError, match="not today"):
        said(talk.ask("hi"))
    assert talk.messages == []
    model, tok = lorica.load(base, dtype="fp32")
    with pytest.raises(LoricaError, match="no adapter on this model"):
        evaluate.Talk(evaluate.Here(model, tok)).toggle()
