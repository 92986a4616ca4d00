"""The methods: LoRA and what the paper compares it with, one line each.

A method is a frozen dataclass of its settings that has what `patch.Method` asks for. Its line says where it is, which
settings of a training it reads (they have the same names there, but for LoRA's), and what can be done with it; the
tests take every line through every law, and `docs/methods.md` is made from them. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorica.errors import LoricaError, nearest

if TYPE_CHECKING:
    from lorica.patch import Method


@dataclass(frozen=True)
class Entry:
    """A method and what can be done with it.

    Attributes:
        name: after `--method`.
        home: ``module:class`` of its settings.
        what: one line for help and docs.
        reads: settings of a training that it reads.
        lr: its default learning rate, as a multiple of LoRA's.
        neutral: step zero is the base model, to the bit (law 1).
        mixes: rows of one batch may each have another adapter of it when it is served.
        packs: an example in a pack gets what it gets alone.
        shares: many adapters of it can be trained in one pass (`--sweep`).
    """

    name: str
    home: str
    what: str
    reads: tuple[str, ...]
    lr: float = 1.0
    neutral: bool = True
    mixes: bool = False
    packs: bool = True
    shares: bool = False

    @property
    def kind(self) -> type[Any]:
        """The dataclass of its settings."""
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(f"lorica.{module}"), name)

    @property
    def unmergeable(self) -> str:
        """Why it cannot be folded into the weights, at its default settings; empty where it can."""
        return self.kind().unmergeable

    @property
    def peft_type(self) -> str:
        """What the config of its adapters is marked with: PEFT's own type, or one that PEFT refuses."""
        return "LORA" if self.name == "lora" else "LORICA_" + self.name.upper().replace("-", "_").replace("+", "_")


_LORA = (
    "rank", "alpha", "dropout", "targets", "scaling", "init", "bias", "ranks", "alphas", "modules_to_save",
    "token_rows", "tied", "dora",
)  # fmt: skip
_ADAPTERS, _BOTTLENECK = "methods.adapters", ("bottleneck", "activation")
_TOKENS, _PREFIX = "methods.prefix", ("prefix", "infix")
_BESIDE = ("rank", "alpha", "dropout", "targets", "scaling", "init", *_PREFIX)
# Rates beside LoRA's: a tenth for whole weights ("LoRA Without Regret"), and the paper's table 12 (1.6e-3 for biases,
# 1e-4 for adapters, 2e-4 for LoRA). Rows of special tokens are as large as embeddings and need more (docs/LOG.md).
_ENTRIES = (
    Entry("lora", "lowrank:LoRA", "a low-rank update of the targets", _LORA, mixes=True, shares=True),
    Entry("full", "methods.selections:Full", "every parameter", (), lr=0.1),
    Entry("top2", "methods.selections:Top", "the last blocks (2)", ("blocks",), lr=0.1),
    Entry("bitfit", "methods.selections:BitFit", "every bias", ("add_biases",), lr=8.0),
    *(
        Entry(f"adapter-{letter}", f"{_ADAPTERS}:Adapter{letter.upper()}", what, reads, lr=0.5, shares=True)
        for letter, what, reads in (
            ("h", "layers after attention and MLP (Houlsby)", _BOTTLENECK),
            ("l", "layers after blocks, with a LayerNorm (Lin)", _BOTTLENECK),
            ("p", "layers after MLP and LayerNorm (Pfeiffer)", _BOTTLENECK),
            ("d", "adapter-p in the upper blocks", (*_BOTTLENECK, "blocks")),
        )
    ),
    Entry("prefix-embedding", f"{_TOKENS}:PrefixEmbedding", "embeddings of special tokens", _PREFIX, 15, neutral=False),
    Entry("prefix-layer", f"{_TOKENS}:PrefixLayer", "activations of special tokens", _PREFIX, 15, neutral=False),
    Entry("lora+prefix-embedding", f"{_TOKENS}:LoRAPrefixEmbedding", "both", _BESIDE, neutral=False),
    Entry("lora+prefix-layer", f"{_TOKENS}:LoRAPrefixLayer", "both", _BESIDE, neutral=False),
)
METHODS = {entry.name: entry for entry in _ENTRIES}


def entry(name: str) -> Entry:
    """The line of a method; raises with the names there are."""
    if name not in METHODS:
        raise LoricaError(f"there is no method {name!r}{nearest(name, METHODS)}; there are: {', '.join(METHODS)}")
    return METHODS[name]


def of(method: Method) -> Entry:
    """The line of some settings."""
    return entry(method.name)


def alone(method: Method) -> str:
    """Why rows of one batch cannot each have another adapter of a method; empty where they can (`Entry.mixes`)."""
    if of(method).mixes:
        return ""
    other = f"nor merged, since {method.unmergeable}" if method.unmergeable else "but merged (lorica merge X -o DIR)"
    return f"an adapter of {method.name} cannot be served beside others, {other}"


def in_words(method: Method) -> str:
    """The settings of a method that reads plain ones: ``bottleneck 64, activation relu``, or what it is."""
    found = {name: getattr(method, name) for name in of(method).reads if name != "targets"}
    said = [
        name.replace("_", " ") if value is True else f"{name} {value}"
        for name, value in found.items()
        if value not in (False, None)
    ]
    return ", ".join(said) or of(method).what
