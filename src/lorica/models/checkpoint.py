"""A folder in transformers' layout -> model and tokenizer: safetensors only, no code from the folder, strict."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import utils as hub
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorica.errors import LoricaError, all_faults
from lorica.models import heads, sizes
from lorica.models.packing import Packing

_WEIGHTS = ("model.safetensors", sizes.INDEX)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Without any of these transformers makes up an empty tokenizer instead of saying that there is none.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def read_folder(
    folder: Path, dtype: torch.dtype, name: str, packing: Packing | None = None, labels: Sequence[str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer; `name` is what errors call the folder.

    It is on the CPU, or where `packing` wants it. With `labels` it has a head for these (see `heads`).
    """
    check(folder, name)
    held = sizes.of_folder(folder, name)
    with quiet(), refused(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind: Any = heads.give_labels(config, labels, name) if labels else model_class(config)
        sizes.require(kind, config, held, name)
        model, found = kind.from_pretrained(
            folder,
            config=config,
            **(packing.arguments(config, name) if packing else {}),
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are listed with all other faults
            output_loading_info=True,
        )
    tok = read_tokenizer(folder, name)
    if labels:
        heads.settle(found, model, name)
    else:
        require_whole(found, model, name)
    if heads.is_classifier(model):
        heads.ready_to_pad(model, tok)
    return model, tok


def read_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone."""
    if faults := _tokenizer_faults(folder):
        raise all_faults(f"{name} cannot be loaded:", faults)
    with quiet(), refused(name):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check(folder: Path, name: str) -> None:
    """Say what a folder lacks before anything of it is opened."""
    if (folder / "adapter_config.json").is_file():
        raise LoricaError(
            f"{name} is an adapter, not a model: load its base model, then `lorica.Adapter.load({name!r}).apply(model)`"
        )
    if not (folder / "config.json").is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; it holds {', '.join(ggufs)}: name the file" if ggufs else ""
        raise LoricaError(f"{name} holds no config.json, so it is not a model in transformers' layout{hint}")
    faults = []
    if not any((folder / weights).is_file() for weights in _WEIGHTS):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            faults.append(
                f"its weights are pickles ({', '.join(pickles)}), which can run code when they are opened. Where you"
                f" trust them, convert once: {converter(name)}"
            )
        else:
            faults.append(
                f"no weights: {_WEIGHTS[0]}, or {_WEIGHTS[1]} with its parts. Pickles are not taken from the hub; where"
                f" you trust them, convert once: {converter(name)}"
            )
    if faults := faults + _tokenizer_faults(folder):
        raise all_faults(f"{name} cannot be loaded:", faults)


def _tokenizer_faults(folder: Path) -> list[str]:
    if any((folder / file).is_file() for file in _TOKENIZERS):
        return []
    return [
        "no tokenizer: copy tokenizer.json and tokenizer_config.json from the model that it was made from, or"
        " `tok.save_pretrained(folder)`"
    ]


def converter(name: str) -> str:
    """The line that turns pickled weights into safetensors."""
    return (
        'python -c "from transformers import AutoModelForCausalLM as M;'
        f" M.from_pretrained({name!r}, use_safetensors=False).save_pretrained('converted')\" (AutoModel for an"
        " encoder), then copy the tokenizer's files"
    )


def model_class(config: PretrainedConfig) -> Any:
    """The class that the weights were saved from; where the configuration does not say, by the kind of model.

    Encoder-decoders get their generating head, decoders their language-model head, encoders none.
    """
    for architecture in config.architectures or ():
        known = getattr(transformers, architecture, None)
        if isinstance(known, type) and issubclass(known, PreTrainedModel):
            return known
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not encoder:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def require_whole(found: dict[str, Any], model: PreTrainedModel, name: str) -> None:
    """Refuse weights that do not fit the model one to one; transformers has left out what is tied or ignorable."""
    faults = [f"{key}: missing" for key in sorted(found["missing_keys"])]
    faults += [f"{key}: not part of the model" for key in sorted(found["unexpected_keys"])]
    for key, held, wanted in sorted(found["mismatched_keys"]):
        faults.append(f"{key}: shape {list(held)} in the file, {list(wanted)} in the model")
    faults += [str(message) for message in found.get("error_msgs") or ()]
    if faults:
        raise all_faults(f"the weights of {name} do not fit {type(model).__name__}:", faults)


_AS_THEY_ARE = (LoricaError, torch.OutOfMemoryError, MemoryError)


@contextlib.contextmanager
def refused(name: str) -> Iterator[None]:
    """Turn what transformers raises about a file into one error without addresses or stack.

    Any exception: its configurations check few of their values, and wrong ones fail wherever they are first used.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of the tokenizers' Rust
        if not (panic or isinstance(error, Exception)) or isinstance(error, _AS_THEY_ARE):
            raise
        said = re.sub(r"\S+://\S+", "...", str(error).strip().split("\n")[0])
        if "trust_remote_code" in str(error):
            said = "it needs Python code that comes with the model, which lorica does not run"
        raise LoricaError(f"{name} cannot be loaded: {said or type(error).__name__}") from error


@contextlib.contextmanager
def quiet(hub_bars: bool = False) -> Iterator[None]:
    """Keep transformers' bars and warnings off the screen for a moment; what matters in them is raised by us."""
    log = transformers.utils.logging
    level, bars, downloads_hidden = log.get_verbosity(), log.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    if hub_bars and sys.stderr.isatty() and not downloads_hidden:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(level)
        with warnings.catch_warnings():
            # Where HF_HUB_DISABLE_PROGRESS_BARS is set, switching them on again is warned about.
            warnings.simplefilter("ignore")
            if bars:
                log.enable_progress_bar()
            (hub.disable_progress_bars if downloads_hidden else hub.enable_progress_bars)()
