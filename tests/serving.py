"""A base with adapters of every kind, what each gives with merged weights, and engines over them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import torch
from torch import nn

import lorica
from lorica import Adapter, LoRA
from tiny import VOCAB, gpt2, llama, phi3, stir

# name: method, targets
KINDS = {
    "r2": (LoRA(r=2, alpha=4), "all-linear"),
    "qv": (LoRA(r=4), "qv"),
    "qv2": (LoRA(r=4), "qv"),
    "qv3": (LoRA(r=4), "qv"),
    "rslora": (LoRA(r=8, scaling="alpha/sqrt(r)"), "all-linear"),
    "patterns": (LoRA(r=4, ranks={"q_proj": 16}, alphas={"o_proj": 3.0}), "q_proj,o_proj,down_proj"),
    "r64": (LoRA(r=64), "mlp"),
    "dora": (LoRA(r=4, dora=True), "all-linear"),
    "dora2": (LoRA(r=4, dora=True), "all-linear"),
    "head": (LoRA(r=4), "all-linear,lm_head"),
}
FUSED = {
    "q": (LoRA(r=4), "c_attn[q]"),
    "qv": (LoRA(r=3), "c_attn[q,v],c_proj"),
    "all": (LoRA(r=8), "all-linear"),
    "dora": (LoRA(r=4, dora=True), "c_fc,c_proj"),
}
PHI = {
    "qv": (LoRA(r=3), "qkv_proj[q,v]"),
    "up": (LoRA(r=8), "gate_up_proj[up]"),
    "all": (LoRA(r=4), "all-linear"),
}


def loud(model: nn.Module) -> nn.Module:
    """The model with larger matrices, so that different adapters say different things."""
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.ndim == 2}.values():
            parameter.mul_(3)
    return model.requires_grad_(False)


def base(family: str = "llama") -> nn.Module:
    return loud({"llama": lambda: llama(tied=False), "gpt2": gpt2, "phi3": phi3}[family]())


@functools.cache
def merged(family: str = "llama") -> dict[str | None, nn.Module]:
    """The base, and with each adapter merged; `_lorica` is still on them."""
    kinds = {"llama": KINDS, "gpt2": FUSED, "phi3": PHI}[family]
    models: dict[str | None, nn.Module] = {None: base(family)}
    for seed, (name, (method, targets)) in enumerate(kinds.items()):
        models[name] = trained(family, method, targets, seed)
    return models


def trained(family: str, method: LoRA, targets: str, seed: int) -> nn.Module:
    model = copy.deepcopy(base(family))
    lorica.inject(model, method, targets)
    stir(model, seed, 0.3)
    lorica.merge(model, check=False)
    return model


def saved(root: Path, family: str = "llama") -> Path:
    for name, model in merged(family).items():
        if name:
            Adapter.of(model).save(root / name)
    return root


def alone(model: nn.Module, ids: list[int], count: int = 12) -> list[int]:
    """What a model says by itself, greedily."""
    with torch.no_grad():
        said = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return said[0, len(ids) :].tolist()


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(5, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
