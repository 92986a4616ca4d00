"""Experts kept in one stack: every law, the grouped product against materialised weights, PEFT's files both ways."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call

import laws
import lorica
from families import COMMON
from lorica import Adapter, LoRA, patch, plan
from lorica.data import collate
from lorica.errors import LoricaError
from lorica.fast import Fast
from lorica.inspect import inspect
from lorica.kernels.documents import Documents, documents
from lorica.kernels.experts import grouped
from lorica.passes import Passes
from lorica.targets import resolve
from test_fast import ROWS, apart, gradients
from tiny import inputs, logits, stir

MIXTURES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # [E, in, out], biases, own gate
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}
LAWS = [
    laws.step_zero_is_the_base,
    laws.inject_and_eject_are_inverse,
    laws.merge_and_unmerge_are_inverse,
    laws.adapters_do_not_touch_each_other,
    laws.a_copy_is_independent,
    laws.only_the_adapter_learns,
]
TARGETS = {
    "both": "experts",
    "first": "experts.gate_up_proj",
    "second and attention": "experts.down_proj, q_proj",
}


def mixture(name: str, implementation: str = "grouped_mm"):
    family, options = MIXTURES[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**COMMON | options)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in key:
                nn.init.normal_(parameter, std=0.2)
        model.set_experts_implementation(implementation)
        return model

    return make


def materialised(model: nn.Module, fresh: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a fresh model with every update of the adapter added to its weight, with gradients."""
    changed = dict(fresh.named_parameters())
    for (path, part), each in patch.installed(model).patches.items():
        key = f"{path}.{part}" if part.endswith("_proj") else f"{path}.weight"
        delta = each.scale * (each.B @ each.A)
        changed[key] = changed[key] + (
            delta.mT if getattr(model.get_submodule(path), "is_transposed", False) else delta
        )
    return changed


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_holds(law, name, implementation):
    assert law(mixture(name, implementation), LoRA(r=3, alpha=5), "experts") is None


@pytest.mark.parametrize("targets", [*TARGETS.values(), "all-linear, experts"])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_holds_for_one_matrix_and_beside_others(law, targets):
    method = LoRA(r=2, ranks={"experts.down_proj": 4}) if "down_proj" in targets else LoRA(r=3)
    assert law(mixture("mixtral"), method, targets) is None


@pytest.mark.parametrize("name", MIXTURES)
def test_save_and_load_are_inverse(name, tmp_path):
    assert laws.save_and_load_are_inverse(mixture(name), LoRA(r=3, alpha=5), "experts, v_proj", tmp_path / "a") is None


@pytest.mark.parametrize(
    "law",
    [laws.step_zero_is_the_base, laws.inject_and_eject_are_inverse, laws.merge_and_unmerge_are_inverse],
    ids=lambda law: law.__name__,
)
def test_law_holds_on_a_bf16_base(law):
    assert law(lambda: mixture("mixtral")().to(torch.bfloat16), LoRA(r=3), "experts") is None


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_grouped_product_is_that_of_materialised_weights(name, implementation):
    """Outputs and gradients against the model's own loop over experts, its weights replaced by W + s B A."""
    model = mixture(name, implementation)()
    lorica.inject(model, LoRA(r=3, alpha=5), "experts, q_proj")
    stir(model, size=0.2)
    said = model(**inputs(model)).logits
    said.pow(2).mean().backward()
    found = gradients(model)
    fresh = mixture(name, "eager")()
    wanted = functional_call(fresh, materialised(model, fresh), kwargs=inputs(model)).logits
    wanted.pow(2).mean().backward()
    assert laws.close(said, wanted)
    assert apart(found, gradients(model)) < 1e-5


def test_step_zero_under_batched_products_is_close():
    model = mixture("mixtral", "batched_mm")()
    before = logits(model)
    lorica.inject(model, LoRA(r=3), "experts")
    assert laws.close(logits(model), before)


def test_an_expert_without_tokens_gets_no_gradient_and_the_others_do():
    W = torch.randn(4, 5, 6, requires_grad=True)
    x = torch.randn(7, 6, requires_grad=True)
    y = grouped(x, W, (3, 0, 4, 0))
    assert torch.equal(y[3:], x[3:] @ W[2].T)
    y.sum().backward()
    assert [bool(each.any()) for each in W.grad] == [True, False, True, False]
    assert laws.close(x.grad[:3], W[0].sum(0).expand(3, -1).detach())


def test_the_gradient_of_the_grouped_product_is_right():
    torch.manual_seed(0)
    W = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, W: grouped(x, W, (4, 0, 2)), (x, W))


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_peft_loads_what_is_saved_with_the_same_updates(name, targets, tmp_path):
    model = mixture(name)()
    lorica.inject(model, LoRA(r=3, alpha=5), targets)
    stir(model, size=0.2)
    Adapter.of(model).save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(mixture(name)(), tmp_path / "ours")
    with torch.no_grad():
        assert laws.close(theirs(**inputs(model)).logits, logits(model))
    updates = {}
    for path, module in theirs.named_modules():
        if type(module).__name__ == "ParamWrapper":
            plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
            updates[plain, module.parameter_name] = module.get_delta_weight("default")
    own = {key: each for key, each in patch.installed(model).patches.items() if key[1] != "lora"}
    assert updates.keys() == own.keys()
    for (path, part), each in own.items():
        delta = each.delta()
        assert laws.close(delta.mT if model.get_submodule(path).is_transposed else delta, updates[path, part], 1e-6)
    theirs.save_pretrained(tmp_path / "again")
    again = Adapter.load(tmp_path / "again")
    assert again.sha256 == Adapter.of(model).sha256
    fresh = mixture(name)()
    again.apply(fresh)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    "parameters, ranks",
    [
        (["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], {"experts.down_proj": 2}),
        (["down_proj"], {}),
        (["gate_up_proj", "down_proj"], {}),
    ],
)
@pytest.mark.parametrize("modules", [[], ["q_proj", "o_proj"]])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_what_peft_made_means_the_same_here(name, modules, parameters, ranks, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=modules, target_parameters=parameters, rank_pattern=ranks)
    theirs = peft.get_peft_model(mixture(name)(), config)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    model = mixture(name)()
    Adapter.load(tmp_path).apply(model)
    with torch.no_grad():
        assert laws.close(logits(model), theirs(**inputs(model)).logits)


def test_a_file_whose_parameters_the_config_does_not_name_is_refused(tmp_path):
    model = mixture("mixtral")()
    lorica.inject(model, LoRA(r=3), "experts")
    stir(model)
    Adapter.of(model).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_parameters"] = config["target_parameters"][:1]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoricaError, match="the config names"):
        Adapter.load(tmp_path)
    config["target_parameters"] = ["experts.router_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoricaError, match=r"target_parameters names 'experts\.router_proj'"):
        Adapter.load(tmp_path)


def test_an_adapter_of_experts_is_refused_by_a_model_without_them():
    model = mixture("mixtral")()
    lorica.inject(model, LoRA(r=3), "experts")
    stir(model)
    with pytest.raises(LoricaError, match="experts is not a layer of this model"):
        Adapter.of(model).apply(transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)))


def test_experts_are_targets_by_preset_name_glob_and_regex():
    model = mixture("mixtral")()
    both = [f"model.layers.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up_proj", "down_proj")]
    for spec in ("experts", "experts.gate_up_proj, experts.down_proj", "re:.*experts.*_proj", "*.experts.*"):
        assert [str(target) for target in resolve(model, spec)] == both
    assert [str(target) for target in resolve(model, "experts@1, !down_proj")] == both[2:3]
    assert not any("experts" in str(target) for target in resolve(model, "all-linear"))
    assert [target.sizes for target in resolve(model, "experts")] == [(4,)] * 4
    assert [target.shape for target in resolve(model, "experts")[:2]] == [(96, 32), (32, 48)]
    with pytest.raises(LoricaError, match="has no slice up; it has: gate_up_proj, down_proj"):
        resolve(model, "experts.gate_up_proj[up]")


def test_experts_that_multiply_themselves_are_refused_with_the_reason():
    config = transformers.Llama4TextConfig(
        **COMMON | {"intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 1}
    )
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(LoricaError, match="Llama4TextExperts does not go through transformers' experts interface"):
        lorica.inject(model, LoRA(r=2), "experts")
    assert lorica.inject(model, LoRA(r=2), "attention")


def test_dropout_on_experts_is_refused():
    model = mixture("mixtral")()
    with pytest.raises(LoricaError, match="dropout on the input of experts is refused"):
        lorica.inject(model, LoRA(dropout=0.1), "all-linear, experts")
    assert lorica.inject(model, LoRA(dropout=0.1), "all-linear")


def test_a_batch_of_several_adapters_is_refused():
    model = mixture("mixtral")()
    lorica.inject(model, LoRA(r=2), "experts")
    with documents(Documents((9, 9, 9), (), ("default", "default", "other"))):
        with pytest.raises(LoricaError, match="several adapters in one batch"):
            model(**inputs(model))
    assert model.model.layers[0].mlp.experts.config is model.config


def test_the_rank_is_each_experts():
    model = mixture("qwen3-moe")()
    lorica.inject(model, LoRA(r=3), "experts")
    per_layer = 8 * 3 * ((32 + 48) + (24 + 32))
    assert lorica.count(model).trainable == 2 * per_layer


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_a_packed_step_is_that_of_the_plain_model(name):
    """LoRA on experts and attention: loss, the router's own among it, and gradients."""

    def adapted(implementation):
        model = mixture(name, implementation)()
        lorica.inject(model, LoRA(r=3), "all-linear, experts")
        stir(model, size=0.1)
        return model

    model = adapted("grouped_mm")
    passes = Passes(model, ROWS, 1)
    assert passes.way == "packed", passes.note
    assert not any("Experts" in taken for taken in Fast(model).names)
    with passes(model, ROWS) as (loss, _):
        loss.backward()
    found = gradients(model)
    fresh = mixture(name, "eager")()
    out = functional_call(fresh, materialised(model, fresh), kwargs=collate(ROWS, 1))
    out.loss.backward()
    if name == "mixtral":
        assert out.aux_loss.item() * model.config.router_aux_loss_coef > 1e-3
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    assert apart(found, gradients(model)) < 1e-5


def test_recomputing_in_the_backward_pass_changes_nothing():
    def step(again):
        model = mixture("mixtral")()
        lorica.inject(model, LoRA(r=3), "experts")
        stir(model, size=0.1)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(**collate(ROWS, 1), use_cache=False).loss.backward()
        return gradients(model)

    assert apart(step(True), step(False)) < 1e-6


def test_a_plan_counts_experts():
    config = transformers.MixtralConfig(**COMMON | {"num_local_experts": 4, "num_hidden_layers": 4})
    work = plan.Work(LoRA(r=2), targets="experts", lengths=(8,) * 4, labelled=0.5)
    assert plan.predict(config, work, process=0).trainable == 4 * 4 * 2 * ((96 + 32) + (48 + 32))


def test_merged_experts_are_saved_and_read_by_transformers(tmp_path):
    model = mixture("mixtral")()
    lorica.inject(model, LoRA(r=3), "experts")
    stir(model, size=0.2)
    lorica.merge(model, keep=False)
    said = logits(model)
    model.save_pretrained(tmp_path)
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert laws.close(logits(again), said)


def test_what_is_shown_of_an_adapter_names_the_ranks_of_experts(tmp_path):
    model = mixture("mixtral")()
    lorica.inject(model, LoRA(r=3, alpha=6, ranks={"experts.down_proj": 2}), "experts")
    stir(model)
    Adapter.of(model).save(tmp_path)
    shown = inspect(tmp_path)
    assert shown["ranks"] == [2, 3] and shown["scales"] == [2.0, 3.0]
