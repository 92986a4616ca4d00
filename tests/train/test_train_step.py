"""Law 4, determinism, clipping and masters: what one update does."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import lorica
from lorica import LoRA, TrainSettings
from lorica.data import Example, Sampler, collate, encode
from lorica.data.pack import packs
from lorica.passes import WAYS, Passes
from lorica.train.examples import cut, labels_in
from lorica.train.loop import updates
from lorica.train.optimizer import Optimizer
from lorica.train.setup import preview
from tiny import MODELS

RAGGED = [
    Example([0, 5, 6, 7, 8, 9, 1], [False] * 6 + [True]),
    Example([0, 4, 5, 1], [False, True, True, True]),
    Example([0, *range(2, 14), 1], [False] + [True] * 13),
    Example([0, 9, 9, 8, 1], [False, False, False, True, True]),
]


def with_adapter(model):
    """An adapter off its start, so that both factors have a gradient; the same each time for a fresh model."""
    lorica.inject(model, LoRA(r=2))
    with torch.no_grad():
        for name, parameter in lorica.trainable(model).items():
            if name.endswith("B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return lorica.trainable(model)


def gradients(model, settings, accelerator=None, ways=WAYS):
    """The gradients of one update over the ragged examples."""
    parameters = with_adapter(model)
    sampler = Sampler(len(RAGGED), len(RAGGED))
    accelerator = accelerator or Accelerator(mixed_precision="no", device_placement=False)
    made = updates(
        model,
        Optimizer(parameters, settings, accelerator.num_processes),
        RAGGED,
        sampler,
        settings,
        accelerator=accelerator,
        first=1,
        steps=1,
        passes=Passes(model, RAGGED, 1, ways=ways),
    )
    update = next(made)
    return update, {name: parameter.grad.clone() for name, parameter in parameters.items()}


def close(found, expected):
    """Law 4's tolerance: the whole gradient to 1e-5 of its length, which regrouped sums may change in fp32."""
    assert found.keys() == expected.keys()
    difference, length = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm()
        for tensors in ([found[name] - expected[name] for name in found], expected.values())
    )
    return difference <= 1e-5 * length


def plain(**changes):
    return TrainSettings(**{"lr": 1e-3, "clip": 0.0, "batch": 4, **changes})


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_the_step_does_not_depend_on_the_cut(fresh, micro):
    whole, expected = gradients(fresh(), plain())
    update, found = gradients(fresh(), plain(micro=micro))
    assert update.loss == pytest.approx(whole.loss, rel=1e-6)
    assert close(found, expected)


def test_the_gradient_is_that_of_the_summed_token_losses_over_their_number(fresh):
    update, found = gradients(fresh(), plain(micro=2))
    model = fresh()
    parameters = with_adapter(model)
    total, count = torch.zeros(()), 0
    for example in RAGGED:
        logits = model(torch.tensor([example.ids])).logits[0, :-1]
        wanted = torch.tensor(example.loss[1:])
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(example.ids[1:]), reduction="none")
        total, count = total + losses[wanted].sum(), count + int(wanted.sum())
    (total / count).backward()
    assert count == labels_in(RAGGED) == update.labels == 19
    assert update.loss == pytest.approx(total.item() / count, rel=1e-6)
    assert close(found, {name: parameter.grad for name, parameter in parameters.items()})


def test_in_fp16_gradients_are_kept_from_vanishing_and_from_overflowing(fresh):
    def run(factor):
        model = fresh().half()
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        return gradients(model, plain())

    update, small = run(1.0)
    _, expected = gradients(fresh(), plain())
    parts = [torch.cat([tensor.flatten() for tensor in found.values()]) for found in (small, expected)]
    assert (parts[0] - parts[1]).norm() < 0.02 * parts[1].norm()
    update, large = run(300.0)  # the first scale overflows
    assert update.norm > 1 and all(gradient.isfinite().all() for gradient in large.values())


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_loss_gives_the_same_gradient(fresh, way):
    _, found = gradients(fresh(), plain(), ways=[way])
    model = fresh()
    parameters = with_adapter(model)
    labels = sum(labels_in([example]) for example in RAGGED)
    for example in RAGGED:
        model(**collate([example], 0)).loss.mul(labels_in([example]) / labels).backward()
    assert close(found, {name: parameter.grad for name, parameter in parameters.items()})


def test_the_first_token_of_a_sequence_is_not_counted_as_predicted():
    assert labels_in([Example([3, 4], [True, True])]) == 1


@pytest.mark.parametrize("divide", [cut, packs])
def test_a_cut_keeps_every_example_once_and_no_process_goes_without(divide):
    for processes in (1, 2, 3):
        for micro in (None, 1, 2, 3):
            pieces = divide(RAGGED[:3], micro, processes)
            assert sorted(place for piece in pieces for place in piece) == [0, 1, 2]
            assert len(pieces) % processes == 0
            assert all(len(piece) <= (micro or 3) for piece in pieces)
    assert [len(piece) for piece in divide(RAGGED, 4, 2)] == [2, 2]


def test_long_examples_are_not_put_into_one_micro_batch():
    long = [Example([2] * 900, [False] + [True] * 899) for _ in range(5)]
    assert [len(piece) for piece in cut(long, None)] == [2, 2, 1]
    assert [len(piece) for piece in cut(long, 5)] == [5]


def test_padding_is_weighed_against_the_cost_of_a_pass():
    rows = [Example([2] * length, [False] + [True] * (length - 1)) for length in (9, 60, 10, 8, 61, 9)]
    assert cut(rows, None, tokens=768) == [[3, 0, 5, 2], [1, 4]]
    assert len(cut(rows, None)) == 1  # on a GPU one pass costs more than the padding
    assert len(cut(rows[:1] + rows[2:4], None, tokens=768)) == 1


def test_long_examples_are_put_into_packs_that_hold_them():
    long = [Example([2] * 900, [False] + [True] * 899) for _ in range(5)]
    assert [len(piece) for piece in packs(long, None)] == [2, 2, 1]


def test_a_row_longer_than_a_pack_is_one_pass_and_no_pass_is_empty():
    rows = [Example([2] * length, [False] + [True] * (length - 1)) for length in (3000, 100, 2500, 90)]
    assert packs(rows[:1], None, tokens=1024) == [[0]]
    assert packs(rows, None, tokens=1024) == [[0], [2], [1, 3]]
    assert packs(rows[:1], None, processes=2, tokens=1024) == [[0], []]


def test_packs_are_as_few_as_do_and_equally_full():
    mixed = [Example([2] * length, [True] * length) for length in (500, 20, 30, 480, 470, 40, 460, 10)]
    sums = [sum(len(mixed[i].ids) for i in piece) for piece in packs(mixed, None, tokens=1024)]
    assert sorted(sums) == [1000, 1010]


def test_two_processes_make_the_step_of_one(fresh, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, json
            sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
            from conftest import make_model
            from test_train_step import gradients, plain
            from accelerate import Accelerator
            accelerator = Accelerator(cpu=True, mixed_precision="no", device_placement=False)
            assert accelerator.num_processes == 2
            update, found = gradients(make_model(), plain(), accelerator)
            if accelerator.is_main_process:
                with open({str(tmp_path / "out")!r}, "w") as out:
                    json.dump([update.loss, {{name: gradient.tolist() for name, gradient in found.items()}}], out)
            accelerator.end_training()  # a process that ends with its group open may abort
            """
        )
    )
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531", "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    ranks = [{"RANK": str(k), "LOCAL_RANK": str(k)} for k in (0, 1)]
    both = [subprocess.Popen([sys.executable, script], env=environment | rank) for rank in ranks]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    loss, found = json.loads((tmp_path / "out").read_text())
    update, expected = gradients(fresh(), plain())
    assert loss == pytest.approx(update.loss, rel=1e-6)
    assert close({name: torch.tensor(values) for name, values in found.items()}, expected)


def test_clipping_limits_the_norm_and_keeps_the_direction(model):
    lorica.inject(model, LoRA(r=2))
    parameters = lorica.trainable(model)
    optimizer = Optimizer(parameters, TrainSettings())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in parameters.values())
    assert optimizer.clip(0.0) == pytest.approx(count**0.5)
    assert optimizer.clip(1.0) == pytest.approx(count**0.5)
    after = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    assert float(after.norm()) == pytest.approx(1.0, rel=1e-4)
    assert after.min() == after.max()


def test_a_bf16_parameter_moves_by_steps_smaller_than_its_spacing():
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer({"p": parameter}, TrainSettings())
    for _ in range(10):
        parameter.grad = torch.ones_like(parameter)
        optimizer.clip(0.0)
        optimizer.step(1e-3)
    assert parameter.dtype == torch.bfloat16
    assert parameter.tolist() == torch.full((4,), 0.99).bfloat16().tolist()


def test_the_update_is_that_of_plain_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    optimizer = Optimizer({"p": ours}, TrainSettings(weight_decay=0.1))
    reference = torch.optim.AdamW([theirs], betas=(0.9, 0.999), weight_decay=0.1, foreach=False, fused=False)
    for step in range(5):
        gradient = torch.randn(6)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        reference.param_groups[0]["lr"] = lr = 0.1 / (step + 1)
        optimizer.clip(0.0)
        optimizer.step(lr)
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_with_a_ratio_the_update_is_that_of_plain_adamw_with_a_group_of_its_own_for_every_b():
    def weights_after(made, settings=None):
        model = copy.deepcopy(made)
        parameters = lorica.trainable(model)
        factors = [key for key in parameters if key.endswith(".B")]
        others = [key for key in parameters if not key.endswith(".B")]
        assert factors and others
        if settings:
            optimizer = Optimizer(parameters, settings)
        else:
            groups = [{"params": [parameters[key] for key in keys]} for keys in (others, factors)]
            plain = torch.optim.AdamW(groups, weight_decay=0.1)
        for step in range(1, 4):
            generator = torch.Generator().manual_seed(step)
            for key in sorted(parameters):
                parameters[key].grad = torch.randn(parameters[key].shape, generator=generator)
            if settings:
                optimizer.clip(0)
                optimizer.step(0.01 / step)
                optimizer.clear()
            else:
                plain.param_groups[0]["lr"], plain.param_groups[1]["lr"] = 0.01 / step, 0.16 / step
                plain.step()
        return {key: parameter.detach().clone() for key, parameter in parameters.items()}

    model = MODELS["llama"]()
    lorica.inject(model, LoRA(r=2, bias="none", dora=True), "q_proj, down_proj")
    ours = weights_after(model, TrainSettings(weight_decay=0.1, lr_ratio=16))
    plain = weights_after(model)
    assert all(torch.allclose(ours[key], plain[key], rtol=1e-5, atol=1e-7) for key in plain)
    assert not torch.allclose(ours["model.layers.0.mlp.down_proj#lora.B"], torch.zeros(1))


def test_the_default_rate_shrinks_with_the_ratio_and_a_given_one_does_not(fresh, tok, rows, brief):
    told = {}
    for ratio, lr in ((1.0, None), (16.0, None), (16.0, 1e-3)):
        settings = dataclasses.replace(brief, lr_ratio=ratio, lr=lr)
        told[ratio, lr] = preview(fresh(), tok, rows, settings)
    assert told[16.0, None]["lr"] == pytest.approx(told[1.0, None]["lr"] / 16, rel=0.05)
    assert "first update is as large as plain LoRA's" in told[16.0, None]["lr_from"]
    assert told[16.0, 1e-3]["lr"] == 1e-3 and told[16.0, 1e-3]["lr_from"] == "as given, B's 16 times that"


def test_the_same_seed_gives_the_same_numbers_with_dropout(fresh, tok, rows, brief, tmp_path):
    settings = copy.copy(brief)
    settings.dropout = 0.3
    first, second = (lorica.train(fresh(), tok, rows, settings, out=tmp_path / name) for name in "ab")
    settings.seed = 1
    third = lorica.train(fresh(), tok, rows, settings, out=tmp_path / "c")
    assert first.adapter.sha256 == second.adapter.sha256 != third.adapter.sha256
    assert (first.before, first.after) == (second.before, second.after)


def test_training_does_not_depend_on_what_random_numbers_were_drawn_before(fresh, tok, rows, brief, tmp_path):
    first = lorica.train(fresh(), tok, rows, brief, out=tmp_path / "a")
    torch.rand(7)
    assert lorica.train(fresh(), tok, rows, brief, out=tmp_path / "b").adapter.sha256 == first.adapter.sha256


def test_padding_changes_nothing(fresh, tok, rows):
    """Law 4 beside a much longer row: what is padded is neither attended nor predicted."""
    examples = encode(rows[:2], tok).examples
    model = fresh()
    alone = [model(**collate([example], 1)).loss.item() * labels_in([example]) for example in examples]
    together = model(**collate(examples, 1)).loss.item() * labels_in(examples)
    assert together == pytest.approx(sum(alone), rel=1e-6)
