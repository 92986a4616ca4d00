"""What is in a model, an adapter, a run, or a folder of adapters, read from headers where they say enough."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from lorica import doors, formats, methods, models, patch, targets, weights
from lorica.adapter import Adapter
from lorica.errors import LoricaError
from lorica.formats import engines, pair
from lorica.lowrank import LoRA


def inspect(thing: str | Path, norms: bool = False) -> dict[str, Any]:
    """Facts about `thing`; `kind` says what it is: `model`, `adapter`, `run` or `folder`.

    Args:
        norms: load an adapter's base model too, and compare the size of each update with that of its matrix.
    """
    path = doors.place(thing)
    if str(thing) not in models.BUILTIN and path.is_dir():
        # First: an adapter from a hub has the settings of its run beside it.
        if (path / pair.CONFIG).is_file():
            return _adapter(path, norms)
        if (path / "run.toml").is_file():
            return _run(path, norms)
        if not (path / "config.json").is_file() and (found := _adapter_folders(path)):
            return {"kind": "folder", "path": str(path), "adapters": [_row(folder, path) for folder in found]}
    if str(thing) not in models.BUILTIN and path.exists() and formats.recognise(path):
        return _adapter(path, norms)
    return _model(thing)


def _model(thing: str | Path) -> dict[str, Any]:
    model, _ = models.load(thing)
    about = models.describe(model)
    layers = targets.candidates(model)
    return {
        "kind": "model",
        "name": about.name,
        "title": about.title,
        "class": about.kind,
        "parameters": about.parameters,
        "bytes": about.nbytes,
        "dtype": about.dtype,
        "layers": targets.names(layers),
        "slices": sorted({path.rsplit(".", 1)[-1] for path in layers if targets.slices(model, path)}),
        "fingerprint": patch.fingerprint(model),
    }


def _adapter(folder: Path, norms: bool) -> dict[str, Any]:
    adapter = Adapter.load(folder)
    found = {
        "kind": "adapter",
        "path": str(folder),
        "base": adapter.meta.get("base_model", ""),
        **_method(adapter),
        "targets": targets.names(adapter.places) if adapter.places else "",
        "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
        "file_bytes": _bytes(folder),
        "beside": sorted(key for key in adapter.tensors if "#" not in key or "#tokens" in key),
        "dead": adapter.silent(),
        "sha256": adapter.sha256,
        "vllm": _vllm(adapter, folder),
    }
    return found | ({"norms": _norms(adapter)} if norms else {})


def _method(adapter: Adapter) -> dict[str, Any]:
    """The method and its settings; `ranks`, `alpha` and `scales` are LoRA's."""
    method = adapter.method
    if not isinstance(method, LoRA):
        return {"method": method.name, "detail": methods.in_words(method), "unmergeable": method.unmergeable}
    return {
        "method": "dora" if method.dora else "lora",
        "ranks": _ranks(adapter),
        "alpha": method.alpha,
        "scales": sorted({round(method.scale_of(target.key), 6) for target in adapter.targets}),
    }


def _ranks(adapter: Adapter) -> list[int]:
    method = adapter.method
    return sorted({method.rank_of(target.key) for target in adapter.targets}) if isinstance(method, LoRA) else []


def _run(folder: Path, norms: bool) -> dict[str, Any]:
    settings = doors.toml(folder / "run.toml")
    best = next((folder / name for name in ("best", "last") if (folder / name / pair.CONFIG).is_file()), None)
    end: dict[str, Any] = {}
    metrics = folder / "metrics.jsonl"
    for event in doors.json_lines(metrics, "kind") if metrics.is_file() else []:
        if event["kind"] == "end":
            end = event
    kept = ("steps", "planned", "best_step", "before", "after", "seconds", "peak_rss_bytes")
    if wrong := [key for key in kept if key in end and not isinstance(end[key], int | float | None)]:
        raise LoricaError(f"{metrics}: the end of the run gives no number as {', '.join(wrong)}")
    return {
        "kind": "run",
        "path": str(folder),
        "finished": bool(end),
        "settings": {key: value for key, value in settings.items() if not isinstance(value, dict)},
        "result": {key: end[key] for key in kept if key in end},
        "adapter": _adapter(best, norms) if best else None,
    }


def _adapter_folders(folder: Path) -> list[Path]:
    """The adapters below a folder: folders in PEFT's layout, and runs by the best one they hold."""
    found = [path.parent for path in sorted(folder.glob("*/adapter_config.json"))]
    return sorted(found + [path.parent for path in folder.glob("*/best/adapter_config.json")])


def _row(folder: Path, root: Path) -> dict[str, Any]:
    name = str(folder.relative_to(root))
    try:
        adapter = Adapter.load(folder)
    except LoricaError as fault:
        return {"name": name, "loads": False, "fault": str(fault)}
    dead = adapter.silent()
    return {
        "name": name,
        "loads": True,
        "base": adapter.meta.get("base_model", ""),
        "method": adapter.method.name,
        "ranks": _ranks(adapter),
        "targets": targets.names(adapter.places) if adapter.places else "",
        "bytes": _bytes(folder),
        "fault": f"{len(dead)} of {len(adapter.places)} patches are zero" if dead else "",
    }


def _bytes(path: Path) -> int:
    """Of the file with the tensors."""
    path = formats.find(path)
    files = [path] if path.is_file() else list(path.glob("adapter*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _norms(adapter: Adapter) -> dict[str, Any]:
    """``||dW|| / ||W||`` (Frobenius) of each patched matrix of the base that the adapter names."""
    base = adapter.meta.get("base_model")
    if not base:
        raise LoricaError("the adapter names no base model, so there is nothing to compare its updates with")
    model, _ = models.load(base)
    adapter.apply(model)
    found: dict[str, float] = {}
    for (path, part), each in patch.installed(model).patches.items():
        if hasattr(each, "delta"):
            layer: nn.Module = model.get_submodule(path)
            storage = weights.storage(layer)
            assert storage is not None
            name = path if part == "lora" else f"{path}[{part}]"
            found[name] = float(each.delta().norm() / storage.read(layer, part).norm())  # type: ignore[operator]
    ordered = sorted(found.values())
    largest = max(found, key=found.__getitem__)
    return {"median": ordered[len(ordered) // 2], "max": found[largest], "max_at": largest, "by_target": found}


def _vllm(adapter: Adapter, folder: Path) -> dict[str, str]:
    """The line that serves it with vLLM, or why vLLM would refuse it or read it wrongly."""
    method = adapter.method
    if not isinstance(method, LoRA):
        merged = f"it cannot be merged either, since {method.unmergeable}" if method.unmergeable else "merge it"
        return {"refused": f"vLLM knows no {method.name}; {merged}"}
    against = [
        reason
        for reason, holds in {
            "vLLM refuses DoRA: merge it (lorica merge X -o DIR)": method.dora,
            "it trains whole modules": bool(method.modules_to_save),
            "it trains biases": method.bias != "none",
            "it trains token rows": bool(method.token_rows),
            "vLLM reads one scale for all layers": bool(method.ranks or method.alphas),
        }.items()
        if holds
    ]
    if formats.recognise(folder) != "peft":
        against = [f"it takes PEFT's layout: lorica convert {folder} --to vllm"]
    if against:
        return {"refused": "; ".join(against)}
    name = re.sub(r"\W+", "-", (folder.parent if folder.name in ("best", "last") else folder).resolve().name)
    base = adapter.meta.get("base_model") or "BASE"
    return {"line": engines.vllm_line(base, name, folder)}
