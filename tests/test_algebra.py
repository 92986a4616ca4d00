"""Adapter algebra keeps its laws on every storage: what merges is the sum of what was trained."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorica
from laws import close
from lorica import Adapter, LoRA, LoricaError, core, weights
from lorica.core import Factors
from test_conv import net
from test_experts import mixture
from test_laws import CASES as LAWFUL
from test_quantised import packed
from tiny import MODELS, gpt2, llama, logits, stir

CASES = {
    name: (MODELS[kind], method, targets)
    for name, (kind, method, targets) in LAWFUL.items()
    if not method.dora  # no sum of a base and low-rank updates: refused
} | {
    "conv": (net(), LoRA(r=6), "conv"),
    "experts": (mixture("mixtral"), LoRA(r=3, ranks={"experts.down_proj": 2}), "experts, q_proj"),
    "experts kept as in x out": (mixture("gpt-oss"), LoRA(r=3), "experts"),
    "nf4": (packed("nf4"), LoRA(r=4), "all-linear"),
    "int8": (packed("int8"), LoRA(r=4), "all-linear"),
}


def trained(make, method, targets, seed=0):
    model = make()
    lorica.inject(model, method, targets)
    stir(model, seed, 0.1)
    return Adapter.of(model)


def two(make, method, targets):
    """Two adapters of one base whose rank, scale and tensors differ."""
    other = dataclasses.replace(method, r=method.r * 2, alpha=5, scaling="alpha/sqrt(r)")
    return trained(make, method, targets), trained(make, other, targets, seed=1)


def parameters(model) -> dict[str, Tensor]:
    """Every parameter in fp64, a packed one as the floats it stands for."""
    packed = {
        f"{path}.weight": weights.storage(layer).read(layer).double()
        for path, layer in model.named_modules()
        if (kind := weights.storage(layer)) and kind.packed
    }
    return {name: value.detach().double() for name, value in model.named_parameters()} | packed


def merged(make, adapter: Adapter) -> dict[str, Tensor]:
    model = make()
    adapter.apply(model)
    lorica.merge(model, check=False, keep=False)
    return parameters(model)


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """``scale B A`` of each matrix in fp64, slices placed in their layer."""
    found: dict[str, Tensor] = {}
    for target in adapter.targets:
        A, B = (adapter.tensors[f"{target.path}#{target.part or 'lora'}.{factor}"].double() for factor in "AB")
        delta = adapter.method.scale_of(target.key) * (B @ A)
        if target.rows:
            delta = torch.nn.functional.pad(delta, (0, 0, target.rows[0], target.shape[0] - target.rows[1]))
        found[target.key] = found.get(target.key, 0) + delta
    return found


def same_deltas(a: Adapter, b: Adapter, rtol: float = 1e-5) -> bool:
    ours, theirs = deltas(a), deltas(b)
    return ours.keys() == theirs.keys() and all(close(ours[key], theirs[key], rtol) for key in ours)


@pytest.mark.parametrize("name", CASES)
def test_a_sum_merges_to_the_sum_of_what_its_parts_merge_to(name):
    make, _, _ = CASES[name]
    a, b = two(*CASES[name])
    base, from_a, from_b = parameters(make()), merged(make, a), merged(make, b)
    for of_a, of_b in ((0.7, 0.3), (1.0, -2.0)):
        for key, both in merged(make, of_a * a + of_b * b).items():
            W = base[key if key in base else "model.embed_tokens.weight"]  # a head that was tied has no name of its own
            assert close(both, W + of_a * (from_a[key] - W) + of_b * (from_b[key] - W)), key


def test_a_sum_in_groups_of_a_convolution_acts_as_the_sum_of_its_patches():
    make = net(groups=3)
    a, b = two(make, LoRA(r=6), "odd")
    wanted = {key: 0.5 * each + deltas(b)[key] for key, each in deltas(a).items()}
    both = 0.5 * a + b
    assert all(close(each, wanted[key]) for key, each in deltas(both).items())
    assert both.method.rank_of("odd") == 18
    assert both.truncate(r=7).method.rank_of("odd") == 6
    model = make()
    both.apply(model)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_an_ordinary_adapter_that_can_be_saved(name, tmp_path):
    make, method, targets = CASES[name]
    a, b = two(make, method, targets)
    both = 0.25 * a + 0.75 * b
    both.save(tmp_path / "both")
    back = Adapter.load(tmp_path / "both")
    assert back.sha256 == both.sha256
    here, there = make(), make()
    both.apply(here)
    back.apply(there)
    assert torch.equal(logits(here), logits(there))


@given(ranks=st.tuples(*[st.integers(1, 6)] * 3), scales=st.tuples(*[st.floats(-4, 4)] * 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_sums_are_commutative_and_associative_and_concatenation_is_exact(ranks, scales, seed):
    a, b, c = terms(seed, ranks, scales)
    ab_c, a_bc, cba = (
        dense(each)
        for each in (
            core.stacked([core.stacked([a, b]), c]),
            core.stacked([a, core.stacked([b, c])]),
            core.stacked([c, b, a]),
        )
    )
    wanted = dense(a) + dense(b) + dense(c)
    size = max(dense(each).abs().max().item() for each in (a, b, c))
    for got in (ab_c, a_bc, cba):
        assert (got - wanted).abs().max().item() <= 1e-6 * max(size, 1e-6)
    assert core.stacked([a, b]).rank == a.rank + b.rank


@given(ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)), power=st.integers(-3, 3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_concatenation_is_exact_to_the_bit_where_scales_are_alike_or_a_power_of_two_apart(ranks, power, seed):
    a, b = terms(seed, ranks, (3.0, 3.0 * 2.0**power))
    both = core.stacked([a, b])
    assert torch.equal(both.A, torch.cat([a.A, b.A], -2))
    assert torch.equal(both.scale * both.B.double(), torch.cat([a.scale * a.B.double(), b.scale * b.B.double()], -1))


@given(sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), rank=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_cut_spectrum_is_the_best_approximation_and_keeps_the_energy_it_promises(sizes, rank, seed):
    (term,) = terms(seed, (rank,), (1.5,), sizes, stack=(2,))
    W, spectrum = dense(term), core.spectrum(term)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert close(dense(spectrum.cut()), W)
    for r in range(1, spectrum.S.shape[-1] + 1):
        best = U[..., :r] @ torch.diag_embed(S[..., :r]) @ Vh[..., :r, :]
        assert close(dense(spectrum.cut(r)), best, 1e-4)
    for energy in (0.3, 0.9, 0.999, 1.0):
        r = spectrum.rank_for(energy)
        shares = S[..., :r].square().sum(-1) / S.square().sum(-1)
        assert (shares >= energy - 1e-12).all()
        assert r == 1 or (S[..., : r - 1].square().sum(-1) / S.square().sum(-1) < energy).any()


def terms(seed, ranks, scales, sizes=(9, 7), stack=()):
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(*stack, r, sizes[1], generator=generator),
            torch.randn(*stack, sizes[0], r, generator=generator),
            scale,
        )
        for r, scale in zip(ranks, scales, strict=True)
    ]


def dense(term: Factors) -> Tensor:
    return term.scale * (term.B.double() @ term.A.double())


@pytest.mark.parametrize("name", ["llama patterns", "gpt2 paper", "llama embedding", "experts", "conv"])
def test_adding_and_taking_away_changes_nothing_and_truncation_finds_the_rank_back(name):
    a, b = two(*CASES[name])
    same = a + b - b
    assert same_deltas(same, a)
    back = same.truncate(energy=1)
    assert same_deltas(back, a)
    ranks = {target.key: a.method.rank_of(target.key) for target in a.targets}
    sides = {target.key: min(target.shape) for target in a.targets}
    assert {target.key: back.method.rank_of(target.key) for target in back.targets} == {
        key: min(r, sides[key]) if not name.startswith("gpt2") else r for key, r in ranks.items()
    }
    assert same_deltas(a.truncate(r=max(ranks.values())), a)
    assert (a - a).inner(a - a) < 1e-9 * a.inner(a)


def test_multiples_change_nothing_but_alpha():
    a = trained(llama, LoRA(r=3, ranks={"q_proj": 5}), "qv")
    for got, factor in ((0.7 * a, 0.7), (a * 2, 2)):
        assert all(torch.equal(got.tensors[key], tensor) for key, tensor in a.tensors.items())
        for target in a.targets:
            assert got.method.scale_of(target.key) == pytest.approx(factor * a.method.scale_of(target.key), rel=1e-15)
    assert all(torch.equal(-delta, deltas(a)[key]) for key, delta in deltas(-a).items())
    assert (2 * (0.5 * a)).sha256 == (1 * a).sha256
    assert not any(each.any() for each in deltas(0 * a).values())
    assert same_deltas(sum([a, a, a]), 3 * a)
    with pytest.raises(TypeError):
        a * a
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(LoricaError, match="finite number, not by"):
        math.nan * a


def test_what_an_adapter_has_no_target_for_it_contributes_nothing_to(tmp_path):
    a, b = trained(llama, LoRA(r=2, alpha=3), "qv"), trained(llama, LoRA(r=5), "v_proj@1, down_proj", seed=1)
    both = a + 0.5 * b
    own, other = deltas(a), deltas(b)
    assert deltas(both).keys() == own.keys() | other.keys()
    for key, delta in deltas(both).items():
        assert close(delta, own.get(key, torch.zeros(())) + 0.5 * other.get(key, torch.zeros(())))
    assert {both.method.rank_of(target.key) for target in both.targets} == {2, 5, 7}
    both.save(tmp_path / "both")
    assert same_deltas(Adapter.load(tmp_path / "both"), both, 1e-12)


def test_slices_stay_slices_unless_another_has_the_whole_layer(tmp_path):
    q, kv = trained(gpt2, LoRA(r=2), "c_attn[q]"), trained(gpt2, LoRA(r=3), "c_attn[q,v]", seed=1)
    whole = trained(gpt2, LoRA(r=4), "c_attn", seed=2)
    sliced, joined = q + kv, q - 2 * whole
    assert {target.part for target in sliced.targets} == {"q", "v"}
    assert {target.part for target in joined.targets} == {None}
    for both, parts in ((sliced, ((1, q), (1, kv))), (joined, ((1, q), (-2, whole)))):
        for key, delta in deltas(both).items():
            assert close(delta, sum(weight * deltas(each)[key] for weight, each in parts))
        both.save(tmp_path / str(len(both.targets)))
        assert same_deltas(Adapter.load(tmp_path / str(len(both.targets))), both, 1e-7)
    assert q.inner(whole) == pytest.approx(sum((deltas(q)[key] * deltas(whole)[key]).sum().item() for key in deltas(q)))


def test_the_inner_product_is_that_of_the_full_matrices():
    a, b = two(*CASES["llama patterns"])
    wanted = sum((deltas(a)[key] * deltas(b)[key]).sum().item() for key in deltas(a))
    assert a.inner(b) == pytest.approx(wanted, rel=1e-9)
    assert a.inner(b) ** 2 <= a.inner(a) * b.inner(b)


ROWS = LoRA(r=2, token_rows=(3, 7), bias="all")


def test_values_trained_whole_take_the_base_in_where_weights_do_not_add_up_to_one(tmp_path):
    def make():
        return llama(tied=False, bias=True)

    a = trained(make, ROWS, "q_proj")
    b = trained(make, dataclasses.replace(ROWS, token_rows=(7, 9), bias="none"), "q_proj", seed=1)
    both = a + b
    assert both.method.token_rows == (3, 7, 9)
    with pytest.raises(LoricaError, match=r"which takes the base's own values: adapter.settled\(model\)"):
        both.save(tmp_path / "both")
    base = make()
    with pytest.raises(
        LoricaError, match=r"not the base of the adapters:\n.*tokens.rows is \[3, 32\], the model has \[0\] there"
    ):
        both.settled(gpt2())
    settled = both.settled(base)
    settled.save(tmp_path / "both")
    there, here, saved = make(), make(), make()
    both.apply(here)
    settled.apply(there)
    Adapter.load(tmp_path / "both").apply(saved)
    assert torch.equal(logits(here), logits(there))
    assert torch.equal(logits(here), logits(saved))
    rows = settled.tensors["model.embed_tokens#tokens.rows"]
    table = base.model.embed_tokens.weight.detach()
    assert torch.equal(rows[0], a.tensors["model.embed_tokens#tokens.rows"][0])
    assert close(
        rows[1],
        table[7] + sum(each.tensors["model.embed_tokens#tokens.rows"][i] - table[7] for i, each in ((1, a), (0, b))),
    )
    assert (0.5 * a + 0.5 * a).shares == {}
    assert (a + b - b).settled(base).tensors.keys() == both.tensors.keys()
    for key, share in (a + b - b).shares.items():
        assert "rows" in key and share.tolist() == [[0.0], [0.0], [1.0]]


def test_copies_of_the_base_that_peft_adds_are_neither_weighted_nor_lost():
    a = trained(lambda: llama(tied=False), LoRA(r=2), "embed_tokens")
    table = llama(tied=False).model.embed_tokens.weight.detach().clone()
    with_copy = dataclasses.replace(a, tensors={**a.tensors, "model.embed_tokens.weight": table})
    both = 0.5 * with_copy + a
    assert torch.equal(both.tensors["model.embed_tokens.weight"], table) and not both.shares
    assert both.apply(llama(tied=False)) == ["model.embed_tokens"]


class Other(LoRA):
    """Some other method."""


def refused(match, *adapters, act=lambda a, b: a + b):
    with pytest.raises(LoricaError, match=match):
        act(*adapters)


def test_what_cannot_be_combined_is_refused_with_the_reason():
    a = trained(llama, LoRA(r=2), "qv")
    wide = trained(lambda: llama(layers=2), LoRA(r=2), "up_proj")
    cut = dataclasses.replace(wide.targets[0], shape=(40, 32))
    refused("have not the same base", wide, dataclasses.replace(wide, targets=(cut, *wide.targets[1:])))
    other = dataclasses.replace(
        a, tensors={**a.tensors, "model.layers.0.self_attn.q_proj#lora.magnitude": torch.ones(2)}
    )
    refused("no pair of matrices A and B: .*magnitude", a, other)
    refused("is Other, which is no sum of", a, dataclasses.replace(a, method=Other(r=2)))
    refused("is DoRA, whose magnitudes make it no sum", a, trained(llama, LoRA(r=2, dora=True), "qv"))
    whole = trained(llama, LoRA(r=2, modules_to_save=("norm",)), "qv")
    elsewhere = dataclasses.replace(whole, meta={**whole.meta, "base_fingerprint": "other"})
    refused("norm.weight is trained whole, but on different weights", whole, elsewhere)
    head = trained(lambda: llama(tied=False), LoRA(r=2, modules_to_save=("lm_head",)), "qv")
    refused("lm_head.weight is trained whole in one", head, trained(lambda: llama(tied=False), LoRA(r=2), "lm_head"))
    refused("ties acts on low-rank updates, and 1 parameters", a, whole, act=Adapter.ties)
    refused(
        "tied=True", trained(llama, LoRA(r=2), "embed_tokens"), trained(llama, LoRA(r=2, tied=True), "embed_tokens")
    )
    with_biases = trained(lambda: llama(bias=True), LoRA(r=2, bias="lora_only"), "q_proj")
    refused("bias='lora_only'", with_biases, trained(lambda: llama(bias=True), LoRA(r=2), "v_proj"))
    for asked in ({}, {"r": 0}, {"energy": 1.5}, {"r": 2.5}):
        with pytest.raises(LoricaError, match="truncate takes a rank r from 1 up"):
            a.truncate(**asked)
    with pytest.raises(LoricaError, match="dare takes a density above 0"):
        Adapter.dare(a, density=0)


def test_adapters_of_different_weights_are_added_with_a_warning():
    a = trained(llama, LoRA(r=2), "qv")
    b = dataclasses.replace(a, meta={**a.meta, "base_fingerprint": "other", "base_model": "elsewhere"})
    with pytest.warns(UserWarning, match="trained on different weights"):
        both = a + b
    assert "base_fingerprint" not in both.meta
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (a + a).meta["base_fingerprint"] == a.meta["base_fingerprint"]


def test_the_result_says_what_it_is_made_of(tmp_path):
    a, b = two(*CASES["llama patterns"])
    made = (0.7 * a - (a + b)).truncate(r=3)
    one, other = a.sha256[:12], b.sha256[:12]
    made.save(tmp_path / "made")
    said = json.loads(Adapter.load(tmp_path / "made").meta["made_of"])
    assert said["expression"] == f"truncate(0.7*{one} - ({one} + {other}), r=3)"
    assert said["adapters"] == {one: a.sha256, other: b.sha256}
    assert (
        json.loads(Adapter.dare(-a, density=0.5).meta["made_of"])["expression"] == f"dare(-{one}, density=0.5, seed=0)"
    )


TIED = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(ranks=TIED, density=st.floats(0.05, 1), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_ties_depends_on_the_updates_alone(ranks, density, seed):
    """Not on their order, nor on how each is divided into B and A; and it follows a common factor."""
    a, b = terms(seed, ranks, (1.0, 2.0), stack=(2,))
    wanted = dense(core.ties([a, b], density).cut())
    mix = torch.linalg.qr(torch.randn(a.rank, a.rank, generator=torch.Generator().manual_seed(seed)))[0] * 3
    again = Factors((mix @ a.A), (a.B @ torch.linalg.inv(mix)), a.scale)
    for others in ([b, a], [again, b]):
        assert close(dense(core.ties(others, density).cut()), wanted, 1e-4)
    doubled = [each._replace(scale=2 * each.scale) for each in (a, b)]
    assert close(dense(core.ties(doubled, density).cut()), 2 * wanted, 1e-4)
    assert close(dense(core.ties([a, a], 1.0).cut()), dense(a), 1e-5)
    assert close(dense(core.ties([a], 1.0).cut()), dense(a), 1e-5)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_trim_elect_and_mean_are_those_of_peft(density):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    cores = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = merge_utils.ties(list(cores), torch.ones(3, dtype=torch.float64), density)
    assert torch.equal(core.elected(cores, density), theirs)


def test_dare_is_right_in_the_mean_and_as_far_off_as_on_the_full_matrix():
    (term,) = terms(0, (4,), (1.5,))
    W, density = dense(term), 0.5
    drawn = torch.stack(
        [dense(core.dare(term, density, torch.Generator().manual_seed(seed)).cut()) for seed in range(1000)]
    )
    assert (drawn.mean(0) - W).norm() < 0.08 * W.norm()
    error = (drawn - W).square().sum((1, 2)).mean() / W.square().sum()
    assert error.item() == pytest.approx(1 / density - 1, rel=0.08)


def test_dare_follows_its_seed_and_not_the_order_of_layers():
    a, b = two(*CASES["llama patterns"])
    one = Adapter.dare(a, b, density=0.6, seed=1)
    shuffled = dataclasses.replace(a, targets=a.targets[::-1])
    assert same_deltas(one, Adapter.dare(shuffled, b, density=0.6, seed=1), 1e-12)
    assert not same_deltas(one, Adapter.dare(a, b, density=0.6, seed=2))
    assert same_deltas(Adapter.dare(a, b, density=1.0), a + b)
    assert one.method.rank_of(a.targets[0].key) == a.method.rank_of(a.targets[0].key) + b.method.rank_of(
        a.targets[0].key
    )


@pytest.mark.parametrize("name", ["llama patterns", "experts", "gpt2 paper"])
def test_merged_by_ties_or_dare_an_adapter_can_be_applied_and_saved(name, tmp_path):
    make, _, _ = CASES[name]
    a, b = two(*CASES[name])
    for place, made in enumerate((Adapter.ties(a, b, density=0.4), Adapter.dare(a, b, density=0.7))):
        made.save(tmp_path / str(place))
        model = make()
        assert len(Adapter.load(tmp_path / str(place)).apply(model)) == len(a.targets)
        assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("case", ["linear", "conv1d", "embedding"])
def test_sums_are_those_of_peft(case, kind, tmp_path):
    peft = pytest.importorskip("peft")
    make, targets = {"linear": (llama, "qv"), "conv1d": (gpt2, "c_fc"), "embedding": (llama, "embed_tokens")}[case]
    a, b = trained(make, LoRA(r=3, alpha=5), targets), trained(make, LoRA(r=2, alpha=7), targets, seed=1)
    ours = 0.7 * a - 0.4 * b
    for name, each in (("a", a), ("b", b)):
        each.save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "a"), adapter_name="a")
        theirs.load_adapter(str(tmp_path / "b"), adapter_name="b")
        theirs.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=kind, svd_rank=4)
    if kind == "svd":
        ours = ours.truncate(r=4)
    for target in ours.targets:
        delta = theirs.base_model.model.get_submodule(target.path).get_delta_weight("c").double()
        assert close(deltas(ours)[target.key], delta if target.storage == "linear" else delta.T)
