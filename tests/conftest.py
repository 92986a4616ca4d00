"""Offline and quiet, for every test."""

from __future__ import annotations

import os

# Before transformers is imported: a test that asks a hub fails at once and not after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("FORCE_COLOR", None)
