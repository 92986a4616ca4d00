"""Rows with a label or a score: which columns they come from, what is a label, how they become tokens."""

from __future__ import annotations

import json

import pytest

import classifiers
from lorica import LoricaError
from lorica.data import LabelledRow, encode_labelled, label_names, read_labelled, split
from lorica.data.sequences import balance, collate_labelled, counts


@pytest.fixture
def table(tmp_path):
    """Writes rows into a file."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize(
    "row, texts, label",
    [
        ({"sentence": "a", "label": 1, "idx": 7}, ("a",), "1"),
        ({"Text": "a", "Label": "spam"}, ("a",), "spam"),
        ({"premise": "a", "hypothesis": "b", "label": "no"}, ("a", "b"), "no"),
        ({"question": "a", "sentence": "b", "label": "no"}, ("a", "b"), "no"),
        ({"sentence1": "a", "sentence2": "b", "label": True}, ("a", "b"), "true"),
        ({"review": "a", "label": 2.0}, ("a",), "2"),
        ({"text": "a", "label": " x "}, ("a",), "x"),
    ],
)
def test_columns_of_well_known_names_are_found(table, row, texts, label):
    found = read_labelled(table([row]), "classify").rows[0]
    assert (found.texts, found.label) == (texts, label)
    assert found.where == "rows.jsonl:1"


def test_the_columns_may_be_told(table):
    path = table([{"body": "a", "reply": "b", "kind": "x", "stars": "4.5", "label": "wrong"}])
    told = read_labelled(path, "classify", map="text=body,label=kind").rows[0]
    assert (told.texts, told.label) == (("a",), "x")
    pair = read_labelled(path, "regress", map="first=body,second=reply,score=stars").rows[0]
    assert (pair.texts, pair.label) == (("a", "b"), 4.5)


def test_what_cannot_be_found_is_said_with_a_line_to_type(table):
    path = table([{"a": "x", "b": "y"}])
    with pytest.raises(LoricaError, match=r"columns: a, b[\s\S]*--map text=a,label=b"):
        read_labelled(path, "classify")
    with pytest.raises(LoricaError, match=r"(?s)unknown key 'texts'.*did you mean.*text.*'label': expected key=column"):
        read_labelled(path, "classify", map="texts=a,label")
    with pytest.raises(LoricaError, match="unknown column 'c'"):
        read_labelled(path, "classify", map="text=a,label=c")


def test_every_row_that_cannot_be_used_is_listed(table):
    path = table([{"text": "a", "score": 1}, {"text": "b", "score": "x"}, {"text": ["c"], "score": 1}])
    with pytest.raises(
        LoricaError, match=r"(?s)2 faults.*rows.jsonl:2: the score is 'x'.*rows.jsonl:3: 'text' is list"
    ):
        read_labelled(path, "regress")
    with pytest.raises(LoricaError, match="for scores: --task regress"):
        read_labelled(table([{"text": "a", "label": 0.5}]), "classify")


def test_duplicates_and_rows_without_a_label_are_dropped_and_counted(table):
    rows = [
        {"text": "a", "label": 1},
        {"text": "b", "label": None},
        {"text": "a", "label": 1},
        {"text": "a", "label": 0},
    ]
    found = read_labelled(table(rows), "classify")
    assert [(row.texts[0], row.label) for row in found.rows] == [("a", "1"), ("a", "0")]
    assert (found.duplicates, found.empty) == (1, 1)
    kept = read_labelled(table(rows), "classify", answers=False)
    assert [row.label for row in kept.rows] == ["1", None, "1", "0"]


def test_a_part_whose_labels_are_all_placeholders_has_none(table):
    table([{"text": f"t{i}", "label": i % 2} for i in range(4)], "glue/train.jsonl")
    path = table([{"text": "u", "label": -1}, {"text": "v", "label": -1}], "glue/test.jsonl").parent
    found = read_labelled(path, "classify")
    assert (len(found.rows), found.test, found.empty) == (4, [], 2)
    mixed = read_labelled(table([{"text": "a", "label": -1}, {"text": "b", "label": 1}]), "classify")
    assert label_names(mixed.rows) == ("-1", "1")


def test_labels_are_in_the_order_of_their_numbers_or_of_the_alphabet():
    def names(*labels):
        return label_names([LabelledRow(("a",), label) for label in [*labels, labels[0]]])

    assert names("10", "9", "-1") == ("-1", "9", "10")
    assert names("spam", "ham") == ("ham", "spam")
    with pytest.raises(LoricaError, match="only x"):
        names("x", "x")
    with pytest.raises(LoricaError, match="regress"):
        label_names([LabelledRow(("a",), str(i)) for i in range(5)])


def test_rows_are_split_and_keep_duplicates_on_one_side():
    rows = [LabelledRow((str(i // 2),), "x") for i in range(40)]
    train, held = split(rows, fraction=0.2)
    assert len(train) + len(held) == 40
    assert not {row.texts for row in train} & {row.texts for row in held}


def test_a_pair_is_written_as_the_tokenizer_writes_one():
    tok = classifiers.tokenizer()
    row = LabelledRow(("the film", "good"), "b")
    (example,) = encode_labelled([row], tok, ("a", "b"), 20).examples
    assert tok.convert_ids_to_tokens(example.ids) == ["[CLS]", "the", "film", "[SEP]", "good", "[SEP]"]
    assert example.segments == [0, 0, 0, 0, 1, 1]
    assert example.target == 1.0


def test_a_tokenizer_without_separator_gets_a_pair_as_two_lines():
    tok = classifiers.tokenizer(encoder=False)
    apart = encode_labelled([LabelledRow(("the", "film"), "a")], tok, ("a", "b"), 20).examples[0]
    assert apart.ids == tok("the\nfilm")["input_ids"]
    assert apart.segments == []


def test_what_the_tokenizers_file_says_of_padding_and_cutting_does_not_count():
    tok = classifiers.tokenizer()
    tok.backend_tokenizer.enable_padding(length=16)
    tok.backend_tokenizer.enable_truncation(4)
    (example,) = encode_labelled([LabelledRow(("the film was good a film",), "a")], tok, ("a", "b"), 20).examples
    assert len(example.ids) == 8


def test_long_rows_lose_the_end_of_their_longer_text():
    tok = classifiers.tokenizer()
    row = LabelledRow(("the film was so so so so", "good"), "a", "rows:3")
    found = encode_labelled([row], tok, ("a", "b"), 8)
    words = tok.convert_ids_to_tokens(found.examples[0].ids)
    assert words == ["[CLS]", "the", "film", "was", "so", "[SEP]", "good", "[SEP]"]
    assert (found.report.cut, found.report.longest) == (1, 11)
    assert "rows:3" in found.report.notes[0]


def test_an_end_that_looks_like_padding_is_left_out_for_models_that_read_the_last_token():
    tok = classifiers.tokenizer(encoder=False)
    tok.pad_token = tok.eos_token
    (example,) = encode_labelled([LabelledRow(("the film </s> </s>",), "a")], tok, ("a", "b"), 20).examples
    assert tok.convert_ids_to_tokens(example.ids) == ["the", "film"]


def test_a_batch_is_padded_on_the_right():
    tok = classifiers.tokenizer()
    rows = [LabelledRow(("the", "film"), "a"), LabelledRow(("good", "bad dull"), "b")]
    batch = collate_labelled(encode_labelled(rows, tok, ("a", "b"), 20).examples, 0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["input_ids"][0, 5] == 0
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    with pytest.raises(LoricaError, match="one text and others two"):
        encode_labelled([rows[0], LabelledRow(("good",), "a")], tok, ("a", "b"), 20)


def test_unknown_labels_are_listed_with_their_number_and_the_nearest():
    tok = classifiers.tokenizer()
    rows = [LabelledRow(("a",), label) for label in ("good", "god", "god")]
    with pytest.raises(LoricaError, match="'god' of 2 rows; did you mean 'good'"):
        encode_labelled(rows, tok, ("bad", "good"), 20)
    assert encode_labelled(rows, tok, ("bad", "good"), 20, known=False).examples[1].target == 0.0


def test_uneven_classes_are_said():
    tok = classifiers.tokenizer()
    names = ("a", "b", "c", "d")

    def examples(labels):
        return encode_labelled(
            [LabelledRow((f"film {'so ' * i}",), x) for i, x in enumerate(labels)], tok, names, 24
        ).examples

    train, held = examples("aaaaaaaaab"), examples("abc")
    assert counts(train, names) == {"a": 9, "b": 1, "c": 0, "d": 0}
    notes = balance(train, held, names)
    assert "90% of the rows are 'a'" in notes[0]
    assert "'c'" in notes[1] and "1 held-out rows" in notes[1]
    assert "'d'" in notes[2] and "no row has it" in notes[2]
    even = examples("abcdabcd")
    assert balance(even, even, names) == []
    assert "1 texts have more than one label each" in balance([*even, examples("b")[0]], [], names)
