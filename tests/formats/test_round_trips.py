"""What is written for another program reads back as the same update: to the bit, or within a rounding of B."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from adapters import CASES, MAKE, adapter, deltas, farthest, trained
from hypothesis import given, settings
from hypothesis import strategies as st

import lorica
from laws import close
from lorica import Adapter, LoRA, LoricaError
from lorica.export import FORMATS, export, open_adapter
from lorica.formats.updates import method_of
from tiny import inputs, logits

# Where no scale has to be folded, or by 2^n: the rest is one rounding of B away.
ROUNDED = {
    ("rslora", "gguf"), ("rslora", "ollama"), ("alphas", "loralib"), ("alphas", "gguf"), ("alphas", "ollama"),
    *((case, to) for case in ("ranks", "alphas") for to in ("mlx", "vllm", "sglang", "ray")),
}  # fmt: skip
REFUSED = {("slices", "mlx"), ("one slice", "mlx")}


def written(done):
    return next(done.path.glob("*/adapter_config.json")).parent if (done.path / "serve.yaml").exists() else done.path


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_an_update_comes_back_from_its_file(case, to, bases, tmp_path):
    made = adapter(case, base=str(bases / CASES[case][0]))
    if (case, to) in REFUSED:
        with pytest.raises(LoricaError, match="calls its layers otherwise"):
            export(made, to, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    done = export(made, to, tmp_path / "out")
    off = farthest(deltas(made), deltas(Adapter.load(written(done))))
    if (case, to) in ROUNDED:
        assert 0 < off < 2e-7
        assert any("folded the scales into B" in note for note in done.notes)
        assert max(each.largest for each in done.differences.values()) > 0
    else:
        assert off == 0
        assert {each.largest for each in done.differences.values()} == {0.0}


@pytest.mark.parametrize("to", ["gguf", "mlx", "loralib", "vllm"])
@pytest.mark.parametrize("case", ["linear", "embedding", "unequal slices"])
def test_what_was_read_back_acts_on_the_model_as_the_adapter_does(case, to, bases, tmp_path):
    name = CASES[case][0]
    made = adapter(case, base=str(bases / name))
    ours, theirs = MAKE[name](), MAKE[name]()
    made.apply(ours)
    Adapter.load(export(made, to, tmp_path / "out").path).apply(theirs)
    assert close(logits(theirs), logits(ours))


@settings(max_examples=25, deadline=None)
@given(
    to=st.sampled_from(["peft", "loralib", "gguf", "mlx", "vllm"]),
    r=st.integers(1, 9),
    alpha=st.one_of(st.integers(0, 64), st.floats(0.001, 100)),
    scaling=st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
    ranks=st.dictionaries(st.sampled_from(["q_proj", r"layers\.1\.self_attn\.v_proj"]), st.integers(1, 9)),
    alphas=st.dictionaries(st.sampled_from(["v_proj", r"layers\.0\.self_attn\.q_proj"]), st.integers(0, 40)),
    seed=st.integers(0, 99),
)
def test_any_rank_and_scale_comes_back_within_a_rounding(bases, to, r, alpha, scaling, ranks, alphas, seed):
    method = LoRA(r=r, alpha=alpha, scaling=scaling, ranks=ranks, alphas=alphas)
    made = trained("llama", method, "qv", seed, str(bases / "llama"))
    with tempfile.TemporaryDirectory() as folder:
        done = export(made, to, Path(folder) / "out")
        back = Adapter.load(done.path)
    was, now = deltas(made), deltas(back)
    size = max(each.abs().max() for each in was.values())
    off = max((was[path] - now[path]).abs().max() for path in was)
    if any("folded" in note for note in done.notes):
        assert off <= 2e-7 * size
    else:
        assert off == 0
    assert to != "peft" or not any("folded" in note for note in done.notes)


@settings(max_examples=10, deadline=None)
@given(
    to=st.sampled_from(["peft", "loralib", "gguf", "vllm"]),
    r=st.integers(1, 5),
    parts=st.lists(st.sampled_from("qkv"), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 9),
)
def test_any_slices_of_a_fused_layer_come_back_to_the_bit(bases, to, r, parts, seed):
    made = trained("gpt2", LoRA(r=r, alpha=2 * r), f"c_attn[{','.join(parts)}]", seed, str(bases / "gpt2"))
    with tempfile.TemporaryDirectory() as folder:
        done = export(made, to, Path(folder) / "out")
        assert farthest(deltas(made), deltas(Adapter.load(done.path))) == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("to", ["peft", "loralib", "gguf", "mlx", "vllm"])
def test_half_the_bytes_round_every_factor_once(dtype, to, bases, tmp_path):
    made = adapter("linear", base=str(bases / "llama"))
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    back = Adapter.load(export(made, to, tmp_path / "out", dtype).path)
    for key, tensor in made.tensors.items():
        assert torch.equal(back.tensors[key], tensor.to(kind).float()), key


def test_numbers_that_a_format_cannot_hold_leave_no_file(bases, tmp_path):
    made = adapter("linear", base=str(bases / "llama"))
    for tensor in made.tensors.values():
        tensor *= 1e-6
    with pytest.raises(LoricaError, match=r"does not read back as it was; fp16 cannot hold these numbers"):
        export(made, "gguf", tmp_path / "out.gguf", "fp16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["peft", "vllm"])
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_the_same_update(case, to, tmp_path):
    peft = pytest.importorskip("peft")
    name = CASES[case][0]
    made = adapter(case)
    folder = export(made, to, tmp_path / "out").path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(MAKE[name](), str(folder)).eval()
    found = {}
    for path, delta in deltas(made).items():
        layer = theirs.base_model.model.get_submodule(path)
        said = layer.get_delta_weight("default").detach()
        found[path] = said if said.shape == delta.shape and not getattr(layer, "fan_in_fan_out", False) else said.T
        assert close(found[path], delta.float(), 1e-6), path
    ours = MAKE[name]()
    made.apply(ours)
    with torch.no_grad():
        assert close(theirs(**inputs(theirs)).logits, logits(ours))


BESIDE = {
    "biases": LoRA(r=2, bias="all"),
    "whole modules": LoRA(r=2, modules_to_save=("norm",)),
    "rows": LoRA(r=2, token_rows=(3, 7)),
}


@pytest.mark.parametrize("to", ["gguf", "mlx", "vllm", "ollama", "sglang", "ray"])
@pytest.mark.parametrize(
    ("what", "said"),
    [("biases", "biases: "), ("whole modules", "modules_to_save"), ("rows", "token_rows"), ("tied", "tied=True")],
)
def test_what_a_format_has_no_place_for_is_refused_by_name(to, what, said, bases, tmp_path):
    from tiny import llama

    model = llama(bias=True)
    method = BESIDE.get(what) or LoRA(r=2, tied=True)
    lorica.inject(model, method, "embed_tokens" if what == "tied" else "q_proj")
    made = Adapter.of(model, meta={"base_model": str(bases / "llama")})
    with pytest.raises(LoricaError, match=said):
        export(made, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["peft", "loralib"])
@pytest.mark.parametrize("what", ["biases", "whole modules"])
def test_parameters_trained_beside_come_back_to_the_bit(to, what, tmp_path):
    from tiny import llama, stir

    model = llama(bias=True)
    lorica.inject(model, BESIDE[what], "q_proj")
    stir(model)
    done = export(Adapter.of(model), to, tmp_path / "out")
    assert {each.largest for each in done.differences.values()} == {0.0}
    other = llama(bias=True)
    Adapter.load(done.path).apply(other)
    assert torch.equal(logits(other), logits(model))


def test_nothing_is_overwritten_and_a_run_gives_its_best(tmp_path):
    made = adapter("linear")
    made.save(tmp_path / "run/best")
    back = open_adapter(tmp_path / "run")
    assert back.sha256 == made.sha256
    export(back, "peft", tmp_path / "out")
    with pytest.raises(LoricaError, match="nothing is overwritten"):
        export(back, "peft", tmp_path / "out")


def test_a_pattern_is_for_its_layer_alone_whatever_the_names():
    wanted = {
        "blocks.a+b": (2, 1.0), "blocks.a.b": (3, 1.0), "blocks.a_b": (4, 2.0), "blocks.x(1)": (5, 1.0),
        "blocks.w*": (2, 3.0), "b": (6, 1.0), "encoder.b": (7, 1.0),
    }  # fmt: skip
    method = method_of(wanted)
    assert {path: (method.rank_of(path), method.scale_of(path)) for path in wanted} == wanted


@pytest.mark.parametrize("targets", ["wte, c_attn, mlp.c_proj", "wte, c_attn[q,v]"])
def test_what_is_read_is_written_again_byte_for_byte(targets, tmp_path):
    made = trained("gpt2", LoRA(r=2), targets)
    made.save(tmp_path / "a")
    read = Adapter.load(tmp_path / "a")
    assert {str(each): each.storage for each in read.targets} == {str(each): each.storage for each in made.targets}
    read.save(tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
