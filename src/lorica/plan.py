"""What a training takes, before anything is loaded: memory, arithmetic and time, from shapes alone.

The plan does not describe the training step, it runs it: the model is built without weights (torch's meta device), an
adapter is injected, and the forward and backward passes of one pack go through the same code as in training, while an
account is kept of every tensor that comes and goes. Layers repeat, so two sizes give all others by a straight line; a
GPT-3 of 96 layers takes a second.

    memory = process + weights + what is trained, its gradient and Adam's two moments + the largest sum of live tensors
    time   = operations / (measured peak of a matrix product * share that a step reaches)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lorica import patch
from lorica.account import Account
from lorica.data.batch import Sampler
from lorica.data.encoding import Example
from lorica.data.pack import CPU_MICRO_TOKENS, divided, micro_tokens, packs
from lorica.errors import LoricaError
from lorica.formats import gguf_header
from lorica.lowrank import LoRA
from lorica.models import machine
from lorica.models.checkpoint import refused
from lorica.models.loading import locate
from lorica.models.machine import DTYPES, resolve_device, resolve_dtype
from lorica.passes import Passes

# What an allocator keeps beyond what is asked for, as a share of the tensors that come and go: pieces that fit nothing.
SLACK = 0.06
# Bytes per parameter of a packed base: 4 bits and an fp32 scale per 64, or 8 bits and (nearly nothing) a scale per row.
PACKED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
# Starts that are made from weights, which a plan has not, and others that take the same room.
LIKE = {"loftq": "kaiming", "pissa": "gradient"}
GPT3 = "gpt3-175b"
# Updates of a training that are looked at for the fullest pack, and how much fuller another must be able to be.
LOOKED = 10_000
FULLER = 1.02


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for; `process` is what Python, its libraries and the heap hold without a model."""

    process: int
    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it at the moment of the peak."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Prediction:
    """What a training takes.

    Attributes:
        memory: at its peak.
        parameters, trainable: numbers of the model, and of those trained.
        flops: operations of one update.
        tokens: of one update.
        seconds: of one update, None without a measured rate.
        checkpointing: whether activations are computed again instead of kept.
    """

    memory: Memory
    parameters: int
    trainable: int
    flops: float
    tokens: int
    seconds: float | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Work:
    """What is to be trained, as far as memory and time go.

    Attributes:
        method: what is trained, or None for full fine-tuning in place, without lorica's copy of the weights.
        targets: what it is put on.
        dtype: of the base, a key of `DTYPES`.
        quantize: none, nf4 or int8.
        checkpointing: compute activations again in the backward pass.
        lengths: tokens of the examples of one update.
        labelled: share of the tokens that are predicted.
        micro_tokens: tokens of a pack.
        micro: most examples of a pack.
        beside: adapters that are trained in the same passes: the method, targets, lengths and labelled share of each;
            all else is as here.
    """

    method: patch.Method | None = field(default_factory=LoRA)
    targets: str = "all-linear"
    dtype: str = "fp32"
    quantize: str = "none"
    checkpointing: bool = False
    lengths: Sequence[int] = (512,) * 8
    labelled: float = 1.0
    micro_tokens: int = CPU_MICRO_TOKENS
    micro: int | None = None
    beside: Sequence[Work] = ()

    @property
    def everyone(self) -> tuple[Work, ...]:
        """This one and those beside it."""
        return (self, *self.beside)


class Asked(NamedTuple):
    """A training: its settings, what the model is given, what is trained, and the number of its updates."""

    settings: Any
    examples: Sequence[Example]
    method: patch.Method
    steps: int

    @property
    def tokens(self) -> float:
        """Tokens of all its updates."""
        mean = sum(len(example.ids) for example in self.examples) / len(self.examples)
        return mean * self.settings.batch * self.steps


def config_of(thing: str) -> PretrainedConfig:
    """The config of anything that `lorica.load` takes, or of the paper's GPT-3; no weights are read."""
    if thing == GPT3:
        return GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048, vocab_size=50257)
    path = locate(thing, weights=False)
    with refused(thing):
        if path.is_file():
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

            gguf_header.check(path)
            return AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"])
        return AutoConfig.from_pretrained(path)


def predict(
    config: PretrainedConfig,
    work: Work,
    process: int | None = None,
    rate: float | None = None,
    kind: Any = AutoModelForCausalLM,
) -> Prediction:
    """Memory and arithmetic of one update.

    Args:
        config: of a causal model.
        work: what is trained on what.
        process: bytes that the process holds without the model (see `machine.room`); those of this one if left out.
        rate: FLOP/s of a training step in this dtype (`machine.step_rate`); with it, the time is predicted too.
        kind: the class that the config belongs to.
    """
    fullest = _fullest(work)
    found = _grown(config, work, fullest, kind)
    tokens = sum(map(sum, (each.lengths for each in work.everyone)))
    flops = found.flops * tokens / sum(len(example.ids) for _, example in fullest)
    width = DTYPES[work.dtype].itemsize
    base = found.parameters * width
    if work.quantize != "none":
        base -= int(found.linear * (width - PACKED[work.quantize]))
    memory = Memory(
        process=machine.room(torch.device("cpu"))[1] if process is None else process,
        weights=base,
        trained=found.own,
        gradients=found.trainable * (width if work.method is None else 4),
        optimizer=found.trainable * 8,
        activations=int(found.live * (1 + SLACK)),
    )
    seconds = flops / rate if rate else None
    return Prediction(memory, found.parameters, found.trainable, flops, tokens, seconds, work.checkpointing)


def fitting(
    config: PretrainedConfig, work: Work, available: int, process: int | None = None
) -> tuple[Prediction, bool]:
    """The cheapest way to fit: activations kept if they can be, else computed again; and whether it fits."""
    kept = predict(config, work, process)
    if kept.memory.total <= available:
        return kept, True
    again = predict(config, dataclasses.replace(work, checkpointing=True), process)
    return again, again.memory.total <= available


def advice(config: PretrainedConfig, work: Work, available: int, process: int | None = None) -> list[tuple[str, int]]:
    """What to change so that it takes less, cheapest first: (flag, bytes in all with it and those before)."""
    found = []
    longest = max(max(each.lengths, default=0) for each in work.everyone)
    halved = [tuple(min(length, longest // 2) for length in each.lengths) for each in work.everyone]
    shorter = [dataclasses.replace(each, lengths=few) for each, few in zip(work.everyone, halved, strict=True)]
    for flag, change in (
        ("--micro 1", {"micro": 1, "micro_tokens": longest}),
        ("--checkpointing on", {"checkpointing": True}),
        (f"--max-len {longest // 2}", {"lengths": shorter[0].lengths, "beside": shorter[1:]}),
        ("--dtype bf16", {"dtype": "bf16"} if work.dtype == "fp32" else {}),
        ("--quantize nf4", {"quantize": "nf4", "dtype": "bf16"} if work.quantize == "none" else {}),
    ):
        if not change or (work.method is None and flag.startswith("--quantize")):
            continue
        work = dataclasses.replace(work, **change)
        found.append((flag, predict(config, work, process).memory.total))
        if found[-1][1] <= available:
            break
    return found


def work_of(*asked: Asked) -> Work:
    """The work of a training, or of several in one pass: of the update whose fullest pack is the fullest of all."""
    settings = asked[0].settings
    kind = resolve_dtype(settings.dtype, settings.device)
    device = resolve_device(settings.device)
    plain = Work(
        dtype=next(name for name, dtype in DTYPES.items() if dtype == kind),
        quantize=settings.quantize,
        checkpointing=settings.checkpointing == "on",
        micro_tokens=micro_tokens(device, kind),
        micro=settings.micro,
    )
    fullest, most = plain, 0
    for drawn in _updates(asked):
        tokens = [len(example.ids) for each in drawn for example in each]
        if min(sum(tokens), max(plain.micro_tokens, *tokens)) <= most * FULLER:
            continue  # no pack of this update can be fuller
        works = [_drawn(plain, each, examples) for each, examples in zip(asked, drawn, strict=True)]
        work = dataclasses.replace(works[0], beside=tuple(works[1:]))
        if (held := sum(len(example.ids) for _, example in _fullest(work))) > most:
            fullest, most = work, held
    return fullest


def _updates(asked: Sequence[Asked]) -> Iterator[list[list[Example]]]:
    """What each training draws in each update; nothing after its last."""
    samplers = [
        islice(Sampler(len(each.examples), each.settings.batch, each.settings.seed), each.steps) for each in asked
    ]
    for _ in range(min(LOOKED, max(each.steps for each in asked))):
        places = [next(sampler, []) for sampler in samplers]
        yield [[each.examples[i] for i in drawn] for each, drawn in zip(asked, places, strict=True)]
    if max(each.steps for each in asked) > LOOKED:  # the longest of all comes some day
        yield [[max(each.examples, key=lambda example: len(example.ids))] for each in asked]


def _drawn(plain: Work, asked: Asked, examples: Sequence[Example]) -> Work:
    tokens = sum(len(example.ids) for example in examples)
    return dataclasses.replace(
        plain,
        method=asked.method,
        targets=asked.settings.targets,
        lengths=tuple(len(example.ids) for example in examples),
        labelled=sum(sum(example.loss[1:]) for example in examples) / max(1, tokens),
    )


def _fullest(work: Work) -> list[tuple[int, Example]]:
    """The pack of an update that has most tokens: whose each row is, and the row."""
    laid = [
        (k, row(length, each.labelled))
        for k, each in enumerate(work.everyone)
        for length in sorted(each.lengths, reverse=True)
    ]
    if work.beside:
        pieces = divided([len(example.ids) for _, example in laid], work.micro_tokens, work.micro)
    else:
        pieces = packs([example for _, example in laid], work.micro, tokens=work.micro_tokens)
    return [laid[place] for place in max(pieces, key=lambda piece: sum(len(laid[i][1].ids) for i in piece))]


@dataclass(frozen=True)
class _Traced:
    """Numbers of one model, or of a part of it: all grow by the same amount with each layer."""

    parameters: int
    linear: int
    trainable: int
    own: int
    live: int
    flops: float


def _grown(
    config: PretrainedConfig, work: Work, rows: Sequence[tuple[int, Example]], kind: Any = AutoModelForCausalLM
) -> _Traced:
    """The numbers of the whole model, from two small ones where its layers are alike."""
    layers = config.get_text_config().num_hidden_layers
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    some = any(hasattr(each.method, "blocks") for each in work.everyone)  # some blocks only: not alike
    if layers <= 4 or len(kinds) > 1 or some:
        return _whole(_traced(_built(kind, config, layers, work.dtype), work, rows))
    small = (_built(kind, config, count, work.dtype) for count in (2, 3))
    few, more = (_traced(model, work, rows) for model in small)
    slopes = [b - a for a, b in zip(dataclasses.astuple(few), dataclasses.astuple(more), strict=True)]
    start = dataclasses.astuple(few)
    return _whole(_Traced(*(a + (layers - 2) * slope for a, slope in zip(start, slopes, strict=True))))


def _whole(found: _Traced) -> _Traced:
    return _Traced(*(round(number) for number in dataclasses.astuple(found)))


def _traced(model: Any, work: Work, rows: Sequence[tuple[int, Example]]) -> _Traced:
    """Run a pack through a model on the meta device."""
    parameters = sum(each.numel() for each in model.parameters())
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D))
    if (head := model.get_output_embeddings()) is not None:
        linear -= head.weight.numel()
    trained, held = _equipped(model, work)
    if work.checkpointing:
        checkpoint(model)
    model.train()
    examples = [example for _, example in rows]
    passes = Passes(model, examples, 0, ways=("packed", "rows"))
    for each in trained:
        # A gradient that stays is counted with what is trained; lorica's in less than fp32 come and go.
        each.grad = torch.zeros_like(each) if each.dtype == torch.float32 or work.method is None else None
    grads = [each.grad for each in trained if each.grad is not None]
    account = Account([*model.parameters(), *model.buffers(), *grads])
    owners = [f"a{k}" for k, _ in rows] if work.beside else ()
    with account, passes(model, examples, keys=range(len(examples)), owners=owners) as (loss, _):
        loss.backward()
    trainable = sum(each.numel() for each in trained)
    # A parameter below fp32 is trained through an fp32 copy, beside its own; without lorica it is the base's.
    low = sum(each.numel() * each.element_size() for each in trained if each.dtype != torch.float32)
    own = 4 * (trainable + held) + low
    if work.method is None:
        own = 4 * trainable if low else 0
    return _Traced(parameters, linear, trainable, own, account.peak, account.flops)


def _equipped(model: Any, work: Work) -> tuple[list[nn.Parameter], int]:
    """Put on a model what is trained: those parameters, and how many numbers are held beside them."""
    if work.method is None:
        return list(model.parameters()), 0
    for k, each in enumerate(work.everyone):
        assert each.method is not None, "full fine-tuning has no adapters beside it"
        like = LIKE.get(getattr(each.method, "init", ""))
        method = dataclasses.replace(each.method, init=like) if like else each.method  # type: ignore[type-var, call-arg]
        patch.inject(model, method, each.targets, f"a{k}")
    records = [patch.installed(model, name) for name in patch.adapters(model)]
    trained = [parameter for record in records for parameter in record.tensors().values()]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained, sum(tensor.numel() for record in records for tensor in record.held().values())


def checkpoint(model: Any) -> None:
    """Compute the activations of every block again in the backward pass; the non-reentrant kind."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def keep_activations(model: Any) -> None:
    """Undo `checkpoint`."""
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def _built(kind: Any, config: PretrainedConfig, layers: int, dtype: str) -> nn.Module:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    with torch.device("meta"):
        try:
            return make(config, dtype=DTYPES[dtype])
        except ValueError as fault:
            raise LoricaError(f"{config.model_type} is no causal model, which a plan is for") from fault


def row(length: int, labelled: float = 1.0) -> Example:
    """A row of so many tokens, the last of which are predicted."""
    first = min(length - 1, max(1, round(length * (1 - labelled))))
    return Example([0] * length, [i >= first for i in range(length)])
