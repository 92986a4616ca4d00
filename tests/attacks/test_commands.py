"""The commands on files that are damaged or not what they are called: exit 1, one error on stderr, no traceback."""

from __future__ import annotations

import json

import pytest
from model_files import tokenizer
from safetensors.torch import save_file

from attacks.kinds import KINDS, Bench
from lorica import LoricaError, tensorfiles
from lorica.cli.main import main
from lorica.data import tables
from lorica.data.template import render_chat
from lorica.formats import pair


@pytest.fixture
def refused(capsys):
    """Run a command that must fail in words; returns what it said."""

    def run(*argv) -> str:
        code = main([str(word) for word in argv])
        said = capsys.readouterr()
        assert code == 1, (argv, said)
        assert said.err.startswith("error: ") and "not your fault" not in said.err and len(said.err) < 20_000, said.err
        assert all(c.isprintable() or c in "\n\t" for c in said.err)
        return said.err

    return run


@pytest.fixture
def adapter(tmp_path):
    return Bench(KINDS["peft tensors"], tmp_path / "bench").work


@pytest.mark.parametrize(
    "name", ["a\0b", "~nobody-of-this-name/x", "x" * 5000, "", "\x1b[31mred", "no such thing", "../../../x", "a/b/c/d"]
)
def test_names_that_no_file_has(name, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert = ("convert", name, "--to", "peft", "-o", "out")
    for argv in (("show", name), ("data", name), convert, ("generate", name, "rows.jsonl")):
        assert refused(*argv)


def test_a_damaged_adapter(adapter, refused, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    for content in (b"", b"garbage" * 40, (adapter / pair.TENSORS).read_bytes()[:-9]):
        (adapter / pair.TENSORS).write_bytes(content)
        assert "damaged or not a safetensors file" in refused("show", adapter)
        assert "damaged or not a safetensors file" in refused("convert", adapter, "--to", "gguf", "-o", tmp_path / "o")
        assert "damaged or not a safetensors file" in refused("generate", adapter, rows)
    (adapter / pair.CONFIG).write_text("[" * 9000)
    assert "nested more than" in refused("show", adapter)


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf", "x.bin", "x"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"GGUF", b"\x80\x02}q\x00."])
def test_garbage_by_any_name(name, content, refused, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    for said in (refused("show", path), refused("convert", path, "--to", "peft", "-o", tmp_path / "out")):
        assert name != "x.safetensors" or "not a safetensors file" in said


def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(adapter, capsys):
    path = adapter / pair.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "\x1b]0;x\x07; rm -rf ~"}))
    tensors, _ = tensorfiles.read(adapter / pair.TENSORS)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, adapter / pair.TENSORS)
    assert main(["show", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b]0;x" in out
    assert "vllm serve '" in out  # in quotes, for those who copy the line


def test_damaged_adapters_among_hundreds_are_lines_of_the_table(tmp_path, capsys):
    kinds = [Bench(KINDS["peft config"], tmp_path / "a"), Bench(KINDS["peft tensors"], tmp_path / "b")]
    for number in range(200):
        bench = kinds[number % 2]
        damaged = bench.damaged(f"table:{number}") if number % 3 else bench.work
        (tmp_path / "many" / f"{number:03d}").mkdir(parents=True)
        for name in (pair.CONFIG, pair.TENSORS):
            (tmp_path / "many" / f"{number:03d}" / name).write_bytes((damaged / name).read_bytes())
    assert main(["show", str(tmp_path / "many"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["adapters"]
    assert len(rows) == 200
    loads = sum(row["loads"] for row in rows)
    assert 0 < loads < 200 and all(row["fault"] for row in rows if not row["loads"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_garbage_as_rows(name, refused, tmp_path):
    path = tmp_path / name
    for content in (
        b"",
        b"\0\1\2\xff" * 50,
        b"PAR1" + bytes(40) + b"PAR1",
        b"\xff\xfea\0b\0",
        b"{" * 5000,
        b"[" * 5000,
    ):
        path.write_bytes(content)
        assert str(path.name) in refused("data", path)
        refused("generate", "smollm2-135m", path)
    path.unlink()
    path.mkdir()
    refused("data", path)


def test_a_line_without_end_is_not_taken_into_memory(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LINE_BYTES", 1000)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "' + "x" * 5000)
    assert "rows.jsonl:2: a line of more than 1,000 bytes" in refused("data", tmp_path / "rows.jsonl")


def test_a_key_that_is_there_twice_is_not_dropped_in_silence(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "completion": "c"}\n')
    assert "the key 'completion' is there twice" in refused("data", tmp_path / "rows.jsonl")
    (tmp_path / "rows.csv").write_text("prompt,completion,completion\na,b,c\n")
    assert "names 'completion' twice" in refused("data", tmp_path / "rows.csv")


def test_a_parquet_file_that_unpacks_to_a_thousand_times_its_size_is_refused(refused, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    many = pyarrow.array(["x" * 20_000]).dictionary_encode()
    table = pyarrow.table({name: many.take(pyarrow.array([0] * 5_000)) for name in ("prompt", "completion")})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < 100_000
    assert "unpacks to more than" in refused("data", tmp_path / "rows.parquet")


def test_byte_order_marks_and_line_ends_of_other_systems_are_no_faults(tmp_path, capsys):
    for name, text in (
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\r\n{"prompt": "c", "completion": "d"}\r\n'),
        ("a.csv", "prompt,completion\r\na,b\r\nc,d\r\n"),
        ("a.json", '[{"prompt": "a", "completion": "b"},\r\n{"prompt": "c", "completion": "d"}]'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert main(["data", str(tmp_path / name), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rows"]["train"] == 2


def test_half_of_a_character_is_named_with_its_line(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "\\ud83d", "completion": "b"}\n')
    assert "a.jsonl:2: holds half of a character" in refused("data", tmp_path / "a.jsonl")


def test_columns_of_mixed_types_are_text_or_a_fault(refused, tmp_path, capsys):
    rows = [1, 2.5, True, None, "x"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": row, "completion": "y"}) + "\n" for row in rows))
    assert main(["data", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["train"] == 5
    path.write_text(path.read_text() + '{"prompt": ["x"], "completion": {"a": 1}}\n')
    assert "a.jsonl:6: 'prompt' is a list, not text" in refused("data", path)


@pytest.mark.parametrize(
    "text", ["a = [" * 3000, "rank = 1e400", "lr = nan", "rank = true", "\0", "rank = 99999999999999999"]
)
def test_a_settings_file_that_cannot_be_used(text, tmp_path, capsys):
    (tmp_path / "s.toml").write_text(text)
    assert main(["train", "m", "d", "-c", str(tmp_path / "s.toml")]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "not your fault" not in said


def test_a_run_whose_settings_are_of_the_wrong_kinds(refused, tmp_path):
    run = Bench(KINDS["run.toml"], tmp_path / "b").work
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace("rank = 8", 'rank = "many"').replace("seed = 0", "seed = []"))
    said = refused("train", "--resume", run)
    assert "rank" in said


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for %}", "{{ messages.pop() }}", "{{ ''.__class__.mro() }}"])
def test_a_chat_template_that_fails_is_the_template_s_fault(template):
    tok = tokenizer()
    tok.chat_template = template
    with pytest.raises(LoricaError, match="the model's chat template refuses these messages"):
        render_chat([{"role": "user", "content": "a"}], tok)


def test_a_log_that_is_none(refused, tmp_path):
    run = Bench(KINDS["metrics.jsonl"], tmp_path / "b").work
    for content in (b"\xff\xfe\n", b"[]\n", b'{"kind": 3}\n', b"{\n", b'{"kind": "end", "after": "x"}\n'):
        (run / "metrics.jsonl").write_bytes(content)
        assert "metrics.jsonl" in refused("show", run)
