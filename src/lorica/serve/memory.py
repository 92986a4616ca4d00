"""What serving takes, from shapes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from lorica.errors import LoricaError
from lorica.models.machine import DTYPES
from lorica.plan import PACKED
from lorica.serve.places import TENSORS
from lorica.serve.requests import kv_bytes

# A step's extra time is the bytes of its distinct adapters over those of the base; a fifth is 20 %.
ADAPTER_SHARE = 0.2


@dataclass(frozen=True)
class Plan:
    """Bytes, and what they hold.

    Attributes:
        weights: of the base.
        kv_token: of the keys and values of one token.
        kv_tokens: that the cache will hold; 0: what a quarter of the free memory holds.
        adapters: by name, those that are known now.
    """

    weights: int
    kv_token: int
    kv_tokens: int
    adapters: Mapping[str, int]


def predict(config: PretrainedConfig, dtype: str, quantize: str, kv_memory: int, adapters: Mapping[str, Path]) -> Plan:
    """The plan for a model with this config; adapters count as large as their files."""
    width = DTYPES[dtype].itemsize
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError as fault:
            raise LoricaError(f"{config.model_type} is no causal model, which serving is for") from fault
    weights = sum(each.numel() for each in model.parameters())
    nbytes = weights * width
    if quantize != "none":
        head = model.get_output_embeddings()
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        nbytes -= int(linear * (width - PACKED[quantize]))
    each = kv_bytes(config.get_text_config(), width)
    sizes = {name: file.stat().st_size for name, path in adapters.items() if (file := path / TENSORS).is_file()}
    return Plan(nbytes, each, kv_memory // each, sizes)


def kept(cache: int, device: torch.device) -> int:
    """How much of a cache, in its unit, is kept side by side as well (`attention.Kept`): on a GPU recorded steps read
    the pages."""
    return 0 if device.type == "cuda" else cache // 2
