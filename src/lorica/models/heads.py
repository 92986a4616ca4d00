"""Heads for sequence classification: the labels they tell apart, which of their weights are new, and padding.

One label alone means that a number is predicted (regression), as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lorica.errors import LoricaError, all_faults
from lorica.targets import FRESH

# The last layer of every head in transformers, from which an adapter of another library tells how many labels it has.
_LAST = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def is_classifier(model: Any) -> bool:
    """Whether a model gives a row of numbers for each sequence."""
    return type(model).__name__.endswith("ForSequenceClassification")


def labels_of(config: PretrainedConfig) -> tuple[str, ...]:
    """The labels of a classifier, in the order of its outputs."""
    named: Any = config.id2label or {}
    return tuple(str(named[place]) for place in sorted(named))


def give_labels(config: PretrainedConfig, labels: Sequence[str], name: str) -> type[PreTrainedModel]:
    """Set a configuration up to tell `labels` apart; returns the class for it. Labels it has already keep their order.

    LoricaError where transformers has no head for this kind of model.
    """
    kinds = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in kinds:
        raise LoricaError(f"transformers has no sequence classification for {name} ({config.model_type})")
    if set(labels) != set(labels_of(config)):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: place for place, label in enumerate(labels)}
    config.problem_type = "regression" if len(labels) == 1 else "single_label_classification"
    kind: Any = kinds[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def settle(found: dict[str, Any], model: PreTrainedModel, name: str) -> None:
    """Remember which weights of the head no file held, and draw them; refuse a body that is not whole.

    What belongs to another head (a language model's, another number of labels) may be missing, extra or misshapen.
    """
    missing = set(found["missing_keys"])
    misshapen = {
        key: f"shape {list(held)} in the file, {list(wanted)} in the model"
        for key, held, wanted in found["mismatched_keys"]
    }
    faults = [f"{key}: missing" for key in sorted(missing) if _in_body(key, model)]
    faults += [f"{key}: {why}" for key, why in sorted(misshapen.items()) if _in_body(key, model)]
    faults += [
        f"{key}: not part of the model"
        for key in sorted(found["unexpected_keys"])
        if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in f".{key}"
    ]
    faults += [str(message) for message in found.get("error_msgs") or ()]
    if faults:
        raise all_faults(f"the weights of {name} do not fit {type(model).__name__}:", faults)
    named = [key for key, _ in model.named_parameters()]
    fresh = {key for key in named if key in missing or key in misshapen}
    beside = {key for key in named if not key.startswith(f"{model.base_model_prefix}.")}
    if fresh & beside:
        fresh |= beside  # a head is new as a whole, or not at all
    setattr(model, FRESH, frozenset(fresh))
    draw_head(model, 0)


def draw_head(model: Any, seed: int) -> None:
    """Draw the new weights of a head as its class does, the same for the same seed; others stay as they are."""
    fresh: frozenset[str] = getattr(model, FRESH, frozenset())
    if not fresh:
        return
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for path in sorted({key.rpartition(".")[0] for key in fresh}):
            module = model.get_submodule(path)
            for parameter in module.parameters(recurse=False):
                vars(parameter).pop("_is_hf_initialized", None)
            model._init_weights(module)


def ready_to_pad(model: Any, tok: Any) -> None:
    """Let model and tokenizer agree on a padding token; decoders without one pad with their end token.

    A decoder is read at its last token that is no padding, which it tells by the id.
    """
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token or tok.unk_token
    if tok.pad_token_id is None:
        raise LoricaError("this tokenizer has no padding token and no end token, so rows cannot be padded")
    model.config.pad_token_id = tok.pad_token_id
    model.config.get_text_config().pad_token_id = tok.pad_token_id


def outputs_of(tensors: dict[str, Any]) -> int | None:
    """How many outputs the head among an adapter's tensors has."""
    return next((len(tensors[key]) for key in tensors for last in _LAST if f".{key}".endswith(f".{last}")), None)


def _in_body(key: str, model: PreTrainedModel) -> bool:
    """Whether a weight is part of what every head shares; a pooler may be missing, since not every head has one."""
    return key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key
