"""Each file is checked against the layout itself, key by key, by nothing that wrote it."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from adapters import CASES, MAKE, adapter, deltas, trained
from safetensors.torch import load_file, save_file

from laws import close
from lorica import Adapter, LoRA, LoricaError
from lorica.export import export, open_adapter
from lorica.formats import recognise


def tensors_of(path):
    return {each.name: np.array(each.data) for each in gguf.GGUFReader(path).tensors}


def value(path, key):
    field = gguf.GGUFReader(path).get_field(key)
    return field.contents() if field else None


def permuted(weight, heads):
    """As llama.cpp's converter orders the rows of q and k: the two halves of a head in turn."""
    rows = [
        head * (len(weight) // heads) + half * (len(weight) // heads // 2) + place
        for head in range(heads)
        for place in range(len(weight) // heads // 2)
        for half in (0, 1)
    ]
    return weight[rows]


def unsaid(folder, *parts):
    """What the error of loading a folder does not say."""
    with pytest.raises(LoricaError) as raised:
        Adapter.load(folder)
    return [part for part in parts if part not in str(raised.value)]


def test_a_gguf_adapter_has_the_names_and_keys_of_llama_cpp(bases, tmp_path):
    made = adapter("linear", base=str(bases / "llama"))
    path = export(made, "gguf", tmp_path / "a.gguf").path
    assert value(path, "general.type") == "adapter"
    assert value(path, "general.architecture") == "llama"
    assert value(path, "adapter.type") == "lora"
    assert value(path, "adapter.lora.alpha") == 8.0
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{block}.{kind}.weight.lora_{end}" for block in (0, 1) for kind in kinds for end in "ab"}
    assert tensors_of(path).keys() == names
    assert all(array.dtype == np.float32 for array in tensors_of(path).values())


def test_rows_of_q_and_k_are_moved_as_the_converter_moves_the_weights(bases, tmp_path):
    made = adapter("linear", base=str(bases / "llama"))
    found = tensors_of(export(made, "gguf", tmp_path / "a.gguf").path)
    for layer, name, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", 0)):
        a, b = (found[f"blk.1.{name}.weight.lora_{end}"].astype(np.float64) for end in "ab")
        whole = deltas(made)[f"model.layers.1.self_attn.{layer}"].numpy()
        want = permuted(whole, heads) if heads else whole
        assert np.array_equal(8 / len(a) * (b @ a), want)


def test_an_architecture_that_moves_no_rows_keeps_them(bases, tmp_path):
    made = adapter("unequal slices", base=str(bases / "phi3"))
    path = export(made, "gguf", tmp_path / "a.gguf").path
    found = tensors_of(path)
    assert value(path, "general.architecture") == "phi3"
    a, b = (found[f"blk.0.attn_qkv.weight.lora_{end}"] for end in "ab")
    assert a.shape == (4, 32) and b.shape == (64, 4)
    whole = deltas(made)["model.layers.0.self_attn.qkv_proj"]
    assert np.allclose(b.astype(np.float64) @ a, whole.numpy(), rtol=0, atol=1e-9)


def test_the_factors_of_a_gguf_embedding_are_turned(bases, tmp_path):
    made = adapter("embedding", base=str(bases / "untied"))
    found = tensors_of(export(made, "gguf", tmp_path / "a.gguf").path)
    assert found["token_embd.weight.lora_a"].shape == (64, 4)
    assert found["token_embd.weight.lora_b"].shape == (32, 4)
    assert found["output.weight.lora_a"].shape == (4, 32)
    assert np.array_equal(found["token_embd.weight.lora_a"].T, made.tensors["model.embed_tokens#lora.A"].numpy())


@pytest.mark.parametrize("case", ["rslora", "alphas"])
def test_scales_that_one_alpha_cannot_say_are_folded_and_alpha_is_zero(case, bases, tmp_path):
    made = adapter(case, base=str(bases / "llama"))
    path = export(made, "gguf", tmp_path / "a.gguf").path
    assert value(path, "adapter.lora.alpha") == 0.0
    a, b = (tensors_of(path)[f"blk.1.attn_v.weight.lora_{end}"].astype(np.float64) for end in "ab")
    assert close(torch.tensor(b @ a), deltas(made)["model.layers.1.self_attn.v_proj"], 1e-6)


def test_ranks_need_no_folding_because_each_tensor_has_its_own(bases, tmp_path):
    path = export(adapter("ranks", base=str(bases / "llama")), "gguf", tmp_path / "a.gguf").path
    found = tensors_of(path)
    assert value(path, "adapter.lora.alpha") == 6.0
    assert {len(found[f"blk.0.attn_{part}.weight.lora_a"]) for part in "qv"} == {2, 5}


def test_an_alpha_of_zero_is_no_scale_of_one(bases, tmp_path):
    made = trained("llama", LoRA(r=2, alpha=0), "qv", base=str(bases / "llama"))
    path = export(made, "gguf", tmp_path / "a.gguf").path
    assert not any(array.any() for name, array in tensors_of(path).items() if name.endswith("lora_b"))


@pytest.mark.parametrize("targets", ["embed_tokens", "lm_head"])
def test_a_tied_matrix_is_refused_for_gguf_and_mlx(targets, bases, tmp_path):
    made = trained("llama", LoRA(r=2), targets, base=str(bases / "llama"))
    for to in ("gguf", "mlx"):
        with pytest.raises(LoricaError, match="tie"):
            export(made, to, tmp_path / "out")


def test_an_unknown_architecture_and_an_unnamed_base_are_refused_for_gguf(tmp_path):
    from tiny import bert

    bert().config.save_pretrained(tmp_path / "bert")
    with pytest.raises(LoricaError, match="'bert' is not known here; known: llama, mistral"):
        export(adapter("linear", base=str(tmp_path / "bert")), "gguf", tmp_path / "a.gguf")
    with pytest.raises(LoricaError, match="name it with --base"):
        export(adapter("linear", base=""), "gguf", tmp_path / "a.gguf")


def foreign(path, bases, name="llama"):
    """A GGUF adapter without our own key, as llama.cpp's converter writes it."""
    made = adapter("linear", base=str(bases / name))
    ours = export(made, "gguf", path.parent / "ours.gguf").path
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for key, array in tensors_of(ours).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def test_a_gguf_of_another_program_needs_its_base_and_is_then_the_same(bases, tmp_path):
    made = foreign(tmp_path / "theirs.gguf", bases)
    with pytest.raises(LoricaError, match=r"lorica convert .*theirs.gguf --to peft --base MODEL"):
        Adapter.load(tmp_path / "theirs.gguf")
    back = open_adapter(tmp_path / "theirs.gguf", base=str(bases / "llama"))
    assert back.meta["base_model"] == str(bases / "llama")
    assert back.sha256 == made.sha256
    with pytest.raises(LoricaError, match="is an adapter for 'llama', the base is 'phi3'"):
        open_adapter(tmp_path / "theirs.gguf", base=str(bases / "phi3"))


def test_an_mlx_folder_has_the_names_shapes_and_settings_of_mlx_lm(bases, tmp_path):
    made = adapter("embedding", base=str(bases / "untied"))
    folder = export(made, "mlx", tmp_path / "a").path
    found = load_file(folder / "adapters.safetensors")
    assert {file.name for file in folder.iterdir()} == {"adapters.safetensors", "adapter_config.json"}
    layers = ["model.embed_tokens", "lm_head", *(f"model.layers.{block}.self_attn.q_proj" for block in (0, 1))]
    assert found.keys() == {f"{layer}.lora_{end}" for layer in layers for end in "ab"}
    assert found["model.embed_tokens.lora_a"].shape == (64, 4)
    assert found["model.embed_tokens.lora_b"].shape == (4, 32)
    assert found["lm_head.lora_a"].shape == (32, 4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    keys = ["lm_head", "model.embed_tokens", "self_attn.q_proj"]
    assert config["lora_parameters"] == {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}
    q = "model.layers.1.self_attn.q_proj"
    delta = 2.0 * found[f"{q}.lora_a"].double() @ found[f"{q}.lora_b"].double()
    assert torch.equal(delta.T, deltas(made)[q])


def test_mlx_has_one_rank_and_one_scale(bases, tmp_path):
    made = adapter("ranks", base=str(bases / "llama"))
    folder = export(made, "mlx", tmp_path / "a").path
    found = load_file(folder / "adapters.safetensors")
    assert {tensor.shape[1] for key, tensor in found.items() if key.endswith("lora_a")} == {5}
    assert json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 1.0


def test_an_mlx_folder_with_strange_tensors_or_settings_is_refused(bases, tmp_path):
    folder = export(adapter("linear", base=str(bases / "llama")), "mlx", tmp_path / "a").path
    found = load_file(folder / "adapters.safetensors")
    del found["model.layers.0.mlp.up_proj.lora_b"]
    found["model.layers.0.mlp.gate_proj.m"] = torch.zeros(48)
    found["model.layers.0.mlp.down_proj.lora_a"] = torch.zeros(48, 3)
    save_file(found, folder / "adapters.safetensors")
    wanted = (
        "missing     model.layers.0.mlp.up_proj.lora_b",
        "unexpected  ",
        "shape       model.layers.0.mlp.down",
    )
    assert not unsaid(folder, *wanted)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"fine_tune_type": "full"}))
    with pytest.raises(LoricaError, match="fine_tune_type is 'full'"):
        Adapter.load(folder)


@pytest.mark.parametrize("method", [LoRA(r=4, alpha=8, dora=True), LoRA(r=2, dora=True, ranks={"q_proj": 4})])
def test_mlx_keeps_the_magnitudes_of_dora_and_gives_what_we_give(method, bases, tmp_path):
    made = trained("llama", method, "q_proj, down_proj", base=str(bases / "llama"))
    folder = export(made, "mlx", tmp_path / "a").path
    found = load_file(folder / "adapters.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "dora"
    scale, model = config["lora_parameters"]["scale"], MAKE["llama"]()
    layer, q = model.get_submodule("model.layers.0.self_attn.q_proj"), "model.layers.0.self_attn.q_proj"
    a, b, m = (found[f"{q}.{part}"] for part in ("lora_a", "lora_b", "m"))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    # As mlx-lm's DoRALinear computes it, from its own file.
    theirs = m / torch.linalg.norm(layer.weight + scale * b.T @ a.T, dim=1) * (layer(x) + scale * (x @ a) @ b)
    Adapter.load(folder).apply(model)
    assert close(layer(x), theirs)
    ours = MAKE["llama"]()
    made.apply(ours)
    assert close(ours.get_submodule(q)(x), theirs)


def test_mlx_refuses_magnitudes_that_mean_something_else_there(bases, tmp_path):
    made = trained("untied", LoRA(r=2, dora=True), "embed_tokens, q_proj", base=str(bases / "untied"))
    with pytest.raises(LoricaError, match="embed_tokens: mlx-lm keeps a magnitude for each token"):
        export(made, "mlx", tmp_path / "a")
    made = trained("llama", LoRA(r=2, dora=True), "q_proj", base=str(bases / "llama"))
    folder = export(made, "mlx", tmp_path / "b").path
    found = load_file(folder / "adapters.safetensors")
    found["model.layers.0.self_attn.q_proj.m"] = torch.ones(7)
    del found["model.layers.1.self_attn.q_proj.m"]
    found |= {f"model.embed_tokens.{part}": torch.ones(2, 2) for part in ("lora_a", "lora_b")}
    save_file(found | {"model.embed_tokens.m": torch.ones(2)}, folder / "adapters.safetensors")
    wanted = (
        "shape       model.layers.0.self_attn.q_proj.m: (7,) for 32 outputs",
        "missing     model.layers.1.self_attn.q_proj.m",
        "unexpected  model.embed_tokens.m: mlx-lm keeps a magnitude for each token",
    )
    assert not unsaid(folder, *wanted)


def test_vllm_finds_one_rank_one_alpha_and_no_pattern(tmp_path):
    for case, r, alpha in (("linear", 4, 8), ("ranks", 5, 5), ("alphas", 2, 2), ("slices", 4, 6)):
        made = adapter(case)
        folder = export(made, "vllm", tmp_path / case).path
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (r, alpha)
        assert isinstance(config["target_modules"], list)
        assert config["bias"] == "none"
        assert not {"rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"} & config.keys()
        found = load_file(folder / "adapter_model.safetensors")
        assert all(key.startswith("base_model.model.") for key in found)
        assert {tensor.shape[0] for key, tensor in found.items() if "lora_A" in key} == {r}
        for path, delta in deltas(made).items():
            A, B = (found[f"base_model.model.{path}.lora_{factor}.weight"].double() for factor in "AB")
            assert close(alpha / r * (B @ A), delta, 1e-6), path


def test_a_rank_above_what_vllm_allocates_is_refused(tmp_path):
    made = adapter("linear")
    key = "model.layers.0.self_attn.q_proj#lora."
    tensors = dict(made.tensors) | {f"{key}A": torch.ones(513, 32), f"{key}B": torch.ones(32, 513)}
    wide = Adapter(LoRA(r=4, ranks={r"layers\.0\.self_attn\.q_proj": 513}), made.targets, tensors, made.meta)
    with pytest.raises(LoricaError, match="its rank is 513, and vLLM takes at most 512"):
        export(wide, "vllm", tmp_path / "a")


def test_every_engine_gets_the_line_that_starts_it(bases, tmp_path):
    base = str(bases / "llama")
    made = adapter("linear", base=base)
    lines = {to: export(made, to, tmp_path / to, name="mine").next for to in ("vllm", "sglang", "ray", "ollama")}
    line = f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules mine={tmp_path}/vllm"
    assert lines["vllm"] == line
    assert lines["sglang"].startswith(f"python -m sglang.launch_server --model-path {base} --enable-lora")
    assert lines["sglang"].endswith(f"--lora-paths mine={tmp_path}/sglang")
    assert lines["ollama"] == f"ollama create mine -f {tmp_path}/ollama/Modelfile"
    assert "serve run" in lines["ray"]


def test_ray_and_ollama_get_the_file_they_start_from(bases, tmp_path):
    made = adapter("linear", base=str(bases / "llama"))
    meta = dict(made.meta) | {"stop_tokens": json.dumps(["<|im_end|>"])}
    made = Adapter(made.method, made.targets, made.tensors, meta)
    ray = export(made, "ray", tmp_path / "ray", name="mine").path
    text = (ray / "serve.yaml").read_text()
    assert "enable_lora: true" in text and "max_lora_rank: 8" in text and str(bases / "llama") in text
    assert recognise(ray / "mine") == "peft"
    ollama = export(made, "ollama", tmp_path / "ollama", name="mine").path
    lines = (ollama / "Modelfile").read_text().splitlines()
    assert f"FROM {bases / 'llama'}" in lines
    assert "ADAPTER ./mine.gguf" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert recognise(ollama) == "gguf"


def test_what_lies_there_is_told_by_its_files_and_headers(bases, tmp_path):
    made = adapter("linear", base=str(bases / "llama"))
    for to, kind in (("peft", "peft"), ("vllm", "peft"), ("mlx", "mlx"), ("gguf", "gguf"), ("loralib", "loralib")):
        done = export(made, to, tmp_path / to)
        assert recognise(done.path) == kind
        assert Adapter.load(done.path).sha256 == made.sha256
        assert done.path.parent == tmp_path
    assert recognise(tmp_path / "nothing") is None
    from model_files import save, write_gguf

    assert recognise(write_gguf(tmp_path / "model.gguf")) is None
    assert recognise(save(tmp_path / "model")) is None
    (tmp_path / "text.safetensors").write_text("no such file")
    for look in (recognise, Adapter.load):
        with pytest.raises(LoricaError, match="damaged or not a safetensors file"):
            look(tmp_path / "text.safetensors")


def test_every_shape_of_adapter_has_a_case_of_its_own():
    assert {CASES[case][0] for case in CASES} == set(MAKE)


def test_a_damaged_gguf_and_one_whose_factors_do_not_fit_are_errors(bases, tmp_path):
    made = adapter("linear", base=str(bases / "llama"))
    path = export(made, "gguf", tmp_path / "a.gguf").path
    blob = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(LoricaError, match="cut.gguf is not a readable GGUF file"):
        Adapter.load(tmp_path / "cut.gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for name, shape in (
        ("blk.0.attn_v.weight.lora_a", (2, 32)),
        ("blk.0.attn_v.weight.lora_b", (16, 3)),
        ("blk.0.attn_k.weight.lora_a", (2, 32)),
        ("blk.7.attn_k.weight.lora_a", (2, 32)),
        ("blk.0.attn_norm.weight", (1, 32)),
    ):
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoricaError) as raised:
        open_adapter(tmp_path / "odd.gguf", base=str(bases / "llama"))
    for said in (
        "shape       blk.0.attn_v.weight",
        "missing     blk.0.attn_k.weight.lora_b",
        "unexpected  blk.7.attn_k.weight: the base has no such layer",
        "unexpected  blk.0.attn_norm.weight",
    ):
        assert said in str(raised.value), said


def test_a_file_gets_the_ending_by_which_it_is_told(bases, tmp_path):
    made = adapter("linear", base=str(bases / "llama"))
    assert export(made, "gguf", tmp_path / "v1.2").path == tmp_path / "v1.2.gguf"
    assert export(made, "loralib", tmp_path / "a.pt").path == tmp_path / "a.pt.safetensors"


def test_an_update_that_is_still_zero_is_told(bases, tmp_path):
    made = adapter("linear", base=str(bases / "llama"))
    zero = {key: tensor * (key != "model.layers.0.mlp.up_proj#lora.B") for key, tensor in made.tensors.items()}
    done = export(Adapter(made.method, made.targets, zero, made.meta), "vllm", tmp_path / "a")
    assert done.notes == ["1 of 14 change nothing (they are zero): model.layers.0.mlp.up_proj ..."]
