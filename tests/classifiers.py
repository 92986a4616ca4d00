"""Tiny models for sequence classification of five families, as folders of their body alone, and rows to learn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "</s>",
    *"good bad fine awful the film was a very so not dull bright".split(),
]
SIZE = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tokenizer(encoder: bool = True) -> PreTrainedTokenizerFast:
    """Words between [CLS] and [SEP]; of a decoder nothing is added, and there is no padding token."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if not encoder:
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="[UNK]")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=24, model_input_names=names, **special)


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZE, intermediate_size=48, **NO_DROPOUT))


def masked_bert() -> nn.Module:
    """Without the pooler that its classifier has, and with a head of its own."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZE, intermediate_size=48, **NO_DROPOUT))


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        **SIZE, intermediate_size=48, max_position_embeddings=26, pad_token_id=0, type_vocab_size=2, **NO_DROPOUT
    )
    return transformers.RobertaModel(config)


def deberta() -> nn.Module:
    config = transformers.DebertaV2Config(
        **SIZE, intermediate_size=48, relative_attention=True, pos_att_type=["p2c", "c2p"], **NO_DROPOUT
    )
    return transformers.DebertaV2Model(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, bos_token_id=4, eos_token_id=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZE, intermediate_size=48, num_key_value_heads=2, bos_token_id=4, eos_token_id=4, tie_word_embeddings=False
    )
    return transformers.LlamaForCausalLM(config)


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert, "masked-bert": masked_bert, "roberta": roberta, "deberta": deberta
}  # fmt: skip
DECODERS: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "llama": llama}
FAMILIES = [*ENCODERS, *DECODERS]


def folder(family: str, path: Path) -> Path:
    """A checkpoint of a family's body on the disk."""
    torch.manual_seed(0)
    model = (ENCODERS | DECODERS)[family]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)  # at the usual 0.02, so narrow a body tells nothing apart
    model.save_pretrained(path)
    tokenizer(family in ENCODERS).save_pretrained(path)
    return path


def rows(count: int = 40) -> list[dict]:
    """Sentences of unlike lengths that are positive or negative by one word."""
    said = []
    for i in range(count):
        right = i % 3 != 0
        word = (("good", "fine", "bright") if right else ("bad", "awful", "dull"))[i % 2]
        text = " ".join(["the", "film", "was", *["very"] * (i % 5), *["so"] * (i % 4), word])
        said.append({"text": f"{text} a film" if i % 7 == 0 else text, "label": "positive" if right else "negative"})
    return said
