"""A `.gguf` file -> a dense model that trains and saves like any other, and its tokenizer.

Quantised weights are unpacked to what they stand for, which is not the checkpoint that they were made from.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorica.formats import gguf_header
from lorica.models import sizes
from lorica.models.checkpoint import model_class, quiet, refused, require_whole
from lorica.models.packing import Packing

# What the file's `tokenizer.ggml.pre` means where transformers converts it to plain ByteLevel.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
_ROLES = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}
_PLAIN = ("", "default", "gpt-2")


def read_gguf(
    path: Path, dtype: torch.dtype, name: str, packing: Packing | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer; `name` is what errors call the file.

    It is on the CPU, or where `packing` wants it.
    """
    held = gguf_header.check(path)
    config, tok = _config_and_tokenizer(path, name)
    with _silent(name):
        sizes.require(model_class(config), config, sizes.Held(*held), name)
        packed, found = model_class(config).from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=copy.deepcopy(config),
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
        require_whole(found, packed, name)
        model = _clean(packed, config, dtype, name, packing)
    return model, tok


def read_gguf_tokenizer(path: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone."""
    return _config_and_tokenizer(path, name)[1]


def _config_and_tokenizer(path: Path, name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    facts = _tokenizer_facts(path, name)
    with _silent(name):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if hasattr(config, "_model_name_or_path"):
            del config._model_name_or_path  # the file's title for itself
        tok = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, config=config)
    for key, role in _ROLES.items():
        if key in facts:
            setattr(tok, role, tok.convert_ids_to_tokens(int(facts[key])))
    _split_as_trained(tok, str(facts.get("pre", "")), name)
    tok.clean_up_tokenization_spaces = tok.init_kwargs["clean_up_tokenization_spaces"] = False
    tok.model_max_length = config.max_position_embeddings
    tok.init_kwargs.pop("gguf_file", None)
    return config, tok


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    # The converter draws its bar past transformers' switch for bars.
    with quiet(), refused(name), contextlib.redirect_stderr(io.StringIO()):
        yield


def _clean(
    packed: PreTrainedModel, config: PretrainedConfig, dtype: torch.dtype, name: str, packing: Packing | None
) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF's quantizer, which would refuse to train and to save."""
    kind: Any = type(packed)
    model, found = kind.from_pretrained(
        None,
        config=config,
        state_dict=packed.state_dict(),
        dtype=dtype,
        output_loading_info=True,
        **(packing.arguments(config, name) if packing else {}),
    )
    require_whole(found, model, name)
    model.generation_config = packed.generation_config
    return model


def _tokenizer_facts(path: Path, name: str) -> dict[str, Any]:
    """What the file says of its tokenizer that transformers reads differently from one version to the next."""
    tensors, _ = gguf_header.check(path)
    fields = GGUFReader(path).fields
    numbers = {key: field.contents() for key, field in fields.items() if len(field.data) == 1}
    sizes.require_few({key.rpartition(".")[2]: value for key, value in numbers.items()}, tensors, name)
    wanted = {key: fields.get(f"tokenizer.ggml.{key}") for key in ("pre", *_ROLES)}
    return {key: field.contents() for key, field in wanted.items() if field}


def _split_as_trained(tok: PreTrainedTokenizerBase, pre: str, name: str) -> None:
    """Cut texts before the merges as the file says: otherwise some are tokenised as the model never saw them."""
    backend = tok.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) or pre in _PLAIN:
        return
    if pre in _PRE_TOKENIZERS:
        backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    else:
        warnings.warn(
            f"{name}: the pre-tokenizer {pre!r} is not known here, GPT-2's is used; some texts may be tokenised"
            " otherwise than in the model's training",
            stacklevel=2,
        )
