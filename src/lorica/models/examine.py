"""What a report of a fault has to say about the machine and the install, and a small run through the whole method."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import LlamaConfig, LlamaForCausalLM

from lorica import __version__, files, patch
from lorica.adapter import Adapter
from lorica.lowrank import LoRA
from lorica.models.builtin import BUILTIN, place
from lorica.models.machine import native_bf16, resolve_device, resolve_dtype

_BASE = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "gguf", "huggingface_hub", "rich", "tyro")
_EXTRAS = {
    "data": ("datasets", "pandas", "pyarrow"),
    "plot": ("matplotlib",),
    "quant": ("bitsandbytes",),
    "serve": ("prometheus_client", "pydantic", "starlette", "uvicorn"),
}
_OTHERS = ("peft", "bitsandbytes", "triton")


def examine(device: str = "auto") -> dict[str, Any]:
    """Facts about this machine and this install, by heading; sizes in bytes. Opens no connection."""
    return {
        "versions": {"lorica": __version__, "python": platform.python_version()}
        | {name: version for name in (*_BASE, *_OTHERS) if (version := _version(name))},
        "machine": _machine(device),
        "extras": {extra: [name for name in names if not _version(name)] for extra, names in _EXTRAS.items()},
        "pip": importlib.util.find_spec("pip") is not None,
        "caches": {
            "lorica": _folder(files.cache_dir()),
            "hub": _folder(Path(HF_HUB_CACHE)) | {"token": huggingface_hub.get_token() is not None},
            "builtin": {alias: place(alias).is_dir() for alias in BUILTIN},
        },
    }


def selftest(device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Train, merge, save and load an adapter on a tiny random model, in the number format that training would use.

    Returns:
        `ok`, `seconds`, `dtype`, and `steps`: what each step found, "ok" or the fault.
    """
    started = time.perf_counter()
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    steps: dict[str, str] = {}
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = _tiny().to(where, kind)  # type: ignore[arg-type]
        ids = torch.arange(12, device=where).reshape(2, 6)
        before = _logits(model, ids)
        for name, step in _steps(model, ids, before, Path(folder)).items():
            try:
                steps[name] = step() or "ok"
            except Exception as error:  # whatever it is, it is what the report is for
                steps[name] = f"{type(error).__name__}: {error}"
            if steps[name] != "ok":
                break
    return {
        "ok": all(found == "ok" for found in steps.values()),
        "seconds": round(time.perf_counter() - started, 2),
        "dtype": str(kind).removeprefix("torch."),
        "steps": steps,
    }


def _steps(
    model: LlamaForCausalLM, ids: torch.Tensor, before: torch.Tensor, folder: Path
) -> dict[str, Callable[[], str | None]]:
    """Each returns a fault, or nothing; a later one needs what the earlier ones did."""

    def forward() -> str | None:
        patch.inject(model, LoRA(r=4, alpha=8), targets="all-linear")
        return None if torch.equal(_logits(model, ids), before) else "step zero is not the base model"

    def backward() -> str | None:
        trained = patch.trainable(model)
        optimizer = torch.optim.SGD(trained.values(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        still = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
        return f"no gradient in {', '.join(still)}" if still else None

    def merge() -> str | None:
        unmerged = _logits(model, ids)
        patch.merge(model)
        off = (_logits(model, ids) - unmerged).abs().max() / unmerged.abs().max()
        patch.unmerge(model)
        if not torch.equal(_logits(model, ids), unmerged):
            return "unmerge did not restore the weights"
        # A few roundings of the number format, relative to the largest logit.
        return None if off < 32 * torch.finfo(unmerged.dtype).eps else f"merging changed the logits by {off:.1e}"

    def save() -> str | None:
        Adapter.of(model).save(folder / "adapter")
        return None

    def load() -> str | None:
        tuned = _logits(model, ids)
        patch.eject(model)
        if not torch.equal(_logits(model, ids), before):
            return "eject did not restore the base"
        Adapter.load(folder / "adapter").apply(model)
        return None if torch.equal(_logits(model, ids), tuned) else "the loaded adapter gives other logits"

    return {"forward": forward, "backward": backward, "merge": merge, "save": save, "load": load}


def _tiny() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
    ).eval()


@torch.no_grad()
def _logits(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def _machine(device: str) -> dict[str, Any]:
    found = resolve_device(device)
    memory = psutil.virtual_memory()
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(found),
        "bf16": native_bf16(found),
        "dtype": str(resolve_dtype("auto", found)).removeprefix("torch."),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory.total,
        "memory_free": memory.available,
        "disk_free": shutil.disk_usage(_existing(files.cache_dir())).free,
    }
    if torch.cuda.is_available():
        every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        facts["cuda"] = torch.version.cuda
        facts["gpus"] = [{"name": gpu.name, "memory": gpu.total_memory} for gpu in every]
    return facts


def _folder(path: Path) -> dict[str, Any]:
    """Where it is, without the user's name, and what it weighs; a file that is linked to counts once."""
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    home = Path.home()
    shown = f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
    return {"path": shown, "bytes": size}


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
