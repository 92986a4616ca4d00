"""Classification and regression: heads, losses that do not depend on the cut, files that PEFT and transformers read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers

import classifiers
import lorica
from lorica import Adapter, LoRA, LoricaError, TrainSettings, patch
from lorica.data import LabelledRow, encode_labelled
from lorica.evaluate import Verdicts, judge
from lorica.insertion import edited
from lorica.methods.prefix import PrefixEmbedding
from lorica.models import open_thing
from lorica.targets import FRESH, head_parameters
from lorica.tasks import labels_in, task_of
from lorica.train import folder, many
from lorica.train.setup import equip

NAMES = ("negative", "positive")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of every family's body."""
    path = tmp_path_factory.mktemp("bodies")
    return {family: classifiers.folder(family, path / family) for family in classifiers.FAMILIES}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "said.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in classifiers.rows()))
    return path


@pytest.fixture
def brief():
    return TrainSettings(steps=6, batch=8, rank=2, lr=1e-2, eval_every=2, save_every=0, held_out=0.2)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("lorica.train.curve.draw", lambda runs, out: None)


def rows():
    return [LabelledRow((row["text"],), row["label"], f"row:{i}") for i, row in enumerate(classifiers.rows())]


def outputs(model, tok, some=None):
    examples = encode_labelled(some or rows(), tok, NAMES, 24).examples
    return judge(model, examples)


@pytest.mark.parametrize("family", classifiers.FAMILIES)
def test_a_body_gets_a_new_head_that_is_trained_whole(folders, family):
    model, _ = lorica.load(folders[family], labels=NAMES)
    task = task_of(model)
    assert (task.name, task.labels) == ("classify", NAMES)
    settings = TrainSettings(rank=2)
    equip(model, settings)
    trained = patch.trainable(model)
    whole = {key for key in trained if "#" not in key}
    beside = {name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}
    assert beside <= whole
    assert whole - beside == (
        {f"bert.pooler.dense.{w}" for w in ("weight", "bias")} if family == "masked-bert" else set()
    )
    assert not any(key.split("#")[0].rpartition(".")[0] in ("classifier", "score") for key in trained if "#" in key)


@pytest.mark.parametrize("family", classifiers.FAMILIES)
def test_a_row_among_others_gets_what_it_gets_alone(folders, family):
    model, tok = lorica.load(folders[family], labels=NAMES)
    together = outputs(model, tok)
    alone = torch.cat([outputs(model, tok, [row]) for row in rows()])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.std(0).min() > 1e-4  # rows are told apart at all


def test_a_pooler_that_the_checkpoint_has_is_kept_and_patched_like_any_layer(folders):
    body, _ = lorica.load(folders["bert"])
    model, _ = lorica.load(folders["bert"], labels=NAMES)
    assert torch.equal(model.bert.pooler.dense.weight, body.pooler.dense.weight)
    lorica.inject(model, LoRA(r=2))
    assert "bert.pooler.dense#lora.A" in patch.trainable(model)


def test_the_head_depends_on_the_seed_of_the_training_alone(folders):
    heads = []
    for before, seed in ((1, 0), (2, 0), (3, 7)):
        torch.manual_seed(before)
        model, _ = lorica.load(folders["bert"], labels=NAMES)
        equip(model, TrainSettings(seed=seed))
        heads.append(model.classifier.weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_new_head_is_no_part_of_the_fingerprint(folders):
    prints = []
    for seed in (0, 1):
        model, _ = lorica.load(folders["llama"], labels=NAMES)
        lorica.models.draw_head(model, seed)
        prints.append(patch.fingerprint(model))
    assert prints[0] == prints[1]


@pytest.mark.parametrize("family", classifiers.FAMILIES)
def test_peft_and_transformers_say_what_the_run_says(folders, table, brief, tmp_path, family):
    peft = pytest.importorskip("peft")
    model, tok = lorica.load(folders[family], labels=NAMES)
    run = lorica.train(model, tok, table, brief, out=tmp_path / "run")
    wanted = outputs(model, tok)
    again = open_thing(run.path)
    assert torch.equal(outputs(again.model, again.tok), wanted)

    config = json.loads((run.path / "best" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folders[family], num_labels=2)
    base.config.pad_token_id = tok.pad_token_id
    theirs = peft.PeftModel.from_pretrained(base, run.path / "best").eval()
    assert type(theirs) is peft.PeftModelForSequenceClassification
    assert torch.equal(outputs(theirs, tok), wanted)

    lorica.merge(again.model, keep=False)
    again.model.save_pretrained(tmp_path / "merged")
    again.tok.save_pretrained(tmp_path / "merged")
    pipe = transformers.pipeline("text-classification", str(tmp_path / "merged"), device="cpu")
    said = pipe([row.texts[0] for row in rows()], batch_size=7)
    found = Verdicts.of(encode_labelled(rows(), tok, NAMES, 24).examples, wanted, NAMES)
    assert [each["label"] for each in said] == found.answers
    merged, tok = lorica.load(tmp_path / "merged")
    assert task_of(merged).labels == NAMES
    assert torch.allclose(outputs(merged, tok), wanted, atol=1e-4)


def test_an_adapter_of_pefts_own_is_opened_with_its_head(folders, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3).eval()
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    torch.nn.init.normal_(theirs.base_model.model.classifier.modules_to_save.default.weight)
    theirs.save_pretrained(tmp_path / "theirs")
    opened = open_thing(tmp_path / "theirs")
    assert task_of(opened.model).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    some = [dataclasses.replace(row, label="LABEL_1") for row in rows()]
    examples = encode_labelled(some, opened.tok, task_of(opened.model).labels, 24).examples
    assert torch.equal(judge(opened.model, examples), judge(theirs.eval(), examples))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("smooth", [0.0, 0.2])
def test_the_update_does_not_depend_on_how_the_rows_are_cut(folders, table, brief, tmp_path, family, smooth):
    found = {}
    for micro in (1, 3, 8):
        model, tok = lorica.load(folders[family], labels=NAMES)
        settings = dataclasses.replace(brief, micro=micro, steps=3, label_smoothing=smooth, clip=0, lr=1e-4)
        run = lorica.train(model, tok, table, settings, out=tmp_path / f"{micro}")
        found[micro] = [e["norm"] for e in folder.read_log(run.path / "metrics.jsonl") if e["kind"] == "step"]
    assert found[3] == pytest.approx(found[1], rel=1e-5)
    assert found[8] == pytest.approx(found[1], rel=1e-5)


def test_the_loss_is_that_of_transformers(folders):
    model, tok = lorica.load(folders["roberta"], labels=NAMES)
    examples = encode_labelled(rows(), tok, NAMES, 24).examples
    batch = lorica.data.sequences.collate_labelled(examples, tok.pad_token_id)
    with torch.no_grad():
        wanted = model(**batch, labels=torch.tensor([int(example.target) for example in examples])).loss
    assert Verdicts.of(examples, judge(model, examples), NAMES).loss == pytest.approx(float(wanted), rel=1e-5)


def test_scores_are_learnt_by_their_squared_error(folders, brief, tmp_path):
    model, tok = lorica.load(folders["bert"], labels=("score",))
    scored = [LabelledRow(row.texts, 4.0 if row.label == "positive" else 1.0, row.where) for row in rows()]
    settings = dataclasses.replace(brief, steps=40, eval_every=10, lr=2e-2, task="regress", best_by="pearson")
    run = lorica.train(model, tok, scored, settings, out=tmp_path / "run")
    assert run.after < 0.3 * run.before
    events = [event for event in folder.read_log(run.path / "metrics.jsonl") if event["kind"] == "eval"]
    assert run.measures["pearson"] == max(event["pearson"] for event in events[1:])
    again, tok, _, _ = open_thing(run.path)
    assert task_of(again).name == "regress"
    asked = ["the film was good"]
    assert task_of(again).say(again, tok, asked) == task_of(model).say(model, tok, asked)


def test_a_resumed_training_ends_as_one_that_was_not_stopped(folders, table, brief, tmp_path):
    class Stop(Exception):
        pass

    def stop(event):
        if event["kind"] == "step" and event["step"] == 4:
            raise Stop

    model, tok = lorica.load(folders["bert"], labels=NAMES)
    whole = lorica.train(model, tok, table, brief, out=tmp_path / "whole")
    model, tok = lorica.load(folders["bert"], labels=NAMES)
    with pytest.raises(Stop):
        lorica.train(model, tok, table, brief, out=tmp_path / "cut", report=stop)
    model, tok = lorica.load(folders["bert"], labels=NAMES)
    resumed = lorica.train(model, tok, table, resume=tmp_path / "cut")
    assert resumed.adapter.sha256 == whole.adapter.sha256
    assert Adapter.load(tmp_path / "cut" / "last").sha256 == Adapter.load(tmp_path / "whole" / "last").sha256
    logs = [[event for event in folder.read_log(path / "samples.jsonl")] for path in (whole.path, resumed.path)]
    assert logs[0] == logs[1]
    assert {event["text"] for event in logs[0]} <= set(NAMES)


TOKENS = ["prefix-embedding", "prefix-layer", "lora+prefix-embedding", "lora+prefix-layer"]


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "prefix-layer") for family in classifiers.FAMILIES), *(("bert", method) for method in TOKENS)],
)
def test_special_tokens_come_into_texts_that_are_judged(folders, table, brief, tmp_path, family, method):
    model, tok = lorica.load(folders[family], labels=NAMES)
    settings = dataclasses.replace(brief, method=method, rank=8, prefix=3, infix=2, steps=24, eval_every=24, lr=1e-2)
    run = lorica.train(model, tok, table, settings, out=tmp_path / "run")
    losses = [event["loss"] for event in folder.read_log(run.path / "metrics.jsonl") if event["kind"] == "step"]
    assert sum(losses[-8:]) < sum(losses[:8])
    together = outputs(model, tok)
    alone = torch.cat([outputs(model, tok, [row]) for row in rows()])
    assert torch.allclose(together, alone, atol=1e-5)
    with patch.disabled(model):
        assert not torch.allclose(outputs(model, tok), together, atol=1e-3)
    task = task_of(model)
    text = ["the film was " + "very " * 40 + "good"]  # longer than the model reads
    said = task.say(model, tok, text)
    opened = open_thing(tmp_path / "run")
    assert task_of(opened.model) == task and task.inserts == 5
    assert task.say(opened.model, opened.tok, text) == said
    lorica.eject(opened.model)
    assert torch.equal(outputs(opened.model, tok), outputs(lorica.load(folders[family], labels=NAMES)[0], tok))


def test_special_tokens_have_the_segment_of_the_text_that_they_stand_beside(folders):
    model, tok = lorica.load(folders["bert"], labels=NAMES)
    lorica.inject(model, PrefixEmbedding(2, 1), also=head_parameters(model))
    pair = encode_labelled([LabelledRow(("good", "very bad"), "negative")], tok, NAMES, 24).examples
    ((read,),) = edited(model, pair)
    special = model.config.vocab_size
    assert read.ids == [*pair[0].ids[:1], special, special + 1, *pair[0].ids[1:], special + 2]
    assert read.segments == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_the_run_remembers_task_and_labels(folders, table, brief, tmp_path):
    model, tok = lorica.load(folders["bert"], labels=NAMES)
    lorica.train(model, tok, table, brief, out=tmp_path / "run")
    told = folder.read_settings(tmp_path / "run")
    assert told["task"] == "classify"
    assert told["made"]["labels"] == ["negative", "positive"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "matthews" in card
    assert "CausalLM" not in card


def test_what_the_task_does_not_take_is_refused_before_anything_is_written(folders, table, brief, tmp_path):
    body, tok = lorica.load(folders["llama"])
    with pytest.raises(LoricaError, match="made for 'lm'"):
        lorica.train(body, tok, table, dataclasses.replace(brief, task="classify"), out=tmp_path / "run")
    model, tok = lorica.load(folders["bert"], labels=("score",))
    wrong = dataclasses.replace(brief, best_by="f1", label_smoothing=0.1)
    with pytest.raises(LoricaError, match=r"(?s)best_by.*pearson.*label_smoothing"):
        lorica.train(model, tok, [LabelledRow(("a",), 1.0)], wrong, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_that_the_model_does_not_know_are_listed(folders, table):
    model, tok = lorica.load(folders["bert"], labels=("positive", "neutral"))
    with pytest.raises(LoricaError, match=r"not among the model's \(positive, neutral\)[\s\S]*'negative' of 14 rows"):
        lorica.train(model, tok, table, TrainSettings(held_out=0))


def test_a_classifier_that_has_these_labels_keeps_its_head(folders, tmp_path):
    model, tok = lorica.load(folders["bert"], labels=NAMES)
    lorica.models.draw_head(model, 5)
    model.save_pretrained(tmp_path / "made")
    tok.save_pretrained(tmp_path / "made")
    again, _ = lorica.load(tmp_path / "made", labels=("positive", "negative"))
    assert task_of(again).labels == NAMES
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    other, _ = lorica.load(tmp_path / "made", labels=("a", "b", "c"))
    assert other.classifier.weight.shape == (3, 32)


def test_a_training_may_start_from_an_adapter_of_other_labels(folders, table, brief, tmp_path):
    model, tok = lorica.load(folders["bert"], labels=NAMES)
    run = lorica.train(model, tok, table, brief, out=tmp_path / "run")
    with pytest.warns(UserWarning, match="negative, positive apart: its head is replaced"):
        opened = open_thing(folders["bert"], adapter=run.path, labels=("a", "b", "c"))
    trained = patch.trainable(opened.model)
    assert trained["classifier.weight"].shape == (3, 32)
    kept = {key: tensor for key, tensor in run.adapter.tensors.items() if "#" in key}
    assert kept and all(torch.equal(trained[key], tensor) for key, tensor in kept.items())


def test_many_at_once_are_refused(folders, table):
    model, tok = lorica.load(folders["bert"], labels=NAMES)
    with pytest.raises(LoricaError, match="one after another"):
        many.train(model, tok, table, {"a": TrainSettings(), "b": TrainSettings(rank=4)})


def test_labels_are_read_from_the_data(table):
    assert labels_in("classify", table, {}) == NAMES
    assert labels_in("regress", table, {}) == ("score",)
    assert labels_in("auto", table, {}) == labels_in("lm", table, {}) == ()


def test_a_new_head_under_an_adapter_that_does_not_train_it_is_an_error():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    model = transformers.LlamaForSequenceClassification(config)
    setattr(model, FRESH, frozenset({"score.weight"}))
    lorica.inject(model, LoRA(r=8), "all-linear")
    with pytest.raises(LoricaError, match=r"does not train it:\s+score.weight"):
        equip(model, TrainSettings())
