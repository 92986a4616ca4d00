"""Every law over every family of models, kind of target and setting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import laws
from lorica import LoRA
from tiny import MODELS, gpt2, llama

CASES = {
    "llama all-linear": ("llama", LoRA(r=4, alpha=8), "all-linear"),
    "llama qv gaussian rslora": ("llama", LoRA(r=3, init="gaussian", scaling="alpha/sqrt(r)"), "qv"),
    "llama patterns": ("llama", LoRA(r=2, ranks={"q_proj": 5}, alphas={r"layers\.1\..*": 3}), "attention"),
    "llama embedding": ("llama", LoRA(r=4), "embed_tokens, q_proj"),
    "llama tied embedding": ("llama", LoRA(r=4, tied=True), "embed_tokens, q_proj"),
    "llama head": ("llama", LoRA(r=4), "lm_head, v_proj"),
    "llama rows": ("llama", LoRA(r=4, token_rows=(3, 7, 60)), "qv"),
    "llama norms whole": ("llama", LoRA(r=4, modules_to_save=("norm", "input_layernorm")), "qv"),
    "gpt2 paper": ("gpt2", LoRA(r=4), "paper"),
    "gpt2 all-linear, biases": ("gpt2", LoRA(r=4, bias="all"), "all-linear"),
    "gpt2 slice and whole": ("gpt2", LoRA(r=4, bias="lora_only"), "c_attn[v], c_fc"),
    "gpt2 rows": ("gpt2", LoRA(r=4, token_rows=(3, 7)), "paper"),
    "phi3 paper": ("phi3", LoRA(r=4), "paper"),
    "phi3 up": ("phi3", LoRA(r=4), "gate_up_proj[up]"),
    "gemma embedding": ("gemma", LoRA(r=4, token_rows=()), "embed_tokens"),
    "gemma rows": ("gemma", LoRA(r=4, token_rows=(3, 7)), "q_proj"),
    "t5 all-linear": ("t5", LoRA(r=4), "all-linear"),
    "llama dora": ("llama", LoRA(r=4, dora=True, scaling="alpha/sqrt(r)"), "all-linear, lm_head"),
    "gpt2 dora": ("gpt2", LoRA(r=3, dora=True, bias="all"), "all-linear, wte"),
    "gemma dora": ("gemma", LoRA(r=4, dora=True, token_rows=(3, 7)), "embed_tokens, o_proj"),
    "bert all-linear": ("bert", LoRA(r=4, bias="all"), "all-linear"),
}


def case(name):
    kind, method, targets = CASES[name]
    return MODELS[kind], method, targets


def in_bf16(make):
    return lambda: make().to(torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "law",
    [
        laws.step_zero_is_the_base,
        laws.inject_and_eject_are_inverse,
        laws.merge_and_unmerge_are_inverse,
        laws.adapters_do_not_touch_each_other,
        laws.a_copy_is_independent,
        laws.only_the_adapter_learns,
    ],
    ids=lambda law: law.__name__,
)
def test_law_holds(law, name):
    assert law(*case(name)) is None


@pytest.mark.parametrize("name", CASES)
def test_save_and_load_are_inverse(name, tmp_path):
    assert laws.save_and_load_are_inverse(*case(name), tmp_path / "adapter") is None


@pytest.mark.parametrize(
    "name", ["llama all-linear", "llama rows", "gpt2 paper", "gemma embedding", "gpt2 slice and whole", "gpt2 dora"]
)
@pytest.mark.parametrize(
    "law",
    [laws.step_zero_is_the_base, laws.inject_and_eject_are_inverse, laws.merge_and_unmerge_are_inverse],
    ids=lambda law: law.__name__,
)
def test_law_holds_on_a_bf16_base(law, name):
    make, method, targets = case(name)
    assert law(in_bf16(make), method, targets) is None


@given(
    make=st.sampled_from([llama, gpt2]),
    r=st.integers(1, 40),
    alpha=st.floats(0.1, 64),
    scaling=st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
    targets=st.sets(st.sampled_from(["attention", "mlp", "qv", "re:.*(q_proj|c_fc)"]), min_size=1),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_laws_hold_at_any_rank_scale_and_choice_of_targets(make, r, alpha, scaling, targets, tmp_path_factory):
    method, spec = LoRA(r=r, alpha=alpha, scaling=scaling), ",".join(sorted(targets))
    laws.step_zero_is_the_base(make, method, spec)
    laws.merge_and_unmerge_are_inverse(make, method, spec)
    laws.save_and_load_are_inverse(make, method, spec, tmp_path_factory.mktemp("adapter") / "a")
