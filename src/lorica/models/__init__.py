"""Models: a folder, a hub id, a `.gguf` file or a built-in alias -> model and tokenizer, ready to be patched."""

from __future__ import annotations

from lorica.models.builtin import BUILTIN, Builtin
from lorica.models.checkpoint import quiet
from lorica.models.heads import draw_head, is_classifier, labels_of
from lorica.models.loading import load
from lorica.models.machine import resolve_device, resolve_dtype
from lorica.models.opening import Description, Opened, adapter_folder, describe, load_tokenizer, open_thing
from lorica.models.wheels import fetch_wheel

__all__ = [
    "BUILTIN",
    "Builtin",
    "Description",
    "Opened",
    "adapter_folder",
    "describe",
    "draw_head",
    "fetch_wheel",
    "is_classifier",
    "labels_of",
    "load",
    "load_tokenizer",
    "open_thing",
    "quiet",
    "resolve_device",
    "resolve_dtype",
]
