"""The plan: what it counts is what the step allocates, and small models give large ones by a straight line."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from lorica import LoRA, TrainSettings, counts, plan
from lorica.account import Account
from lorica.data import Example
from lorica.errors import LoricaError

SMALL = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
WORK = plan.Work(LoRA(r=4), lengths=(40,) * 4, labelled=0.5)


def test_the_account_counts_what_is_alive_at_the_peak():
    model = torch.nn.Linear(8, 8, device="meta").requires_grad_(False)
    account = Account(model.parameters())
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


def test_two_small_models_give_a_large_one():
    by_line = plan.predict(SMALL, WORK, process=0)
    rows = [(0, plan.row(40, 0.5))] * 4
    traced = plan._traced(plan._built(plan.AutoModelForCausalLM, SMALL, 6, "fp32"), WORK, rows)
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
    claims = {what: number for what, _, number, _ in counts.gpt3_claims()}
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


def lora_of(r: int, targets: str = "all-linear") -> int:
    """Numbers trained on `SMALL`, by counting."""
    q, kv, mlp = 64 + 64, 64 + 32, 64 + 128
    return 6 * r * {"all-linear": 2 * q + 2 * kv + 3 * mlp, "qv": q + kv}[targets]


def test_adapters_in_one_pass_add_up_and_share_activations():
    alone = plan.predict(SMALL, WORK, process=0)
    beside = [plan.Work(LoRA(r=8), "qv", lengths=(40,) * 4, labelled=0.5), dataclasses.replace(WORK, lengths=(20,) * 8)]
    found = plan.predict(SMALL, dataclasses.replace(WORK, beside=beside), process=0)
    trained = 2 * lora_of(4) + lora_of(8, "qv")
    assert alone.trainable == lora_of(4) and found.trainable == trained
    assert found.memory.trained == found.memory.gradients == 4 * trained and found.memory.optimizer == 8 * trained
    assert found.memory.weights == alone.memory.weights
    assert found.tokens == 480
    # All 480 tokens are one pack, three times that of one adapter alone.
    assert found.memory.activations == pytest.approx(3 * alone.memory.activations, rel=0.1)


def test_a_pack_that_adapters_share_is_no_fuller_than_a_pack():
    one = plan.predict(SMALL, dataclasses.replace(WORK, lengths=(40,) * 25), process=0).memory  # 1,000 of 1,024
    many = dataclasses.replace(WORK, lengths=(40,) * 25, beside=[dataclasses.replace(WORK, lengths=(40,) * 25)] * 3)
    assert plan.predict(SMALL, many, process=0).memory.activations == pytest.approx(one.activations, rel=0.05)


def test_a_start_that_is_held_takes_the_room_of_its_factors():
    plain = plan.predict(SMALL, WORK, process=0)
    pissa = plan.predict(SMALL, dataclasses.replace(WORK, method=LoRA(r=4, init="pissa")), process=0)
    loftq = plan.predict(SMALL, dataclasses.replace(WORK, method=LoRA(r=4, init="loftq")), process=0)
    assert pissa.trainable == plain.trainable and pissa.memory.trained == 2 * plain.memory.trained
    assert loftq.memory == plain.memory


def test_full_training_of_a_bf16_base_has_copies_and_their_masters():
    from lorica.methods.selections import Full

    work = dataclasses.replace(WORK, method=Full(), dtype="bf16")
    found = plan.predict(SMALL, work, process=0)
    assert found.trainable == found.parameters
    assert found.memory.trained == 6 * found.parameters and found.memory.gradients == 4 * found.parameters


def drawn_from(*lengths: int) -> list[Example]:
    return [plan.row(length) for length in lengths]


def test_the_plan_is_of_the_update_whose_pack_is_fullest():
    settings = TrainSettings(batch=2, device="cpu", dtype="fp32")
    # The two longest make two packs of 600; a pair that fits into one pack is fuller.
    examples = drawn_from(*[600, 600], *[400] * 20)
    work = plan.work_of(plan.Asked(settings, examples, LoRA(r=4), 100))
    assert sum(work.lengths) in (800, 1000)
    pair = plan.work_of(plan.Asked(settings, examples[:2], LoRA(r=4), 100))
    assert work.micro_tokens == 1024 and pair.lengths == (600, 600)
    longest = plan.work_of(plan.Asked(settings, drawn_from(1200, *[400] * 20), LoRA(r=4), 100))
    assert 1200 in longest.lengths


def test_an_adapter_that_ends_leaves_room_in_the_pack():
    few, many = (TrainSettings(batch=2, steps=steps, device="cpu", dtype="fp32") for steps in (1, 3))
    examples = drawn_from(*[190] * 8)
    # Six rows are two packs of three; the four of those that go on are one.
    work = plan.work_of(*(plan.Asked(each, examples, LoRA(r=4), each.steps) for each in (few, many, many)))
    assert [each.lengths for each in work.everyone] == [(), (190, 190), (190, 190)]
