"""Convolutions as a storage: every law, PEFT's function to the bit, its files both ways, and what is refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import _ConvNd
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import laws
import lorica
from lorica import Adapter, LoRA, patch
from lorica.errors import LoricaError
from lorica.export import export
from lorica.fast import Fast
from lorica.targets import resolve
from tiny import inputs, logits, stir

CHANNELS = 8


class ConvNet(nn.Module):
    """Ids to logits through one convolution of each kind; `options` are those of the one called `odd`."""

    main_input_name = "input_ids"

    def __init__(self, **options) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        self.embed = nn.Embedding(64, CHANNELS)
        self.first = nn.Conv1d(CHANNELS, 12, 3, padding=1)
        self.second = nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0), bias=False)
        self.third = nn.Conv3d(1, 2, (1, 3, 1), padding="same")
        self.odd = nn.Conv1d(18, 12, 3, **{"padding": 1} | options)
        self.point = nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(16, 64)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        x = self.first(self.embed(input_ids).mT)  # [rows, 12, tokens]
        x = self.second(x.unflatten(1, (2, 6)).mT)  # [rows, 3, tokens, 3]
        x = self.third(x[:, None]).movedim(3, -1)  # [rows, 2, 3, 3, tokens]
        x = self.point(torch.tanh(self.odd(x.flatten(1, 3)))[..., None])[..., 0]
        return CausalLMOutput(logits=self.head(torch.tanh(x.mT.contiguous())))


def net(**options):
    def make():
        torch.manual_seed(0)
        return ConvNet(**options).eval()

    return make


CASES = {
    "every kind": (net(), LoRA(r=4, alpha=8), "conv"),
    "one and the head": (net(), LoRA(r=3, init="gaussian", scaling="alpha/sqrt(r)"), "odd, head"),
    "biases": (net(), LoRA(r=2, bias="lora_only"), "first, third, embed"),
    "stride and dilation": (net(stride=2, dilation=2), LoRA(r=4), "odd"),
    "reflected": (net(padding_mode="reflect"), LoRA(r=4), "odd"),
    "circular, same": (net(padding="same", padding_mode="circular", dilation=2), LoRA(r=4), "conv"),
    "ranks": (net(), LoRA(r=2, ranks={"odd": 5}, alphas={"second": 3}), "conv"),
}
GROUPED = (net(groups=3), LoRA(r=6, alpha=4), "conv")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "law",
    [
        laws.step_zero_is_the_base,
        laws.inject_and_eject_are_inverse,
        laws.merge_and_unmerge_are_inverse,
        laws.adapters_do_not_touch_each_other,
        laws.a_copy_is_independent,
        laws.only_the_adapter_learns,
    ],
    ids=lambda law: law.__name__,
)
def test_law_holds(law, name):
    assert law(*CASES[name]) is None


@pytest.mark.parametrize("name", CASES)
def test_save_and_load_are_inverse(name, tmp_path):
    assert laws.save_and_load_are_inverse(*CASES[name], tmp_path / "adapter") is None


@pytest.mark.parametrize(
    "law",
    [laws.step_zero_is_the_base, laws.inject_and_eject_are_inverse, laws.merge_and_unmerge_are_inverse],
    ids=lambda law: law.__name__,
)
def test_law_holds_on_a_bf16_base(law):
    make, method, targets = CASES["every kind"]
    assert law(lambda: make().to(torch.bfloat16), method, targets) is None


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
def test_law_holds_in_groups(law):
    assert law(*GROUPED) is None


def test_save_and_load_are_inverse_in_groups(tmp_path):
    assert laws.save_and_load_are_inverse(*GROUPED, tmp_path / "adapter") is None


def test_an_update_in_groups_is_not_merged_and_the_model_stays_as_it_is():
    make, method, targets = GROUPED
    model = make()
    lorica.inject(model, method, targets)
    stir(model)
    before = logits(model)
    with pytest.raises(LoricaError, match="odd: it is a convolution in 3 groups"):
        lorica.merge(model)
    assert torch.equal(logits(model), before)


def test_a_rank_that_the_groups_do_not_divide_is_refused():
    with pytest.raises(LoricaError, match="the rank is 4, which must be a multiple of its 3 groups"):
        lorica.inject(net(groups=3)(), LoRA(r=4), "conv")


@pytest.mark.parametrize(
    "case",
    [CASES["every kind"], CASES["biases"], CASES["ranks"], GROUPED],
    ids=["every kind", "biases", "ranks", "groups"],
)
def test_peft_loads_what_is_saved_and_computes_it_to_the_bit(case, tmp_path):
    make, method, targets = case
    model = make()
    lorica.inject(model, method, targets)
    stir(model)
    Adapter.of(model).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(theirs), logits(model))
    wrapped = {name: module for name, module in theirs.named_modules() if isinstance(module, _ConvNd)}
    assert len(wrapped) == sum(target.storage == "conv" for target in patch.installed(model).targets)
    for name, module in wrapped.items():
        path = name.removeprefix("base_model.model.")
        if module.get_base_layer().groups == 1:
            delta = patch.installed(model).patches[path, "lora"].delta()
            assert laws.close(delta, module.get_delta_weight("default").flatten(1))


@pytest.mark.parametrize("options", [{}, {"groups": 3}], ids=str)
def test_what_peft_made_means_the_same_here(options, tmp_path):
    make = net(**options)
    config = peft.LoraConfig(r=6, lora_alpha=5, target_modules=["first", "second", "third", "odd", "point", "head"])
    theirs = peft.get_peft_model(make(), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    model = make()
    Adapter.load(tmp_path).apply(model)
    assert torch.equal(logits(model), logits(theirs))


def test_dropout_and_gradients_are_pefts(tmp_path):
    make, _, targets = CASES["every kind"]
    model = make()
    lorica.inject(model, LoRA(r=4, alpha=8, dropout=0.3), targets)
    stir(model)
    Adapter.of(model).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    found = []
    for each in (model, theirs):
        torch.manual_seed(1)
        each.train()(**inputs(model)).logits.pow(2).mean().backward()
    for (path, _), each in patch.installed(model).patches.items():
        for factor in "AB":
            own = getattr(each, factor).grad
            layer = theirs.base_model.model.get_submodule(path)
            other = getattr(layer, f"lora_{factor}")["default"].weight.grad
            found.append(torch.equal(own, other.flatten(1)))
    assert found
    assert all(found)


def test_the_fast_path_leaves_convolutions_alone():
    make, method, targets = CASES["one and the head"]
    model = make()
    lorica.inject(model, method, targets)
    stir(model)
    model.config._attn_implementation = "eager"
    quick = Fast(model)
    assert quick.names == ["Linear"]
    before = logits(model)
    with quick.on():
        assert laws.close(logits(model), before)


def test_linear_presets_mean_no_convolutions():
    assert [str(target) for target in resolve(net()(), "all-linear")] == ["head"]
    assert [str(target) for target in resolve(net()(), "conv, !re:.*d")] == ["first", "point"]


def test_what_a_convolution_needs_is_in_its_target():
    (target,) = resolve(net()(), "second")
    assert (target.storage, target.shape, target.sizes) == ("conv", (3, 12), (1, 3, 2))


def test_a_convolution_that_does_more_is_refused():
    class Standardised(nn.Conv1d):
        def forward(self, x):
            return super().forward(x / 2)

    model = net()()
    model.odd = Standardised(18, 12, 3, padding=1)
    with pytest.raises(LoricaError, match="Standardised does more than convolve"):
        lorica.inject(model, LoRA(r=4), "conv")
    lorica.inject(model, LoRA(r=4), "conv, !odd")


def test_a_weight_that_is_made_anew_at_each_call_is_no_target():
    model = net()()
    nn.utils.parametrizations.weight_norm(model.odd)
    assert "odd" not in [str(target) for target in resolve(model, "conv")]


def whisper():
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_a_speech_model_with_patched_convolutions_saves_loads_and_merges(tmp_path):
    generator = torch.Generator().manual_seed(2)
    given = {
        "input_features": torch.randn(2, 8, 20, generator=generator),
        "decoder_input_ids": torch.randint(3, 60, (2, 5), generator=generator),
    }
    model = whisper()
    with torch.no_grad():
        base = model(**given).logits
        assert lorica.inject(model, LoRA(r=4), "conv1, conv2, q_proj")[:2] == [
            "model.encoder.conv1",
            "model.encoder.conv2",
        ]
        assert torch.equal(model(**given).logits, base)
        stir(model, size=0.2)
        said = model(**given).logits
        assert not laws.close(said, base)
        Adapter.of(model).save(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
            "conv1",
            "conv2",
            "q_proj",
        ]
        config = peft.PeftConfig.from_pretrained(tmp_path)
        config.task_type = None  # PEFT's class for generation asks for a method that Whisper no longer has
        theirs = peft.PeftModel.from_pretrained(whisper(), tmp_path, config=config)
        # Whisper reads conv1.stride, which PEFT's wrapper does not have: only the layers can be compared.
        for path in ("model.encoder.conv1", "model.encoder.conv2"):
            x = torch.randn(2, model.get_submodule(path).in_channels, 20, generator=generator)
            assert torch.equal(theirs.base_model.model.get_submodule(path)(x), model.get_submodule(path)(x))
        lorica.merge(model)
        assert laws.close(model(**given).logits, said)
        lorica.unmerge(model)
        assert torch.equal(model(**given).logits, said)


def test_depthwise_convolutions_need_a_rank_of_their_channels(tmp_path):
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_channels=3)
    torch.manual_seed(0)
    model = transformers.ConvNextForImageClassification(config).eval()
    with pytest.raises(LoricaError, match="must be a multiple of its 16 groups"):
        lorica.inject(model, LoRA(r=8), "conv")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = model(x).logits
        lorica.inject(model, LoRA(r=16, modules_to_save=("classifier",)), "conv, pwconv1")
        assert torch.equal(model(x).logits, base)
        stir(model)
        Adapter.of(model).save(tmp_path)
        torch.manual_seed(0)
        twin = transformers.ConvNextForImageClassification(config).eval()
        Adapter.load(tmp_path).apply(twin)
        assert torch.equal(twin(x).logits, model(x).logits)


@pytest.mark.parametrize("to", ["vllm", "loralib", "mlx"])
def test_other_layouts_refuse_convolutions(to, tmp_path):
    model = net()()
    lorica.inject(model, LoRA(r=6), "conv, head")
    stir(model)
    with pytest.raises(LoricaError, match="5 convolutions: first"):
        export(Adapter.of(model), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())
