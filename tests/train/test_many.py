"""Several adapters in one pass: each is what it is alone, whatever becomes of its neighbours."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch

import lorica
from families import FAMILIES
from lorica import Adapter, LoricaError, TrainSettings, evaluate, plan
from lorica.data import Example
from lorica.data.pack import divided
from lorica.models import machine
from lorica.train import many
from lorica.train.examples import prepare
from lorica.train.forecast import forecast
from lorica.train.recipe import method_of

PLAIN = TrainSettings(steps=5, batch=4, lr=1e-2, eval_every=2, save_every=1e9, sample=0, rank=2, seed=0)


def changed(**changes):
    return dataclasses.replace(PLAIN, **changes)


# Unlike in all that members may differ in: rank, scale, rate, schedule, targets, dropout, batch, length, seed, clip.
UNLIKE = {
    "a": changed(),
    "b": changed(rank=5, alpha=10.0, lr=3e-3, schedule="cosine", seed=3),
    "c": changed(targets="qv", dropout=0.3, batch=7, steps=3, clip=0.1),
    "d": changed(rank=3, batch=1, steps=8, warmup=0.5, weight_decay=0.1, betas=(0.8, 0.9), scaling="alpha/sqrt(r)"),
    "e": changed(dora=True, lr_ratio=4.0),
    "f": changed(init="pissa", lr=1e-3),
    "g": changed(init="gradient", rank=3, targets="attention"),
}


def tensors(adapter):
    return torch.cat([tensor.flatten() for _, tensor in sorted(adapter.tensors.items())])


def apart(found, expected):
    """How far two adapters are from each other, relative to their length."""
    assert set(found.tensors) == set(expected.tensors)
    a, b = tensors(found), tensors(expected)
    return ((a - b).norm() / b.norm()).item()


def logged(path, *kinds):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] in kinds]


def same_as_alone(folder, fresh, tok, data, settings, tmp_path):
    alone = lorica.train(fresh(), tok, data, settings, out=tmp_path / f"alone-{folder.name}")
    for which in ("best", "last"):
        assert apart(Adapter.load(folder / which), Adapter.load(alone.path / which)) < 1e-5
    for kind, keys in (("step", ("loss", "lr", "norm", "tokens", "labels")), ("eval", ("step", "held_out"))):
        mine, theirs = logged(folder, kind), logged(alone.path, kind)
        assert len(mine) == len(theirs)
        for key in keys:
            assert [event[key] for event in mine] == pytest.approx([event[key] for event in theirs], rel=1e-4), key
    return alone


@pytest.fixture(scope="module")
def swept(fresh, tok, rows, tmp_path_factory):
    """Seven unlike members on one model: the model and the sweep."""
    model = fresh()
    return model, many.train(model, tok, rows, UNLIKE, out=tmp_path_factory.mktemp("sweep") / "s")


@pytest.mark.parametrize("name", list(UNLIKE))
def test_each_member_is_what_it_is_alone(swept, name, fresh, tok, rows, tmp_path):
    assert same_as_alone(swept[1].path / name, fresh, tok, rows, UNLIKE[name], tmp_path)


def test_packs_that_cut_through_a_members_batch_change_nothing(fresh, tok, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(many, "micro_tokens", lambda device, dtype: 20)
    sweep = many.train(fresh(), tok, rows, UNLIKE, out=tmp_path / "s")
    for name in ("b", "c"):
        assert same_as_alone(sweep.path / name, fresh, tok, rows, UNLIKE[name], tmp_path)


def test_a_gradient_too_large_for_the_format_is_made_again_smaller(fresh, tok, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(many, "loss_scales", lambda dtype: (1e38, 2.0, 1.0))
    members = {"a": changed(), "b": changed(rank=5, lr=3e-3)}
    sweep = many.train(fresh(), tok, rows, members, out=tmp_path / "s")
    for name, settings in members.items():
        assert same_as_alone(sweep.path / name, fresh, tok, rows, settings, tmp_path)


def test_a_base_in_fp16_trains_its_members_as_each_alone(fresh, tok, rows, tmp_path):
    members = {"a": changed(), "b": changed(rank=5, lr=3e-3)}
    sweep = many.train(fresh().half(), tok, rows, members, out=tmp_path / "s")
    for name, settings in members.items():
        alone = lorica.train(fresh().half(), tok, rows, settings, out=tmp_path / name)
        for mine, theirs in zip(logged(sweep.path / name, "step"), logged(alone.path, "step"), strict=True):
            assert mine["norm"] == pytest.approx(theirs["norm"], rel=0.02)
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.005)


def test_smoothing_and_checkpointing_change_a_member_as_they_change_a_run(fresh, tok, rows, tmp_path):
    members = {name: changed(label_smoothing=0.1, checkpointing="on", rank=rank) for name, rank in (("a", 2), ("b", 3))}
    sweep = many.train(fresh(), tok, rows, members, out=tmp_path / "s")
    assert same_as_alone(sweep.path / "b", fresh, tok, rows, members["b"], tmp_path)


def test_fused_projections_and_conv1d_are_exact_too(tok, rows, tmp_path):
    members = {"a": changed(targets="qv", steps=3), "b": changed(rank=4, steps=2, dropout=0.2)}
    sweep = many.train(FAMILIES["gpt2"](), tok, rows, members, out=tmp_path / "s")
    for name, settings in members.items():
        assert same_as_alone(sweep.path / name, FAMILIES["gpt2"], tok, rows, settings, tmp_path)


@pytest.mark.parametrize("method", ["adapter-h", "adapter-l", "adapter-p", "adapter-d"])
def test_adapter_layers_share_a_pass_too(method, fresh, tok, rows, tmp_path):
    members = {
        "a": changed(method=method, rank=8, bottleneck=4, steps=3),
        "b": changed(method=method, rank=8, bottleneck=6, activation="gelu", lr=3e-3, batch=3, seed=1),
    }
    sweep = many.train(fresh(), tok, rows, members, out=tmp_path / "s")
    for name, settings in members.items():
        assert same_as_alone(sweep.path / name, fresh, tok, rows, settings, tmp_path)


def test_lora_beside_an_adapter_layer_is_refused_where_both_are_on_one_matrix(fresh, tok, rows, tmp_path):
    members = {"a": changed(), "b": changed(method="adapter-h", rank=8)}
    with pytest.raises(LoricaError, match="b: .*o_proj is no matrix that the kernels know"):
        many.train(fresh(), tok, rows, members, out=tmp_path / "s")


def poisoned(model, letter):
    """The model with one token that turns everything after it into no number."""
    with torch.no_grad():
        model.get_input_embeddings().weight[letter] = float("nan")
    return model


def examples(letters, count=12):
    return [
        Example([0, letters[i % len(letters)], 5 + i % 7, 2 + i % 3, 1], [False, False, True, True, True])
        for i in range(count)
    ]


GOOD, BAD = (
    (examples([3, 4, 6, 8]), examples([3, 4])[:4]),
    ([*examples([3, 27, 4]), Example([0, 3, 1], [False, False, True])], []),
)


def test_numbers_that_are_none_in_one_members_tokens_do_not_reach_the_others(fresh, tok, tmp_path):
    members = {"good": changed(), "bad": changed(rank=3), "also": changed(rank=4, dropout=0.3)}
    data = {"good": GOOD, "bad": BAD, "also": GOOD}
    sweep = many.train(poisoned(fresh(), 27), tok, data, members, out=tmp_path / "s")
    bad = next(row for row in sweep.rows if row.name == "bad")
    assert bad.steps < 2 and "the loss is nan" in bad.fault
    for name in ("good", "also"):
        alone = lorica.train(poisoned(fresh(), 27), tok, GOOD, members[name], out=tmp_path / name)
        assert apart(Adapter.load(sweep.path / name / "last"), Adapter.load(alone.path / "last")) < 1e-5
        assert torch.isfinite(tensors(Adapter.load(sweep.path / name / "last"))).all()


def test_a_member_that_blows_up_leaves_and_is_ranked_last(fresh, tok, rows, tmp_path):
    members = {"wild": changed(lr=1e30, warmup=0.0), "calm": changed(lr=3e-3), "end": changed(steps=2)}
    told = []
    model = fresh()
    sweep = many.train(model, tok, rows, members, out=tmp_path / "s", report=told.append)
    assert [row.name for row in sweep.rows][-1] == "wild" and sweep.pick != "wild"
    assert "the weights were left as after step 1" in sweep.rows[-1].fault
    assert any(event["member"] == "wild" and event["kind"] == "note" for event in told)
    for name in ("calm", "end"):
        alone = lorica.train(fresh(), tok, rows, members[name], out=tmp_path / name)
        assert apart(Adapter.load(sweep.path / name / "last"), Adapter.load(alone.path / "last")) < 1e-5
    assert lorica.active(model) == sweep.pick


def test_the_model_has_the_best_weights_of_every_member(fresh, tok, rows, tmp_path):
    model = fresh()
    members = {"over": changed(lr=0.6, schedule="constant", steps=9), "a": changed()}
    sweep = many.train(model, tok, rows, members, out=tmp_path / "s")
    over = next(row for row in sweep.rows if row.name == "over")
    assert over.best_step < over.steps
    for name in members:
        assert Adapter.of(model, name).sha256 == Adapter.load(sweep.path / name / "best").sha256


@pytest.mark.parametrize(
    "settings, reason",
    [
        (changed(bias="all"), "x: bias 'all' changes the base itself"),
        (changed(modules_to_save="lm_head"), "x: modules_to_save 'lm_head' changes the base itself"),
        (changed(token_rows="3"), "x: token_rows '3' changes the base itself"),
        (changed(targets="q_proj, embed_tokens"), "x: model.embed_tokens is no matrix that the kernels know"),
        (changed(targets="q_proj, lm_head"), "x: lm_head is the output head"),
        (changed(targets="q_porj"), "x: these targets do not fit this model:\n  'q_porj' matches no layer"),
        (changed(micro=2), "x: micro is 2, of the first None"),
        (changed(rank=0), "x: rank is 0"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name_and_the_model_stays_as_it_was(
    settings, reason, fresh, tok, rows, tmp_path
):
    model = fresh()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(LoricaError, match=f"(?s)cannot be trained together.*{reason}"):
        many.train(model, tok, rows, {"a": PLAIN, "x": settings}, out=tmp_path / "s")
    assert lorica.adapters(model) == [] and not (tmp_path / "s").exists()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_model_whose_router_looks_at_all_tokens_is_refused(tok, rows, tmp_path):
    with pytest.raises(LoricaError, match="a, b: this model adds a loss over all tokens"):
        many.train(FAMILIES["mixtral"](), tok, rows, {"a": PLAIN, "b": PLAIN}, out=tmp_path / "s")


def test_a_model_that_takes_no_packs_is_refused(fresh, tok, rows, tmp_path):
    model = fresh()
    attention = model.model.layers[0].self_attn

    def mixing(hidden_states, **options):
        out, weights = type(attention).forward(attention, hidden_states, **options)
        return out + hidden_states.mean(1, keepdim=True), weights

    attention.forward = mixing
    with pytest.raises(LoricaError, match="a, b: this model takes no packs .*train one after another"):
        many.train(model, tok, rows, {"a": PLAIN, "b": PLAIN}, out=tmp_path / "s")


def test_a_layer_that_sees_a_choice_of_the_tokens_is_noticed(fresh, tok, rows, tmp_path):
    model = fresh()
    mlp = type(model.model.layers[0].mlp)

    class Chosen(mlp):
        def forward(self, x):
            return torch.cat([super().forward(x[:, :1]), super().forward(x[:, 1:])], 1)

    model.model.layers[0].mlp.__class__ = Chosen
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()  # which no kernel knows, so that the block stays as it is
    with pytest.raises(LoricaError, match="a, b: Linear sees 1 of .* tokens: whose, is not known"):
        many.train(model, tok, rows, {"a": PLAIN, "b": PLAIN}, out=tmp_path / "s")


def test_a_stopped_member_goes_on_alone_to_the_weights_it_would_have_had(fresh, tok, rows, tmp_path):
    def report(event):
        if event["member"] == "d" and event["kind"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(many.Interrupted, match="lorica train --resume") as stopped:
        many.train(fresh(), tok, rows, UNLIKE, out=tmp_path / "s", report=report)
    steps = {row.name: row.steps for row in stopped.value.sweep.rows}
    assert steps == {"a": 4, "b": 4, "c": 3, "d": 4, "e": 4, "f": 4, "g": 4}
    for name in ("b", "d", "e", "g"):
        resumed = lorica.train(fresh(), tok, rows, resume=tmp_path / "s" / name)
        alone = lorica.train(fresh(), tok, rows, UNLIKE[name], out=tmp_path / name)
        assert resumed.steps == alone.steps
        assert apart(Adapter.load(resumed.path / "last"), Adapter.load(alone.path / "last")) < 1e-5


def test_the_folder_holds_runs_a_ranking_and_pictures(swept):
    _, sweep = swept
    assert {path.name for path in sweep.path.iterdir()} == {
        *UNLIKE, "sweep.json", "README.md", "curves.png", "ranking.png"
    }  # fmt: skip
    for name in UNLIKE:
        assert {path.name for path in (sweep.path / name).iterdir()} >= {"run.toml", "best", "last", "metrics.jsonl"}
    told = json.loads((sweep.path / "sweep.json").read_text())
    assert [member["name"] for member in told["members"]] == [row.name for row in sweep.rows]
    assert told["pick"] == sweep.pick and told["why"] == sweep.why
    losses = [row.after for row in sweep.rows]
    assert losses == sorted(losses)
    assert [row.worse is None for row in sweep.rows] == [True] + [False] * (len(UNLIKE) - 1)


def test_what_a_sweep_takes_is_planned_before_and_measured_after(swept):
    _, sweep = swept
    (planned,) = {logged(sweep.path / name, "start")[0]["predicted_bytes"] for name in UNLIKE}
    told = json.loads((sweep.path / "sweep.json").read_text())
    assert told["predicted_bytes"] == planned > 1e8
    assert told["peak_rss_bytes"] == sweep.peak_rss_bytes > 1e8


def test_the_forecast_of_a_sweep_adds_up_its_members(fresh, tok, rows):
    model, data = fresh(), prepare(rows, tok, PLAIN)
    members = {"a": changed(), "b": changed(rank=5, targets="qv", steps=9, batch=6)}
    for name, settings in members.items():
        lorica.inject(model, method_of(settings), settings.targets, name)
    ahead = forecast(model, {name: (data, settings) for name, settings in members.items()})
    assert [each.method.r for each in ahead.work.everyone] == [2, 5]
    q, kv, mlp = 16 + 16, 16 + 8, 16 + 24
    trained = 2 * (2 * (2 * q + 2 * kv + 3 * mlp) + 5 * (q + kv))
    parts = plan.predict(model.config, ahead.work, ahead.process).memory
    assert parts.trained == parts.gradients == 4 * trained and parts.optimizer == 8 * trained
    assert parts.total == ahead.total_bytes and ahead.seconds > 0


def test_a_sweep_that_would_not_fit_computes_activations_again(fresh, tok, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "room", lambda device: (1, 1))
    model, seen = fresh(), {"start": set(), "step": set()}

    def report(event):
        if event["kind"] in seen:
            seen[event["kind"]].add((event.get("checkpointing"), model.is_gradient_checkpointing))

    members = {"a": changed(), "b": changed(rank=5)}
    sweep = many.train(model, tok, rows, members, out=tmp_path / "s", report=report)
    assert seen == {"start": {(True, False)}, "step": {(None, True)}} and not model.is_gradient_checkpointing
    assert same_as_alone(sweep.path / "b", fresh, tok, rows, members["b"], tmp_path)


def test_a_sweep_that_runs_out_of_memory_says_what_lowers_it(fresh, tok, rows, tmp_path):
    def report(event):
        if event["kind"] == "step":
            raise MemoryError

    with pytest.raises(LoricaError, match="(?s)out of memory .*--micro 1"):
        many.train(fresh(), tok, rows, {"a": changed(), "b": changed(rank=5)}, out=tmp_path / "s", report=report)


def test_members_are_measured_as_a_run_alone_is(swept, tok, rows):
    model, sweep = swept
    held = prepare(rows, tok, PLAIN).held
    for row in sweep.rows:
        lorica.select(model, row.name)
        assert row.after == pytest.approx(evaluate.loss(model, held).loss, rel=1e-5)
    lorica.select(model, sweep.pick)


def test_a_row_of_documents_is_cut_into_few_packs_equally_full():
    lengths = [300, 200, 30, 40, 400, 20, 10, 24]
    pieces = divided(lengths, 512)
    assert [place for piece in pieces for place in piece] == list(range(8))
    assert [sum(lengths[i] for i in piece) for piece in pieces] == [300, 270, 454]
    assert divided([100] * 6, 512) == [[0, 1, 2], [3, 4, 5]]
    assert divided([600, 10], 512) == [[0], [1]]
    assert [len(piece) for piece in divided([10] * 7, 512, micro=3)] == [3, 3, 1]
