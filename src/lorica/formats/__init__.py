"""Other people's files: each module turns one layout into `Contents` and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lorica.lowrank import LoRA
from lorica.targets import Target


class Contents(NamedTuple):
    """What an adapter file holds, whatever its layout.

    `tensors` are fp32 by canonical name (see `patch.trainable`); `meta` is text about where they came from.
    """

    method: LoRA
    targets: tuple[Target, ...]
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, str]
