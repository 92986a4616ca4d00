"""`load`: anything that holds a model -> model and tokenizer."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.doors import place
from lorica.errors import LoricaError, nearest
from lorica.models.builtin import BUILTIN, builtin_folder
from lorica.models.cache import disk_is_full
from lorica.models.checkpoint import quiet, read_folder
from lorica.models.ggufs import read_gguf
from lorica.models.machine import resolve_device, resolve_dtype
from lorica.models.packing import Packing
from lorica.models.wheels import Progress
from lorica.weights import keep_packing

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# A model's files lie at the top of its repository; what is below is the same model for other programs.
_WANTED, _UNWANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"), ("*/*", "consolidated*")


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantize: str = "none",
    labels: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a built-in alias, a folder in transformers' layout, a `.gguf` file or a hub id.

    Args:
        source: in that order of precedence; weights must be safetensors or GGUF, and no code of the model is run.
        dtype: `fp32`, `bf16`, `fp16`, or `auto`: bf16 where the device computes it natively, else fp32.
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda:1`, ...
        quantize: keep the linear layers but the output head in `nf4` (4 bits, QLoRA's) or `int8`, by bitsandbytes;
            with `none` the model is as its files have it. The rest is in `dtype`, for which `auto` is bf16 then.
        labels: give it a head for sequence classification that tells these apart, a new one unless it has one for
            just these; one label alone stands for a number to predict. Default: the model as its files have it.
        progress: called while a built-in model is fetched and converted.

    Returns:
        The model in evaluation mode, with `requires_grad` as transformers gives it and `config._name_or_path` the
        alias or hub id as given, or the absolute path; and the tokenizer with its chat template.

    Raises:
        LoricaError: no such model, or one that cannot be fetched or opened, or weights that do not fit it.
    """
    device = resolve_device(device)
    # One answer on every machine: weights rounded otherwise before they are packed would be another base.
    dtype = torch.bfloat16 if quantize != "none" and dtype == "auto" else resolve_dtype(dtype, device)
    packing = Packing(quantize, dtype, device)
    path = locate(source, progress)
    name = base_name(source)
    if path.is_file():
        if labels:
            raise LoricaError(f"{name} is a .gguf file, which holds a language model: give its folder, or its hub id")
        model, tok = read_gguf(path, dtype, name, packing)
    else:
        model, tok = read_folder(path, dtype, name, packing, labels)
    model.config._name_or_path = model.name_or_path = tok.name_or_path = name
    if getattr(model, "hf_quantizer", None) is None:
        return model.to(device).eval(), tok  # type: ignore[arg-type]
    keep_packing(model)
    if quantize != "none":
        # LoftQ starts from what quantizing took away, and that is known only beside the weights as they were.
        model._lorica_unpacked = functools.partial(load, source, dtype=dtype, device="cpu")  # type: ignore[assignment]
    return model.eval(), tok


def base_name(source: str | Path) -> str:
    """How a model is remembered: an alias or a hub id as it is, a folder or file by its absolute path."""
    if str(source) not in BUILTIN and place(source).exists():
        return str(place(source).resolve())
    return str(source)


def locate(source: str | Path, progress: Progress | None = None, weights: bool = True) -> Path:
    """The folder, or the `.gguf` file, that holds `source`; fetched if it has to be, without `weights` from the hub."""
    if str(source) in BUILTIN:
        return builtin_folder(str(source), progress)
    path = place(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise LoricaError(f"{path} is a file, but not a .gguf: give the folder that holds the model")
    if not _HUB_ID.fullmatch(str(source)) or path.suffix == ".gguf":
        raise LoricaError(f"no such folder or file: {source}{_known(str(source))}")
    return _from_hub(str(source), [pattern for pattern in _WANTED if weights or pattern != "*.safetensors"])


def _from_hub(name: str, wanted: list[str]) -> Path:
    """The local snapshot of a hub repository, from the hub's own cache where the hub cannot be reached."""
    try:
        with quiet(hub_bars=True):
            return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(_UNWANTED)))
    except hub.GatedRepoError as error:
        raise LoricaError(f"{name} is gated: accept its terms on its page, then log in with `hf auth login`") from error
    except hub.RepositoryNotFoundError as error:
        raise LoricaError(
            f"unknown model {name!r}: no such folder, and the hub has no such model (if it is private, log in with"
            f" `hf auth login`){_known(name)}"
        ) from error
    except hub.HFValidationError as error:
        raise LoricaError(f"unknown model {name!r}: no such folder, and not a hub id{_known(name)}") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError) as error:
        if disk_is_full(error):
            raise LoricaError(f"no space left on the disk for {name}: free some, or move HF_HOME") from error
        raise LoricaError(
            f"unknown model {name!r}: no such folder, not in the hub's cache, and the hub cannot be reached. Connect"
            f" once, or give a folder{_known(name)}"
        ) from error


def _known(word: str) -> str:
    return f". Built in: {', '.join(BUILTIN)}{nearest(word.lower(), BUILTIN)}"
