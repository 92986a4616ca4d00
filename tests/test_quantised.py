"""Bases kept in nf4 and int8 by bitsandbytes: the same laws, within what the packing rounds."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from model_files import llama as make_llama
from model_files import save, write_gguf
from torch import nn

import laws
import lorica
import tiny
from laws import close
from lorica import Adapter, LoRA, LoricaError, patch, weights
from lorica.models import describe, open_thing
from tiny import inputs, logits, stir

bnb = pytest.importorskip("bitsandbytes")

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 layers warn of their fp16 inputs at each call
SIZE = {"hidden_size": 64, "intermediate_size": 96}
KINDS = ("nf4", "fp4", "int8")


def packed_layer(layer: nn.Module, kind: str) -> nn.Module:
    """The layer as transformers' quantizer makes it, on the CPU."""
    W = weights.storage(layer).read(layer).to(layer.weight.dtype)
    out, inside = W.shape
    bias = layer.bias is not None
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(inside, out, bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(W.clone(), requires_grad=False)
    else:
        new = bnb.nn.Linear4bit(inside, out, bias, quant_type=kind)
        new.weight = bnb.nn.Params4bit(W.clone(), requires_grad=False, quant_type=kind, module=new)
    new.bias = layer.bias
    new.source_cls = type(layer)
    return new.to("cpu").train(layer.training).requires_grad_(False)


def pack(model: nn.Module, kind: str) -> nn.Module:
    """Every linear layer but the head packed."""
    head = model.get_output_embeddings()
    for path, layer in list(model.named_modules()):
        found = weights.storage(layer)
        if found and not found.takes_ids and layer is not head:
            model.set_submodule(path, packed_layer(layer, kind))
    weights.keep_packing(model)
    return model


def packed(kind: str, family: str = "llama", dtype: torch.dtype = torch.float32):
    return lambda: pack(tiny.MODELS[family]().to(dtype), kind)


def unpacked_twin(model: nn.Module) -> nn.Module:
    """The same function in ordinary layers: what each packed weight stands for, in fp32."""
    twin = copy.deepcopy(model)
    for path, layer in list(twin.named_modules()):
        if (found := weights.storage(layer)) and found.packed:
            W = found.read(layer)
            plain = nn.Linear(*reversed(W.shape), bias=layer.bias is not None)
            plain.weight, plain.bias = nn.Parameter(W), layer.bias
            twin.set_submodule(path, plain.train(layer.training))
    return twin


def is_packed(layer: nn.Module) -> bool:
    return isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def nearness(kind: str) -> float:
    # int8 layers round their inputs to 8 bits too, unless they train on a CPU.
    return 0.05 if kind == "int8" else 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "law",
    [
        laws.step_zero_is_the_base,
        laws.inject_and_eject_are_inverse,
        laws.a_copy_is_independent,
        laws.only_the_adapter_learns,
    ],
    ids=lambda law: law.__name__,
)
def test_law_holds_on_a_packed_base(law, kind, family):
    assert law(packed(kind, family), LoRA(r=4), "all-linear") is None


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "law",
    [laws.merge_and_unmerge_are_inverse, laws.adapters_do_not_touch_each_other],
    ids=lambda law: law.__name__,
)
def test_4bit_layers_merge_within_the_rounding_of_the_rest(law, kind):
    assert law(packed(kind), LoRA(r=4), "all-linear") is None


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_are_inverse_on_a_packed_base(kind, tmp_path):
    assert laws.save_and_load_are_inverse(packed(kind), LoRA(r=4), "all-linear", tmp_path / "a") is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_a_packed_base_makes_it_ordinary_and_unmerging_brings_it_back(kind, family):
    model = packed(kind, family)()
    lorica.inject(model, LoRA(r=4), "paper")
    stir(model)
    tuned = logits(model)
    with lorica.disabled(model):
        base = logits(model)
    before = laws.weights_of(model)
    objects = dict(model.named_parameters())
    mark = lorica.fingerprint(model)
    there = sum(is_packed(layer) for layer in model.modules())
    report = lorica.merge(model, check=inputs(model))
    assert report.unpacked == there > 0
    assert not any(is_packed(layer) for layer in model.modules())
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    merged = logits(model)
    assert close(merged, tuned, nearness(kind))
    assert report.max_logit_diff == (merged - tuned).abs().max().item()
    assert lorica.fingerprint(model) == mark
    assert torch.equal(logits(copy.deepcopy(model)), merged)
    with lorica.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)
    lorica.unmerge(model)
    assert dict(model.named_parameters()).keys() == objects.keys()
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    assert laws.same_weights(laws.weights_of(model), before)
    assert torch.equal(logits(model), tuned)


def test_a_merged_weight_is_rounded_once_to_the_format_of_the_rest():
    model = packed("nf4", dtype=torch.bfloat16)()
    lorica.inject(model, LoRA(r=2), "q_proj")
    stir(model)
    layer = model.model.layers[0].self_attn.q_proj
    part = layer.lorica.default.lora
    W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    wanted = (weights.storage(layer).read(layer) + part.scale * (part.B @ part.A)).to(torch.bfloat16)
    assert close(weights.storage(layer).read(layer), W, 2**-8)
    lorica.merge(model)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_unpacked_model(kind):
    model = packed(kind)()
    lorica.inject(model, LoRA(r=4), "all-linear")
    stir(model)
    twin = unpacked_twin(packed(kind)())
    Adapter.of(model).apply(twin)
    for each in (model.train(), twin.train()):
        each(**inputs(each)).logits.pow(2).mean().backward()
    ours, theirs = lorica.trainable(model), lorica.trainable(twin)
    assert all(close(ours[key].grad, theirs[key].grad, 1e-4) for key in theirs)
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.values())


def test_a_model_that_was_evaluated_still_trains():
    model = packed("nf4")()
    lorica.inject(model, LoRA(r=4), "v_proj")
    stir(model)
    logits(model)
    model.train()(**inputs(model)).logits.pow(2).mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in lorica.trainable(model).values())


def test_4bit_weights_that_bitsandbytes_repacked_for_inference_are_refused():
    model = packed("nf4")()
    model.model.layers[0].self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(LoricaError, match="repacked 1 4-bit layers .*lorica.load"):
        lorica.inject(model, LoRA())
    assert lorica.adapters(model) == []


def test_packed_parameters_are_counted_as_what_they_stand_for():
    model = tiny.llama()
    total, mark = sum(parameter.numel() for parameter in model.parameters()), lorica.fingerprint(model)
    marks = {mark}
    for kind in KINDS:
        model = packed(kind)()
        lorica.inject(model, LoRA(r=2), "qv")
        assert lorica.count(model).total == total
        marks.add(lorica.fingerprint(model))
        logits(model)
        assert lorica.fingerprint(model) in marks
    assert len(marks) == 1 + len(KINDS)


def test_a_fingerprint_sees_the_scales_of_a_packed_weight():
    for kind in KINDS:
        model = packed(kind)()
        before = lorica.fingerprint(model)
        weight = model.model.layers[0].mlp.up_proj.weight
        (weight.SCB if kind == "int8" else weight.quant_state.absmax)[3] *= 2
        assert lorica.fingerprint(model) != before


def test_a_packed_layer_cannot_be_trained_whole():
    model = packed("nf4")()
    with pytest.raises(LoricaError, match=r"q_proj.weight is packed as nf4"):
        lorica.inject(model, LoRA(modules_to_save=("q_proj",)), "v_proj")
    assert lorica.adapters(model) == []


def test_embeddings_and_norms_of_a_packed_model_train_like_any():
    model = packed("nf4")()
    lorica.inject(model, LoRA(r=2, modules_to_save=("norm",), token_rows=(3,)), "q_proj")
    stir(model)
    tuned = logits(model)
    lorica.merge(model)
    assert close(logits(model), tuned, 1e-4)


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model", make_llama(**SIZE))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_load_quantizes_and_the_whole_way_works(kind, folder, tmp_path):
    model, tok = lorica.load(folder, dtype="bf16", device="cpu", quantize=kind)
    assert weights.storage(model.model.layers[0].self_attn.q_proj).name == kind
    lorica.inject(model, LoRA(r=4))
    base = logits(model)
    stir(model)
    tuned = logits(model)
    assert not torch.equal(tuned, base)
    Adapter.of(model).save(tmp_path / "a")
    again, _ = lorica.load(folder, dtype="bf16", device="cpu", quantize=kind)
    assert torch.equal(logits(again), base)
    Adapter.load(tmp_path / "a").apply(again)
    assert torch.equal(logits(again), tuned)
    assert lorica.fingerprint(again) == lorica.fingerprint(model)
    report = lorica.merge(model, keep=False)
    model.save_pretrained(tmp_path / "merged")
    tok.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    plain, _ = lorica.load(tmp_path / "merged", dtype="bf16", device="cpu")
    assert not any(is_packed(layer) for layer in plain.modules())
    assert torch.equal(logits(plain), logits(model))
    assert report.max_logit_diff < 0.1 * tuned.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_model_is_saved_as_it_is_and_opened_again(kind, folder, tmp_path):
    model, tok = lorica.load(folder, dtype="bf16", device="cpu", quantize=kind)
    base = logits(model)
    lorica.inject(model, LoRA(r=4))
    stir(model)
    for step in ("patched", "unmerged"):
        model.save_pretrained(tmp_path / step)
        tok.save_pretrained(tmp_path / step)
        again, _ = lorica.load(tmp_path / step, dtype="bf16", device="cpu")
        assert torch.equal(logits(again), base)
        assert lorica.fingerprint(again) == lorica.fingerprint(model)
        lorica.merge(model)
        lorica.unmerge(model)
    same, _ = lorica.load(tmp_path / step, dtype="bf16", device="cpu", quantize=kind)
    assert torch.equal(logits(same), base)
    other = "int8" if kind == "nf4" else "nf4"
    with pytest.raises(LoricaError, match=f"is kept in {kind} already"):
        lorica.load(tmp_path / step, device="cpu", quantize=other)


def test_a_gguf_file_is_quantized_like_a_folder(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    model, _ = lorica.load(path, dtype="fp32", device="cpu", quantize="nf4")
    assert weights.storage(model.model.layers[0].self_attn.q_proj).name == "nf4"
    whole, _ = lorica.load(path, dtype="fp32", device="cpu")
    assert close(logits(model), logits(whole), 0.5)


def test_a_run_trained_on_a_packed_base_opens_on_one_by_itself(folder, tmp_path):
    rows = [{"prompt": f"say {place}", "completion": "yes" * place} for place in range(1, 7)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = lorica.TrainSettings(steps=3, held_out=0, sample=0, init="loftq", rank=2, dtype="bf16")
    model, tok = lorica.load(folder, dtype="bf16", device="cpu", quantize="nf4")
    run = lorica.train(model, tok, data, settings, out=tmp_path / "run")
    assert run.adapter.meta["quantize"] == "nf4"
    opened = open_thing(tmp_path / "run", dtype="bf16", device="cpu")
    assert patch.packing(opened.model) == "nf4"
    assert torch.equal(logits(opened.model), logits(model.eval()))
    about = describe(opened.model)
    assert about.parameters == lorica.count(model).total == sum(p.numel() for p in make_llama(**SIZE).parameters())
    assert about.nbytes < describe(lorica.load(folder, dtype="bf16", device="cpu")[0]).nbytes
    with pytest.warns(UserWarning, match="expect other answers"):
        whole = open_thing(tmp_path / "run", dtype="bf16", device="cpu", quantize="none")
    assert patch.packing(whole.model) == ""


def test_an_unknown_way_to_quantize_names_the_nearest(folder):
    with pytest.raises(LoricaError, match="did you mean 'nf4'"):
        lorica.load(folder, quantize="nf8")


def error_of(model: nn.Module, whole: nn.Module) -> float:
    """How far what the patched layers stand for is from the weights as they were, relative to what was lost."""
    left = gone = 0.0
    for path, layer in model.named_modules():
        if (found := weights.storage(layer)) and found.packed:
            lost = weights.lost(model, whole, path)
            gone += lost.pow(2).sum().item()
            left += (lost - sum(part.delta() for part in layer.lorica.parts())).pow(2).sum().item()
    return (left / gone) ** 0.5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loftq_starts_nearer_to_the_model_as_it_was_the_more_so_the_higher_the_rank(kind, folder):
    whole, _ = lorica.load(folder, dtype="fp32", device="cpu")
    wanted = logits(whole)
    model, _ = lorica.load(folder, dtype="fp32", device="cpu", quantize=kind)
    off = (logits(model) - wanted).norm().item()
    errors, distances = [1.0], [off]
    for r in (2, 8, 24):
        lorica.inject(model, LoRA(r=r, alpha=3, init="loftq"))
        errors.append(error_of(model, whole))
        distances.append((logits(model.train()) - wanted).norm().item())
        lorica.eject(model.eval())
        assert (logits(model) - wanted).norm().item() == off
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7
    assert distances[-1] < distances[1] < off or kind == "int8"


def test_loftq_is_the_best_of_its_rank_and_its_scale_is_honoured(folder):
    whole, _ = lorica.load(folder, dtype="fp32", device="cpu")
    model, _ = lorica.load(folder, dtype="fp32", device="cpu", quantize="nf4")
    for alpha in (1, 32, -4):
        lorica.inject(model, LoRA(r=4, alpha=alpha, init="loftq"))
        for path in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"):
            part = model.get_submodule(path).lorica.default.lora
            U, S, V = torch.linalg.svd(weights.lost(model, whole, path))
            best = (U[:, :4] * S[:4]) @ V[:4]
            assert close(part.delta(), best, 1e-3)
            assert torch.allclose(part.A.norm(dim=1), part.B.norm(dim=0), rtol=1e-3)
        lorica.eject(model)


def test_loftq_with_a_rank_above_the_width_makes_up_for_all_and_trains(folder):
    whole, _ = lorica.load(folder, dtype="fp32", device="cpu")
    model, _ = lorica.load(folder, dtype="fp32", device="cpu", quantize="nf4")
    lorica.inject(model, LoRA(r=80, init="loftq"), "k_proj")
    assert close(logits(model), logits(whole), 0.5)
    layer = model.model.layers[0].self_attn.k_proj
    assert close(layer.lorica.default.lora.delta(), weights.lost(model, whole, "model.layers.0.self_attn.k_proj"), 1e-3)


def test_loftq_needs_a_base_that_was_quantized_as_it_was_loaded(folder):
    model, _ = lorica.load(folder, dtype="fp32", device="cpu")
    with pytest.raises(LoricaError, match="none of the targets is quantized"):
        lorica.inject(model, LoRA(init="loftq"))
    with pytest.raises(LoricaError, match="as they were are not known"):
        lorica.inject(packed("nf4")(), LoRA(init="loftq"))
    model, _ = lorica.load(folder, dtype="fp32", device="cpu", quantize="nf4")
    with pytest.raises(LoricaError, match="scale is 0"):
        lorica.inject(model, LoRA(init="loftq", alpha=0))


def test_an_adapter_that_began_with_loftq_goes_on_any_base(folder, tmp_path):
    model, _ = lorica.load(folder, dtype="fp32", device="cpu", quantize="nf4")
    lorica.inject(model, LoRA(r=4, init="loftq"))
    tuned = logits(model)
    adapter = Adapter.of(model)
    adapter.save(tmp_path / "a")
    for each in (adapter, Adapter.load(tmp_path / "a")):
        again, _ = lorica.load(folder, dtype="fp32", device="cpu", quantize="nf4")
        each.apply(again)
        assert torch.equal(logits(again), tuned)
    each.apply(lorica.load(folder, device="cpu")[0])
    adapter.apply(lorica.load(folder, device="cpu")[0])
