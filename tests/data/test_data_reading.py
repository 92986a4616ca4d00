"""Files, folders and hub ids -> records; every fault with its place, all at once."""

from __future__ import annotations

import csv
import json
import sys
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorica import data
from lorica.errors import LoricaError

PAIR = {"prompt": "hi", "completion": "hello"}


@pytest.mark.parametrize(
    ("row", "format", "turns"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "chat", ["q", "a"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", ["q", "a"]),
        ({"prompt": "q", "completion": "a"}, "pair", ["q", "a"]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", ["q", "a"]),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", ["q\n\ni", "a"]),
    ],
)
def test_formats_are_found_from_their_keys(write, row, format, turns):
    found = data.read(write("a.jsonl", [row]))
    assert found.format == format
    assert [message["content"] for message in found.rows[0].turns()] == turns
    assert [message["role"] for message in found.rows[0].turns()] == ["user", "assistant"]
    assert found.rows[0].where == "a.jsonl:1"


def test_text_rows_are_text(write):
    found = data.read(write("a.jsonl", [{"text": "once", "id": 3}]))
    assert (found.format, found.rows[0].kind, found.rows[0].text) == ("text", "text", "once")


def test_the_same_rows_come_out_of_every_file_type(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [{"prompt": f'p, "{i}"\nx', "completion": f"c {i}"} for i in range(5)]
    write("a.jsonl", rows)
    write("a.json", json.dumps(rows, indent=1))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = {kind: data.read(tmp_path / f"a.{kind}").rows for kind in ("jsonl", "json", "csv", "parquet")}
    assert all([row.key for row in found] == [row.key for row in read["jsonl"]] for found in read.values())
    assert [row.where for row in read["csv"]] == ["a.csv:2", "a.csv:4", "a.csv:6", "a.csv:8", "a.csv:10"]
    assert [row.where for row in read["json"]] == ["a.json:2", "a.json:6", "a.json:10", "a.json:14", "a.json:18"]


def test_nulls_that_parquet_adds_to_messages_are_removed(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [
        {"messages": [{"role": "user", "content": "q", "name": "me"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert data.read(tmp_path / "a.parquet").rows[1].messages == rows[1]["messages"]


def test_a_json_file_of_lines_is_read_as_lines(write):
    assert len(data.read(write("a.json", json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "prompt": "ho"})))) == 2


def test_a_byte_order_mark_is_no_part_of_the_first_key(write):
    for name, text in (
        ("a.jsonl", json.dumps(PAIR)),
        ("b.json", json.dumps([PAIR])),
        ("c.csv", "prompt,completion\nq,a"),
    ):
        assert len(data.read(write(name, "\ufeff" + text))) == 1


def test_all_faults_come_at_once_with_file_and_line(write):
    lines = [
        json.dumps(PAIR),
        "{broken",
        "[1, 2]",
        '{"prompt": [1], "completion": "a"}',
        '{"prompt": "\\ud83d", "completion": "a"}',
    ]
    with pytest.raises(LoricaError, match="4 faults") as caught:
        data.read(write("a.jsonl", "\n".join(lines)))
    text = str(caught.value)
    assert all(f"a.jsonl:{line}: " in text for line in (2, 3, 4, 5))
    assert "mend or remove the line" in text
    assert "surrogate" in text


def test_many_faults_are_counted_and_the_first_named(write):
    with pytest.raises(LoricaError) as caught:
        data.read(write("a.jsonl", json.dumps(PAIR) + "\n" + "x\n" * 100))
    assert "... and 80 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 22


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "\xe9"}\n')
    with pytest.raises(LoricaError, match=r"a\.jsonl:2: not UTF-8"):
        data.read(tmp_path / "a.jsonl")


def test_a_json_list_that_is_cut_off_is_reported(write):
    with pytest.raises(LoricaError, match="looks cut off"):
        data.read(write("a.json", json.dumps([PAIR, PAIR])[:-1]))
    with pytest.raises(LoricaError, match=r"b\.json:3: not JSON from here on"):
        data.read(write("b.json", "[\n" + json.dumps(PAIR) + ',\n{"prompt": "h'))


def test_csv_lines_with_too_many_or_too_few_fields_are_reported(write):
    with pytest.raises(LoricaError) as caught:
        data.read(write("a.csv", "prompt,completion\nq,a\nq\nq,a,b\n"))
    assert "a.csv:3: not the 2 fields" in str(caught.value)
    assert "a.csv:4: not the 2 fields" in str(caught.value)


def test_a_csv_cell_may_be_long(write):
    limit = csv.field_size_limit()
    assert len(data.read(write("a.csv", "prompt,completion\nq," + "a" * 200_000)).rows[0].completion) == 200_000
    assert csv.field_size_limit() == limit


def test_a_mixture_of_formats_is_reported_and_not_guessed(write):
    with pytest.raises(LoricaError) as caught:
        data.read(write("a.jsonl", [PAIR, {"text": "t"}, {"text": "u"}, {"other": 1}]))
    text = str(caught.value)
    assert "1 rows are pair, the first at a.jsonl:1" in text
    assert "2 rows are text, the first at a.jsonl:2" in text
    assert "a.jsonl:4: no known format; it has other" in text


def test_duplicates_and_empty_answers_are_dropped_with_count_and_lines(write):
    rows = [PAIR, {"prompt": "x", "completion": " "}, PAIR, {"prompt": "y", "completion": None}, PAIR]
    found = data.read(write("a.jsonl", rows))
    assert [row.where for row in found.rows] == ["a.jsonl:1"]
    assert (found.duplicates, found.empty) == (2, 2)
    assert found.faults == [
        "2 duplicates dropped: a.jsonl:3 (as a.jsonl:1), a.jsonl:5 (as a.jsonl:1)",
        "2 without an answer dropped: a.jsonl:2, a.jsonl:4",
    ]


def test_a_talk_without_a_reply_is_dropped_and_one_that_ends_with_a_question_is_shortened(write):
    ask, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    found = data.read(write("a.jsonl", [{"messages": [ask]}, {"messages": [ask, reply, ask]}]))
    assert found.empty == 1
    assert found.rows[0].messages == [ask, reply]


def test_a_source_without_a_usable_row_is_an_error(write):
    with pytest.raises(LoricaError, match="has no rows"):
        data.read(write("a.jsonl", ""))
    with pytest.raises(LoricaError, match="no row is left"):
        data.read(write("b.jsonl", [{"prompt": "x", "completion": ""}]))


def test_rows_to_answer_need_no_answer_and_keep_their_order(write):
    ask = {"role": "user", "content": "q"}
    found = data.read(write("a.jsonl", [{"prompt": "b"}, {"prompt": "a"}, {"prompt": "b"}]), answers=False)
    assert [row.prompt for row in found.rows] == ["b", "a", "b"]
    assert data.read(write("b.jsonl", [{"messages": [ask]}]), answers=False).rows[0].messages == [ask]
    assert data.read(write("c.jsonl", [{"body": "x"}]), prompt="Say {body}", answers=False).rows[0].prompt == "Say x"


def test_a_folder_gives_its_parts_and_training_rows_that_are_also_held_out_are_dropped(write, tmp_path):
    write("set/train.jsonl", [PAIR, {"prompt": "b", "completion": "c"}])
    write("set/dev.csv", "prompt,completion\nhi,hello\nhi,hello\n")
    write("set/test.json", json.dumps([{"prompt": "t", "completion": "u"}]))
    found = data.read(tmp_path / "set")
    assert [row.prompt for row in found.rows] == ["b"]
    assert [row.prompt for row in found.valid] == ["hi", "hi"]
    assert [row.prompt for row in found.test] == ["t"]
    assert found.faults == ["1 duplicate dropped: train.jsonl:1 (as dev.csv:2)"]


def test_a_folder_with_shards_is_read_whole_and_one_with_rivals_is_refused(write, tmp_path):
    for shard in (0, 1):
        write(f"set/train-0000{shard}-of-00002.jsonl", [{"prompt": str(shard), "completion": "a"}])
    assert [row.prompt for row in data.read(tmp_path / "set").rows] == ["0", "1"]
    write("set/train.csv", "prompt,completion\nq,a\n")
    with pytest.raises(LoricaError, match="more than one file"):
        data.read(tmp_path / "set")


def test_a_folder_without_training_rows_names_what_it_has(write, tmp_path):
    write("set/rows.jsonl", [PAIR])
    with pytest.raises(LoricaError, match=r"but rows\.jsonl; name the file itself"):
        data.read(tmp_path / "set")


def test_a_missing_file_suggests_the_nearest_name(write, tmp_path):
    write("support.jsonl", [PAIR])
    with pytest.raises(LoricaError, match=r"did you mean 'support\.jsonl'"):
        data.read(tmp_path / "suport.jsonl")


def test_an_unknown_ending_names_the_known_ones(write):
    with pytest.raises(LoricaError, match=r"expected one of \.jsonl, \.json, \.csv, \.parquet"):
        data.read(write("a.xlsx", "x"))


def test_another_table_is_an_error_that_prints_its_columns_and_the_line_to_type(write):
    with pytest.raises(LoricaError) as caught:
        data.read(write("a.csv", "body,category,id\nb,c,1\n"))
    assert "columns: body, category, id" in str(caught.value)
    assert "--map prompt=body,completion=category" in str(caught.value)


def test_map_renames_columns_and_writes_what_is_not_text_as_json(write):
    path = write("a.jsonl", [{"body": ["a", 1], "label": 0, "prompt": "unused"}])
    row = data.read(path, map="prompt=body, completion=label").rows[0]
    assert (row.prompt, row.completion) == ('["a", 1]', "0")


def test_templates_fill_columns_and_keep_literal_braces(write):
    path = write("a.jsonl", [{"body": "x", "n": 3, "category": "spam"}])
    found = data.read(path, prompt=r"{{Classify}}: {body}\n{n}", completion="{category}", system="Be brief")
    row = found.rows[0]
    assert (row.prompt, row.completion, row.system) == ("{Classify}: x\n3", "spam", "Be brief")
    assert data.read(path, prompt="{body}", map="completion=category").rows[0].completion == "spam"


def test_a_prompt_needs_an_answer_to_learn(write):
    with pytest.raises(LoricaError, match=r"--completion '\{category\}'"):
        data.read(write("a.jsonl", [{"body": "x", "category": "spam"}]), prompt="{body}")


def test_all_faults_of_the_flags_come_at_once(write):
    path = write("a.jsonl", [{"body": "x", "category": "spam"}])
    with pytest.raises(LoricaError) as caught:
        data.read(path, map="promt=body,completion", prompt="{body}")
    assert "did you mean 'prompt'" in str(caught.value)
    assert "'completion': expected key=column" in str(caught.value)
    with pytest.raises(LoricaError) as caught:
        data.read(path, map="completion=categry", prompt="{bdy}")
    assert "'categry'; did you mean 'category'" in str(caught.value)
    assert "'bdy'; did you mean 'body'" in str(caught.value)


def test_a_system_prompt_is_for_rows_that_have_none(write):
    ask, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    own = {"role": "system", "content": "own"}
    found = data.read(write("a.jsonl", [{"messages": [ask, reply]}, {"messages": [own, ask, reply]}]), system="given")
    assert [row.messages[0]["content"] for row in found.rows] == ["given", "own"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("no", "not a list of messages"),
        ([], "not a list of messages"),
        (["no"], "message 1 is a str"),
        ([{"role": "asistant", "content": "a"}], "did you mean 'assistant'"),
        ([{"role": "user"}], "message 1 .user. has no content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content that is not text"),
    ],
)
def test_messages_that_cannot_be_used_say_why(write, messages, reason):
    with pytest.raises(LoricaError, match=rf"a\.jsonl:1: .*{reason}"):
        data.read(write("a.jsonl", [{"messages": messages}]))


def test_tools_and_tool_calls_kept_as_json_text_become_objects(write):
    call = {"type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    row = data.read(write("a.jsonl", [{"messages": messages, "tools": '[{"name": "get"}]'}])).rows[0]
    assert row.tools == [{"name": "get"}]
    assert row.messages[0]["content"] == "ab"
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert row.messages[1]["content"] == ""


def hub(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_hub_id_names_its_split_and_configuration(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return [PAIR] if split else {"train": [PAIR], "validation": [{**PAIR, "prompt": "v"}]}

    hub(monkeypatch, load)
    assert data.read("user/name:main:test").rows[0].where == "user/name:main:test:1"
    assert data.read("user/name:dev").format == "pair"
    assert data.read("user/name").valid[0].prompt == "v"
    assert asked == [("user/name", "main", "test"), ("user/name", None, "dev"), ("user/name", None, None)]


def test_a_hub_set_that_cannot_be_had_is_one_clear_error(monkeypatch):
    def load(name, config, split):
        raise ConnectionError("no route")

    hub(monkeypatch, load)
    with pytest.raises(LoricaError, match=r"user/name: no such file, and the hub gives no such data set \(no route\)"):
        data.read("user/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LoricaError, match=r'pip install "lorica\[data\]"'):
        data.read("user/name")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([".jsonl", ".json", ".csv"]), st.binary(max_size=80), st.integers(0, 60))
def test_a_damaged_file_gives_rows_or_a_lorica_error_and_nothing_else(tmp_path, suffix, noise, place):
    good = {
        ".jsonl": (json.dumps(PAIR) + "\n").encode() * 2,
        ".json": json.dumps([PAIR, PAIR]).encode(),
        ".csv": b'prompt,completion\n"a, b",c\nd,e\n',
    }[suffix]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(good[:place] + noise + good[place:])
    found = read_or_refuse(path)
    assert isinstance(found, LoricaError) or all(not row.lacks_answer for row in found.rows)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=4)
    | st.sampled_from(["user", "assistant", '{"a": 1}']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "x"]), inner)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"])}, optional={"content": VALUES, "tool_calls": VALUES}
    ),
    max_size=3,
)
ROWS = st.fixed_dictionaries({"messages": MESSAGES | VALUES}, optional={"tools": VALUES, "system": VALUES}) | (
    st.dictionaries(st.sampled_from(["prompt", "completion", "instruction", "output", "text", "y"]), VALUES, max_size=4)
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ROWS, min_size=1, max_size=3))
def test_rows_of_any_content_give_examples_or_a_lorica_error_and_nothing_else(write, make_tok, rows):
    found = read_or_refuse(write("a.jsonl", rows))
    if isinstance(found, LoricaError):
        return
    try:
        encoded = data.encode(found.rows, make_tok("chatml"))
    except LoricaError:
        return
    assert all(any(example.loss) for example in encoded.examples)


def read_or_refuse(path):
    """The records of a file, or the error, which names the file."""
    try:
        return data.read(path)
    except LoricaError as error:
        if path.name not in str(error):
            raise AssertionError(f"the error does not name the file: {error}") from error
        return error
