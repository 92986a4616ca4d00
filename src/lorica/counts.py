"""Numbers of trained parameters: what the paper prints, what its formulas give, and what the injected model has.

The models are built from their published shapes on torch's meta device: nothing is downloaded and no memory is taken,
whatever their size. The printed numbers and their settings are data, in `paper_counts.toml`.

    full        L (12 d^2 + 13 d) and the embeddings             all of the model but a new head
    top2        2 (12 d^2 + 13 d)                                the last two blocks
    bitfit      (11 L + 1) d                                     every bias
    lora        2 d r of each matrix                             section 5.1, |Theta| = 2 L_LoRA d r
    adapter-*   2 d r + r + d of each, and 2 d of each new LayerNorm
    preembed    d (lp + li)
    prelayer    L d (lp + li)
"""

from __future__ import annotations

import copy
import functools
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from importlib import resources
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    GPT2Config,
    PretrainedConfig,
    RobertaConfig,
)

from lorica import patch
from lorica.errors import LoricaError
from lorica.lowrank import LoRA
from lorica.methods.adapters import AdapterD, AdapterH, AdapterL, AdapterP
from lorica.methods.prefix import LoRAPrefixEmbedding, LoRAPrefixLayer, PrefixEmbedding, PrefixLayer
from lorica.methods.selections import BitFit, Full, Top
from lorica.plan import GPT3, Work, config_of, predict

UNITS = {"M": 10**6, "B": 10**9}
# What each family calls the matrices of attention.
MATRICES = {
    "gpt2": {"q": "c_attn[q]", "k": "c_attn[k]", "v": "c_attn[v]", "o": "attn.c_proj"},
    "roberta": {"q": "query", "v": "value"},
    "deberta-v2": {"q": "query_proj", "v": "value_proj"},
}
# New parameters of a task, which no row but one counts.
_HEAD = r"(classifier|pooler)\."


@dataclass(frozen=True)
class Row:
    """One printed number and the settings it belongs to; see the head of `paper_counts.toml` for the fields."""

    table: str
    model: str
    method: str
    printed: str
    r: int = 0
    on: str = ""
    lp: int = 0
    li: int = 0
    share: float = 0.0
    misprint: str = ""
    nominal: str = ""
    note: str = ""

    @property
    def settings(self) -> str:
        """The settings in words: ``r = 8 on q,v``."""
        parts = []
        if self.r:
            parts.append(f"r = {self.r}" + (f" on {self.on}" if self.on else ""))
        if self.lp or self.li:
            parts.append(f"lp = {self.lp}, li = {self.li}")
        if self.share:
            parts.append(f"{self.share:.1%} of the model")
        return "; ".join(parts)


@dataclass(frozen=True)
class Checked:
    """A row beside its right value.

    Attributes:
        row: what is printed.
        formula: the number by arithmetic from the model's shapes.
        counted: the number on the injected model; None for a method that is not here to be injected.
        digits: how the printed digits come from the right value: rounded, cut, or not at all (empty).
        mark: ok, misprint or nominal; `differs` where this table and the code do not agree.
        why: the reason of a misprint or a nominal value, or what to know of the row.
    """

    row: Row
    formula: int
    counted: int | None
    digits: str
    mark: str
    why: str


def paper() -> list[Checked]:
    """Every printed number beside the two others, in the paper's order."""
    told = _told()
    built = {name: _on_no_device(name) for name in told["models"]}
    return [_check(Row(table, **row), told["why"], built) for table, rows in told["tables"].items() for row in rows]


def titles() -> dict[str, str]:
    """The paper's names of the models, by ours."""
    return _told()["models"]


def digits(printed: str, value: int) -> str:
    """How the digits of ``"37.7M"`` come from a value: `rounded`, `cut` off, or an empty string if they do not."""
    number, unit = printed.replace(",", "")[:-1], printed[-1]
    exact, step = Decimal(value) / UNITS[unit], Decimal(1).scaleb(-len(number.partition(".")[2]))
    for how, rounding in (("rounded", ROUND_HALF_UP), ("cut", ROUND_DOWN)):
        if exact.quantize(step, rounding) == Decimal(number):
            return how
    return ""


def formula(row: Row) -> int:
    """The number of a row by arithmetic alone (section 5.1; the shapes are those of `config`)."""
    shape = config(row.model)
    d, depth = shape.hidden_size, shape.num_hidden_layers
    adapter = 2 * d * row.r + row.r + d
    block = 12 * d**2 + 13 * d
    lora = 2 * d * row.r * depth * len(row.on.split(","))
    tokens = d * (row.lp + row.li)
    if row.share:
        return round(row.share * (depth * block + _embeddings(shape)))
    return {
        "full": depth * block + _embeddings(shape),
        "top2": 2 * block,
        "bitfit": 11 * d * depth + d,
        "lora": lora,
        "lora+head": lora + d * d + d + 2 * d + 2,
        "adapter-h": 2 * depth * adapter,
        "adapter-l": depth * adapter + 2 * depth * d,
        "adapter-p": depth * adapter,
        "adapter-d": depth * adapter,
        "preembed": tokens,
        "prelayer": depth * tokens,
        "lora+preembed": lora + tokens,
        "lora+prelayer": lora + depth * tokens,
    }[row.method]


def counted(model: nn.Module, method: patch.Method, spec: str = "all-linear") -> int:
    """What a method trains on a model of the meta device, where it is injected; the model is then as before."""
    with torch.device("meta"):
        patch.inject(model, method, spec)
        found = patch.count(model).trainable
        patch.eject(model)
    return found


def _lying(model: nn.Module, pattern: str) -> int:
    """The number of parameters whose whole name matches a regex."""
    found = {id(each): each.numel() for name, each in patch.base_parameters(model) if re.fullmatch(pattern, name)}
    return sum(found.values())


def _lora(model: Any, row: Row) -> int:
    return _on(model, row, LoRA(r=row.r))


def _both(model: Any, row: Row, kind: type[LoRAPrefixEmbedding]) -> int:
    return _on(model, row, kind(prefix=row.lp, infix=row.li, rank=row.r))


def _on(model: Any, row: Row, method: patch.Method) -> int:
    names = MATRICES[model.config.model_type]
    return counted(model, method, ",".join(names[each] for each in row.on.split(",")))


# How the rows of a method are counted. A method without an entry is "by formula" in the table.
COUNTERS: dict[str, Callable[[Any, Row], int]] = {
    "preembed": lambda model, row: counted(model, PrefixEmbedding(row.lp, row.li)),
    "prelayer": lambda model, row: counted(model, PrefixLayer(row.lp, row.li)),
    "lora+preembed": lambda model, row: _both(model, row, LoRAPrefixEmbedding),
    "lora+prelayer": lambda model, row: _both(model, row, LoRAPrefixLayer),
    "full": lambda model, row: counted(model, Full()) - _lying(model, f"{_HEAD}.*"),
    "top2": lambda model, row: counted(model, Top()),
    "bitfit": lambda model, row: counted(model, BitFit()) - _lying(model, f"{_HEAD}.*bias"),
    "lora": _lora,
    "adapter-h": lambda model, row: counted(model, AdapterH(row.r)),
    "adapter-l": lambda model, row: counted(model, AdapterL(row.r)),
    "adapter-p": lambda model, row: counted(model, AdapterP(row.r)),
    "adapter-d": lambda model, row: counted(model, AdapterD(row.r, blocks=model.config.num_hidden_layers)),
    "lora+head": lambda model, row: _lora(model, row) + _lying(model, f"{_HEAD}.*"),
}


def config(name: str) -> PretrainedConfig:
    """The published shapes of a model of the paper, by the name in `paper_counts.toml`."""
    if name == GPT3:
        return config_of(GPT3)
    if name.startswith("gpt2"):
        d, depth, heads = {"gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20)}[name]
        return GPT2Config(n_embd=d, n_layer=depth, n_head=heads, n_positions=1024, vocab_size=50257)
    if name == "deberta-xxl":
        shapes: dict[str, Any] = {
            "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24,
            "intermediate_size": 6144, "max_position_embeddings": 512, "type_vocab_size": 0,
            "position_biased_input": False, "relative_attention": True, "position_buckets": 256,
            "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3, "conv_act": "gelu",
        }  # fmt: skip
        return DebertaV2Config(**shapes)
    d, depth = {"roberta-base": (768, 12), "roberta-large": (1024, 24)}[name]
    # RoBERTa's positions begin at 2.
    return RobertaConfig(
        vocab_size=50265, hidden_size=d, num_hidden_layers=depth, num_attention_heads=d // 64, intermediate_size=4 * d,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip


def _embeddings(shape: Any) -> int:
    """Parameters of a model outside its blocks and its head: tables of rows of d, and LayerNorms of 2 d."""
    d = shape.hidden_size
    if shape.model_type == "gpt2":
        return (shape.vocab_size + shape.n_positions + 2) * d
    if shape.model_type == "roberta":
        return (shape.vocab_size + shape.max_position_embeddings + shape.type_vocab_size + 2) * d
    # DeBERTa: relative positions both ways, and a convolution beside the first block; each with its LayerNorm.
    return (shape.vocab_size + 2) * d + (2 * shape.position_buckets + 2) * d + shape.conv_kernel_size * d**2 + 3 * d


def _on_no_device(name: str) -> nn.Module:
    shape = copy.deepcopy(config(name))
    kind = AutoModelForCausalLM if shape.model_type == "gpt2" else AutoModelForSequenceClassification
    with torch.device("meta"):
        return kind.from_config(shape)


def _check(row: Row, why: dict[str, str], built: dict[str, nn.Module]) -> Checked:
    number = formula(row)
    count = COUNTERS[row.method](built[row.model], row) if row.method in COUNTERS and not row.share else None
    how = digits(row.printed, number)
    mark = "misprint" if row.misprint else "nominal" if row.nominal else "ok"
    if count not in (None, number) or (how if mark == "misprint" else mark == "ok" and not how):
        mark = "differs"
    reason = row.misprint or row.nominal or row.note
    return Checked(row, number, count, how, mark, why[reason] if reason else "")


@functools.cache
def _told() -> dict[str, Any]:
    text = (resources.files("lorica") / "paper_counts.toml").read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise LoricaError(f"paper_counts.toml of this install is damaged: {fault}; install lorica again") from fault


def gpt3_claims() -> list[tuple[str, str, float, str]]:
    """The paper's claims on GPT-3 175B (section 4.2) by arithmetic: (what, how, number, what the paper says).

    Adam's memory is that of weights and two moments in fp16, which the paper's 1.2 TB has beside what it does not
    list; with fp32 moments and masters, as mixed precision has them, it is 16 bytes per parameter.
    """
    found = predict(config_of(GPT3), Work(LoRA(r=4), "qv", "fp16", lengths=(8,)), process=0)
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
