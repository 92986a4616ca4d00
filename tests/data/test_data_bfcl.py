"""The quickstart's set and the metric on calls."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica import data
from lorica.data import bfcl
from lorica.errors import LoricaError


def schema(name: str, **properties) -> dict:
    required = [key for key, value in properties.items() if not value.get("optional")]
    return {"name": name, "parameters": {"type": "dict", "properties": properties, "required": required}}


@pytest.fixture
def folder(tmp_path):
    """A set of the wheel's layout: 30 functions, two requests each, one request that is in both parts."""
    number, text = {"type": "integer"}, {"type": "string", "optional": True, "default": "km"}
    questions, answers = {part: [] for part in bfcl.PARTS}, {part: [] for part in bfcl.PARTS}

    def add(part, name, request, possible, others=()):
        row_id = f"{part}_{len(questions[part])}"
        functions = [*others, schema(name, n=number, unit=text)]
        questions[part].append(
            {"id": row_id, "question": [[{"role": "user", "content": request}]], "function": functions}
        )
        answers[part].append({"id": row_id, "ground_truth": [{name: possible}]})

    for i in range(30):
        add("simple_python", f"m.f{i}", f"ask {i} ", {"n": [i], "unit": ["", "km"]})
        add("multiple", f"m.f{i}", f"again {i}", {"n": [i], "unit": ["miles", "mi"]}, [schema("other", x=number)])
    add("multiple", "m.f0", "ask 0", {"n": [0], "unit": [""]})
    for part in bfcl.PARTS:
        for place, lines in (("", questions), ("possible_answer/", answers)):
            path = tmp_path / bfcl.FOLDER / f"{place}BFCL_v4_{part}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(json.dumps(line) for line in lines[part]))
    return tmp_path


def test_rows_are_a_signature_with_a_request_and_one_call(folder):
    train, test = bfcl.rows(folder, test=20)
    by_prompt = {row.prompt: row.completion for row in train + test}
    assert by_prompt["m.f3(n: int, unit: str = 'km')\nask 3"] == "m.f3(n=3)"
    assert by_prompt["m.f3(n: int, unit: str = 'km')\nagain 3"] == "m.f3(n=3, unit='miles')"


def test_functions_of_the_test_rows_are_unseen_and_repeated_requests_are_dropped(folder):
    train, test = bfcl.rows(folder, test=20)
    assert len(train) + len(test) == 60
    assert 20 <= len(test) <= 21
    assert not {row.extra["name"] for row in train} & {row.extra["name"] for row in test}
    assert (train, test) == bfcl.rows(folder, test=20)
    assert test != bfcl.rows(folder, test=20, seed=1)[1]


def test_every_target_is_accepted_as_its_own_answer(folder):
    train, test = bfcl.rows(folder)
    assert all(bfcl.correct(row, row.completion) for row in train + test)


def test_files_of_another_wheel_are_refused(tmp_path):
    with pytest.raises(LoricaError, match=r"not the file of bfcl-eval"):
        bfcl.rows(tmp_path)


def test_worked_examples_come_before_the_request_and_carry_no_loss(folder, make_tok):
    train, test = bfcl.rows(folder, test=20)
    shown = bfcl.with_examples(test[0], train[:2])
    tok = make_tok("chatml")
    assert [m["content"] for m in shown.messages][::2] == [train[0].prompt, train[1].prompt, test[0].prompt]
    example = data.encode([shown], tok).examples[0]
    assert [text for text, loss in data.marked(example, tok) if loss] == [test[0].completion + "<|im_end|>"]
    assert data.prompt_ids(shown, tok)[1] == test[0].completion
    assert bfcl.correct(shown, test[0].completion)


ROW = data.Record(
    "pair",
    extra={
        "name": "geo.area",
        "parameters": ["a", "b", "unit", "flag", "points", "opts"],
        "required": ["a"],
        "answers": {
            "a": [10],
            "b": [2.5, ""],
            "unit": ["San Francisco, CA", "it's", ""],
            "flag": [True, ""],
            "points": [[1.0, 2.0], ["x y", "z"], ""],
            "opts": [{"low": [1, 2], "high": ["", 9]}, [{"k": ["v"]}], ""],
        },
    },
)


@pytest.mark.parametrize(
    "arguments",
    [
        "a=10",
        "10",
        "10, 2.5",
        "a=10, b=2.5",
        "a=10, unit='san francisco CA'",
        'a=10, unit="IT\'S"',
        "a=10, flag=True",
        "a=10, unit=''",
        "a=10, points=[1, 2.0]",
        "a=10, points=(1.0, 2)",
        "a=10, points=['X-Y', 'z']",
        "a=10, opts={'low': 2}",
        "a=10, opts={'low': 1, 'high': 9}",
        "a=10, opts=[{'k': 'V'}]",
        "\n a = 10 \n",
    ],
)
def test_these_calls_are_correct(arguments):
    assert bfcl.correct(ROW, f" geo.area({arguments}) \n")


@pytest.mark.parametrize(
    "text",
    [
        "geo.area()",
        "geo.area(a=11)",
        "geo.area(a=10.0)",
        "geo.area(a='10')",
        "geo.area(a=True)",
        "geo.area(a=ten)",
        "geo.area(a=10, b=2.6)",
        "geo.area(a=10, flag=1)",
        "geo.area(a=10, flag=false)",
        "geo.area(a=10, unit=None)",
        "geo.area(a=10, flag='')",
        "geo.area(a=10, other=1)",
        "geo.area(a=10, points=[1.0])",
        "geo.area(a=10, points='12')",
        "geo.area(a=10, opts={'high': 9})",
        "geo.area(a=10, opts={'low': 1, 'x': 1})",
        "geo.area(10, a=10)",
        "geo.area(1, 2, 3, 4, 5, 6, 7)",
        "geo.area(a=10, **{})",
        "geo.area(*[10])",
        "area(a=10)",
        "geo.area(a=10) + 1",
        "geo.area(a=10); geo.area(a=10)",
        "geo.area(a=10)\ngeo.area(a=10)",
        "geo.area(a=10",
        "The answer is geo.area(a=10)",
        "",
    ],
)
def test_these_calls_are_wrong(text):
    assert not bfcl.correct(ROW, text)


def test_text_parses_if_it_is_one_call_of_a_name():
    assert bfcl.parses("f(x=g(1))")
    assert bfcl.parses("a.b.c()")
    for text in (
        "f",
        "f()()",
        "f(a=1, a=2)",
        "f(x",
        "[f()]",
        "\x00",
        "(" * 5000,
        "-" * 100_000 + "1",
        "f(" + "[" * 3000,
    ):
        assert not bfcl.parses(text)


def test_code_in_an_answer_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    assert not bfcl.correct(ROW, f"geo.area(a=open({str(mark)!r}, 'w').write('x') or 10)")
    assert not mark.exists()


@given(st.text(max_size=60))
def test_any_text_is_judged_without_an_error(text):
    assert bfcl.correct(ROW, text) in (True, False)
    assert not bfcl.correct(ROW, f"geo.area(a=11, unit={text!r})")


def test_a_row_of_another_set_has_nothing_to_compare_with():
    with pytest.raises(LoricaError, match="no possible answers"):
        bfcl.correct(data.Record("pair", where="t:1"), "f()")
