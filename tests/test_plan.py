"""The plan: what it counts is what the step allocates, and small models give large ones by a straight line."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from lorica import LoRA, plan
from lorica.errors import LoricaError

SMALL = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
WORK = plan.Work(LoRA(r=4), lengths=(40,) * 4, labelled=0.5)


def test_the_account_counts_what_is_alive_at_the_peak():
    model = torch.nn.Linear(8, 8, device="meta").requires_grad_(False)
    account = plan.Account(model)
    with account:
        x = torch.empty(4, 8, device="meta")
        y = model(x)
        del x
        z = torch.empty(16, device="meta")
    assert account.peak == 4 * 8 * 4 * 2
    assert account.live == 4 * 8 * 4 + 16 * 4
    assert account.flops == 2 * 4 * 8 * 8
    del y, z
    assert account.live == 0


def test_two_small_models_give_a_large_one(monkeypatch):
    by_line = plan.predict(SMALL, WORK, process=0)
    traced = plan._traced(plan._built(plan.AutoModelForCausalLM, SMALL, 6, "fp32"), WORK, WORK.lengths, again=False)
    assert by_line.parameters == traced.parameters
    assert by_line.trainable == traced.trainable
    assert by_line.memory.activations == pytest.approx(traced.live * (1 + plan.SLACK), rel=1e-6)
    assert by_line.flops == pytest.approx(traced.flops)


def test_parameters_and_operations_are_those_of_the_formulas():
    found = plan.predict(SMALL, WORK, process=0)
    blocks = 6 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    lora = 6 * 4 * (7 * 64 + 2 * 64 + 2 * 32 + 3 * 128)
    assert found.parameters == blocks + 512 * 64 + (2 * 6 + 1) * 64
    assert found.trainable == lora
    attention = 6 * 12 * 40 * 64  # six products of short documents
    unmade = 2 * 64 * (64 + 32 + 32)  # the gradient of the lowest input
    per_token = 4 * blocks + 6 * lora + 4 * 512 * 64 * 0.5 + attention - unmade
    assert found.flops / found.tokens == pytest.approx(per_token, rel=0.005)


def test_each_change_lowers_what_it_is_for():
    base = plan.predict(SMALL, WORK, process=0).memory
    again = plan.predict(SMALL, dataclasses.replace(WORK, checkpointing=True), process=0).memory
    packed = plan.predict(SMALL, dataclasses.replace(WORK, quantize="nf4", dtype="bf16"), process=0).memory
    double = plan.predict(SMALL, dataclasses.replace(WORK, lengths=(40,) * 8), process=0).memory
    assert again.activations < base.activations and again.weights == base.weights
    assert packed.weights < base.weights / 2
    assert 1.8 * base.activations < double.activations < 2.2 * base.activations
    assert double.optimizer == base.optimizer == 8 * plan.predict(SMALL, WORK, process=0).trainable


def test_full_fine_tuning_keeps_adams_moments_of_every_weight():
    full = plan.predict(SMALL, dataclasses.replace(WORK, method=None, dtype="bf16"), process=0)
    assert full.trainable == full.parameters
    assert full.memory.optimizer == 8 * full.parameters
    assert full.memory.trained == 4 * full.parameters  # masters


def test_activations_are_kept_where_they_fit_and_else_made_again():
    kept = plan.predict(SMALL, WORK, process=0).memory.total
    again = plan.predict(SMALL, dataclasses.replace(WORK, checkpointing=True), process=0).memory.total
    assert plan.fitting(SMALL, WORK, kept, process=0)[0].checkpointing is False
    found, fits = plan.fitting(SMALL, WORK, (kept + again) // 2, process=0)
    assert found.checkpointing and fits
    assert not plan.fitting(SMALL, WORK, again // 2, process=0)[1]


def test_the_paper_claims_follow_by_arithmetic():
    claims = {what: number for what, _, number, _ in plan.gpt3_claims()}
    assert claims["trained by LoRA"] == 18_874_368
    assert claims["parameters"] == pytest.approx(175e9, rel=0.005)
    assert claims["checkpoint, full"] == pytest.approx(350e9, rel=0.005)
    assert claims["checkpoint, LoRA"] == 37_748_736  # 36 MiB
    assert 9_000 < claims["fewer parameters"] < 10_000


def test_other_families_have_a_plan():
    config = GPT2Config(vocab_size=512, n_embd=64, n_layer=3, n_head=4)
    assert plan.predict(config, WORK, process=0).memory.activations > 0


def test_an_unknown_model_is_refused():
    with pytest.raises(LoricaError, match="no such folder"):
        plan.config_of("./nothing-here")


def test_a_method_of_some_blocks_is_counted_on_all_of_them():
    from lorica.methods.adapters import AdapterD
    from lorica.methods.selections import Top

    block = sum(
        each.numel() for each in plan._built(plan.AutoModelForCausalLM, SMALL, 6, "fp32").model.layers[0].parameters()
    )
    assert plan.predict(SMALL, dataclasses.replace(WORK, method=Top(5)), process=0).trainable == 5 * block
    three, seven_of_twelve = (
        plan.predict(SMALL, dataclasses.replace(WORK, method=AdapterD(8, blocks=blocks)), process=0).trainable
        for blocks in (3, None)
    )
    assert three * 4 == seven_of_twelve * 3
