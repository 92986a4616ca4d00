"""What transformers is told so that linear layers are packed as they are read, by bitsandbytes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from lorica.errors import LoricaError, nearest

KINDS = ("none", "nf4", "fp4", "int8")


@dataclass(frozen=True)
class Packing:
    """How the linear layers of a model are kept, and where it is to be.

    Attributes:
        kind: `none` leaves a model as it is in the file, which may be packed already.
        dtype: what the packed layers compute in.
    """

    kind: str
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            known = f"{', '.join(KINDS)}{nearest(self.kind, KINDS)}"
            raise LoricaError(f"unknown way to quantize a model: {self.kind!r}; there are {known}")
        if self.kind != "none":
            _require()

    def arguments(self, config: PretrainedConfig, name: str) -> dict[str, Any]:
        """The arguments for `from_pretrained`."""
        # A packed model can hardly be moved, so it is read where it belongs.
        place = {"device_map": {"": self.device}}
        there = _kind_of(getattr(config, "quantization_config", None))
        if there is None:
            return place | {"quantization_config": self._settings()} if self.kind != "none" else {}
        if there in ("nf4", "fp4", "int8"):
            _require()
        if self.kind not in ("none", there):
            raise LoricaError(f"{name} is kept in {there} already, which cannot be quantized to {self.kind}")
        return place

    def _settings(self) -> BitsAndBytesConfig:
        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        # The block scales are quantized too, as QLoRA does (arXiv 2305.14314, section 3).
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )


def _kind_of(settings: Any) -> str | None:
    """How a checkpoint says that it is kept; None for an ordinary one."""
    if settings is None:
        return None
    known = settings if isinstance(settings, dict) else settings.to_dict()
    if known.get("load_in_4bit") or known.get("_load_in_4bit"):
        return known.get("bnb_4bit_quant_type", "fp4")
    if known.get("load_in_8bit") or known.get("_load_in_8bit"):
        return "int8"
    return str(known.get("quant_method"))


def _require() -> None:
    # Said at each call of a layer otherwise; that int8 products take fp16 inputs is what they are.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as missing:
        raise LoricaError('quantized models need bitsandbytes: pip install "lorica[quant]"') from missing
