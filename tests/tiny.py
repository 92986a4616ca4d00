"""Tiny random models of families whose layers differ: separate and fused projections, Conv1D, tied heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

VOCAB = 64


def llama(tied: bool = True, bias: bool = False, layers: int = 2) -> nn.Module:
    """Separate projections, grouped queries, RMSNorm."""
    return _make(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attention_bias=bias,
            bos_token_id=0,
            eos_token_id=1,
        ),
    )


def gpt2() -> nn.Module:
    """Fused c_attn in Conv1D, biases, tied head."""
    return _make(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
    )


def phi3() -> nn.Module:
    """Fused qkv_proj with grouped queries and fused gate_up_proj, in nn.Linear."""
    return _make(
        transformers.Phi3ForCausalLM,
        transformers.Phi3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
    )


def gemma() -> nn.Module:
    """An embedding that scales what it looks up, tied to the head."""
    return _make(
        transformers.GemmaForCausalLM,
        transformers.GemmaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        ),
    )


def t5() -> nn.Module:
    """Encoder and decoder; its code reads `wo.weight.dtype` directly."""
    return _make(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    )


def bert() -> nn.Module:
    """An encoder whose output head has a bias and a matrix tied to the embedding."""
    return _make(
        transformers.BertForMaskedLM,
        transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        ),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "phi3": phi3,
    "gemma": gemma,
    "t5": t5,
    "bert": bert,
}


def inputs(model: nn.Module, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """A batch of random ids, the same at each call, as the active adapter is to read them."""
    from lorica.insertion import asked

    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor(asked(model, ids.tolist())).to(model.device)
    both = model.config.is_encoder_decoder
    return {"input_ids": ids, "decoder_input_ids": ids} if both else {"input_ids": ids}


def logits(model: nn.Module) -> Tensor:
    """What the model says to `inputs`, without gradient."""
    with torch.no_grad():
        return model(**inputs(model)).logits


def stir(model: nn.Module, seed: int = 0, size: float = 0.05) -> None:
    """Move every tensor of the active adapter off its start, as training would."""
    import lorica

    generator = torch.Generator().manual_seed(seed)
    for parameter in lorica.trainable(model).values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def _make(kind: type, config: transformers.PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config).eval()
    # Real biases are not zero, and a zero one hides whether it was trained, merged or lost.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model
