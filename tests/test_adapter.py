"""An adapter's file is strict, whole, and understood by PEFT and from PEFT."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorica
from laws import close
from lorica import Adapter, LoRA, LoricaError
from tiny import gpt2, inputs, llama, logits, stir


def trained(make, method, targets):
    model = make()
    lorica.inject(model, method, targets)
    stir(model)
    return model


def edit(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_an_adapter_is_a_snapshot():
    model = trained(llama, LoRA(r=2), "qv")
    adapter = Adapter.of(model)
    before = adapter.sha256
    stir(model, seed=3)
    assert adapter.sha256 == before
    assert Adapter.of(model).sha256 != before
    with pytest.raises(TypeError):
        adapter.tensors["x"] = torch.zeros(1)


def test_the_config_says_what_is_not_default_and_no_more(tmp_path):
    Adapter.of(trained(llama, LoRA(r=2), "qv")).save(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }


def test_metadata_travels_with_the_adapter(tmp_path):
    model = trained(llama, LoRA(r=2), "qv")
    Adapter.of(model, meta={"chat_template": "{{ x }}", "stop_tokens": '["</s>"]'}).save(tmp_path / "a")
    meta = Adapter.load(tmp_path / "a").meta
    assert meta["chat_template"] == "{{ x }}"
    assert meta["stop_tokens"] == '["</s>"]'
    assert meta["base_fingerprint"] == lorica.fingerprint(model)


def test_bf16_halves_the_file_and_rounds_once(tmp_path):
    adapter = Adapter.of(trained(llama, LoRA(r=8), "all-linear"))
    adapter.save(tmp_path / "full")
    adapter.save(tmp_path / "half", dtype="bf16")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    for key, tensor in Adapter.load(tmp_path / "half").tensors.items():
        assert torch.equal(tensor, adapter.tensors[key].to(torch.bfloat16).float())


def test_saving_leaves_other_files_in_the_folder_alone(tmp_path):
    adapter = Adapter.of(trained(llama, LoRA(r=2), "qv"))
    adapter.save(tmp_path / "a")
    (tmp_path / "a/README.md").write_text("card")
    adapter.save(tmp_path / "a")
    assert (tmp_path / "a/README.md").read_text() == "card"
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_an_update_that_is_still_zero_is_told_when_saved(tmp_path):
    model = llama()
    lorica.inject(model, LoRA(r=2), "qv")
    with pytest.warns(UserWarning, match="4 of 4 patches change nothing yet"):
        Adapter.of(model).save(tmp_path / "a")


def test_every_fault_of_a_file_is_in_one_error(tmp_path):
    Adapter.of(trained(llama, LoRA(r=2), "qv")).save(tmp_path / "a")
    prefix = "base_model.model.model.layers"

    def change(tensors):
        del tensors[f"{prefix}.0.self_attn.q_proj.lora_B.weight"]
        tensors["something.else"] = torch.zeros(1)
        tensors[f"{prefix}.0.self_attn.v_proj.lora_A.weight"] = torch.zeros(3, 32)

    edit(tmp_path / "a", change)
    with pytest.raises(LoricaError) as raised:
        Adapter.load(tmp_path / "a")
    for word in ("missing", "q_proj: its lora_B", "unexpected", "something.else", "shape", "v_proj"):
        assert word in str(raised.value)


def test_every_misfit_with_a_model_is_in_one_error(tmp_path):
    adapter = Adapter.of(trained(lambda: llama(layers=3), LoRA(r=2), "qv"))
    model = llama(layers=2)
    with pytest.raises(LoricaError, match="extra +model.layers.2.self_attn.q_proj"):
        adapter.apply(model)
    assert lorica.adapters(model) == []
    with pytest.raises(LoricaError) as raised:
        Adapter.of(trained(lambda: llama(layers=1), LoRA(r=2), "qv")).apply(model)
    assert "missing  model.layers.1.self_attn.q_proj" in str(raised.value)
    with pytest.raises(LoricaError, match="not a layer of this model"):
        adapter.apply(gpt2())


def test_a_mis_shaped_tensor_names_both_shapes(tmp_path):
    adapter = Adapter.of(trained(llama, LoRA(r=2), "up_proj"))
    wide = llama()
    wide.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 50, bias=False)
    with pytest.raises(LoricaError, match=r"up_proj#lora.B: file \(48, 2\), model \(50, 2\)"):
        adapter.apply(wide)


def test_pickles_and_damaged_files_are_refused(tmp_path):
    Adapter.of(trained(llama, LoRA(r=2), "qv")).save(tmp_path / "a")
    blob = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    (tmp_path / "a/adapter_model.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(LoricaError, match="damaged"):
        Adapter.load(tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").rename(tmp_path / "a/adapter_model.bin")
    with pytest.raises(LoricaError, match=r"pickle \(adapter_model.bin\).*refused"):
        Adapter.load(tmp_path / "a")
    with pytest.raises(LoricaError, match="no adapter_config.json"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 1]]),
    ],
)
def test_a_setting_that_changes_the_meaning_is_refused_by_name(tmp_path, key, value):
    Adapter.of(trained(llama, LoRA(r=2), "qv")).save(tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(LoricaError, match=key):
        Adapter.load(tmp_path / "a")


def test_unknown_settings_that_are_off_are_passed_over(tmp_path):
    Adapter.of(trained(llama, LoRA(r=2), "qv")).save(tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_something_new": False, "other": None}))
    assert len(Adapter.load(tmp_path / "a").targets) == 4


INTEROP = {
    "linear": (llama, LoRA(r=4, alpha=8), "all-linear"),
    "conv1d": (gpt2, LoRA(r=4), "c_attn, c_fc"),
    "embedding": (lambda: llama(tied=False), LoRA(r=4), "embed_tokens, q_proj"),
    "fused slices": (gpt2, LoRA(r=2, alpha=3), "paper"),
    "fused slices, rslora, beside a whole layer": (gpt2, LoRA(r=2, scaling="alpha/sqrt(r)"), "c_attn[q,v], c_fc"),
    "patterns": (llama, LoRA(r=2, ranks={"q_proj": 5}, alphas={r"layers\.1\.self_attn\.k_proj": 3}), "attention"),
    "patterns of which the first that fits counts": (
        llama,
        LoRA(r=2, ranks={"q_proj": 5, r"layers\.1\..*": 3}, alphas={"v_proj": 7, r"layers\.0\..*": 3}),
        "qv",
    ),
    "fused slices, a rank by name": (gpt2, LoRA(r=2, ranks={"c_attn": 4}), "c_attn[q,v], c_fc"),
    "fused slices, ranks by path": (
        gpt2,
        LoRA(r=2, ranks={"transformer.h.0.attn.c_attn": 4}, alphas={"transformer.h.0.attn.c_attn": 5}),
        "c_attn[q,v]",
    ),
    "fused slices, rslora, ranks by pattern": (
        gpt2,
        LoRA(r=2, scaling="alpha/sqrt(r)", ranks={r"h\.0\..*": 3}),
        "c_attn[q,v], c_fc",
    ),
    "biases": (lambda: llama(bias=True), LoRA(r=2, bias="all"), "q_proj"),
    "biases of the patched": (lambda: llama(bias=True), LoRA(r=2, bias="lora_only"), "q_proj"),
    "whole modules": (llama, LoRA(r=2, modules_to_save=("norm",)), "q_proj"),
    "rows": (llama, LoRA(r=2, token_rows=(7, 3)), "q_proj"),
    "rows, untied": (lambda: llama(tied=False), LoRA(r=2, token_rows=(3, 7)), "q_proj"),
}


@pytest.mark.parametrize("name", INTEROP)
def test_peft_reads_what_we_write_and_we_read_what_it_writes_back(name, tmp_path):
    peft = pytest.importorskip("peft")
    make, method, targets = INTEROP[name]
    model = trained(make, method, targets)
    ours = logits(model)
    adapter = Adapter.of(model)
    adapter.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
        with torch.no_grad():
            said = theirs(**inputs(model)).logits
        theirs.save_pretrained(str(tmp_path / "theirs"))
    # Our output rows are trained by their difference, added in another order; PEFT multiplies slices as one update.
    regrouped = "rows" in name or "slices" in name
    assert torch.equal(said, ours) or (regrouped and close(said, ours))
    back = Adapter.load(tmp_path / "theirs")
    fresh = make()
    back.apply(fresh)
    assert torch.equal(logits(fresh), ours) or (adapter.targets[0].rows and close(logits(fresh), ours))


@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding", "patterns"])
def test_an_adapter_made_by_peft_has_the_same_tensors_delta_and_logits(name, tmp_path):
    peft = pytest.importorskip("peft")
    make, method, _ = INTEROP[name]
    modules = {
        "linear": ["q_proj", "down_proj"],
        "conv1d": ["c_attn", "c_fc"],
        "embedding": ["embed_tokens"],
        "patterns": ["q_proj", "k_proj"],
    }[name]
    config = peft.LoraConfig(
        r=method.r,
        lora_alpha=int(method.alpha),
        target_modules=modules,
        rank_pattern=dict(method.ranks),
        alpha_pattern=dict(method.alphas),
        fan_in_fan_out=name == "conv1d",
        init_lora_weights="gaussian",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), config).eval()
        generator = torch.Generator().manual_seed(0)
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
        with torch.no_grad():
            said = theirs(**inputs(theirs)).logits
    model = make()
    adapter = Adapter.load(tmp_path / "theirs")
    adapter.apply(model)
    assert torch.equal(logits(model), said)
    raw = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert sorted(tensor.sum().item() for tensor in raw.values()) == sorted(
        tensor.sum().item() for tensor in adapter.tensors.values()
    )
    for target in adapter.targets:
        patch = model.get_submodule(target.path).lorica.default.lora
        delta = theirs.base_model.model.get_submodule(target.path).get_delta_weight("default")
        assert torch.equal(patch.delta(), delta.T if target.storage != "linear" else delta)


def made_by_peft(make, folder, **settings):
    """A model with PEFT's adapter, every tensor of it moved, and the adapter in a folder."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, **settings)).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        theirs.save_pretrained(str(folder))
    return theirs


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": [9, 3, 7]},
        {"trainable_token_indices": {"embed_tokens": [7, 3]}},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"layers_to_transform": [1]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_a_setting_of_peft_means_it_means_here(settings, tmp_path):
    theirs = made_by_peft(llama, tmp_path, target_modules=["q_proj"], **settings)
    model = llama()
    Adapter.load(tmp_path).apply(model)
    with torch.no_grad():
        assert close(logits(model), theirs(**inputs(model)).logits)


def test_token_rows_that_do_not_fit_their_ids_are_refused(tmp_path):
    Adapter.of(trained(llama, LoRA(r=2, token_rows=(3, 7)), "qv")).save(tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    config = json.loads(path.read_text())
    for ids, why in (([3], "2 token rows, the config names 1"), ([3, 3], "a list of different token ids")):
        path.write_text(json.dumps(config | {"trainable_token_indices": {"embed_tokens": ids}}))
        with pytest.raises(LoricaError, match=why):
            Adapter.load(tmp_path / "a")
    both = {"embed_tokens": [3, 7], "lm_head": [3, 8]}
    path.write_text(json.dumps(config | {"trainable_token_indices": both}))
    with pytest.raises(LoricaError, match="other rows for one layer than for another"):
        Adapter.load(tmp_path / "a")


def test_a_rank_that_is_not_the_config_s_is_refused_since_the_scale_would_be_another(tmp_path):
    Adapter.of(trained(llama, LoRA(r=2), "qv")).save(tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"v_proj": 4}}))
    with pytest.raises(LoricaError, match="v_proj: its rank is 2, the config says 4"):
        Adapter.load(tmp_path / "a")


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_a_resized_vocabulary_brings_its_tables(tied, tmp_path):
    peft = pytest.importorskip("peft")

    def base(tokens=None):
        model = llama(tied=tied)
        if tokens:
            torch.manual_seed(tokens)
            model.resize_token_embeddings(tokens, mean_resizing=False)
        return model

    theirs = peft.get_peft_model(base(70), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=True)
    ids = {"input_ids": torch.tensor([[3, 66, 5, 69]])}
    wanted = theirs(**ids).logits
    adapter = Adapter.load(tmp_path / "theirs")
    with pytest.raises(
        LoricaError, match=r"resized to 70 tokens, .* has 64: model.resize_token_embeddings\(70\) first"
    ):
        adapter.apply(base())
    model = base()
    torch.manual_seed(5)
    model.resize_token_embeddings(70, mean_resizing=False)  # its new rows are others
    before = model(**ids).logits
    adapter.apply(model)
    assert torch.equal(model(**ids).logits, wanted)
    with lorica.disabled(model):
        assert torch.equal(model(**ids).logits, before)
    Adapter.of(model).save(tmp_path / "ours")
    again = base(70)
    Adapter.load(tmp_path / "ours").apply(again)
    assert torch.equal(again(**ids).logits, wanted)
    lorica.merge(model)
    assert close(model(**ids).logits, wanted)
    lorica.eject(model)
    assert torch.equal(model(**ids).logits, before)


def test_the_base_embedding_that_peft_adds_is_passed_over_if_it_is_the_base_s(tmp_path):
    Adapter.of(trained(lambda: llama(tied=False), LoRA(r=2), "embed_tokens")).save(tmp_path / "a")
    table = llama(tied=False).model.embed_tokens.weight.detach().clone()
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit(tmp_path / "a", lambda tensors: tensors.update({key: table}))
    assert Adapter.load(tmp_path / "a").apply(llama(tied=False)) == ["model.embed_tokens"]
    edit(tmp_path / "a", lambda tensors: tensors.update({key: table + 1}))
    with pytest.raises(LoricaError, match="extra +model.embed_tokens.weight"):
        Adapter.load(tmp_path / "a").apply(llama(tied=False))
