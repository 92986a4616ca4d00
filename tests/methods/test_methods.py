"""Every method of the registry on every family: the laws, its line, what it selects, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import typing

import peft
import pytest
import torch
import transformers

import laws
import lorica
from lorica import Adapter, LoRA, TrainSettings
from lorica.errors import LoricaError
from lorica.formats import recognise
from lorica.methods import METHODS, of
from lorica.methods.selections import BitFit, Full, Top
from lorica.train.recipe import method_of, settings_of
from lorica.train.settings import default_lr
from tiny import MODELS, VOCAB, _make, bert, gpt2, llama, logits, stir

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def roberta():
    config = transformers.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=40, **SMALL)
    return _make(transformers.RobertaForMaskedLM, config)


def deberta():
    config = transformers.DebertaV2Config(
        vocab_size=VOCAB, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, **SMALL
    )
    return _make(transformers.DebertaV2ForMaskedLM, config)


FAMILIES = MODELS | {"roberta": roberta, "deberta": deberta}
# Settings of a training under which each method can be put on any of them.
GIVEN = {"bitfit": {"add_biases": True}}


def made(name):
    return method_of(TrainSettings(method=name, **GIVEN.get(name, {})))


CASES = [
    (family, name)
    for family in FAMILIES
    for name in METHODS
    if (name != "lora" or family in ("roberta", "deberta")) and not (family == "t5" and "prefix" in name)
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_method_keeps_the_laws_on_every_family(family, name, tmp_path):
    make, method = FAMILIES[family], made(name)
    if METHODS[name].neutral:
        laws.step_zero_is_the_base(make, method, "all-linear")
    laws.inject_and_eject_are_inverse(make, method, "all-linear")
    laws.merge_and_unmerge_are_inverse(make, method, "all-linear")
    laws.adapters_do_not_touch_each_other(make, method, "all-linear")
    laws.a_copy_is_independent(make, method, "all-linear")
    laws.only_the_adapter_learns(make, method, "all-linear")
    laws.save_and_load_are_inverse(make, method, "all-linear", tmp_path / "adapter")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_laws_on_a_bf16_base(name):
    def make():
        return gpt2().to(torch.bfloat16)

    if METHODS[name].neutral:
        laws.step_zero_is_the_base(make, made(name), "all-linear")
    laws.inject_and_eject_are_inverse(make, made(name), "all-linear")
    laws.merge_and_unmerge_are_inverse(make, made(name), "all-linear")


@pytest.mark.parametrize("name", METHODS)
def test_a_line_says_what_the_method_is(name):
    line, method = METHODS[name], made(name)
    assert of(method) is line
    assert isinstance(method, line.kind)
    assert method.takes_targets == ("targets" in line.reads)
    assert name in typing.get_args(typing.get_type_hints(TrainSettings)["method"])
    if name != "lora":
        assert {field.name for field in dataclasses.fields(line.kind)} == set(line.reads) - {"targets"}
    again = method_of(TrainSettings(**settings_of(method)))
    assert again == method


def test_the_settings_know_no_other_method():
    assert set(typing.get_args(typing.get_type_hints(TrainSettings)["method"])) == set(METHODS)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "lora"])
def test_peft_refuses_what_it_has_no_type_for(name, tmp_path):
    model = gpt2()
    lorica.inject(model, made(name))
    stir(model)
    Adapter.of(model).save(tmp_path / "a")
    assert recognise(tmp_path / "a") == "own"
    with pytest.raises(Exception, match="LORICA_"):
        peft.PeftModel.from_pretrained(gpt2(), tmp_path / "a")


def test_a_method_that_reads_no_targets_refuses_them():
    with pytest.raises(LoricaError, match="top2 finds its places itself"):
        lorica.inject(llama(), Top(), "q_proj")
    assert lorica.adapters(llama()) == []


def test_settings_that_the_method_does_not_read_are_faults():
    faults = TrainSettings(method="full", rank=4, targets="qv", add_biases=True).check()
    assert len(faults) == 3
    assert "rank is 4, which method full does not read" in faults[0]
    assert "one of lora" in TrainSettings(method="lore").check()[0]  # type: ignore[arg-type]


def test_the_rate_of_whole_weights_is_a_tenth_of_loras():
    assert default_lr(576, "full") == pytest.approx(default_lr(576) / 10, rel=0.05)
    assert default_lr(576, "lora") == default_lr(576)


def test_full_trains_everything_and_top2_the_last_blocks():
    model = llama(layers=3)
    lorica.inject(model, Full())
    assert lorica.count(model).trainable == lorica.count(model).total
    lorica.eject(model)
    lorica.inject(model, Top())
    own = set(lorica.trainable(model))
    assert own == {
        name for name, _ in llama(layers=3).named_parameters() if ".layers.1." in name or ".layers.2." in name
    }
    lorica.eject(model)
    with pytest.raises(LoricaError, match="last 4 blocks are asked for, but this model has 3"):
        lorica.inject(model, Top(4))


def test_top2_of_an_encoder_and_a_decoder_is_the_decoders():
    model = MODELS["t5"]()
    lorica.inject(model, Top(1))
    assert all(name.startswith("decoder.block.1.") for name in lorica.trainable(model))


def test_bitfit_trains_every_bias_and_refuses_a_model_without():
    model = bert()
    lorica.inject(model, BitFit())
    assert all(name.endswith("bias") for name in lorica.trainable(model))
    lorica.eject(model)
    with pytest.raises(LoricaError, match="--add-biases"):
        lorica.inject(llama(), BitFit())


def test_added_biases_are_at_every_linear_layer_but_the_head():
    model = llama()
    assert len(lorica.inject(model, BitFit(add_biases=True))) == 14
    assert "lm_head#bias.b" not in lorica.trainable(model)


def test_a_damaged_folder_is_refused_with_every_fault(tmp_path):
    model = gpt2()
    lorica.inject(model, Top(1))
    Adapter.of(model).save(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    told = json.loads(config.read_text())
    told |= {"peft_type": "LORICA_FULL", "surprise": 1, "settings": {"block": 2}}
    config.write_text(json.dumps(told))
    with pytest.raises(LoricaError) as refused:
        Adapter.load(tmp_path / "a")
    for part in ("surprise=1", "peft_type is 'LORICA_FULL'", "block=2", "the setting blocks"):
        assert part in str(refused.value)
    config.write_text(json.dumps(told | {"peft_type": "LORICA_TOP2", "settings": {"blocks": "two"}}))
    with pytest.raises(LoricaError, match="blocks='two'"):
        Adapter.load(tmp_path / "a")
    config.write_text(json.dumps(told | {"method": "top3"}))
    with pytest.raises(LoricaError, match="there is no method 'top3'"):
        Adapter.load(tmp_path / "a")


def test_an_adapter_of_another_shape_is_refused_with_every_tensor(tmp_path):
    model = llama(layers=3)
    lorica.inject(model, Top(1))
    Adapter.of(model).save(tmp_path / "a")
    with pytest.raises(LoricaError) as refused:
        Adapter.load(tmp_path / "a").apply(llama(layers=2))
    assert "extra    model.layers.2.mlp.up_proj.weight" in str(refused.value)
    assert "missing  model.layers.1.mlp.up_proj.weight" in str(refused.value)


def test_lora_at_full_rank_with_biases_reaches_any_weights():
    """Section 4.1: as r grows to the rank of W, on every matrix and with the biases, LoRA becomes full fine-tuning."""
    torch.manual_seed(0)
    tuned, model = gpt2(), gpt2()
    lorica.inject(model, LoRA(r=32, alpha=32, bias="all"), "all-linear")
    for name, parameter in lorica.trainable(model).items():
        if "#" not in name:
            moved = tuned.get_parameter(name)
            moved.data += 0.1 * torch.randn_like(moved)
            parameter.data.copy_(moved)
    for (path, _), patch in lorica.patch.installed(model).patches.items():
        change = 0.1 * torch.randn_like(tuned.get_submodule(path).weight)
        tuned.get_submodule(path).weight.data += change
        # Conv1D keeps W [in, out]; B A is [out, in], and the smaller side of each is 32, which is the rank.
        left, sizes, right = torch.linalg.svd(change.T, full_matrices=False)
        patch.B.data, patch.A.data = left * sizes, right
    assert not laws.close(logits(tuned), logits(gpt2()), 0.1)
    assert laws.close(logits(model), logits(tuned))


@pytest.mark.parametrize("settings", [{"alpha": 16, "dropout": 0}, {"init": "pissa"}], ids=["whole numbers", "pissa"])
@pytest.mark.parametrize("name", ["lora+prefix-embedding", "lora+prefix-layer"])
def test_lora_beside_prefixes_is_read_again_as_it_was_set(name, settings, tmp_path):
    model = llama()
    lorica.inject(model, method_of(TrainSettings(method=name, rank=4, **settings)), "q_proj")
    stir(model, size=0.05)
    Adapter.of(model).save(tmp_path / "a")
    fresh = llama()
    Adapter.load(tmp_path / "a").apply(fresh)
    assert torch.allclose(logits(fresh), logits(model), atol=1e-5)


def test_places_are_those_of_the_base_whatever_is_on_it():
    from lorica.methods.places import inside, stacks

    plain, adapted = bert(), bert()
    lorica.inject(adapted, made("adapter-l"))
    assert inside(adapted, stacks(adapted)[-1]) == inside(plain, stacks(plain)[-1])
