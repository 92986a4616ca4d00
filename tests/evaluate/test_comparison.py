"""Base and adapters side by side: each is measured as it would be alone."""

from __future__ import annotations

import pytest
import torch

import lorica
from lorica import Adapter, LoRA, LoricaError, data, evaluate, models
from lorica.data import Record
from tiny import llama

ROWS = [Record("pair", prompt=f"say {i}", completion="no" if i % 3 else "yes", where=f"rows:{i}") for i in range(12)]


def scores(thing, others, rows=ROWS, **how):
    opened = models.open_thing(thing, dtype="fp32")
    found = {}
    for contender in evaluate.line_up(opened, thing, others):
        with evaluate.selected(opened, contender):
            found[contender.name] = evaluate.measure(opened.model, opened.tok, rows, name=contender.name, **how)
    return found


def test_each_contender_is_measured_as_it_would_be_alone(base, two):
    found = scores(two[0], ["base", two[1]])
    assert list(found) == ["base", "two", "one"]
    for name, thing in zip(found, (base, two[1], two[0]), strict=True):
        alone = models.open_thing(thing, dtype="fp32")
        expected = evaluate.measure(alone.model, alone.tok, ROWS)
        assert found[name].loss.loss == pytest.approx(expected.loss.loss, rel=1e-6)
        assert found[name].answers == expected.answers
    assert len({score.loss.loss for score in found.values()}) == 3


def test_the_model_is_as_before_after_a_comparison(two):
    opened = models.open_thing(two[0], dtype="fp32")
    before = {name: tensor.clone() for name, tensor in lorica.trainable(opened.model).items()}
    for contender in evaluate.line_up(opened, two[0], ["base", two[1]]):
        with evaluate.selected(opened, contender):
            pass
        with pytest.raises(KeyError), evaluate.selected(opened, contender):
            raise KeyError
        assert lorica.active(opened.model) == "default"
    assert all(torch.equal(before[name], tensor) for name, tensor in lorica.trainable(opened.model).items())


def test_a_plain_model_may_be_compared_with_adapters_of_it(base, two):
    found = scores(base, ["base", *two], answers=False)
    assert list(found)[:2] == ["one", "two"]
    assert len(found) == 3
    assert found["one"].loss.loss == scores(two[0], [], answers=False)["one"].loss.loss


def test_everything_that_cannot_be_compared_is_in_one_error(two, tmp_path, tok):
    other = llama()
    other.config._name_or_path = "elsewhere"
    lorica.inject(other, LoRA(r=2))
    with pytest.warns(UserWarning, match="change nothing"):
        Adapter.of(other).save(tmp_path / "foreign")
    with pytest.raises(LoricaError) as fault:
        scores(two[0], [str(tmp_path / "foreign"), str(tmp_path / "absent"), two[1]])
    assert f"its base is elsewhere, not {models.open_thing(two[0]).base}" in str(fault.value)
    assert str(tmp_path / "absent") in str(fault.value)


def test_each_contender_is_asked_through_its_own_template(base, two, tmp_path):
    opened = models.open_thing(two[0], dtype="fp32")
    own = opened.tok.chat_template
    Adapter.of(opened.model, meta={"chat_template": own.replace("assistant", "model")}).save(tmp_path / "other")
    names = evaluate.line_up(opened, two[0], ["base", str(tmp_path / "other")])
    assert [contender.template for contender in names] == [own, own.replace("assistant", "model"), own]
    with evaluate.selected(opened, names[1]):
        assert opened.tok.chat_template != own
    assert opened.tok.chat_template == own


def test_answers_are_asked_for_where_there_is_one_to_compare_with(two):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [Record("chat", messages=chat, where="r:1"), Record("text", text="plain text", where="r:2")]
    (score,) = scores(two[0], [], rows).values()
    assert (score.asked, score.references) == (["r:1"], ["b"])
    assert set(score.nats) == {"r:1", "r:2"}
    (score,) = scores(two[0], [], rows[1:]).values()
    assert score.answers == [] and "exact" not in score.summary()


def test_answers_are_long_enough_for_the_longest_right_one(two):
    rows = [Record("pair", prompt="hi", completion="x" * length, where=f"r:{length}") for length in (1, 30)]
    (score,) = scores(two[0], [], rows).values()
    opened = models.open_thing(two[0], dtype="fp32")
    ids, _ = data.prompt_ids(rows[0], opened.tok)
    assert score.answers[0] == evaluate.generate(opened.model, opened.tok, [ids], max_new=38)[0]
    (score,) = scores(two[0], [], rows, max_new=3).values()
    assert score.answers[0] == evaluate.generate(opened.model, opened.tok, [ids], max_new=3)[0]


def test_a_summary_holds_its_intervals_and_a_difference_is_paired(two):
    found = scores(two[0], ["base"])
    summary = found["one"].summary()
    assert summary["loss_low"] < summary["loss"] < summary["loss_high"]
    assert (summary["rows"], summary["answers"], summary["exact"]) == (12, 12, 0.0)
    assert summary["exact_high"] == pytest.approx(evaluate.wilson(0, 12)[1])
    gap = evaluate.against(found["one"], found["base"])
    assert gap["loss"] == pytest.approx(found["one"].loss.loss - found["base"].loss.loss)
    assert gap["loss_low"] < gap["loss"] < gap["loss_high"]
    same = evaluate.against(found["one"], found["one"])
    assert (same["loss"], same["loss_low"], same["loss_high"], same["exact"]) == (0, 0, 0, 0)
