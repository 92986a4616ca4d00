"""A patched layer stays itself, and faults are told at the door."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import lorica
from laws import close
from lorica import LoRA, LoricaError
from tiny import MODELS, bert, gpt2, inputs, llama, logits, stir, t5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_a_patched_model_keeps_its_names_classes_and_ties(kind):
    model = MODELS[kind]()
    names = [name for name, _ in model.named_parameters()]
    classes = {name: (type(module).__name__, type(module).__module__) for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    lorica.inject(model, LoRA(r=2), "all-linear")
    assert [name for name, _ in model.named_parameters() if ".lorica." not in name] == names
    for name, seen in classes.items():
        module = model.get_submodule(name)
        assert (type(module).__name__, type(module).__module__) == seen
    assert head.weight is embedding.weight
    assert all(isinstance(layer, nn.Linear) for name, layer in model.named_modules() if name.endswith("q_proj"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_save_pretrained_writes_the_base_and_nothing_else(kind, tmp_path):
    model = MODELS[kind]()
    before = logits(model)
    lorica.inject(model, LoRA(r=2), "all-linear")
    stir(model)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert torch.equal(logits(again.eval()), before)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        *((kind, "all-linear") for kind in ("llama", "gpt2", "t5", "bert")),
        # T5 calls its encoder's and decoder's embeddings, and a resize puts others in their place.
        *((kind, "embedding") for kind in ("llama", "gpt2", "bert")),
    ],
)
def test_resizing_the_embeddings_of_a_patched_model_works(kind, targets):
    model = MODELS[kind]()
    if targets == "embedding":
        targets = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    lorica.inject(model, LoRA(r=2), targets)
    stir(model)
    before = logits(model)
    model.resize_token_embeddings(80, mean_resizing=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert close(logits(model)[..., :64], before)
    ids = torch.full((1, 3), 79)
    out = model(input_ids=ids, decoder_input_ids=ids) if kind == "t5" else model(input_ids=ids)
    assert out.logits.shape[-1] == 80
    lorica.merge(model)
    lorica.unmerge(model)
    lorica.eject(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_merged_model_saved_by_transformers_is_the_tuned_model(kind, tmp_path):
    model = MODELS[kind]()
    lorica.inject(model, LoRA(r=2, bias="none" if kind == "llama" else "all"), "all-linear")
    stir(model)
    tuned = logits(model)
    lorica.merge(model)
    model.save_pretrained(tmp_path)
    assert close(logits(type(model).from_pretrained(tmp_path).eval()), tuned)


def test_merging_one_side_of_a_tied_matrix_unties_it_and_says_so(tmp_path):
    for target in ("embed_tokens", "lm_head"):
        model = llama(tied=True)
        base = logits(model)
        lorica.inject(model, LoRA(r=2), target)
        stir(model)
        tuned = logits(model)
        report = lorica.merge(model)
        assert report.untied_bytes == 64 * 32 * 4
        assert model.config.tie_word_embeddings is False
        model.save_pretrained(tmp_path / target)
        again = type(model).from_pretrained(tmp_path / target).eval()
        assert again.config.tie_word_embeddings is False
        assert close(logits(again), tuned)
        lorica.unmerge(model)
        assert model.config.tie_word_embeddings is True
        lorica.eject(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(logits(model), base)


def test_merging_both_sides_of_a_tied_matrix_keeps_it_tied():
    model = llama(tied=True)
    lorica.inject(model, LoRA(r=2, tied=True), "embed_tokens")
    stir(model)
    report = lorica.merge(model)
    assert report.untied_bytes == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_update_of_a_tied_embedding_changes_the_input_side_only_unless_told():
    hidden = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for tied in (False, True):
        model = llama(tied=True)
        before = model.lm_head(hidden)
        lorica.inject(model, LoRA(r=2, tied=tied), "embed_tokens")
        stir(model)
        assert torch.equal(model.lm_head(hidden), before) is not tied


def test_merge_without_keeping_leaves_a_plain_model():
    model = gpt2()
    lorica.inject(model, LoRA(r=2, bias="all", token_rows=(3,)), "paper")
    stir(model)
    tuned = logits(model)
    report = lorica.merge(model, keep=False)
    assert report.kept_bytes == 0
    assert close(logits(model), tuned)
    assert lorica.adapters(model) == []
    assert not [name for name, _ in model.named_parameters() if ".lorica." in name]
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(LoricaError, match="no adapter"):
        lorica.unmerge(model)


def test_merge_says_what_keeping_the_weights_costs():
    model = llama()
    lorica.inject(model, LoRA(r=2), "q_proj, embed_tokens")
    report = lorica.merge(model)
    # The tied embedding stays in use at the head, so keeping it costs nothing more.
    assert report.kept_bytes == 2 * 32 * 32 * 4


def test_merging_accumulates_in_fp32_and_rounds_once():
    model = llama().to(torch.bfloat16)
    lorica.inject(model, LoRA(r=2), "q_proj")
    stir(model, size=0.02)
    layer = model.model.layers[0].self_attn.q_proj
    patch = layer.lorica.default.lora
    wanted = (layer.weight.float() + patch.scale * (patch.B @ patch.A)).to(torch.bfloat16)
    lorica.merge(model)
    assert torch.equal(layer.weight, wanted)


def test_direct_reads_of_a_weight_see_the_merged_one():
    model = t5()
    lorica.inject(model, LoRA(r=2), "wo")
    stir(model)
    layer = model.encoder.block[0].layer[1].DenseReluDense.wo
    before = layer.weight.clone()
    lorica.merge(model)
    assert not torch.equal(layer.weight, before)


def test_a_patched_model_can_be_pickled():
    model = llama()
    lorica.inject(model, LoRA(r=2), "qv")
    stir(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_patches_move_and_switch_mode_with_their_model():
    model = llama()
    lorica.inject(model, LoRA(r=2, dropout=0.5), "qv")
    stir(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval().to(torch.float64)
    assert logits(model).dtype == torch.float64


def test_inject_keeps_the_mode_of_the_model():
    model = llama().train()
    lorica.inject(model, LoRA(r=2, dropout=0.5), "q_proj")
    assert model.training
    assert model.model.layers[0].self_attn.q_proj.lorica.default.lora.dropout.training
    lorica.merge(model)
    assert model.training


def test_count_gives_the_formula_of_the_paper():
    model = gpt2()
    lorica.inject(model, LoRA(r=4), "paper")
    count = lorica.count(model)
    assert count.trainable == 2 * 2 * 2 * 32 * 4  # 2 L d r for q and v each
    assert count.total == sum(parameter.numel() for parameter in gpt2().parameters())
    assert count.share == count.trainable / count.total


def test_the_fingerprint_is_of_the_base_whatever_lies_on_it():
    model = gpt2()
    plain = lorica.fingerprint(model)
    lorica.inject(model, LoRA(r=2, bias="all", token_rows=(3,)), "paper")
    stir(model)
    assert lorica.fingerprint(model) == plain
    lorica.merge(model)
    assert lorica.fingerprint(model) == plain
    assert lorica.fingerprint(gpt2().to(torch.bfloat16)) == plain
    assert lorica.fingerprint(llama()) != plain


def test_a_failed_injection_leaves_the_model_untouched():
    model = bert()
    names = [name for name, _ in model.named_parameters()]
    for method, targets in [
        (LoRA(modules_to_save=("nothing",)), "query"),
        (LoRA(ranks={"no_such": 2}), "query"),
        (LoRA(token_rows=(999,)), "query"),
        (LoRA(tied=True), "query"),
        (LoRA(), "query, no_such"),
    ]:
        with pytest.raises(LoricaError):
            lorica.inject(model, method, targets)
        assert [name for name, _ in model.named_parameters()] == names
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert lorica.adapters(model) == []


def test_faults_of_use_say_what_to_do():
    model = llama()
    with pytest.raises(LoricaError, match="no adapter; inject one"):
        lorica.merge(model)
    with pytest.raises(LoricaError, match="cannot be called 'a.b'"):
        lorica.inject(model, LoRA(), name="a.b")
    lorica.inject(model, LoRA(), name="first")
    with pytest.raises(LoricaError, match="already has an adapter 'first'"):
        lorica.inject(model, LoRA(), name="first")
    with pytest.raises(LoricaError, match="did you mean 'first'"):
        lorica.select(model, "fist")
    lorica.merge(model)
    with pytest.raises(LoricaError, match="is merged"):
        lorica.inject(model, LoRA(), name="second")
    with pytest.raises(LoricaError, match="merged already"):
        lorica.merge(model)
    lorica.unmerge(model)
    lorica.inject(model, LoRA(), name="second")
    with pytest.raises(LoricaError, match="eject the other"):
        lorica.merge(model, keep=False)
    with pytest.raises(LoricaError, match="no biases|has none"):
        lorica.inject(model, LoRA(bias="all"), name="third")


def test_settings_report_every_fault_at_once():
    with pytest.raises(LoricaError) as raised:
        LoRA(r=0, dropout=1.5, init="zeros", ranks={"q": -1})
    for word in ("rank is 0", "rank is -1", "dropout is 1.5", "init is 'zeros'"):
        assert word in str(raised.value)


def test_a_layer_with_a_forward_of_its_own_is_refused():
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x: x
    with pytest.raises(LoricaError, match="replaced on the instance"):
        lorica.inject(model, LoRA(), "q_proj")


def test_new_tokens_train_their_rows_only():
    model = llama(tied=True)
    lorica.inject(model, LoRA(r=2, token_rows=(5, 9)), "q_proj")
    table = model.model.embed_tokens.weight.clone()
    model(input_ids=torch.tensor([[5, 6, 9, 5]])).logits.pow(2).sum().backward()
    rows = lorica.trainable(model)["model.embed_tokens#tokens.rows"]
    assert rows.shape == (2, 32)
    assert rows.grad.abs().sum(-1).min() > 0
    assert model.model.embed_tokens.weight.grad is None
    stir(model)
    lorica.merge(model)
    changed = (model.model.embed_tokens.weight != table).any(-1).nonzero().flatten().tolist()
    assert changed == [5, 9]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_new_tokens_of_an_untied_model_get_output_rows_too():
    model = llama(tied=False)
    lorica.inject(model, LoRA(r=2, token_rows=(5,)), "q_proj")
    assert {"model.embed_tokens#tokens.rows", "lm_head#tokens.rows"} < set(lorica.trainable(model))


def test_biases_that_are_one_parameter_are_trained_once():
    model = bert()
    lorica.inject(model, LoRA(bias="all"), "query")
    names = [name for name in lorica.trainable(model) if "cls.predictions" in name and name.endswith("bias")]
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    assert len([name for name in names if "transform" not in name]) == 1


def test_inputs_are_the_same_each_time():
    assert torch.equal(inputs(llama())["input_ids"], inputs(llama())["input_ids"])
