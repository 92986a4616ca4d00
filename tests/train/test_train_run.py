"""What a training leaves: a run folder, the best weights, logs, a card; and how a library user sees it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import io
import json
import re
import sys

import pytest
import torch
from rich.console import Console

import lorica
from lorica import Adapter, LoRA, LoricaError, TrainSettings, evaluate
from lorica.data import encode, split
from lorica.formats.card import card
from lorica.tasks.language import question_and_answer
from lorica.train import folder
from lorica.train.examples import prepare
from lorica.train.report import Terminal, duration, number, size


@pytest.fixture
def overshooting(brief):
    """So high a rate that the best measurement is not the last."""
    return dataclasses.replace(brief, lr=0.3, dropout=0.2, schedule="constant", held_out=0.2)


@pytest.fixture(scope="module")
def ended(fresh, tok, rows, brief, tmp_path_factory):
    """A short run: its model and what `train` returned."""
    model = fresh()
    path = tmp_path_factory.mktemp("runs") / "run"
    return model, lorica.train(model, tok, rows, dataclasses.replace(brief, lr=1e-2), out=path)


def test_training_lowers_the_held_out_loss_of_a_task_that_can_be_learnt(fresh, tok, rows, tmp_path):
    settings = TrainSettings(steps=60, batch=8, lr=1e-2, sample=0, held_out=0.2)
    run = lorica.train(fresh(), tok, rows, settings, out=tmp_path / "run")
    assert run.after < 0.8 * run.before


def test_the_run_folder_holds_what_it_should(ended):
    run = ended[1]
    assert {path.name for path in run.path.iterdir()} == {
        "run.toml", "best", "last", "metrics.jsonl", "samples.jsonl", "state", "curve.png", "README.md"
    }  # fmt: skip
    assert (run.path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_model_and_the_run_have_the_best_adapter_not_the_last(fresh, tok, rows, overshooting, tmp_path):
    model = fresh()
    run = lorica.train(model, tok, rows, overshooting, out=tmp_path / "run")
    assert run.best_step < run.steps == 9
    assert run.adapter.sha256 == Adapter.of(model).sha256 == Adapter.load(run.path / "best").sha256
    assert run.adapter.sha256 != Adapter.load(run.path / "last").sha256
    held = encode(split(rows, fraction=0.2)[1], tok).examples
    assert evaluate.loss(model, held).loss == pytest.approx(run.after, rel=1e-6)
    with lorica.disabled(model):
        assert evaluate.loss(model, held).loss == pytest.approx(run.before, rel=1e-6)


def test_early_stop_ends_after_so_many_measurements_without_a_better_one(fresh, tok, rows, tmp_path):
    settings = TrainSettings(
        steps=60, batch=8, lr=0.03, eval_every=3, sample=0, schedule="constant", held_out=0.2, early_stop=2
    )
    run = lorica.train(fresh(), tok, rows, settings, out=tmp_path / "run")
    measured = [event for event in folder.read_log(run.path / "metrics.jsonl") if event["kind"] == "eval"]
    assert [event["best"] for event in measured[-3:]] == [True, False, False]
    assert run.steps == run.best_step + 2 * settings.eval_every < run.planned == 60


def test_the_log_tells_every_update_and_measurement(ended):
    run = ended[1]
    log = folder.read_log(run.path / "metrics.jsonl")
    assert [event["kind"] for event in log] == ["start", "eval", *["step"] * 3, "eval", *["step"] * 3, "eval",
                                                *["step"] * 3, "eval", "end"]  # fmt: skip
    assert [event["step"] for event in log if event["kind"] == "step"] == list(range(1, 10))
    assert log[1]["held_out"] == run.before
    assert min(event["held_out"] for event in log[2:] if event["kind"] == "eval") == run.after
    assert log[-1]["after"] == run.after
    assert run.peak_rss_bytes > 1e8


def test_the_first_example_is_in_the_log_with_its_loss_tokens_marked(ended, rows):
    start = folder.read_log(ended[1].path / "metrics.jsonl")[0]
    learnt = "".join(text for text, loss in start["example"]["runs"] if loss)
    assert learnt == next(row.completion for row in rows if row.where == start["example"]["where"]) + "</s>"


def test_samples_are_kept_at_each_measurement(ended):
    samples = folder.read_log(ended[1].path / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 3, 6, 9]
    assert all(sample["prompt"].endswith("=") and sample["reference"] for sample in samples)


def test_text_without_a_prompt_is_sampled_from_its_middle(tok):
    from lorica.data import Example

    assert question_and_answer(Example([0, 2, 3, 4, 5, 6], [False] + [True] * 5)) == ([0, 2, 3], [4, 5, 6])
    chat = Example([0, 2, 3, 4, 5, 6], [False, True, False, False, True, True])
    assert question_and_answer(chat) == ([0, 2, 3, 4], [5, 6])


def test_a_run_is_never_overwritten(fresh, tok, rows, brief, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(brief, steps=2)
    first, second = (lorica.train(fresh(), tok, rows, short) for _ in range(2))
    assert [str(run.path) for run in (first, second)] == ["runs/0001-run", "runs/0002-run"]
    before = (first.path / "metrics.jsonl").read_bytes()
    with pytest.raises(LoricaError, match=r"overwrites nothing.*--resume"):
        lorica.train(fresh(), tok, rows, short, out=first.path)
    assert (first.path / "metrics.jsonl").read_bytes() == before


def test_numbers_go_up_past_removed_and_foreign_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "0007-old").mkdir(parents=True)
    (tmp_path / "runs" / "notes").mkdir()
    assert str(folder.new(None, "my data!.v2")) == "runs/0008-my-data-.v2"


def test_the_settings_file_repeats_the_run(ended, fresh, tok, rows, tmp_path):
    run = ended[1]
    values = folder.read_settings(run.path)
    again = TrainSettings(**{key: values[key] for key in run.settings.values()})
    assert again.values() == {**run.settings.values(), "betas": [0.9, 0.999]}
    assert again.lr == 1e-2
    assert again.dtype == "fp32"
    repeated = lorica.train(fresh(), tok, rows, again, out=tmp_path / "again")
    assert repeated.adapter.sha256 == run.adapter.sha256


def test_awkward_strings_survive_the_settings_file(tmp_path):
    values = {"prompt": 'say "{a}"\n\t\\ \u2603 \U0001f600 \x7f\x01', "lr": 1e-05, "tied": True, "betas": (0.9, 0.99)}
    folder.write_settings(tmp_path, values, {"note": "x"})
    assert folder.read_settings(tmp_path) == {**values, "betas": [0.9, 0.99], "made": {"note": "x"}}


def test_an_adapter_on_the_model_is_what_is_trained_and_recorded(fresh, tok, rows, brief, tmp_path):
    model = fresh()
    lorica.inject(model, LoRA(r=3, alpha=5, ranks={"down_proj": 4}), targets=["v_proj", "down_proj"])
    settings = dataclasses.replace(brief, rank=8)
    run = lorica.train(model, tok, rows, settings, out=tmp_path / "run")
    assert (run.settings.rank, run.settings.alpha, run.settings.ranks) == (3, 5.0, "down_proj=4")
    assert run.settings.targets == "down_proj,v_proj"
    assert run.adapter.method == LoRA(r=3, alpha=5, ranks={"down_proj": 4})
    # and the record makes the same run from a plain model
    values = folder.read_settings(run.path)
    values.pop("made")
    again = lorica.train(fresh(), tok, rows, TrainSettings(**values), out=tmp_path / "again")
    assert {key: tensor.shape for key, tensor in again.adapter.tensors.items()} == {
        key: tensor.shape for key, tensor in run.adapter.tensors.items()
    }


def test_a_second_run_starts_from_the_weights_of_the_first(ended, tok, rows, brief, tmp_path):
    model, run = copy.deepcopy(ended[0]), ended[1]
    more = lorica.train(
        model, tok, rows, dataclasses.replace(brief, steps=3), out=tmp_path / "more", start=str(run.path)
    )
    assert more.before == pytest.approx(run.after, rel=1e-6)
    assert folder.read_settings(more.path)["from"] == str(run.path)


def test_training_changes_no_weight_of_the_base(fresh, tok, rows, brief, tmp_path):
    model = fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lorica.train(model, tok, rows, brief, out=tmp_path / "run")
    assert not model.training
    lorica.eject(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_data_may_be_a_path_rows_examples_or_a_pair(tok, rows, data_file):
    settings = TrainSettings(held_out=0.2)
    from_rows = prepare(rows, tok, settings)
    from_path = prepare(data_file, tok, settings)
    train, held = split(rows, fraction=0.2)
    assert from_path.fingerprint() == from_rows.fingerprint() == prepare((train, held), tok, settings).fingerprint()
    assert (len(from_rows.train), len(from_rows.held), from_rows.held_all) == (32, 8, 8)
    assert from_path.source == str(data_file)
    encoded = encode(train, tok)
    assert prepare(encoded, tok, settings).held == []
    pair = prepare((encoded.examples, encode(held, tok)), tok, settings)
    assert pair.fingerprint() == from_rows.fingerprint() != prepare(encoded, tok, settings).fingerprint()


def test_held_out_rows_do_not_depend_on_the_seed_and_can_be_limited(tok, rows):
    settings = [TrainSettings(held_out=0.2, seed=seed, eval_rows=5) for seed in (0, 1)]
    first, second = (prepare(rows, tok, each) for each in settings)
    assert [example.where for example in first.held] == [example.where for example in second.held]
    assert (len(first.held), first.held_all) == (5, 8)


def test_the_adapter_says_what_it_was_trained_with(ended):
    meta = ended[1].adapter.meta
    assert json.loads(meta["stop_tokens"]) == ["</s>"]
    assert meta["lorica"] == lorica.__version__
    assert meta["base_fingerprint"] == lorica.fingerprint(ended[0])


@pytest.mark.peer
def test_peft_opens_the_best_adapter_of_a_run(ended, fresh, tok, rows):
    peft = pytest.importorskip("peft")
    model, run = ended
    ids = torch.tensor([encode(rows[:1], tok).examples[0].ids])
    theirs = peft.PeftModel.from_pretrained(fresh(), run.path / "best")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(theirs(ids).logits, fresh()(ids).logits, atol=1e-4)


def test_state_goes_where_only_the_adapter_is_kept(fresh, tok, rows, brief, tmp_path):
    run = lorica.train(fresh(), tok, rows, dataclasses.replace(brief, keep="adapter", steps=2), out=tmp_path / "run")
    assert not (run.path / "state").exists()
    with pytest.raises(LoricaError, match="finished"):
        lorica.train(fresh(), tok, rows, resume=run.path)


def test_without_matplotlib_training_goes_on_and_names_the_install_line(fresh, tok, rows, brief, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = lorica.train(fresh(), tok, rows, dataclasses.replace(brief, steps=2), out=tmp_path / "run")
    assert any('pip install "lorica[plot]"' in note for note in run.notes)
    assert not (run.path / "curve.png").exists()
    assert "curve.png" not in (run.path / "README.md").read_text()


def test_a_library_user_sees_nothing_by_default(fresh, tok, rows, brief, tmp_path, capfd):
    lorica.train(fresh(), tok, rows, dataclasses.replace(brief, steps=2), out=tmp_path / "run")
    assert capfd.readouterr() == ("", "")


def test_the_package_is_the_function_and_still_a_package():
    assert importlib.import_module("lorica.train") is lorica.train
    assert callable(lorica.train)
    assert lorica.train.settings.TrainSettings is TrainSettings


def test_the_terminal_gets_plain_lines_where_it_is_none(fresh, tok, rows, brief, tmp_path):
    text = io.StringIO()
    console = Console(file=text, force_terminal=False, width=80)
    with Terminal(console) as report:
        run = lorica.train(fresh(), tok, rows, brief, out=tmp_path / "run", report=report)
    lines = text.getvalue().splitlines()
    assert "\x1b" not in text.getvalue()
    for label in ("model", "data", "method", "steps", "lr", "out"):
        assert sum(line.startswith(f"{label:<8}") for line in lines) == 1
    assert any("lora r 2, alpha 16 (x8), all-linear, 14 layers" in line for line in lines)
    assert any("0.002 linear   5e-4 (2000 / 16)^0.775" in line for line in lines)
    rows_shown = [line for line in lines if re.match(r" +\d+ ", line)]
    assert rows_shown[0].split() == ["0", f"{run.before:.3f}"]
    assert len(rows_shown) == 10
    assert "done" in rows_shown[-1].split()
    assert sum("->" in line for line in lines) == 4


@pytest.mark.parametrize("init", ["pissa", "gradient"])
def test_a_start_that_is_not_the_base_prints_the_base_beside_it_and_keeps_to_its_rate(
    fresh, tok, rows, brief, tmp_path, init
):
    text = io.StringIO()
    settings = dataclasses.replace(brief, init=init)
    model = fresh()
    with Terminal(Console(file=text, force_terminal=False, width=80)) as report:
        run = lorica.train(model, tok, rows, settings, out=tmp_path / "run", report=report)
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    first = next(event for event in events if event["kind"] == "eval")
    assert run.before == pytest.approx(first["held_out"], rel=1e-5)
    assert f"init={init} does not start as the base: held out {run.before:.3f} without it" in text.getvalue()
    assert "so that the first update is as large as plain LoRA's" in text.getvalue()
    assert run.after < run.before
    assert run.adapter.method.r == 2 * settings.rank  # an ordinary LoRA, which holds the start too
    said = evaluate.loss(model, prepare(rows, tok, settings).held).loss
    other = fresh()
    run.adapter.apply(other)
    assert said == pytest.approx(run.after, rel=1e-5)
    assert evaluate.loss(other, prepare(rows, tok, settings).held).loss == pytest.approx(run.after, rel=1e-5)


def test_markup_and_control_codes_in_a_sample_are_shown_as_they_are():
    text = io.StringIO()
    report = Terminal(Console(file=text, force_terminal=False))
    report.sampled = False
    report({"kind": "sample", "prompt": "[red]a[/b]", "text": "[x]\x1b[2J"})
    assert "[red]a[/b]  ->  [x]\\x1b[2J" in text.getvalue()


def test_numbers_are_short():
    assert [number(n) for n in (999, 12_345, 5_000_000, 596_000_000)] == ["999", "12.3k", "5.0M", "596M"]
    assert [size(n) for n in (20, 3_000, 20_000_000, 4_100_000_000)] == ["20 B", "3.0 kB", "20 MB", "4.1 GB"]
    assert [duration(s) for s in (9, 84, 3840)] == ["9 s", "1m24", "1h04"]


def test_the_card_says_what_how_and_what_came_of_it(ended):
    run = ended[1]
    text = (run.path / "README.md").read_text()
    for part in (f"{run.before:.4f}", f"{run.after:.4f}", "curve.png", "lorica chat", "PeftModel.from_pretrained",
                 "lorica merge", "vllm serve", "## Limits", "rank 2, alpha 16"):  # fmt: skip
        assert part in text


def test_the_card_does_not_boast_where_nothing_got_better(ended):
    facts = {**folder.read_log(ended[1].path / "metrics.jsonl")[0], "run": "r", "best_step": 1, "seconds": 1.0,
             "peak_rss_bytes": 1e9, "before": 1.0, "after": 1.5}  # fmt: skip
    assert "not lower than the base's" in card(facts)
    assert "nothing was measured" in card({**facts, "before": None, "after": None})
