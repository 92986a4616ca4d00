"""Tiny random decoders whose blocks differ, for what must hold under every architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn

VOCAB = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def _decoder(family: str, config: str = "Config", **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        settings = getattr(transformers, f"{family}{config}")(**COMMON | options)
        model = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
        # At its usual width of start a tiny model says the same to everything.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.2)
            elif "norm" in name or name.endswith("bias"):
                nn.init.normal_(parameter, mean=0.0 if family.startswith("Gemma") else 1.0, std=0.1)
        return model

    return make


def _gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def _bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.BertLMHeadModel(config).eval()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": _decoder("Llama"),
    "llama-bias": _decoder("Llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral-window": _decoder("Mistral", sliding_window=4),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "gemma": _decoder("Gemma", hidden_activation="gelu_pytorch_tanh"),
    "gemma2": _decoder("Gemma2", sliding_window=4, final_logit_softcapping=3.0, attn_logit_softcapping=5.0),
    "gemma3": _decoder("Gemma3", "TextConfig", sliding_window=4),
    "smollm3": _decoder("SmolLM3", no_rope_layers=[1, 0]),
    "granite": _decoder("Granite", logits_scaling=3.0, residual_multiplier=0.5),
    "cohere": _decoder("Cohere", logit_scale=0.3),
    "phi3": _decoder("Phi3"),
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
    "gpt2": _gpt2,
    "bert": _bert,
}
