"""Starts at singular vectors: the laws within rounding, an ordinary LoRA in the file, and the rate that suits them."""

from __future__ import annotations

import json
import math
import warnings

import peft
import pytest
import torch

import laws
import lorica
from lorica import Adapter, LoRA, LoricaError, patch, spectral
from lorica.fast import Fast
from lorica.geometry import Start, correction
from lorica.passes import Passes
from lorica.train import start
from lorica.train.settings import TrainSettings
from test_conv import net
from test_fast import ROWS, adapted, apart, eager, packed
from tiny import gpt2, inputs, llama, logits, stir

CASES = {
    "linear": (llama, LoRA(r=4, init="pissa"), "all-linear"),
    "conv1d and slices": (gpt2, LoRA(r=3, init="pissa", bias="all"), "c_attn[q,v], c_fc"),
    "embedding, tied": (llama, LoRA(r=4, init="pissa", tied=True), "embed_tokens, q_proj"),
    "patterns": (llama, LoRA(r=2, init="pissa", ranks={"q_proj": 5}, alphas={"k_proj": 3}), "attention"),
    "conv": (net(), LoRA(r=1, init="pissa"), "conv"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "law",
    [
        laws.inject_and_eject_are_inverse,
        laws.merge_and_unmerge_are_inverse,
        laws.adapters_do_not_touch_each_other,
        laws.a_copy_is_independent,
        laws.only_the_adapter_learns,
    ],
    ids=lambda law: law.__name__,
)
def test_law_holds(law, name):
    assert law(*CASES[name]) is None


@pytest.mark.parametrize("name", CASES)
def test_step_zero_is_the_base_within_rounding_and_the_file_an_ordinary_lora(name, tmp_path):
    make, method, targets = CASES[name]
    model = make()
    base = logits(model)
    lorica.inject(model, method, targets)
    assert laws.close(logits(model), base)
    for each in patch.installed(model).patches.values():
        assert each.silent()
    stir(model)
    Adapter.of(model).save(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert "init_lora_weights" not in config
    loaded = Adapter.load(tmp_path / "a")
    assert loaded.method.init == "kaiming" and loaded.method.r == 2 * method.r
    fresh = make()
    loaded.apply(fresh)
    assert laws.close(logits(fresh), logits(model)) and not laws.close(logits(model), base)
    if name not in ("conv1d and slices", "embedding, tied"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "a")).eval()
        with torch.no_grad():
            assert laws.close(theirs(**inputs(model)).logits, logits(model))


def test_pissa_trains_the_principal_triplets_of_the_weight():
    model = llama()
    lorica.inject(model, LoRA(r=3, alpha=6, init="pissa"), "down_proj")
    for (path, _), each in patch.installed(model).patches.items():
        W = model.get_submodule(path).weight
        U, S, V = torch.linalg.svd(W)
        assert laws.close(each.scale * each.B @ each.A, (U[:, :3] * S[:3]) @ V[:3], 1e-4)
        assert laws.close(each.A.norm(dim=1), (S[:3] / each.scale).sqrt(), 1e-4)


def test_a_gradient_start_spans_what_the_gradient_of_the_weight_spans():
    settings = TrainSettings(seed=4)
    model = adapted(init="gradient")
    lorica.eject(model)
    lorica.inject(model, LoRA(r=3, init="gradient"), "q_proj, down_proj")
    assert start.wants(model)
    random_state = torch.random.get_rng_state()
    start.at_gradient(model, Passes(model, ROWS, 1), ROWS, settings)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    found = {path: (each.A.detach(), each.B.detach()) for (path, _), each in patch.installed(model).patches.items()}
    assert all(parameter.grad is None for parameter in model.parameters())
    lorica.eject(model)
    for path in found:
        model.get_submodule(path).weight.requires_grad_(True)
    lorica.inject(model, LoRA(r=1), "o_proj")
    for path in found:
        model.get_submodule(path).weight.requires_grad_(True)
    eager(model)
    for path, (A, B) in found.items():
        G = model.get_submodule(path).weight.grad
        within = (B / B.norm(dim=0)).T @ G @ (A / A.norm(dim=1, keepdim=True)).T
        # Subspace iteration is not exact where singular values are close, nor need it be.
        assert within.square().sum() > 0.85 * torch.linalg.svdvals(G)[:3].square().sum()
        assert laws.close(within, within.diag().diag(), 1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pack_gives_the_gradient_of_the_plain_model(family):
    loss, found = packed(adapted(family, init="pissa"))
    wanted, expected = eager(adapted(family, init="pissa"))
    assert loss == pytest.approx(wanted, rel=1e-5) and apart(found, expected) < 1e-5


def test_dropout_drops_the_same_from_the_start_and_from_what_is_held_against_it():
    model = llama()
    lorica.inject(model, LoRA(r=4, init="pissa", dropout=0.5), "all-linear")
    base = logits(model)
    assert laws.close(logits(model.train()), base)


def test_what_cannot_start_there_is_refused():
    with pytest.raises(LoricaError, match=r"the rank is 40, and it has 32 singular vectors"):
        lorica.inject(llama(), LoRA(r=40, init="pissa"), "q_proj")
    with pytest.raises(LoricaError, match="convolution in groups"):
        lorica.inject(net(groups=3)(), LoRA(r=6, init="gradient"), "odd")
    with pytest.raises(LoricaError, match="the scale is 0"):
        lorica.inject(llama(), LoRA(r=4, alpha=0, init="pissa"), "q_proj")
    with pytest.raises(LoricaError, match="off with init='pissa'"):
        LoRA(init="pissa", dora=True)


def test_the_correction_is_that_of_the_first_update_of_adam():
    generator = torch.Generator().manual_seed(0)
    r, into, out, lr = 8, 300, 500, 1e-4

    def moved(A, B, ratio):
        """The size of the change of B A in Adam's first step under a random gradient."""
        G = torch.randn(out, into, generator=generator)
        A, B = (torch.nn.Parameter(factor.clone()) for factor in (A, B))
        adam = torch.optim.Adam([{"params": [A]}, {"params": [B], "lr": lr * ratio}], lr=lr)
        before = (B @ A).detach()
        (B @ A * G).sum().backward()
        adam.step()
        return (B @ A - before).norm().item()

    kaiming = torch.empty(r, into).uniform_(-1, 1, generator=generator) / math.sqrt(into)
    plain = moved(kaiming, torch.zeros(out, r), 1)
    W = torch.randn(out, into, generator=generator)
    for A, B in (
        spectral.best_factors(W, r),
        spectral.equally_far(*(torch.linalg.svd(W)[0][:, :r], torch.linalg.svd(W)[2][:r])),
    ):
        for ratio in (1, 16):
            factor = correction([Start(A, -B, 2.0)], ratio)
            assert moved(A, B, ratio) == pytest.approx(plain / factor, rel=0.1)
    assert moved(kaiming, torch.zeros(out, r), 16) == pytest.approx(plain / correction([], 16), rel=0.1)


def test_the_fast_path_is_the_plain_one_at_the_start():
    model = llama()
    lorica.inject(model, LoRA(r=4, init="pissa"), "all-linear")
    plain = logits(model)
    with Fast(model).on():
        assert laws.close(logits(model), plain)
