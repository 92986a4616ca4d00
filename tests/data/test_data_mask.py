"""Which tokens are learnt: the answer and the token that closes it, under templates of every manner."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lorica import data
from lorica.data import Record
from lorica.errors import LoricaError

SETTLED = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def chat(*turns: str, system: str = "") -> Record:
    """A talk that starts with the user and alternates."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return Record(
        "chat", messages=[{"role": "system", "content": system}, *messages] if system else messages, where="t:1"
    )


def learnt(row: Record, tok) -> list[str]:
    """The learnt runs of every example of `row`, in order."""
    examples = data.encode([row], tok).examples
    return [text for example in examples for text, loss in data.marked(example, tok) if loss]


@pytest.mark.parametrize(
    ("template", "eos", "wanted"),
    [
        ("chatml", "<|im_end|>", ["hello<|im_end|>", "fine thanks<|im_end|>"]),
        ("default-system", "<|im_end|>", ["hello<|im_end|>", "fine thanks<|im_end|>"]),
        ("markers", "<|im_end|>", ["hello<|im_end|>", "fine thanks<|im_end|>"]),
        ("inst", "</s>", [" hello</s>", " fine thanks</s>"]),
        ("llama3", "<|eot|>", ["hello<|eot|>", "fine thanks<|eot|>"]),
    ],
)
def test_answers_and_their_end_tokens_are_learnt_and_nothing_else(make_tok, template, eos, wanted):
    assert learnt(chat("hi there", "hello", "how are you", "fine thanks"), make_tok(template, eos=eos)) == wanted


@pytest.mark.parametrize("earlier", [(), ("hi  there\n", "hello")])
@pytest.mark.parametrize("template", ["chatml", "default-system", "inst", "stripping"])
def test_generation_is_given_exactly_what_training_has_before_the_answer(make_tok, template, earlier):
    tok = make_tok(template, eos="</s>")
    row = chat(*earlier, "how are you", "fine")
    ids, reference = data.prompt_ids(row, tok)
    example = data.encode([row], tok).examples[-1]
    assert reference == "fine"
    assert example.ids[: len(ids)] == ids
    assert example.loss[len(ids)]
    assert not example.loss[len(ids) - 1]


def test_line_breaks_that_tokenise_otherwise_before_an_answer_stay_as_generation_has_them(make_tok):
    tok = make_tok("llama3", eos="<|eot|>")
    row = chat("how are you", "fine")
    ids, _ = data.prompt_ids(row, tok)
    whole = tok(data.render_chat(row.messages, tok), add_special_tokens=False)["input_ids"]
    encoded = data.encode([row], tok)
    assert whole[: len(ids)] != ids
    assert encoded.examples[0].ids[: len(ids)] == ids
    assert encoded.report.joined == 1


def test_no_second_bos_is_added_to_a_template_that_writes_one(make_tok):
    tok = make_tok("llama3", eos="<|eot|>")
    ids = data.encode([chat("hi", "hello")], tok).examples[0].ids
    assert ids.count(tok.bos_token_id) == 1
    assert ids[0] == tok.bos_token_id


@SETTLED
@given(st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=4))
def test_generation_markers_agree_with_the_rendered_difference(make_tok, exchanges):
    tok = make_tok("markers")
    row = chat(*(text for exchange in exchanges for text in exchange))
    encoded = data.encode([row], tok)
    assume(not encoded.report.joined)
    example = encoded.examples[0]
    theirs = tok.apply_chat_template(row.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    length = len(example.ids)
    assert example.ids == theirs["input_ids"][:length]
    assert example.loss == [bool(mark) for mark in theirs["assistant_masks"][:length]]
    assert not any(theirs["assistant_masks"][length:])


@SETTLED
@given(
    st.sampled_from(["chatml", "default-system", "markers", "llama3"]),
    st.lists(st.tuples(st.text(max_size=9), st.text(min_size=1, max_size=9)), min_size=1, max_size=3),
    st.text(max_size=5),
)
def test_learnt_text_is_the_answers_whatever_they_say(make_tok, template, exchanges, system):
    end = "<|eot|>" if template == "llama3" else "<|im_end|>"
    tok = make_tok(template, eos=end)
    row = chat(*(text for exchange in exchanges for text in exchange), system=system)
    example = data.encode([row], tok).examples[0]
    found = [tok.convert_tokens_to_ids(end)]
    wanted = [(answer.strip() if template == "llama3" else answer) + end for _, answer in exchanges]
    runs, current = [], []
    for token, loss in zip(example.ids, example.loss, strict=True):
        if loss:
            current.append(token)
            if token in found:
                runs.append(tok.decode(current))
                current = []
    assert runs == wanted
    assert not current


def test_a_template_that_drops_earlier_thinking_gives_each_such_answer_its_own_example(make_tok):
    tok = make_tok("stripping")
    row = chat("hi", "<think>hm</think>hello", "how are you", "<think>ok</think>fine")
    encoded = data.encode([row], tok)
    assert len(encoded.examples) == 2
    assert learnt(row, tok) == ["<think>hm</think>hello<|im_end|>", "<think>ok</think>fine<|im_end|>"]
    assert "<think>hm" not in tok.decode(encoded.examples[1].ids)
    assert any("rewrites earlier turns" in note for note in encoded.report.notes)


def test_answers_that_the_template_does_not_rewrite_stay_in_one_example(make_tok):
    assert len(data.encode([chat("hi", "hello", "how", "fine")], make_tok("stripping")).examples) == 1


def test_learning_starts_where_answer_and_generation_prompt_part(make_tok):
    tok = make_tok("opening")
    encoded = data.encode([chat("hi", "hello")], tok)
    assert learnt(chat("hi", "hello"), tok) == ["hello<|im_end|>"]
    assert any("leaves the template's generation prompt" in note for note in encoded.report.notes)


def test_a_template_that_rewrites_what_stands_before_an_answer_is_refused_with_the_place(make_tok):
    with pytest.raises(LoricaError, match=r"t:1: .*rewrites what stands before message 2"):
        data.encode([chat("hi", "hello")], make_tok("counting"))


def test_answers_that_no_special_token_closes_are_reported(make_tok):
    tok = make_tok("open-ended")
    encoded = data.encode([chat("hi", "hello", "how", "fine")], tok)
    assert learnt(chat("hi", "hello", "how", "fine"), tok) == ["hello\n", "fine\n"]
    assert any("not taught to stop" in note for note in encoded.report.notes)


def test_a_template_that_refuses_the_roles_says_why_for_every_row(make_tok):
    rows = [chat("hi", "hello", system="be brief"), chat("hi", "hello"), chat("hi", "ho", system="be long")]
    with pytest.raises(LoricaError, match="2 of 3 rows cannot be written") as caught:
        data.encode(rows, make_tok("inst", eos="</s>"))
    assert str(caught.value).count("roles must alternate") == 2


def test_an_answer_of_weight_zero_is_context_only(make_tok):
    row = chat("hi", "hello", "how", "fine")
    row.messages[1]["weight"] = 0
    assert learnt(row, make_tok("chatml")) == ["fine<|im_end|>"]


def test_two_answers_in_a_row_are_both_learnt(make_tok):
    row = chat("hi", "hello")
    row.messages.append({"role": "assistant", "content": "fine"})
    assert learnt(row, make_tok("chatml")) == ["hello<|im_end|>", "fine<|im_end|>"]


def test_a_chat_needs_a_template(make_tok):
    with pytest.raises(LoricaError, match="no chat template"):
        data.encode([chat("hi", "hello")], make_tok(None))


def test_a_pair_is_one_exchange_under_a_template(make_tok):
    pair = Record("pair", prompt="hi", completion="hello", system="be kind")
    tok = make_tok("chatml")
    assert (
        data.encode([pair], tok).examples[0].ids
        == data.encode([chat("hi", "hello", system="be kind")], tok).examples[0].ids
    )
