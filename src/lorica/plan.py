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
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lorica import patch
from lorica.data.encoding import Example
from lorica.data.pack import CPU_MICRO_TOKENS, micro_tokens, packs
from lorica.errors import LoricaError
from lorica.formats import gguf_header
from lorica.lowrank import LoRA
from lorica.models.checkpoint import refused
from lorica.models.loading import locate
from lorica.models.machine import DTYPES, resolve_dtype
from lorica.passes import Passes

# Of a peak measured on large products, what a training step reached (docs/LOG.md): its products are smaller.
EFFICIENCY = 0.55
# What an allocator keeps beyond what is asked for, as a share of the tensors that come and go: pieces that fit nothing.
SLACK = 0.06
# Bytes per parameter of a packed base: 4 bits and an fp32 scale per 64, or 8 bits and (nearly nothing) a scale per row.
PACKED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
GPT3 = "gpt3-175b"


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for; `process` is what Python and its libraries hold without a model."""

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
        seconds: of one update, None without a measured peak.
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
    peak: float | None = None,
    kind: Any = AutoModelForCausalLM,
) -> Prediction:
    """Memory and arithmetic of one update.

    Args:
        config: of a causal model.
        work: what is trained on what.
        process: bytes that the process holds without the model; those of this one if left out.
        peak: FLOP/s of a matrix product in this dtype on this machine; with it, the time is predicted too.
        kind: the class that the config belongs to.
    """
    examples = [row(length, work.labelled) for length in work.lengths]
    pieces = packs(examples, work.micro, tokens=work.micro_tokens)
    heaviest = max(pieces, key=lambda piece: sum(work.lengths[i] for i in piece))
    found = _grown(config, work, tuple(work.lengths[i] for i in heaviest), again=len(pieces) > 1, kind=kind)
    tokens = sum(work.lengths)
    flops = found.flops * tokens / sum(work.lengths[i] for i in heaviest)
    width = DTYPES[work.dtype].itemsize
    base = found.parameters * width
    if work.quantize != "none":
        base -= int(found.linear * (width - PACKED[work.quantize]))
    # A parameter below fp32 is trained through an fp32 copy; an adapter is fp32 itself.
    own = 0 if work.method is None and width == 4 else found.trainable * 4
    grads = found.trainable * (width if work.method is None else 4)
    memory = Memory(
        process=psutil.Process().memory_info().rss if process is None else process,
        weights=base,
        trained=own,
        gradients=grads,
        optimizer=found.trainable * 8,
        activations=int(found.live * (1 + SLACK)),
    )
    seconds = flops / (peak * EFFICIENCY) if peak else None
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
    longest = max(work.lengths)
    for flag, change in (
        ("--micro 1", {"micro": 1, "micro_tokens": longest}),
        ("--checkpointing on", {"checkpointing": True}),
        (f"--max-len {longest // 2}", {"lengths": tuple(min(each, longest // 2) for each in work.lengths)}),
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


def work_of(config: PretrainedConfig, settings: Any, examples: Sequence[Example], method: patch.Method) -> Work:
    """The work of a training with these settings on these examples: an update of its longest rows."""
    drawn = sorted(examples, key=lambda example: -len(example.ids))[: settings.batch]
    tokens = sum(len(example.ids) for example in drawn)
    kind = resolve_dtype(settings.dtype, settings.device)
    device = torch.device(settings.device if settings.device != "auto" else "cpu")
    return Work(
        method=method,
        targets=settings.targets,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == kind),
        quantize=settings.quantize,
        checkpointing=settings.checkpointing == "on",
        lengths=tuple(len(example.ids) for example in drawn),
        labelled=sum(sum(example.loss[1:]) for example in drawn) / tokens,
        micro_tokens=micro_tokens(device, kind),
        micro=settings.micro,
    )


@dataclass(frozen=True)
class _Traced:
    """Numbers of one model, or of a part of it: all grow by the same amount with each layer."""

    parameters: int
    linear: int
    trainable: int
    live: int
    flops: float


def _grown(
    config: PretrainedConfig,
    work: Work,
    lengths: tuple[int, ...],
    again: bool = False,
    kind: Any = AutoModelForCausalLM,
) -> _Traced:
    """The numbers of the whole model, from two small ones where its layers are alike."""
    layers = config.get_text_config().num_hidden_layers
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if layers <= 4 or len(kinds) > 1 or hasattr(work.method, "blocks"):  # some blocks only: not alike
        return _whole(_traced(_built(kind, config, layers, work.dtype), work, lengths, again))
    small = (_built(kind, config, count, work.dtype) for count in (2, 3))
    few, more = (_traced(model, work, lengths, again) for model in small)
    slopes = [b - a for a, b in zip(dataclasses.astuple(few), dataclasses.astuple(more), strict=True)]
    start = dataclasses.astuple(few)
    return _whole(_Traced(*(a + (layers - 2) * slope for a, slope in zip(start, slopes, strict=True))))


def _whole(found: _Traced) -> _Traced:
    return _Traced(*(round(number) for number in dataclasses.astuple(found)))


def _traced(model: Any, work: Work, lengths: tuple[int, ...], again: bool) -> _Traced:
    """Run a pack through a model on the meta device; `again`, as the second of an update."""
    parameters = sum(each.numel() for each in model.parameters())
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D))
    if (head := model.get_output_embeddings()) is not None:
        linear -= head.weight.numel()
    if work.method is None:
        trainable = parameters
    else:
        patch.inject(model, work.method, work.targets)
        trainable = sum(each.numel() for each in patch.trainable(model).values())
    if work.checkpointing:
        checkpoint(model)
    model.train()
    examples = [row(length, work.labelled) for length in lengths]
    passes = Passes(model, examples, 0, ways=("packed", "rows"))
    account = Account(model)
    for _ in range(1 + again):
        account.flops = 0.0
        with account, passes(model, examples, keys=range(len(examples))) as (loss, _):
            loss.backward()
    # Gradients stay, and are counted with what is trained.
    held = sum(each.grad.numel() * each.grad.element_size() for each in model.parameters() if each.grad is not None)
    return _Traced(parameters, linear, trainable, account.peak - held, account.flops)


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


class Account(TorchDispatchMode):
    """Keeps count of the bytes of all tensors made in a block and still alive, and of the operations on matrices.

    The model's own parameters do not count, nor views of anything.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops = 0.0
        self._held = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args)
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held:
                self._held.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.live -= size


_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")


def _flops(func: Any, args: Sequence[Any]) -> float:
    """Operations of a matrix product, or of attention in one kernel: half a square each way, 2 products and then 5."""
    name = func._schema.name.removeprefix("aten::")
    if name in _PRODUCTS:
        a, b = [each for each in args if isinstance(each, torch.Tensor)][-2:]
        return 2.0 * a.numel() * b.shape[-1]
    if name.startswith("_scaled_dot_product") and name.endswith(("for_cpu", "for_cpu_backward")):
        q = args[1] if name.endswith("backward") else args[0]
        return (5 if name.endswith("backward") else 2) * q.numel() * q.shape[-2]
    return 0.0


def gpt3_claims() -> list[tuple[str, str, float, str]]:
    """The paper's claims on GPT-3 175B (section 4.2) by arithmetic: (what, how, number, what the paper says).

    Adam's memory is that of weights and two moments in fp16, which the paper's 1.2 TB has beside what it does not
    list; with fp32 moments and masters, as mixed precision has them, it is 16 bytes per parameter.
    """
    config = config_of(GPT3)
    found = _grown(config, Work(LoRA(r=4), "qv", "fp16", lengths=(8,)), (8,))
    full, few = found.parameters, found.trainable
    return [
        ("parameters", "96 layers of width 12288", full, "175B"),
        ("trained by LoRA", "r = 4 on q and v: 96 * 2 * 4 * (12288 + 12288)", few, "18.9M (37.7M with r = 8)"),
        ("fewer parameters", "parameters / trained", full / few, "10,000x"),
        ("checkpoint, full", "2 bytes each", 2 * full, "350 GB"),
        ("checkpoint, LoRA", "2 bytes each", 2 * few, "35 MB"),
        ("100 tasks, full", "100 checkpoints", 200 * full, "35 TB"),
        ("100 tasks, LoRA", "weights + 100 adapters", 2 * full + 200 * few, "354 GB"),
        ("memory, Adam", "weights and two moments, 2 bytes each", 6 * full, "1.2 TB"),
        ("memory, Adam mixed", "2 + 2 + 4 + 4 + 4 bytes", 16 * full, "not given"),
        ("memory, LoRA", "weights in 2 bytes, 16 per trained", 2 * full + 16 * few, "350 GB"),
    ]
