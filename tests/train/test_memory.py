"""The heap's idle pages go back to the system where it has fewer left, and only there."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from lorica.train import memory


@pytest.fixture
def short_of(monkeypatch):
    """Let the system have so many bytes left."""

    def leave(count):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=count))

    return leave


@pytest.mark.skipif(memory._glibc() is None, reason="another C library")
def test_what_a_pass_left_goes_back_where_the_system_is_short_of_memory(short_of):
    pieces = [torch.ones(1 << 18) for _ in range(200)]  # 1 MB each, so in the heap
    fence = [each for place, each in enumerate(pieces) if place % 2]  # what stays keeps the heap from shrinking
    del pieces
    held = psutil.Process().memory_info().rss
    short_of(1 << 40)
    memory.relieve()
    assert psutil.Process().memory_info().rss > held - 10e6
    short_of(0)
    memory.relieve()
    assert psutil.Process().memory_info().rss < held - 50e6
    assert len(fence) == 100


def test_another_c_library_is_left_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: asked.append("memory"))
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    memory.relieve()
    assert asked == []
