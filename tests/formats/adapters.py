"""Adapters of every shape that the formats must hold: ranks, scales, patterns, slices, embeddings."""

from __future__ import annotations

import torch

import lorica
from lorica import Adapter, LoRA
from lorica.formats import Contents
from tiny import gpt2, llama, phi3, stir

MAKE = {"llama": llama, "untied": lambda: llama(tied=False), "gpt2": gpt2, "phi3": phi3}
CASES = {
    "linear": ("llama", LoRA(r=4, alpha=8), "all-linear"),
    "a scale of thirds": ("llama", LoRA(r=3, alpha=1), "qv"),
    "rslora": ("llama", LoRA(r=8, alpha=16, scaling="alpha/sqrt(r)"), "attention"),
    "ranks": ("llama", LoRA(r=2, alpha=6, ranks={"q_proj": 5}), "qv"),
    "alphas": ("llama", LoRA(r=2, alphas={r"layers\.1\.self_attn\.k_proj": 3}), "attention"),
    "embedding": ("untied", LoRA(r=4, alpha=8), "embed_tokens, q_proj, lm_head"),
    "slices": ("gpt2", LoRA(r=2, alpha=3), "paper"),
    "one slice": ("gpt2", LoRA(r=2, alpha=3), "c_attn[k]"),
    "unequal slices": ("phi3", LoRA(r=2, alpha=4), "qkv_proj[q,v], o_proj"),
}


def adapter(case: str, seed: int = 0, base: str = "tiny") -> Adapter:
    name, method, targets = CASES[case]
    return trained(name, method, targets, seed, base)


def trained(name: str, method: LoRA, targets: str, seed: int = 0, base: str = "tiny") -> Adapter:
    model = MAKE[name]()
    lorica.inject(model, method, targets)
    stir(model, seed)
    return Adapter.of(model, meta={"base_model": base})


def contents(adapter: Adapter) -> Contents:
    return Contents(adapter.method, adapter.targets, adapter.tensors, adapter.meta)


def deltas(adapter: Adapter | Contents) -> dict[str, torch.Tensor]:
    """``scale B A`` of each layer in fp64, computed from its parts and from nothing that the formats use."""
    found: dict[str, torch.Tensor] = {}
    for target in adapter.targets:
        A, B = (adapter.tensors[f"{target.path}#{target.part or 'lora'}.{factor}"].double() for factor in "AB")
        whole = found.setdefault(target.path, torch.zeros(target.shape, dtype=torch.float64))
        rows = slice(*target.rows) if target.rows else slice(None)
        whole[rows] += adapter.method.scale_of(target.path) * (B @ A)
    return found


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of updates, relative to the largest element."""
    assert a.keys() == b.keys()
    size = max(each.abs().max() for each in a.values())
    return float(max((a[path] - b[path]).abs().max() for path in a) / size)
