"""loralib's layout, that of the paper's own code: a state dict with `<path>.lora_A` and `<path>.lora_B`.

    Linear        lora_A  [r, in]        lora_B  [out, r]
    Embedding     lora_A  [r, num]       lora_B  [dim, r]
    MergedLinear  lora_A  [r n, in]      lora_B  [out n / m, r]       n of the m equal slots of a fused layer have one:
                                                                      rows g r to (g + 1) r of A belong to the g-th
    Conv2d        lora_A  [r k, in k]    lora_B  [out k, r k]         B A [out k, in k] read as [out, in, k, k]

beside whole parameters under their own names (a trained head, biases). The file holds neither alpha nor which slots
are on nor k, because loralib has them in the code of the model: whoever reads it must say them, unless lorica wrote it,
which keeps them in the file's metadata. A convolution gets PEFT's factors, at rank r k^2, which is exact; loralib's
Conv1d and Conv3d never worked, since their B A has not the size of the weight. loralib itself writes pickles, which are
opened only when that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica import doors, tensorfiles
from lorica.errors import LoricaError, all_faults, shown
from lorica.formats import Contents, meta_of
from lorica.formats.pair import DTYPES
from lorica.formats.updates import (
    STORED,
    Update,
    by_path,
    joined,
    method_of,
    name,
    one_alpha,
    refusals,
    storage_by_name,
)
from lorica.lowrank import BIASES, LoRA
from lorica.targets import Target

OFF = "-"  # a slot without an update
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def write(path: Path, contents: Contents, dtype: str = "fp32") -> list[str]:
    """Write a state dict in safetensors; returns what had to be changed to fit, and what the model's code must say."""
    found, rest = joined(contents)
    if against := refusals(contents, rest, plain=True):
        raise all_faults("loralib's layout has no place for what this adapter holds:", against)
    slots: dict[str, list[str]] = {}
    for layer, parts in by_path(contents.targets).items():
        if enabled := _enabled(parts):
            slots[layer] = enabled
            A, B = (torch.cat([contents.tensors[f"{name(target)}.{factor}"] for target in parts]) for factor in "AB")
            found[layer] = Update(A, B, found[layer].scale, found[layer].storage)
    alpha, notes = one_alpha(found.values()), []
    if alpha is None:
        notes.append(f"folded the scales into B: {', '.join(sorted({f'{each.scale:g}' for each in found.values()}))}")
        found = {layer: update.folded() for layer, update in found.items()}
    ranks = ", ".join(map(str, sorted({update.rank for update in found.values()})))
    notes.append(f"build the layers with r={ranks} and lora_alpha={'r' if alpha is None else f'{alpha:g}'}")
    notes += [
        f"{layer}: MergedLinear with enable_lora={[slot != OFF for slot in each]}" for layer, each in slots.items()
    ][:1]
    tensors = {key: tensor.to(DTYPES[dtype]) for key, tensor in rest.items()}
    for layer, update in found.items():
        for factor in "AB":
            tensors[f"{layer}.lora_{factor}"] = getattr(update, factor).to(DTYPES[dtype])
    ours = {
        "alpha": alpha,
        "slots": slots,
        "storages": {layer: update.storage for layer, update in found.items()},
        "meta": {key: value for key, value in contents.meta.items() if key != "target_modules"},
        "beside": {"bias": contents.method.bias, "modules_to_save": contents.method.modules_to_save},
    }
    tensorfiles.write(path, dict(sorted(tensors.items())), ours)
    return notes


def read(
    path: Path,
    alpha: float | None = None,
    slots: Mapping[str, Sequence[str]] | None = None,
    pickled: bool = False,
    kernels: Mapping[str, int] | None = None,
) -> Contents:
    """Read a state dict.

    Args:
        alpha: loralib's `lora_alpha`, which the file does not hold; the scale is ``alpha / r``, r as the shapes say.
        slots: of MergedLinear layers by the end of their path: their slots in order, `-` for those without an update,
            as ``{"c_attn": ["q", "-", "v"]}`` for ``enable_lora=[True, False, True]``.
        pickled: open a pickle, for tensors alone (torch's `weights_only`).
        kernels: the k of Conv2d layers by the end of their path.
    """
    faults: list[str] = []
    raw, ours = _load(path, pickled, faults)
    paths = sorted({key.rpartition(".")[0] for key in raw if key.endswith((".lora_A", ".lora_B"))})
    enabled = {layer: _of(layer, slots or {}) or ours.get("slots", {}).get(layer) for layer in paths}
    sizes = {layer: k for layer in paths if (k := _of(layer, kernels or {}))}
    faults += [f"--kernels {end}: no such layer" for end in kernels or {} if not any(_of(p, {end: 1}) for p in paths)]
    faults += [] if paths else ["it has no tensor called ....lora_A"]
    faults += [f"unexpected  {tensorfiles.shown_name(key)}" for key in raw if "#" in key]
    if alpha is None and "alpha" not in ours:
        faults.append(
            "which lora_alpha its layers were built with is not in such a file: give it with --alpha, as in"
            f" lorica convert {path} --alpha 16 --to peft -o OUT"
        )
    for layer in paths:
        faults += _layer_faults(layer, raw, enabled[layer], sizes.get(layer, 1))
    if faults:
        raise all_faults(f"{path} cannot be read as loralib's:", faults)
    alpha = ours["alpha"] if alpha is None else alpha
    tensors: dict[str, Tensor] = {}
    targets: list[Target] = []
    layers: dict[str, tuple[int, float]] = {}
    for layer in paths:
        A, B = raw.pop(f"{layer}.lora_A"), raw.pop(f"{layer}.lora_B")
        k = sizes.get(layer, 0)
        scale = 1.0 if alpha is None else alpha * max(1, k) / B.shape[1]
        if k:
            A, B = _by_channels(A, B, k)
        layers[layer] = (B.shape[1], scale)
        storage = ours.get("storages", {}).get(layer) or storage_by_name(layer)
        for target, a, b in _parts(layer, storage, A, B, enabled[layer], k):
            targets.append(target)
            tensors[f"{name(target)}.A"], tensors[f"{name(target)}.B"] = a, b
    method = method_of(layers)
    beside = ours.get("beside") or _beside(raw, paths)
    method = LoRA(r=method.r, alpha=method.alpha, ranks=method.ranks, alphas=method.alphas, **beside)
    return Contents(method, tuple(targets), tensors | raw, meta_of(ours.get("meta", {}), path))


def _enabled(parts: list[Target]) -> list[str]:
    """The slots of a fused layer whose parts MergedLinear can hold: all of one size, which divides the layer."""
    sizes = {target.rows[1] - target.rows[0] if target.rows else 0 for target in parts}
    size, out = min(sizes), parts[0].shape[0]
    if len(sizes) > 1 or not size or out % size or any(target.rows and target.rows[0] % size for target in parts):
        return []
    slots = [OFF] * (out // size)
    for target in parts:
        assert target.rows and target.part
        slots[target.rows[0] // size] = target.part
    return slots


def _parts(
    layer: str, storage: str, A: Tensor, B: Tensor, slots: Sequence[str] | None, k: int
) -> list[tuple[Target, Tensor, Tensor]]:
    if k:
        return [(Target(layer, "conv", (B.shape[0], A.shape[1]), sizes=(1, k, k)), A, B)]
    if not slots:
        return [(Target(layer, storage, (B.shape[0], A.shape[1])), A, B)]
    r, on = B.shape[1], [place for place, slot in enumerate(slots) if slot != OFF]
    size = B.shape[0] // len(on)
    shape = (size * len(slots), A.shape[1])
    return [
        (
            Target(layer, storage, shape, slots[place], (place * size, (place + 1) * size)),
            A[g * r : (g + 1) * r].clone(),
            B[g * size : (g + 1) * size].clone(),
        )
        for g, place in enumerate(on)
    ]


def _by_channels(A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Factors of ``[out, in k k]``: k rows of ``B A [out k, in k]`` lie behind each other in one row of the weight."""
    return torch.block_diag(*[A] * k), torch.cat([B[row::k] for row in range(k)], 1)


def _of(layer: str, known: Mapping[str, Any]) -> Any:
    """What is said of a layer by the end of its path."""
    return next((each for end, each in known.items() if layer == end or layer.endswith(f".{end}")), None)


def _layer_faults(layer: str, raw: Mapping[str, Tensor], slots: Sequence[str] | None, k: int) -> list[str]:
    A, B, weight = (raw.get(f"{layer}.{end}") for end in ("lora_A", "lora_B", "weight"))
    if A is None or B is None:
        return [f"missing  {layer}.lora_{'A' if A is None else 'B'}"]
    if weight is not None:
        of_conv = (
            f", and say its kernel: --kernels {layer.rpartition('.')[2]}={weight.shape[-1]}" if weight.ndim > 2 else ""
        )
        return [f"{layer}.weight is of the base: keep only what is trained (loralib.lora_state_dict){of_conv}"]
    if k > 1 and (A.ndim != 2 or B.ndim != 2 or any(size % k for size in (*A.shape, *B.shape))):
        return [f"shape    {layer}: lora_A is {tuple(A.shape)} and lora_B is {tuple(B.shape)}, with a kernel of {k}"]
    if A.ndim != 2 or B.ndim != 2 or not B.shape[1] or A.shape[0] % B.shape[1]:
        return [f"shape    {layer}: lora_A is {tuple(A.shape)} and lora_B is {tuple(B.shape)}"]
    named = [slot for slot in slots or () if slot != OFF]
    if len(set(named)) < len(named) or not all(re.fullmatch(r"\w+", slot) for slot in named):
        return [f"{layer}: its slots are {shown(list(slots or ()))}; give each a name of its own, or {OFF}"]
    groups, end = A.shape[0] // B.shape[1], layer.rpartition(".")[2]
    on = len(named)
    if groups > 1 and not slots:
        example = ",".join(["q", "k", "v"][:groups] if groups > 2 else ["q", OFF, "v"])
        return [f"{layer} is a fused layer with {groups} slots in use: say which, as in --slots {end}={example}"]
    if slots and (on != groups or B.shape[0] % on):
        return [
            f"{layer} has {groups} slots in use and {B.shape[0]} rows, which --slots {','.join(slots)} does not fit"
        ]
    return []


def _beside(raw: Mapping[str, Tensor], paths: list[str]) -> dict[str, Any]:
    """Settings under which the other tensors of a file are trained: biases alone, and whole modules."""
    owners: dict[str, set[str]] = {}
    for key in raw:
        owner, _, last = key.rpartition(".")
        owners.setdefault(owner, set()).add(last)
    biased = {owner for owner, own in owners.items() if own == {"bias"}}
    whole = tuple(sorted(owner for owner in owners if owner not in biased))
    bias = "none" if not biased else "lora_only" if biased <= set(paths) else "all"
    return {"bias": bias, "modules_to_save": whole}


def _load(path: Path, pickled: bool, faults: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in fp32, and what lorica wrote beside them."""
    metadata: dict[str, str] = {}
    if path.suffix in PICKLES:
        if not pickled:
            raise LoricaError(pickle_refused(path))
        try:
            raw = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as fault:
            raise LoricaError(f"{path} holds more than tensors, or is no pickle of torch's: {fault}") from fault
        raw = raw.get("model_state_dict", raw) if isinstance(raw, dict) else raw
    else:
        raw, metadata = tensorfiles.read(path)
    if not isinstance(raw, dict) or not all(isinstance(each, Tensor) for each in raw.values()):
        raise LoricaError(f"{path} holds no state dict: names with tensors")
    if not all(isinstance(key, str) and _is_whole(each) for key, each in raw.items()):
        raise LoricaError(f"{path} holds tensors without a name, or larger than what is stored of them")
    if raw and all(key.startswith("module.") for key in raw):  # DistributedDataParallel's
        raw = {key.removeprefix("module."): tensor for key, tensor in raw.items()}
    ours = doors.object_in(metadata.get("lorica", "{}"), f"the metadata of {path}")
    if wrong := doors.faults_of(ours, _KINDS):
        raise all_faults(f"the metadata of {path} cannot be used:", wrong)
    return tensorfiles.floats(raw, faults), ours


def _is_whole(tensor: Tensor) -> bool:
    """Whether each element has bytes of its own: strides of zero make a small file as large as one likes."""
    return tensor.layout == torch.strided and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _is_beside(value: Any) -> bool:
    known = {"bias": BIASES.__contains__, "modules_to_save": doors.is_words}
    return isinstance(value, dict) and value.keys() == known.keys() and all(known[key](value[key]) for key in known)


def _by_layer(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(good, value.values()))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": (lambda value: value is None or doors.is_number(value), "a finite number"),
    "slots": (_by_layer(lambda slots: doors.is_words(slots) and any(slot != OFF for slot in slots)), "slots by layer"),
    "storages": (_by_layer(lambda kind: kind in STORED), f"one of {', '.join(STORED)} by layer"),
    "beside": (_is_beside, "bias and modules_to_save"),
}


def pickle_refused(path: Path) -> str:
    """What is said of a pickle that was not asked for by name."""
    return (
        f"{path} is a pickle, which can run code when it is read, and is refused. If it is loralib's, convert it once;"
        f" tensors alone are read then: lorica convert {path} --from loralib --alpha ALPHA --to peft -o OUT"
    )
