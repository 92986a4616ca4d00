"""loralib's files: read as its layers compute, and written as it reads them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapters import MAKE, adapter, deltas
from safetensors.torch import load_file, save_file

import lorica
from laws import close
from lorica import Adapter, LoRA, LoricaError
from lorica.export import export, open_adapter
from lorica.formats import loralib
from tiny import llama, logits, stir

SLOTS = {"c_attn": ["q", "-", "v"]}


def merged_linear(A, B, alpha, slots, out):
    """What loralib's MergedLinear adds to its weight: a grouped convolution, and zero rows for slots without it."""
    on = [slot != "-" for slot in slots]
    delta = F.conv1d(A[None], B[..., None], groups=sum(on))[0] * alpha / B.shape[1]
    whole = torch.zeros(out, A.shape[1], dtype=A.dtype)
    whole.view(len(on), -1, A.shape[1])[torch.tensor(on)] = delta.view(sum(on), -1, A.shape[1])
    return whole


def gpt2_state(groups=2, r=3):
    torch.manual_seed(0)
    paths = [f"transformer.h.{block}.attn.c_attn" for block in (0, 1)]
    return {f"{path}.lora_A": torch.randn(groups * r, 32) for path in paths} | {
        f"{path}.lora_B": torch.randn(32 * groups, r) for path in paths
    }


@pytest.mark.parametrize("slots", ["q,-,v", "-,k,v", "q,k,v", "-,-,v"])
def test_a_merged_linear_is_read_as_loralib_computes_it(slots, tmp_path):
    enabled = slots.split(",")
    state = gpt2_state(sum(slot != "-" for slot in enabled))
    save_file(state, tmp_path / "a.safetensors")
    read = loralib.read(tmp_path / "a.safetensors", 16, {"c_attn": enabled})
    for path, delta in deltas(read).items():
        A, B = (state[f"{path}.lora_{factor}"].double() for factor in "AB")
        assert close(delta, merged_linear(A, B, 16, enabled, 96), 1e-7)
    assert [target.part for target in read.targets] == [slot for slot in enabled if slot != "-"] * 2
    Adapter(*read).apply(MAKE["gpt2"]())


def test_slices_are_written_as_a_merged_linear(tmp_path):
    made = adapter("slices")
    done = export(made, "loralib", tmp_path / "a")
    found = load_file(done.path)
    path = "transformer.h.1.attn.c_attn"
    assert found[f"{path}.lora_A"].shape == (4, 32) and found[f"{path}.lora_B"].shape == (64, 2)
    A, B = (found[f"{path}.lora_{factor}"].double() for factor in "AB")
    assert close(merged_linear(A, B, 3, SLOTS["c_attn"], 96), deltas(made)[path], 1e-7)
    assert done.notes == [
        "build the layers with r=2 and lora_alpha=3",
        "transformer.h.0.attn.c_attn: MergedLinear with enable_lora=[True, False, True]",
    ]
    assert [str(target) for target in Adapter.load(done.path).targets] == [str(target) for target in made.targets]


def test_plain_layers_and_embeddings_have_loralib_s_names(tmp_path):
    made = adapter("embedding")
    found = load_file(export(made, "loralib", tmp_path / "a").path)
    layers = ["model.embed_tokens", "lm_head", *(f"model.layers.{block}.self_attn.q_proj" for block in (0, 1))]
    assert found.keys() == {f"{layer}.lora_{factor}" for layer in layers for factor in "AB"}
    assert found["model.embed_tokens.lora_A"].shape == (4, 64)
    assert found["model.embed_tokens.lora_B"].shape == (32, 4)


def test_the_rank_follows_from_the_shapes_and_alpha_must_be_given(tmp_path):
    q = "roberta.encoder.layer.0.attention.self.query"
    state = {f"{q}.lora_A": torch.ones(8, 32), f"{q}.lora_B": torch.ones(32, 8)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(LoricaError, match="which lora_alpha .* give it with --alpha"):
        Adapter.load(tmp_path / "a.safetensors")
    read = loralib.read(tmp_path / "a.safetensors", 16)
    assert read.method == LoRA(r=8, alpha=16)


def test_a_pickle_is_read_only_when_it_is_asked_for_and_only_its_tensors(tmp_path):
    torch.save({"model_state_dict": {f"module.{key}": each for key, each in gpt2_state().items()}}, tmp_path / "a.pt")
    with pytest.raises(LoricaError, match=r"is a pickle.*refused.*lorica convert .*a.pt --from loralib"):
        Adapter.load(tmp_path / "a.pt")
    read = open_adapter(tmp_path / "a.pt", "loralib", alpha=8, slots=SLOTS)
    assert [str(target) for target in read.targets][:2] == [f"transformer.h.0.attn.c_attn[{part}]" for part in "qv"]
    torch.save({"x": Runs()}, tmp_path / "b.pt")
    with pytest.raises(LoricaError, match="holds more than tensors"):
        open_adapter(tmp_path / "b.pt", "loralib", alpha=8)
    assert not ran


ran: list[int] = []


class Runs:
    def __reduce__(self):
        return ran.append, (1,)


def test_a_trained_head_and_biases_come_along(tmp_path):
    model = llama(tied=False, bias=True)
    lorica.inject(model, LoRA(r=2, bias="lora_only", modules_to_save=("lm_head",)), "q_proj")
    stir(model)
    made = Adapter.of(model)
    found = load_file(export(made, "loralib", tmp_path / "a").path)
    save_file(found, tmp_path / "plain.safetensors")
    read = loralib.read(tmp_path / "plain.safetensors", 16)
    assert read.method == LoRA(r=2, bias="lora_only", modules_to_save=("lm_head",))
    other = llama(tied=False, bias=True)
    Adapter(*read).apply(other)
    assert torch.equal(logits(other), logits(model))


def test_every_fault_of_a_file_is_in_one_error(tmp_path):
    state = gpt2_state() | {
        "a.lora_A": torch.ones(2, 4),
        "b.lora_A": torch.ones(3, 4),
        "b.lora_B": torch.ones(4, 2),
        "conv.lora_A": torch.ones(6, 9),
        "conv.lora_B": torch.ones(12, 6),
        "conv.weight": torch.ones(4, 3, 3, 3),
        "whole.lora_A": torch.ones(2, 4),
        "whole.lora_B": torch.ones(4, 2),
        "whole.weight": torch.ones(4, 4),
    }
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(LoricaError) as raised:
        loralib.read(tmp_path / "a.safetensors", slots={"h.1.attn.c_attn": ["q", "k", "v"]})
    for said in (
        "give it with --alpha",
        "missing  a.lora_B",
        "shape    b:",
        "conv.weight is of the base: keep only what is trained",
        "say its kernel: --kernels conv=3",
        "whole.weight is of the base",
        "0.attn.c_attn is a fused layer with 2 slots in use: say which, as in --slots c_attn=q,-,v",
        "1.attn.c_attn has 2 slots in use",
    ):
        assert said in str(raised.value), said


@pytest.mark.parametrize(("into", "out", "k", "r"), [(3, 4, 3, 2), (5, 2, 2, 1), (4, 6, 1, 3)])
def test_a_convolution_is_read_as_loralib_computes_it(into, out, k, r, tmp_path):
    torch.manual_seed(0)
    state = {"net.conv.lora_A": torch.randn(r * k, into * k), "net.conv.lora_B": torch.randn(out * k, r * k)}
    save_file(state, tmp_path / "a.safetensors")
    read = open_adapter(tmp_path / "a.safetensors", alpha=8, kernels={"conv": k})
    layer = torch.nn.Conv2d(into, out, k)
    # What loralib's ConvLoRA adds to its weight.
    delta = (state["net.conv.lora_B"] @ state["net.conv.lora_A"]).view(layer.weight.shape) * 8 / r
    x = torch.randn(2, into, 7, 7)
    with torch.no_grad():
        wanted = F.conv2d(x, layer.weight + delta, layer.bias)
        model = torch.nn.ModuleDict({"net": torch.nn.ModuleDict({"conv": layer})})
        read.apply(model)
        assert close(layer(x), wanted)
    again = Adapter.load(export(read, "peft", tmp_path / "b").path)
    assert again.sha256 == read.sha256
    small = read.truncate(energy=1.0)
    assert close(deltas(small)["net.conv"], deltas(read)["net.conv"])


def test_a_kernel_that_does_not_fit_is_a_fault(tmp_path):
    state = {"conv.lora_A": torch.ones(4, 6), "conv.lora_B": torch.ones(9, 4)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(LoricaError, match=r"(?s)--kernels other: no such layer.*shape    conv: .* with a kernel of 3"):
        loralib.read(tmp_path / "a.safetensors", 16, kernels={"conv": 3, "other": 3})


def test_a_state_dict_without_updates_is_none_of_loralib_s(tmp_path):
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(LoricaError, match=r"no tensor called \.\.\.\.lora_A"):
        loralib.read(tmp_path / "a.safetensors", 16)
