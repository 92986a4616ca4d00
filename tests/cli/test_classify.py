"""`lorica` on labelled rows: data, train, eval, generate, chat, merge, as a person types them."""

from __future__ import annotations

import io
import json

import pytest

import classifiers
import lorica
from lorica.cli.main import main
from lorica.models import open_thing
from lorica.tasks import task_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, data and a short run on them."""
    path = tmp_path_factory.mktemp("classify")
    classifiers.folder("bert", path / "model")
    lines = [json.dumps(row) + "\n" for row in classifiers.rows(60)]
    (path / "said.jsonl").write_text("".join(lines))
    (path / "test.jsonl").write_text("".join(lines[:30]))
    flags = "--task classify --steps 40 --batch 8 --lr 1e-2 -r 2 --eval-every 20 --held-out 0.2 -q --json"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lorica.train.curve.draw", lambda runs, out: None)
        code = main(["train", str(path / "model"), str(path / "said.jsonl"), "-o", str(path / "run"), *flags.split()])
    assert code == 0
    return path


def said(capsys, *words, code=0):
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


def test_data_shows_labels_lengths_and_what_is_learnt(made, capsys):
    out = said(capsys, "data", made / "said.jsonl", "-m", made / "model", "--task", "classify").out
    assert "negative" in out and "positive" in out and "loss on" not in out
    assert "-> \u27e6" in out and "[CLS]" in out
    assert "lorica train" in out and "--task classify" in out
    found = json.loads(
        said(capsys, "data", made / "said.jsonl", "-m", made / "model", "--task", "classify", "--json").out
    )
    assert set(found["labels"]) == {"negative", "positive"}
    assert sum(found["labels"].values()) == found["tokens"]["rows"]


def test_eval_compares_with_the_base_and_says_that_its_head_is_new(made, capsys):
    found = json.loads(said(capsys, "eval", made / "run", made / "test.jsonl", "--compare", "base", "--json").out)
    base, tuned = found["results"]
    assert found["measures"] == ["accuracy", "f1", "matthews"]
    assert tuned["accuracy"] > base["accuracy"] and tuned["accuracy_low"] <= tuned["accuracy"]
    assert found["differences"][0]["accuracy"] == pytest.approx(tuned["accuracy"] - base["accuracy"])
    assert any("head is new" in note for note in found["notes"])
    out = said(capsys, "eval", made / "run", made / "test.jsonl", "--compare", "base").out
    assert "accuracy" in out and "matthews" in out and "points" in out and "ppl" not in out


def test_eval_knows_what_the_run_held_out(made, capsys):
    assert "held out by" in said(capsys, "eval", made / "run").out


def test_generate_adds_label_and_probabilities_in_order_and_goes_on_where_it_stopped(made, capsys, tmp_path):
    asked = tmp_path / "asked.jsonl"
    texts = [row["text"] for row in classifiers.rows(70)]
    asked.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    line = ["generate", made / "run", asked, "-o", tmp_path / "out.jsonl", "--batch", "4"]
    said(capsys, *line)
    whole = (tmp_path / "out.jsonl").read_text()
    rows = [json.loads(each) for each in whole.splitlines()]
    assert [row["n"] for row in rows] == list(range(70))
    for row in rows:
        assert row["output"] == max(row["probabilities"], key=row["probabilities"].get)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    (tmp_path / "out.jsonl").write_text("".join(each + "\n" for each in whole.splitlines()[:37]))
    assert "were there already" in said(capsys, *line).err
    assert (tmp_path / "out.jsonl").read_text() == whole
    right = {row["text"]: row["label"] for row in classifiers.rows(70)}
    assert sum(right[row["text"]] == row["output"] for row in rows) > 60


def test_generate_refuses_a_column_that_is_there(made, capsys, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"text": "the film", "probabilities": 1}\n')
    assert "'probabilities' already" in said(capsys, "generate", made / "run", tmp_path / "asked.jsonl", code=1).err


def test_chat_judges_each_line(made, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the film was very good\n/base\n/retry\n/system x\n"))
    both = said(capsys, "chat", made / "run")
    first, second = both.out.splitlines()
    assert first.startswith("positive   positive 0.")
    assert second != first
    assert "judged by itself" in both.err and "takes no system prompt" in both.err


def test_merge_gives_a_classifier_that_opens_by_itself(made, capsys, tmp_path):
    said(capsys, "merge", made / "run", "-o", tmp_path / "merged")
    found = json.loads(said(capsys, "eval", tmp_path / "merged", made / "test.jsonl", "--json").out)
    wanted = json.loads(said(capsys, "eval", made / "run", made / "test.jsonl", "--json").out)
    assert found["results"][0]["loss"] == pytest.approx(wanted["results"][0]["loss"], rel=1e-4)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}


def test_a_head_that_the_checkpoint_brought_is_met_again_by_the_file_of_its_run(made, capsys, tmp_path):
    three = ("negative", "neutral", "positive")  # the rows have two of them
    model, tok = lorica.load(made / "model", labels=three)
    lorica.models.draw_head(model, 7)
    model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    short = ["--steps", "2", "-r", "2", "-q", "--json"]
    words = ["train", tmp_path / "model", made / "said.jsonl", *short, "-o", tmp_path / "first"]
    first = json.loads(said(capsys, *words).out)
    again = ["train", "-c", tmp_path / "first" / "run.toml", "-o", tmp_path / "second", "-q", "--json"]
    assert json.loads(said(capsys, *again).out)["adapter_sha256"] == first["adapter_sha256"]
    words = [
        "train",
        made / "model",
        made / "test.jsonl",
        "--from",
        tmp_path / "first",
        *short,
        "-o",
        tmp_path / "third",
    ]
    third = json.loads(said(capsys, *words).out)
    again = ["train", "-c", tmp_path / "third" / "run.toml", "-o", tmp_path / "fourth", "-q", "--json"]
    assert json.loads(said(capsys, *again).out)["adapter_sha256"] == third["adapter_sha256"]
    assert list(task_of(open_thing(tmp_path / "fourth").model).labels) == list(three)


def test_a_sweep_of_classifiers_is_refused_at_once(made, capsys):
    words = ["train", made / "model", made / "said.jsonl", "--task", "classify", "--sweep", "r=1,2"]
    assert "one after another" in said(capsys, *words, code=2).err


def test_a_plan_of_a_classifier_is_refused(made, capsys):
    words = ["plan", made / "model", made / "said.jsonl", "--task", "classify"]
    assert "language models only" in said(capsys, *words, code=2).err


def test_an_encoder_without_a_task_is_told_of_it(made, capsys):
    table = ["--prompt", "{text}", "--completion", "{label}"]
    fault = said(capsys, "train", made / "model", made / "said.jsonl", *table, "-o", made / "never", "-q", code=1).err
    assert "--task classify" in fault
