"""`TrainSettings`: every setting of a training, its default, its help and its check. Imports no torch.

The attribute docstrings are the help texts of `lorica train`. A setting that is None follows a rule of this file.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from lorica.errors import shown
from lorica.methods import METHODS, entry

METHOD_FIELDS = ("method", *dict.fromkeys(name for entry in METHODS.values() for name in entry.reads))
DEFAULT_EPOCHS = 2.0
EVALUATIONS = 10
LR_CAP = 2e-3


@dataclass(kw_only=True)
class TrainSettings:
    """What is trained, on what, how and for how long."""

    task: Literal["auto", "lm", "classify", "regress"] = "auto"
    """What is learnt: lm (continue text), classify (a label), regress (a score); auto: what MODEL is made for."""
    method: Literal[
        "lora", "full", "top2", "bitfit", "adapter-h", "adapter-l", "adapter-p", "adapter-d", "prefix-embedding",
        "prefix-layer", "lora+prefix-embedding", "lora+prefix-layer",
    ] = "lora"  # fmt: skip
    """What is trained: lora is a low-rank update of the targets, full every parameter, top2 the last two blocks, bitfit
    every bias, adapter-* new layers of two small matrices and a nonlinearity, prefix-* special tokens before and after
    the prompt: their embeddings, or what every layer reads there too."""
    rank: int = 8
    """Rank of the update, r in the paper."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the update's inputs dropped while training."""
    targets: str = "all-linear"
    """Which layers: a preset (all-linear, qv, mlp, experts, ...), names, globs or re:REGEX, with commas between."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """How alpha becomes the scale."""
    init: Literal["kaiming", "gaussian", "loftq", "pissa", "gradient"] = "kaiming"
    """How A starts; B starts at zero, so step 0 is the base model. loftq: both make up for what --quantize took. pissa,
    gradient: both start at singular vectors, of the weights or of the gradient, held against the base's; the file is of
    twice the rank."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained beside the update: none, all, or those of the targets."""
    ranks: str = ""
    """Other ranks for some targets: q_proj=4,down_proj=16."""
    alphas: str = ""
    """Other alphas for some targets: q_proj=8,down_proj=32."""
    modules_to_save: str = ""
    """Modules trained whole beside the update, with commas between: lm_head."""
    token_rows: str = ""
    """Ids of tokens whose embedding rows are trained too, with commas between."""
    tied: bool = False
    """Let the update of a tied embedding act on the output head too."""
    dora: bool = False
    """DoRA: train the size of each output beside its direction."""
    blocks: int | None = None
    """Only this many of the last blocks. Default: 2 of top2; 7 of 12 of adapter-d."""
    bottleneck: int = 64
    """Width of the adapter layers, r in the paper."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Nonlinearity of the adapter layers."""
    prefix: int | None = None
    """Special tokens before the prompt. Default: 16 of prefix-embedding, else 8."""
    infix: int | None = None
    """Special tokens between prompt and completion. Default: 8, beside lora 4."""
    add_biases: bool = False
    """For bitfit: give linear layers without a bias one of zero, and train it."""

    map: str = ""
    """Columns of a table: prompt=body,completion=category; text=body,label=kind or first=a,second=b,score=c."""
    prompt: str = ""
    """A template over columns for the prompt: 'Classify: {body}'."""
    completion: str = ""
    """A template over columns for the answer: '{category}'."""
    system: str = ""
    """A system message for rows without one."""
    held_out: float = 0.1
    """Share of the rows held out to measure with, where the data has no validation part of its own."""
    max_len: int = 2048
    """Longest example in tokens; longer ones are cut on the right."""

    lr: float | None = None
    """Peak learning rate. Default: 5e-4 (2000 / width)^0.775, at most 2e-3; of full and top2 a tenth of that, of bitfit
    8 times, of prefix-* 15 times, of adapters half."""
    lr_ratio: float = 1.0
    """LoRA+: B learns at this many times the rate of A; its paper takes 16. The default rate shrinks to suit."""
    epochs: float | None = None
    """Passes over the data, fractions allowed. Default: 2, unless --steps is given."""
    steps: int | None = None
    """Updates to make, instead of --epochs."""
    batch: int = 8
    """Examples per update."""
    micro: int | None = None
    """Examples per forward pass; changes memory and speed, not the result. Default: by tokens, 1,024 (CPU) to 8,192."""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations again instead of keeping them, which costs a third of the time: auto only if it must be."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the vocabulary, or over the labels."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate goes from its peak: linear or cosine to zero, or constant."""
    warmup: float = 0.05
    """Share of the updates over which the rate rises to its peak."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on what is trained."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""

    eval_every: int | None = None
    """Updates between two measurements on the held-out rows. Default: ten in a run."""
    eval_rows: int = 256
    """Largest number of held-out rows to measure on; 0 for all."""
    sample: int = 2
    """Held-out prompts answered at each measurement, kept in samples.jsonl."""
    sample_len: int = 48
    """Longest such answer in tokens."""
    best_by: str = "loss"
    """What best/ is the best by: the held-out loss, or a measure: accuracy, f1, matthews; pearson, spearman."""
    early_stop: int = 0
    """Stop after this many measurements in a row without a better one; 0 never stops early."""
    keep: Literal["all", "adapter"] = "all"
    """What the run folder keeps at the end: all, or without what --resume needs."""
    save_every: float = 60.0
    """Seconds between two savings of the state for --resume; it is saved at each measurement too."""
    seed: int = 0
    """Seed of the factor A, the order of the rows and dropout."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the base: auto is bf16 where the device computes it natively, else fp32."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen linear layers in 4 bits (nf4) or 8 (int8), by bitsandbytes; --dtype auto is bf16 then."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, mps."""

    def check(self) -> list[str]:
        """Everything that is wrong with the values, in words; empty if they can be used."""
        hints = typing.get_type_hints(TrainSettings)
        kinds = {name: hint for name, hint in hints.items() if not _is_of(hint, getattr(self, name))}
        if kinds:
            return [f"{name} is {shown(getattr(self, name))}; it must be {_word(hint)}" for name, hint in kinds.items()]
        faults = [
            f"{name} is {shown(value)}; it must be {need}"
            for name, good, need in _RULES
            if (value := getattr(self, name)) is not None and not good(value)
        ]
        if self.epochs is not None and self.steps is not None:
            faults.append(f"epochs is {self.epochs} and steps is {self.steps}; give one of them")
        if self.early_stop and self.held_out == 0:
            faults.append("early_stop needs held-out rows, and held_out is 0")
        for name in ("ranks", "alphas"):
            try:
                pairs(getattr(self, name))
            except ValueError:
                faults.append(f"{name} is {getattr(self, name)!r}; it must look like q_proj=4,down_proj=16")
        if any(not part.isdigit() for part in words(self.token_rows)):
            faults.append(f"token_rows is {self.token_rows!r}; it must be token ids with commas between")
        return faults + self._unread()

    def _unread(self) -> list[str]:
        """Settings that were given and that the method does not read."""
        if self.method not in METHODS:
            return []
        plain, reads = TrainSettings(), METHODS[self.method].reads
        without = (
            [] if self.lr_ratio == 1 or "rank" in reads else ["lr_ratio is the rate of LoRA's B, which is not here"]
        )
        return without + [
            f"{name} is {getattr(self, name)!r}, which method {self.method} does not read"
            for name in METHOD_FIELDS
            if name not in ("method", *reads) and getattr(self, name) != getattr(plain, name)
        ]

    def values(self) -> dict[str, Any]:
        """The settings as plain values, None left out, in the order above."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainSettings)}
        return {name: value for name, value in found.items() if value is not None}


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value is of a field's type; whole numbers are numbers, lists from a file are tuples."""
    inside = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in inside
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_is_of(float, each) for each in value)
    if inside:
        return value is None or _is_of(inside[0], value)
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))


def _word(hint: Any) -> str:
    """A field's type in words."""
    inside = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(inside)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(inside[0] if typing.get_origin(hint) is not tuple and inside else hint, "two numbers")


_POSITIVE = (lambda value: 0 < value < math.inf, "above 0, and finite")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "0 or more, and finite")
_RULES = (
    *(
        (name, *_POSITIVE)
        for name in (
            "rank",
            "blocks",
            "bottleneck",
            "lr",
            "lr_ratio",
            "epochs",
            "steps",
            "batch",
            "micro",
            "eval_every",
            "sample_len",
        )
    ),
    *(
        (name, *_NOT_NEGATIVE)
        for name in ("prefix", "infix", "clip", "weight_decay", "eval_rows", "sample", "early_stop", "save_every")
    ),
    *(
        (name, lambda value: 0 <= value < 1, "at least 0 and below 1")
        for name in ("dropout", "held_out", "warmup", "label_smoothing")
    ),
    ("alpha", math.isfinite, "a finite number"),
    ("max_len", lambda value: value >= 2, "2 or more"),
    ("betas", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value), "two numbers in [0, 1)"),
    ("schedule", lambda value: value in ("linear", "cosine", "constant"), "linear, cosine or constant"),
    ("checkpointing", lambda value: value in ("auto", "on", "off"), "auto, on or off"),
    ("activation", lambda value: value in ("relu", "gelu", "silu", "tanh"), "relu, gelu, silu or tanh"),
    ("keep", lambda value: value in ("all", "adapter"), "all or adapter"),
    ("method", lambda value: value in METHODS, f"one of {', '.join(METHODS)}"),
)


def default_lr(width: int, method: str = "lora") -> float:
    """The peak rate for a model of this width (hidden size), to two digits.

    ``5e-4 (2000 / width)^0.775``: the fit of "LoRA Without Regret" (Thinking Machines, 2025) for Llama-type decoders.
    Its first factor is ten times the best rate of full fine-tuning, the ratio found there at every width and rank
    under alpha / r scaling. Capped at 2e-3, since narrow models lie outside the fit. Other methods have a multiple of
    it (`methods.Entry.lr`).
    """
    return float(f"{entry(method).lr * min(5e-4 * (2000 / width) ** 0.775, LR_CAP):.2g}")


def rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """The rate of update `step` (from 1) of `steps`: rises over the first `warmup * steps`, then follows `schedule`.

    Linear decay after a warm-up is the default because it is what the paper trains with (tables 9 and 11), and a decay
    to zero suits short runs: the last updates average out the noise of the small batches. No update has rate zero.
    """
    rising = round(warmup * steps)
    if step <= rising:
        return peak * step / rising
    done = (step - 1 - rising) / (steps - rising)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


def number_of_steps(settings: TrainSettings, examples: int) -> int:
    """How many updates a training over `examples` makes; the last, short batch of an epoch is an update."""
    if settings.steps is not None:
        return settings.steps
    epochs = DEFAULT_EPOCHS if settings.epochs is None else settings.epochs
    return max(1, round(epochs * math.ceil(examples / settings.batch)))


def measured_every(settings: TrainSettings, steps: int) -> int:
    """Updates between two measurements."""
    return settings.eval_every or math.ceil(steps / EVALUATIONS)


def words(text: str) -> list[str]:
    """The parts of "a,b"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def pairs(text: str) -> dict[str, float]:
    """ "a=1,b=2" as a dict; ValueError if it is not of that form."""
    found = {}
    for part in words(text):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ValueError(part)
        found[key.strip()] = float(value)
    return found
