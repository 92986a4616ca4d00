"""DoRA: PEFT's function and files, the norm that forms no W + B A, the fast path, and what is refused."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorica
from laws import close, same_weights, weights_of
from lorica import Adapter, LoRA, LoricaError, dora, inspect, patch
from lorica.export import export
from lorica.fast import Fast
from test_conv import net
from test_fast import ROWS, adapted, apart, eager, gradients, packed
from tiny import gpt2, inputs, llama, logits, phi3, stir

CASES = {
    "linear": (llama, LoRA(r=4, alpha=8, dora=True), "q_proj, down_proj"),
    "biases": (lambda: llama(bias=True), LoRA(r=4, dora=True), "all-linear"),
    "rslora": (llama, LoRA(r=4, dora=True, scaling="alpha/sqrt(r)"), "all-linear"),
    "conv1d": (gpt2, LoRA(r=4, dora=True), "c_attn, c_fc"),
    "embedding": (lambda: llama(tied=False), LoRA(r=4, dora=True), "embed_tokens, q_proj"),
    "patterns": (llama, LoRA(r=2, dora=True, ranks={"q_proj": 5}, alphas={"k_proj": 3}), "attention"),
    "conv": (net(), LoRA(r=4, dora=True), "conv"),
}


def made(name, size=0.05):
    make, method, targets = CASES[name]
    model = make()
    lorica.inject(model, method, targets)
    stir(model, size=size)
    return make, model


def theirs_of(make, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(make(), str(folder)).eval()


@pytest.mark.parametrize("name", CASES)
def test_peft_says_the_same_to_the_bit_and_its_file_comes_back(name, tmp_path):
    make, model = made(name)
    Adapter.of(model).save(tmp_path / "ours")
    theirs = theirs_of(make, tmp_path / "ours")
    with torch.no_grad():
        said = theirs(**inputs(model)).logits
    assert torch.equal(said, logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    ours, back = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs"))
    assert ours.keys() == back.keys() and any("magnitude" in key for key in ours)
    assert all(torch.equal(ours[key], back[key]) for key in ours)
    fresh = make()
    Adapter.load(tmp_path / "theirs").apply(fresh)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("name, modules", [("linear", ["q_proj", "down_proj"]), ("conv1d", ["c_attn"])])
def test_an_adapter_made_by_peft_is_read_trained_alike_and_merged_alike(name, modules, tmp_path):
    make, _, _ = CASES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": 4, "lora_alpha": 8, "target_modules": modules, "use_dora": True}
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**settings, fan_in_fan_out=name == "conv1d")).eval()
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        theirs.save_pretrained(str(tmp_path / "a"))
    model = make()
    Adapter.load(tmp_path / "a").apply(model)
    said = theirs(**inputs(model)).logits
    assert torch.equal(model(**inputs(model)).logits, said)
    model(**inputs(model)).logits.pow(2).mean().backward()
    said.pow(2).mean().backward()
    own = sorted((p.grad for p in lorica.trainable(model).values()), key=lambda grad: grad.sum())
    other = sorted((p.grad for p in theirs.parameters() if p.grad is not None), key=lambda grad: grad.sum())
    assert len(own) == len(other) and all(close(a, b) for a, b in zip(own, other, strict=True))
    lorica.merge(model)
    path = next(iter(patch.installed(model).patches))[0]
    assert close(model.get_submodule(path).weight, theirs.merge_and_unload().get_submodule(path).weight)


def test_step_zero_is_the_base_on_the_plain_path_and_on_the_fast_one():
    for make in (lambda: llama(bias=True), gpt2):
        model = make()
        plain = logits(model)
        lorica.inject(model, LoRA(r=4), "all-linear")
        with Fast(model).on():
            fast = logits(model)
        lorica.eject(model)
        lorica.inject(model, LoRA(r=4, dora=True), "all-linear")
        with Fast(model).on():
            assert torch.equal(logits(model), fast)
        assert torch.equal(logits(model), plain)
        for (path, _), each in patch.installed(model).patches.items():
            assert torch.equal(each.gain(model.get_submodule(path)), torch.ones(each.m.shape))


@pytest.mark.parametrize("family", ["llama", "llama-bias", "gemma2", "gpt2", "qwen2"])
def test_a_pack_gives_the_gradient_of_the_plain_model(family):
    loss, found = packed(adapted(family, dora=True))
    wanted, expected = eager(adapted(family, dora=True))
    assert any(key.endswith("#lora.m") for key in found)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert apart(found, expected) < 1e-5
    only = {key for key in found if key.endswith(".m")}
    assert apart({key: found[key] for key in only}, {key: expected[key] for key in only}) < 1e-5


def test_a_pack_of_rows_of_dora_and_of_lora_is_what_each_is_alone():
    model = adapted(dora=True)
    lorica.inject(model, LoRA(r=5), "attention, down_proj", "other")
    stir(model, seed=2)
    expected = {}
    for name, rows in (("default", ROWS[:2]), ("other", ROWS[2:])):
        lorica.select(model, name)
        expected[name] = eager(model, rows)[1]
    for name in expected:
        for parameter in lorica.trainable(model, name).values():
            parameter.requires_grad_(True)
    counts = [sum(sum(row.loss) for row in rows) for rows in (ROWS[:2], ROWS[2:])]
    owners = ["default"] * 2 + ["other"] * 3
    shares = [1 / counts[0]] * 2 + [1 / counts[1]] * 3
    from lorica.passes import Passes

    with Passes(model, ROWS, 1)(model, ROWS, weights=shares, owners=owners) as (loss, _):
        loss.backward()
    for name, wanted in expected.items():
        assert apart(gradients(model, name), wanted) < 1e-5


def test_the_quick_norm_is_the_plain_one_within_1e_5():
    generator = torch.Generator().manual_seed(0)
    for out, into, r, size in ((40, 64, 4, 0.02), (64, 40, 8, 1.0), (5, 5, 5, 3.0)):
        W, A, B = (torch.randn(shape, generator=generator) for shape in ((out, into), (r, into), (out, r)))
        of_W = dora.norms(W, A, 0 * B, 2.0)
        assert close(dora.quick_norms(W, of_W, A, size * B, 2.0), dora.norms(W, A, size * B, 2.0))
        assert torch.equal(dora.quick_norms(W, of_W, A, 0 * B, 2.0), of_W)


def test_the_kept_norms_follow_a_base_that_changes():
    _, model = made("linear")
    ((path, _), each), *_ = patch.installed(model).patches.items()
    layer = model.get_submodule(path)
    before = each.gain(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not close(each.gain(layer), before, 0.1)
    assert close(each.gain(layer), each.gain(layer, exact=True))


def test_a_row_of_zeros_stays_a_row_of_zeros():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    lorica.inject(model, LoRA(r=2, dora=True), "q_proj")
    model(**inputs(model)).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in lorica.trainable(model).values())
    assert logits(model).isfinite().all()


def test_dropout_leaves_the_base_s_own_product_whole():
    model = llama()
    lorica.inject(model, LoRA(r=2, dora=True, dropout=0.5), "q_proj")
    base = logits(model)
    model.train()
    assert torch.equal(logits(model), base)


def test_a_head_of_its_own_and_a_packed_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    from test_quantised import packed as packed_base

    for kind in ("nf4", "int8"):
        model = packed_base(kind)()
        base, before = logits(model), weights_of(model)
        lorica.inject(model, LoRA(r=4, dora=True), "all-linear")
        assert torch.equal(logits(model), base)
        stir(model)
        outputs = logits(model)
        assert not close(outputs, base)
        lorica.merge(model)
        assert close(logits(model), outputs, 1e-5 if kind == "nf4" else 0.05)
        lorica.unmerge(model)
        assert torch.equal(logits(model), outputs)
        lorica.eject(model)
        assert same_weights(weights_of(model), before)


@pytest.mark.parametrize(
    "make, settings, targets, reason",
    [
        (gpt2, {}, "c_attn[v]", "DoRA of a slice has no place in PEFT's layout: take the whole layer .c_attn."),
        (phi3, {}, "paper", "DoRA of a slice"),
        (net(groups=3), {"r": 6}, "conv", "convolution in groups"),
        (llama, {"tied": True}, "embed_tokens", "tied=True and dora=True"),
    ],
)
def test_what_has_no_magnitudes_is_refused_with_the_reason(make, settings, targets, reason):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(LoricaError, match=reason):
        lorica.inject(model, LoRA(dora=True, **settings), targets)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_experts_are_refused():
    from families import FAMILIES

    with pytest.raises(LoricaError, match="DoRA of stacked experts is refused"):
        lorica.inject(FAMILIES["mixtral"](), LoRA(dora=True), "experts")


@pytest.mark.parametrize("to", ["vllm", "sglang", "loralib", "ray"])
def test_what_cannot_say_magnitudes_is_told_to_merge(to, tmp_path):
    _, model = made("linear")
    with pytest.raises(LoricaError, match=r"(?s)DoRA's magnitudes.*lorica merge X -o DIR"):
        export(Adapter.of(model), to, tmp_path / "out", base="some/base")
    assert not any(tmp_path.iterdir())


def test_algebra_refuses_it_by_name():
    _, model = made("linear")
    adapter = Adapter.of(model)
    with pytest.raises(LoricaError, match="is DoRA, whose magnitudes"):
        adapter + adapter


def test_a_file_whose_magnitudes_and_config_disagree_is_refused(tmp_path):
    import json

    from safetensors.torch import save_file

    _, model = made("linear")
    Adapter.of(model).save(tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    said = json.loads(path.read_text())
    assert said["use_dora"] is True
    path.write_text(json.dumps(said | {"use_dora": False}))
    with pytest.raises(LoricaError, match="unexpected .*lora_magnitude_vector, and the config does not say use_dora"):
        Adapter.load(tmp_path / "a")
    path.write_text(json.dumps(said))
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    first, second, *_ = (key for key in tensors if "magnitude" in key)
    del tensors[first]
    tensors[second] = tensors[second][:-1]
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(LoricaError, match=r"(?s)missing .*lora_magnitude_vector, which use_dora.*has 31 of 32 outputs"):
        Adapter.load(tmp_path / "a")


def test_show_calls_it_by_its_name_and_sends_nobody_to_vllm(tmp_path):
    _, model = made("linear")
    Adapter.of(model).save(tmp_path / "a")
    facts = inspect.inspect(tmp_path / "a")
    assert facts["method"] == "dora" and "vLLM refuses DoRA" in facts["vllm"]["refused"]


def test_magnitudes_are_trained_by_a_plain_loop():
    _, model = made("linear", size=0)
    before = {key: value.detach().clone() for key, value in lorica.trainable(model).items()}
    optimizer = torch.optim.AdamW(lorica.trainable(model).values(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs(model)).logits.softmax(-1)[..., 7].sum().backward()
        optimizer.step()
    assert all(not torch.equal(value, before[key]) for key, value in lorica.trainable(model).items())
