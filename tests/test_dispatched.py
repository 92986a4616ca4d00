"""Models that accelerate spreads over devices or offloads: its hooks stay outside, the patch runs inside."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

import lorica
from laws import close
from lorica import Adapter, LoRA, LoricaError
from tiny import MODELS, inputs, llama, stir


def spread(model: nn.Module, folder) -> nn.Module:
    """All of it where it runs, each module under a hook."""
    places = {name: "cpu" for name, _ in model.named_children()}
    return dispatch_model(model, places, main_device="cpu", force_hooks=True)


def to_cpu(model: nn.Module, folder) -> nn.Module:
    return cpu_offload(model, "cpu")


def to_disk(model: nn.Module, folder) -> nn.Module:
    return disk_offload(model, folder, "cpu")


def half_on_disk(model: nn.Module, folder) -> nn.Module:
    """As `device_map="auto"` leaves a model that is larger than its devices."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {"spread": spread, "cpu": to_cpu, "disk": to_disk, "half": half_on_disk}
AWAY = {name: way for name, way in WAYS.items() if name != "spread"}


@pytest.fixture(params=WAYS)
def way(request, tmp_path):
    return lambda model: WAYS[request.param](model, tmp_path / "offload")


def logits(model: nn.Module) -> Tensor:
    """As `tiny.logits`, for a model whose parameters do not say where its inputs go."""
    with torch.no_grad():
        return model(input_ids=inputs(llama())["input_ids"]).logits


def tuned(model: nn.Module, **settings) -> nn.Module:
    torch.manual_seed(0)
    lorica.inject(model, LoRA(r=4, **settings), "all-linear")
    stir(model)
    return model


def test_a_dispatched_model_with_an_adapter_gives_what_the_plain_one_gives(way):
    plain = tuned(llama(tied=False))
    base = logits(llama(tied=False))
    there = way(llama(tied=False))
    lorica.inject(there, LoRA(r=4))
    assert torch.equal(logits(there), base)
    lorica.eject(there)
    assert torch.equal(logits(tuned(there)), logits(plain))
    with lorica.disabled(there):
        assert torch.equal(logits(there), base)


def test_patches_live_where_their_layer_computes_and_learn_there(way):
    plain, there = tuned(llama(tied=False)).train(), tuned(way(llama(tied=False))).train()
    assert {parameter.device.type for parameter in lorica.trainable(there).values()} == {"cpu"}
    for model in (plain, there):
        model(**inputs(plain)).logits.pow(2).mean().backward()
    ours, theirs = lorica.trainable(there), lorica.trainable(plain)
    assert all(torch.equal(ours[key].grad, theirs[key].grad) for key in theirs)
    own = {id(parameter) for parameter in ours.values()}
    assert all(parameter.grad is None for parameter in there.parameters() if id(parameter) not in own)


def test_eject_leaves_a_dispatched_model_as_it_was(way):
    model = way(llama(tied=False))
    before = logits(model)
    seen = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    lorica.eject(tuned(model))
    for name, module in model.named_modules():
        kind, held = seen[name]
        assert type(module) is kind
        for key in ("forward", "_old_forward", "_hf_hook"):
            assert vars(module).get(key) == held.get(key), (name, key)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("first", ["hooks", "adapter"])
def test_hooks_and_adapter_come_off_in_either_order(way, first):
    model = tuned(way(llama(tied=False)))
    outputs, base = logits(model), logits(llama(tied=False))
    if first == "adapter":
        lorica.eject(model)
        remove_hook_from_submodules(model)
    else:
        remove_hook_from_submodules(model)
        assert torch.equal(logits(model), outputs)
        lorica.eject(model)
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(tuned(model)), outputs)
    lorica.merge(model)
    assert close(logits(model), outputs)


def test_an_adapter_is_saved_from_and_put_on_a_dispatched_model(way, tmp_path):
    model = tuned(way(llama(tied=False)))
    Adapter.of(model).save(tmp_path / "a")
    plain = llama(tied=False)
    assert lorica.fingerprint(model) == lorica.fingerprint(plain)
    Adapter.load(tmp_path / "a").apply(plain)
    assert torch.equal(logits(plain), logits(model))


def test_what_is_spread_can_be_merged(tmp_path):
    model = tuned(spread(llama(tied=False), tmp_path))
    outputs = logits(model)
    lorica.merge(model)
    assert close(logits(model), outputs)
    lorica.unmerge(model)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("name", AWAY)
def test_merging_offloaded_layers_is_refused_with_what_to_do(name, tmp_path):
    model = tuned(AWAY[name](llama(tied=False), tmp_path))
    outputs = logits(model)
    with pytest.raises(LoricaError, match=r"are offloaded .*save the adapter, load the model on one device"):
        lorica.merge(model)
    assert torch.equal(logits(model), outputs)


def test_token_rows_of_an_offloaded_embedding_are_trained_like_any(way):
    model, plain = way(llama()), llama()
    for each in (model, plain):
        tuned(each, token_rows=(3, 9))
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"modules_to_save": ("mlp",)}])
def test_training_offloaded_parameters_themselves_is_refused(settings, tmp_path):
    model = to_cpu(llama(tied=False, bias=True), tmp_path)
    with pytest.raises(LoricaError, match="offloaded"):
        lorica.inject(model, LoRA(r=4, **settings), "q_proj")
    assert lorica.adapters(model) == []


def test_a_block_that_is_offloaded_as_a_whole_is_refused(tmp_path):
    model = cpu_offload(llama(tied=False), "cpu")
    model.model.layers[0]._hf_hook = copy.copy(model.model.layers[0].self_attn.q_proj._hf_hook)
    model.model.layers[0]._hf_hook.place_submodules = True
    with pytest.raises(LoricaError, match=r"accelerate offloads model.layers.0 as a whole"):
        lorica.inject(model, LoRA())


def test_a_forward_that_hides_accelerates_is_refused(tmp_path):
    model = spread(llama(tied=False), tmp_path)
    model.model.layers[0].self_attn.q_proj._old_forward = lambda x: x
    with pytest.raises(LoricaError, match="replaced on the instance"):
        lorica.inject(model, LoRA(), "q_proj")


def test_a_copy_of_a_dispatched_model_is_independent(tmp_path):
    model = tuned(spread(llama(tied=False), tmp_path))
    twin, outputs = copy.deepcopy(model), logits(model)
    stir(twin, seed=5)
    assert not torch.equal(logits(twin), outputs)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_tied_and_fused_families_work_offloaded(kind, tmp_path):
    model, plain = to_cpu(MODELS[kind](), tmp_path), MODELS[kind]()
    for each in (model, plain):
        torch.manual_seed(0)
        lorica.inject(each, LoRA(r=4), "paper")
        stir(each)
    assert torch.equal(logits(model), logits(plain))
    assert lorica.fingerprint(model) == lorica.fingerprint(plain)
