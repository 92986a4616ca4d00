"""Law 5 and the fast path: packs through the kernels give what each example alone gives under the plain model."""

from __future__ import annotations

import pytest
import torch
import transformers

import lorica
from classifiers import tokenizer
from families import FAMILIES
from lorica import LoRA, TrainSettings
from lorica.data import Example, Sampler, collate
from lorica.fast import Fast
from lorica.kernels.documents import Documents, documents
from lorica.passes import Passes
from tiny import stir

LENGTHS = (12, 7, 5, 9, 7)


def make_rows():
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randint(2, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Example(ids, [False] * 3 + [True] * (len(ids) - 3)) for ids in draws]


ROWS = make_rows()


def adapted(family="llama", **method):
    model = FAMILIES[family]()
    lorica.inject(model, LoRA(**{"r": 3} | method))
    stir(model, size=0.1)
    return model


def gradients(model, name=None):
    found = {key: parameter.grad.clone() for key, parameter in lorica.trainable(model, name).items()}
    for parameter in lorica.trainable(model, name).values():
        parameter.grad = None
    return found


def eager(model, rows=ROWS, smooth=0.0):
    """Loss and gradients of the plain model, each row alone."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0, :-1]
        wanted = torch.tensor(row.loss[1:])
        goal = torch.tensor(row.ids[1:])[wanted]
        total = total + torch.nn.functional.cross_entropy(
            logits[wanted].float(), goal, reduction="sum", label_smoothing=smooth
        )
        count += int(wanted.sum())
    (total / count).backward()
    return (total / count).item(), gradients(model)


def packed(model, rows=ROWS, smooth=0.0, **options):
    passes = Passes(model, ROWS, 1, smooth)
    assert passes.way == "packed", passes.note
    with passes(model, rows, **options) as (loss, _):
        loss.backward()
    return loss.item(), gradients(model)


def apart(found, expected):
    """How far two sets of gradients are from each other, relative to their length."""
    assert found.keys() == expected.keys()
    difference, length = (
        torch.cat([tensor.flatten().float() for tensor in tensors]).norm()
        for tensors in ([found[name] - expected[name] for name in found], expected.values())
    )
    return (difference / length).item()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_a_pack_gives_the_gradient_of_its_rows_alone(family):
    loss, found = packed(adapted(family))
    wanted, expected = eager(adapted(family))
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert apart(found, expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_the_loss_curve_is_that_of_a_plain_loop(family, tmp_path):
    ours, plain = adapted(family), adapted(family)
    settings = TrainSettings(
        lr=0.02, steps=8, batch=2, schedule="constant", warmup=0.0, clip=0.0, held_out=0.0, dtype="fp32", device="cpu"
    )
    said = []
    lorica.train(ours, tokenizer(), ROWS, settings, out=tmp_path / "run", report=said.append)
    adamw = torch.optim.AdamW(lorica.trainable(plain).values(), 0.02, settings.betas, 1e-8, weight_decay=0.0)
    sampler = Sampler(len(ROWS), 2, settings.seed)
    wanted = []
    for _ in range(8):
        loss, found = eager(plain, [ROWS[i] for i in next(sampler)])
        wanted.append(loss)
        for name, parameter in lorica.trainable(plain).items():
            parameter.grad = found[name]
        adamw.step()
        adamw.zero_grad()
    assert [event["loss"] for event in said if event["kind"] == "step"] == pytest.approx(wanted, rel=1e-4)
    assert min(wanted) < 0.9 * wanted[0]


def test_a_router_keeps_its_own_loss_beside_that_of_the_pack():
    model = adapted("mixtral")
    loss, found = packed(model)
    out = model(**collate(ROWS, 1))
    out.loss.backward()
    assert out.aux_loss.item() * model.config.router_aux_loss_coef > 1e-3
    assert loss == pytest.approx(out.loss.item(), rel=1e-5)
    assert apart(found, gradients(model)) < 1e-5


@pytest.mark.parametrize(
    "family, taken",
    [
        ("llama", {"LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "Linear"}),
        ("qwen3", {"Qwen3Attention", "Qwen3MLP", "Qwen3RMSNorm", "Linear"}),
        ("gemma3", {"Gemma3Attention", "Gemma3MLP", "Gemma3RMSNorm", "Linear"}),
        ("gpt2", {"Conv1D"}),
    ],
)
def test_the_blocks_of_common_decoders_are_taken_over(family, taken):
    assert set(Fast(adapted(family)).names) == taken


def test_a_block_that_computes_something_else_is_left_as_it_is():
    model = adapted()
    mlp = type(model.model.layers[0].mlp)

    class Halved(mlp):
        def forward(self, x):
            return super().forward(x) / 2

    for layer in model.model.layers:
        layer.mlp.__class__ = Halved
    assert "Halved" not in Fast(model).names
    _, found = packed(model)
    assert apart(found, eager(model)[1]) < 1e-5


def test_blocks_of_one_class_that_differ_are_tried_one_by_one():
    model = adapted("smollm3")
    taken = Fast(model).forwards
    rotary, without = (layer.self_attn for layer in model.model.layers)
    assert rotary.use_rope and rotary in taken
    assert not without.use_rope and without not in taken


def test_a_block_that_drops_something_in_training_is_left_as_it_is():
    model = adapted()
    first, second = (layer.mlp for layer in model.model.layers)
    first.dropout = torch.nn.Dropout(0.5)
    taken = Fast(model).forwards
    assert first not in taken and second in taken


@pytest.mark.parametrize("targets", ["qv", "mlp", "o_proj, gate_proj", "layers.1.self_attn.k_proj"])
def test_any_choice_of_targets_is_exact(targets):
    def make():
        model = FAMILIES["llama"]()
        lorica.inject(model, LoRA(r=3), targets)
        stir(model, size=0.1)
        return model

    assert apart(packed(make())[1], eager(make())[1]) < 1e-5


def test_slices_of_a_fused_projection_are_exact():
    def make():
        model = FAMILIES["gpt2"]()
        lorica.inject(model, LoRA(r=3), "qv")
        stir(model, size=0.1)
        return model

    assert apart(packed(make())[1], eager(make())[1]) < 1e-5


def test_no_gradient_is_made_for_the_input_of_the_lowest_patch():
    model = adapted()
    seen = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda *call: seen.append(call[2].requires_grad))
    packed(model)
    assert seen and not any(seen)


def test_checkpointing_recomputes_the_same_gradient():
    model = adapted()
    _, expected = packed(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert apart(packed(model)[1], expected) < 1e-6


def test_without_gradients_the_outputs_are_the_same():
    model = adapted()
    ids = torch.tensor([[token for row in ROWS for token in row.ids]])
    places = torch.tensor([[place for n in LENGTHS for place in range(n)]])
    with torch.no_grad(), Fast(model).on(), documents(Documents(LENGTHS)):
        found = model(input_ids=ids, position_ids=places, use_cache=False).logits[0]
    alone = torch.cat([model(torch.tensor([row.ids])).logits[0] for row in ROWS])
    assert (found - alone).abs().max() < 1e-5 * alone.abs().max()


def test_the_model_is_as_before_after_the_block():
    model = adapted()
    modules = {name: set(module.__dict__) for name, module in model.named_modules()}
    how = model.config._attn_implementation
    before = model(torch.tensor([ROWS[0].ids])).logits
    packed(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == modules
    assert model.config._attn_implementation == how
    assert torch.equal(model(torch.tensor([ROWS[0].ids])).logits, before)


def test_label_smoothing_is_that_of_cross_entropy():
    loss, found = packed(adapted(), smooth=0.2)
    wanted, expected = eager(adapted(), smooth=0.2)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert apart(found, expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_depends_on_the_example_and_not_on_the_pack(family):
    keys = [11, 12, 13, 14, 15]
    counts = [len(row.ids) - 3 for row in ROWS]

    def run(*cuts):
        model = adapted(family, dropout=0.4).train()
        passes = Passes(model, ROWS, 1)
        for cut in cuts:
            with passes(
                model, [ROWS[i] for i in cut], weights=[1 / sum(counts)] * len(cut), keys=[keys[i] for i in cut]
            ) as (loss, _):
                loss.backward()
        return gradients(model)

    whole = run((0, 1, 2, 3, 4))
    assert apart(run((4, 2), (3, 0), (1,)), whole) < 1e-5
    assert apart(gradients_without_dropout(family), whole) > 0.05


def gradients_without_dropout(family):
    return packed(adapted(family, dropout=0.4))[1]


def test_dropout_keeps_its_share_and_its_mean():
    here = Documents((400, 600), keys=(1, 2))
    mask = here.kept(50, 0.3, salt=7, start=0, stop=1000, like=torch.empty(0))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert mask.mean().item() == pytest.approx(1, abs=0.02)
    again = Documents((600, 400), keys=(2, 1)).kept(50, 0.3, 7, 0, 1000, torch.empty(0))
    assert torch.equal(again, torch.cat([mask[400:], mask[:400]]))


def test_adapters_mixed_in_a_pack_get_the_gradients_they_get_alone():
    def make():
        model = FAMILIES["llama"]()
        for name, r, targets in (("a", 2, "all-linear"), ("b", 5, "qv"), ("c", 3, "mlp")):
            lorica.inject(model, LoRA(r=r, dropout=0.3), targets, name)
            stir(model, seed=r, size=0.1)
        return model.train()

    names, keys = ("a", "a", "b", "c", "c"), (1, 2, 3, 4, 5)
    model = make()
    for name in "abc":
        for parameter in lorica.trainable(model, name).values():
            parameter.requires_grad_(True)
    passes = Passes(model, ROWS, 1)
    with passes(model, ROWS, weights=[0.1] * 5, keys=keys, owners=names) as (loss, nats):
        loss.backward()
    assert loss.item() == pytest.approx(0.1 * nats.sum().item())
    for name in "abc":
        mixed = gradients(model, name)
        alone = make()
        lorica.select(alone, name)
        mine = [i for i in range(5) if names[i] == name]
        with Passes(alone, ROWS, 1)(
            alone, [ROWS[i] for i in mine], weights=[0.1] * len(mine), keys=[keys[i] for i in mine]
        ) as (loss, own):
            loss.backward()
        assert torch.allclose(own, nats[mine], rtol=1e-5)
        assert apart(mixed, gradients(alone, name)) < 1e-5


def test_bf16_is_within_its_rounding_of_fp32():
    model = adapted().bfloat16()
    assert all(parameter.dtype == torch.bfloat16 for parameter in lorica.trainable(model).values())
    for parameter in lorica.trainable(model).values():
        parameter.data = parameter.data.float()
    _, found = packed(model)
    assert 0 < apart(found, eager(adapted())[1]) < 0.1
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_a_head_that_is_patched_gets_its_gradient_from_logits():
    def make():
        model = FAMILIES["llama"]()
        lorica.inject(model, LoRA(r=3), "q_proj, lm_head")
        stir(model, size=0.1)
        return model

    model = make()
    passes = Passes(model, ROWS, 1)
    assert passes.way == "rows" and "head" in passes.note
    with passes(model, ROWS) as (loss, _):
        loss.backward()
    assert apart(gradients(model), eager(make())[1]) < 1e-5


def test_dropout_on_a_layer_that_sees_some_of_the_tokens_stays_finite():
    model = FAMILIES["llama"]()
    lorica.inject(model, LoRA(r=3, dropout=0.5), "lm_head")
    stir(model, size=0.1)
    passes = Passes(model.train(), ROWS, 1)
    for turn in range(4):
        with passes(model, ROWS, keys=[turn] * len(ROWS)) as (loss, _):
            loss.backward()
    assert torch.stack([gradient.abs().max() for gradient in gradients(model).values()]).isfinite().all()


def test_a_model_that_cannot_attend_inside_documents_is_trained_on_padded_batches():
    model = adapted()

    def mixing(hidden_states, **options):
        out, weights = type(attention).forward(attention, hidden_states, **options)
        return out + hidden_states.mean(1, keepdim=True), weights

    attention = model.model.layers[0].self_attn
    attention.forward = mixing
    passes = Passes(model, ROWS, 1)
    assert passes.way == "narrow"
    assert passes.note.startswith("batches are padded: what one document of a pack says depends on another")
    assert attention.forward is mixing


# A state that runs on, positions that do, and attention that asks for a mask which nobody makes in a pack.
ALONE = {
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "OpenAIGPT": {"n_embd": 32, "n_layer": 2, "n_head": 4, "embd_pdrop": 0.0},
    "CodeGen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ALONE)
def test_a_model_whose_documents_see_each_other_is_trained_on_padded_batches(family, dtype):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=64, **ALONE[family])
    head = "LMHeadModel" if family == "OpenAIGPT" else "ForCausalLM"
    model = getattr(transformers, f"{family}{head}")(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    passes = Passes(model.to(dtype).eval(), ROWS, 0)
    assert passes.quick is None and "what one document of a pack says depends on another" in passes.note


def test_hooks_on_a_projection_are_still_called():
    model = adapted()
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *call: seen.append(1))
    packed(model)
    assert seen
