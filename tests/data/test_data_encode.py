"""Plain rows, boundaries inside tokens, long rows, and the report."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lorica import data
from lorica.data import Record
from lorica.errors import LoricaError


def pair(prompt: str, completion: str, where: str = "t:1") -> Record:
    return Record("pair", prompt=prompt, completion=completion, where=where)


def test_a_pair_without_template_is_joined_plainly_and_closed_by_the_end_token(make_tok):
    tok = make_tok(None)
    example = data.encode([pair("2+2=", "4 or so")], tok).examples[0]
    assert data.marked(example, tok) == [("2+2=", False), ("4 or so<|im_end|>", True)]


def test_text_is_learnt_whole_but_for_its_first_token(make_tok):
    tok = make_tok(None)
    example = data.encode([Record("text", text="the quick brown fox")], tok).examples[0]
    assert example.loss == [False] + [True] * (len(example.ids) - 1)
    assert example.ids[-1] == tok.eos_token_id
    assert tok.decode(example.ids) == "the quick brown fox<|im_end|>"


def test_text_that_ends_with_the_end_token_gets_no_second_one(make_tok):
    tok = make_tok("chatml")
    assert data.encode([Record("text", text="hi<|im_end|>")], tok).examples[0].ids.count(tok.eos_token_id) == 1


def test_plain_text_starts_with_bos_where_the_tokenizer_puts_one(make_tok):
    tok = make_tok(None)
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tok.bos_token_id)]
    )
    row = pair("hi ", "there")
    example = data.encode([row], tok).examples[0]
    prompt, _ = data.prompt_ids(row, tok)
    assert example.ids[0] == prompt[0] == tok.bos_token_id
    assert example.ids.count(tok.bos_token_id) == 1
    assert not example.loss[0]


def test_a_token_that_would_join_prompt_and_answer_is_tokenised_apart(make_tok):
    tok = make_tok(None)
    row = pair("the quick ", "brown fox")
    assert data.prompt_ids(row, tok)[0] != tok("the quick brown")["input_ids"][: len(data.prompt_ids(row, tok)[0])]
    encoded = data.encode([row], tok)
    assert data.marked(encoded.examples[0], tok) == [("the quick ", False), ("brown fox<|im_end|>", True)]
    assert encoded.report.joined == 1


def test_where_parts_would_change_the_text_the_joined_token_is_learnt(spaced_tok):
    row = pair("class: ", "spam")
    encoded = data.encode([row], spaced_tok)
    example = encoded.examples[0]
    assert spaced_tok.decode(example.ids, skip_special_tokens=True) == "class: spam"
    assert encoded.report.joined == 1
    assert spaced_tok.decode(example.ids[example.loss.index(True) :]).endswith("spam</s>")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_plain_pairs_keep_their_text_and_their_prompt_ids(make_tok, prompt, completion):
    tok = make_tok(None)
    row = pair(prompt, completion)
    example = data.encode([row, pair("a", "bb")], tok).examples[0]
    ids, reference = data.prompt_ids(row, tok)
    assert reference == completion
    assert tok.decode(example.ids[:-1]) == prompt + completion
    assert example.ids[: len(ids)] == ids
    assert example.loss == [False] * max(len(ids), 1) + [True] * (len(example.ids) - max(len(ids), 1))


def test_long_rows_are_cut_on_the_right_or_dropped_when_no_answer_is_left(make_tok):
    tok = make_tok("chatml")
    rows = [pair("hi", "x" * 100, "t:1"), pair("y" * 100, "hi", "t:2"), pair("hi", "ok", "t:3")]
    encoded = data.encode(rows, tok, max_len=30)
    assert [example.where for example in encoded.examples] == ["t:1", "t:3"]
    assert max(len(example.ids) for example in encoded.examples) == 30
    assert (encoded.report.cut, encoded.report.dropped) == (1, 1)
    assert any("over 30 tokens: 1 cut on the right, 1 dropped" in note for note in encoded.report.notes)


def test_nothing_to_learn_at_all_is_refused_with_count_and_example(make_tok):
    with pytest.raises(LoricaError, match="none of the 2 rows") as caught:
        data.encode([pair("y" * 100, "hi", "t:7"), pair("z" * 100, "ho", "t:8")], make_tok("chatml"), max_len=30)
    assert "2 have no answer within the first 30 tokens" in str(caught.value)
    assert "t:7" in str(caught.value)
    assert "yyyy" in str(caught.value)


def test_a_row_without_loss_is_left_out_and_counted(make_tok):
    silent = Record(
        "chat", messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a", "weight": 0}]
    )
    encoded = data.encode([silent, pair("hi", "ho")], make_tok("chatml"))
    assert (len(encoded.examples), encoded.report.silent) == (1, 1)


def test_the_report_counts_what_is_kept(make_tok):
    tok = make_tok("chatml")
    encoded = data.encode([pair("hi", "a" * n, f"t:{n}") for n in range(1, 101)], tok)
    lengths = sorted(len(example.ids) for example in encoded.examples)
    report = encoded.report
    assert (report.rows, report.examples, report.tokens) == (100, 100, sum(lengths))
    assert (report.median, report.p95, report.longest) == (lengths[50], lengths[94], lengths[-1])
    assert report.loss_share == sum(sum(e.loss) for e in encoded.examples) / report.tokens


def test_order_does_not_depend_on_the_batches_in_which_rows_are_tokenised(make_tok, monkeypatch):
    tok = make_tok("chatml")
    rows = [pair("hi " * (n % 7), f"ho {n}", f"t:{n}") for n in range(50)]
    whole = data.encode(rows, tok).examples
    monkeypatch.setattr("lorica.data.encoding.CHUNK", 7)
    assert data.encode(rows, tok).examples == whole


def test_marked_runs_join_to_the_whole_text(make_tok):
    tok = make_tok("default-system")
    example = data.encode([pair("hi", "h\u00e9llo \u4f60\u597d")], tok).examples[0]
    assert "".join(text for text, _ in data.marked(example, tok)) == tok.decode(example.ids)


def test_prompt_ids_of_an_unanswered_row_are_all_of_it(make_tok):
    tok = make_tok("chatml")
    row = Record("chat", messages=[{"role": "user", "content": "hi"}])
    ids, reference = data.prompt_ids(row, tok)
    assert tok.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert reference == ""
    assert data.prompt_ids(Record("pair", prompt="hi"), tok) == (ids, "")
    assert data.prompt_ids(Record("text", text="once"), tok) == (tok("once")["input_ids"], "")


def test_tool_calls_are_rendered_learnt_and_compared_as_the_template_writes_them(make_tok):
    tok = make_tok("chatml")
    tok.chat_template = (
        "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m.tool_calls %}"
        "{{ c.function.name + c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "get", "arguments": {"a": 1}}}
    row = Record(
        "chat",
        messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        tools=[{"type": "function", "function": {"name": "get", "parameters": {}}}],
    )
    example = data.encode([row], tok).examples[0]
    assert data.marked(example, tok)[-1] == ('get{"a": 1}<|im_end|>', True)
    ids, reference = data.prompt_ids(row, tok)
    assert tok.decode(ids).startswith("tools: [")
    assert reference.strip() == 'get{"a": 1}'
