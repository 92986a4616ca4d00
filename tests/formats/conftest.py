"""The bases of the adapters, as folders: some formats need a base's config."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    from adapters import MAKE

    folder = tmp_path_factory.mktemp("bases")
    for name, make in MAKE.items():
        make().config.save_pretrained(folder / name)
    return folder
