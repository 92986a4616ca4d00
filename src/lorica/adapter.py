"""Adapter: the value. What one training made, apart from any model: it can be saved, loaded and put on a base."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lorica import algebra, beside, doors, formats, patch, resized, weights
from lorica.errors import LoricaError, all_faults
from lorica.formats import Contents, mlx, pair
from lorica.lowrank import LoRA
from lorica.targets import Target, candidates, head_parameters, task_head

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An immutable set of patches and selected parameters.

    Attributes:
        method: the settings; LoRA's give a target its rank and scale.
        targets: the matrices it changes; none of a method that finds its places itself.
        tensors: fp32 by canonical name (see `patch.trainable`).
        meta: text about it: `base_model`, `base_fingerprint`, `task_type`, `quantize` if the base was packed (`nf4`,
            `int8`), and what the trainer adds (`chat_template`, `stop_tokens`, ...).
        shares: of values trained whole that algebra made: how many times the base's own is to be added (`settled`).

    Adapters of one base can be added, subtracted and multiplied by numbers: ``(0.7 * a + 0.3 * b).truncate(r=8)``.
    """

    method: Any  # a `patch.Method`
    targets: tuple[Target, ...]
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, str]
    shares: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None, meta: Mapping[str, str] | None = None) -> Adapter:
        """A snapshot of an adapter on a model (default: the active one)."""
        record = patch.installed(model, name)
        paths = [target.path for target in record.targets if target.storage != "experts"]
        config = getattr(model, "config", None)
        known = {
            "base_model": getattr(config, "_name_or_path", "") or "",
            "base_fingerprint": patch.fingerprint(model),
            "task_type": next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), ""),
            **({"target_modules": json.dumps(_short_names(model, paths))} if record.targets else {}),
        } | ({"quantize": packing} if (packing := patch.packing(model)) else {})
        if head := [path for path in task_head(model) if any(key.startswith(f"{path}.") for key in record.selected)]:
            known["head"] = json.dumps(head)
        tensors = {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in record.values().items()}
        about = MappingProxyType(known | dict(meta or {}))
        saved = getattr(record.method, "saved", None)
        method = saved() if saved else record.method
        return cls(method, tuple(record.targets), MappingProxyType(tensors), about)

    @classmethod
    def load(cls, source: str | Path) -> Adapter:
        """Read an adapter from a folder or a file, or from a hub id. Pickles are refused.

        PEFT's layout is the native one; those of loralib, llama.cpp (GGUF) and mlx-lm are told by what is there.
        """
        path = doors.place(source)
        return cls(*formats.read(path if path.exists() else _from_hub(str(source))))

    def save(self, folder: str | Path, dtype: str = "fp32") -> None:
        """Write it in PEFT's layout, atomically; `dtype` is `fp32`, or `bf16` or `fp16` to halve the file."""
        if silent := self.silent():
            warnings.warn(
                f"{len(silent)} of {len(self.places)} patches change nothing yet (a zero factor): {silent[0]} ...",
                stacklevel=2,
            )
        formats.write(Path(folder), self.contents(), dtype)

    def contents(self) -> Contents:
        """What a file holds of it; raises for values that are only known up to the base's."""
        if self.shares:
            raise LoricaError(
                f"{len(self.shares)} parameters are trained whole ({next(iter(self.shares))} ...) and were combined"
                " with weights that do not add up to 1, which takes the base's own values: adapter.settled(model)"
            )
        return Contents(self.method, self.targets, self.tensors, self.meta)

    def apply(self, model: nn.Module, name: str = "default") -> list[str]:
        """Put it on a model as the active adapter. Every missing, extra or mis-shaped tensor is in one error."""
        targets, faults = self._targets(model)
        if self.method.takes_targets and not targets:
            raise all_faults("this adapter is not for this model:", sorted(faults) or ["it has no targets"])
        # Its tensors replace what an initialiser makes, and loftq's costs a second copy of the base.
        again = getattr(self.method, "init", "") == "loftq"
        method = dataclasses.replace(self.method, init="kaiming") if again else self.method
        also = [key for key in head_parameters(model) if key in self.tensors]
        tables, resized_faults = resized.tables(model, self.tensors, [target.path for target in targets])
        patched = patch.inject(model, method, targets, name, [*also, *tables])
        faults += resized_faults
        own = patch.trainable(model, name)
        faults += [f"missing  {key}" for key in own if key not in self.tensors]
        faults += [
            f"shape    {key}: file {tuple(tensor.shape)}, model {tuple(own[key].shape)}"
            for key, tensor in self.tensors.items()
            if key in own and own[key].shape != tensor.shape
        ]
        base = dict(patch.base_parameters(model))
        told = {target.path for target in self.targets} - {target.path for target in targets}
        faults += [
            f"extra    {key}"
            for key, tensor in self.tensors.items()
            if key not in own and _path(key) not in told and not _repeats(base.get(key), tensor) and key not in tables
        ]
        if faults:
            patch.eject(model, name)
            raise all_faults("this adapter is not for this model:", sorted(faults))
        with torch.no_grad():
            for key, parameter in own.items():
                value = self.tensors[key]
                if (share := self.shares.get(key)) is not None:
                    value = value + share * parameter.to("cpu", torch.float32)
                parameter.copy_(value)
        return patched

    def _targets(self, model: nn.Module) -> tuple[list[Target], list[str]]:
        """The targets as this model has them, and what is wrong with the others."""
        layers = candidates(model)
        paths = {target.path for target in self.targets}
        faults = [f"extra    {path} is not a layer of this model" for path in paths - set(layers)]
        faults += [
            f"missing  {path}: the config names it, the file has nothing for it"
            for path in layers
            if path not in paths
            and any(
                path == name or path.endswith(f".{name}") for name in json.loads(self.meta.get("target_modules", "[]"))
            )
        ]
        targets = []
        for target in self.targets:
            if (layer := layers.get(target.path)) is None:
                continue
            storage = weights.storage(layer)
            assert storage is not None
            there = target.part in storage.parts(layer) if storage.inside else target.storage != "experts"
            if not there:
                faults.append(f"extra    {target} is not a matrix of this model's {type(layer).__name__}")
                continue
            targets.append(dataclasses.replace(target, **storage.facts(layer, target.part)))
        return targets, faults

    def silent(self) -> list[str]:
        """The places where it still changes nothing, because a factor is zero."""
        return self.method.silent(self.targets, self.tensors)

    @property
    def places(self) -> list[str]:
        """Where it has patches: its targets, or the layers that a method found by itself."""
        found = dict.fromkeys(key.split("#")[0] for key in self.tensors if "#" in key)
        return [str(target) for target in self.targets] or list(found)

    def __add__(self, other: Adapter) -> Adapter:
        return Adapter(*algebra.combined([(1.0, self), (1.0, other)])) if isinstance(other, Adapter) else NotImplemented

    def __radd__(self, other: int) -> Adapter:
        return self if other == 0 else NotImplemented  # where Python's sum begins

    def __sub__(self, other: Adapter) -> Adapter:
        return (
            Adapter(*algebra.combined([(1.0, self), (-1.0, other)])) if isinstance(other, Adapter) else NotImplemented
        )

    def __mul__(self, weight: float) -> Adapter:
        return Adapter(*algebra.combined([(float(weight), self)])) if isinstance(weight, Real) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def truncate(self, r: int | None = None, energy: float | None = None) -> Adapter:
        """Every update at its best approximation of rank r, or of the smallest rank that keeps `energy` of it.

        See `algebra.truncated`.
        """
        return Adapter(*algebra.truncated(self, r, energy))

    @staticmethod
    def ties(*adapters: Adapter, density: float = 0.5) -> Adapter:
        """Merged by TIES (arXiv 2306.01708) in the core: see `algebra.ties`."""
        return Adapter(*algebra.ties(adapters, density))

    @staticmethod
    def dare(*adapters: Adapter, density: float = 0.5, seed: int = 0) -> Adapter:
        """Summed after DARE (arXiv 2311.03099) in the core: see `algebra.dare`."""
        return Adapter(*algebra.dare(adapters, density, seed))

    def inner(self, other: Adapter) -> float:
        """``<dW, dW'>`` over all matrices: of itself the squared (Frobenius) norm, with another how alike they are."""
        return algebra.inner(self, other)

    def settled(self, model: nn.Module) -> Adapter:
        """With the shares of the base added that algebra left open, so that it can be saved. `model`: the base."""
        tensors = beside.settled(self, dict(patch.base_parameters(model)))
        return Adapter(self.method, self.targets, MappingProxyType(tensors), self.meta)

    @property
    def nbytes(self) -> int:
        """Size of the tensors in fp32."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def sha256(self) -> str:
        """Hex digest of what the adapter does: its scales and tensors, not where it came from."""
        digest = hashlib.sha256(json.dumps(self._beside()).encode())
        shares = {f"{key} base": share for key, share in self.shares.items()}
        for key, tensor in sorted({**self.tensors, **shares}.items()):
            digest.update(f"{key} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _beside(self) -> list[Any]:
        """What its function depends on beside the tensors."""
        if isinstance(self.method, LoRA):
            return sorted((str(target), self.method.scale_of(target.key)) for target in self.targets)
        return [self.method.name, dataclasses.asdict(self.method)]


def _path(key: str) -> str:
    return key.split("#")[0] if "#" in key else key.rpartition(".")[0]


def _repeats(parameter: Tensor | None, tensor: Tensor) -> bool:
    """Whether a tensor only says what the base holds: PEFT adds the whole embedding to an adapter that touches it."""
    return parameter is not None and torch.equal(parameter.detach().to("cpu", torch.float32), tensor)


def _short_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The last names of the paths where they mean exactly those layers, as people write them; else the paths."""
    short = sorted({path.rsplit(".", 1)[-1] for path in paths})
    meant = {path for path in candidates(model) if path.rsplit(".", 1)[-1] in short}
    return short if meant == set(paths) else sorted(set(paths))


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[pair.CONFIG, pair.TENSORS, mlx.TENSORS]))
    except Exception as fault:
        raise LoricaError(
            f"there is no adapter folder {source!r} here, and it could not be had from the hub either: "
            f"{type(fault).__name__}; check the path, or the network"
        ) from fault
