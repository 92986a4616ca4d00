"""What an engine shows before it serves: that adapters give what their merged weights give, and that it gives what the
model gives. It costs a fraction of a second and finds what a change in another library would break in silence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorica import patch
from lorica.adapter import Adapter
from lorica.errors import LoricaError
from lorica.lowrank import LoRA
from lorica.serve.engine import Engine, EngineSettings, Sampling, Token
from lorica.serve.leases import Generation, Lease
from lorica.serve.rows import Layers

# How far log-probabilities may be apart, in nats, where sums are made in another order.
_CLOSE = {torch.float32: 0.01}
_CLOSE_HALF = 0.3


def adapters_are_exact(make: Callable[..., Engine], device: torch.device | str = "cpu") -> None:
    """Two adapters on a tiny model, one prompt for both and the base, against merged weights. Raises where they differ.

    The prompt is longer than a step and than a page, so that chunks and the prefix cache take part.
    """
    import threading

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = _tiny().to(device)
        layers = Layers(base)
        merged: list[nn.Module] = [base]
        leases: list[Lease | None] = [None]
        for place, targets in enumerate(("all-linear", "qv")):
            model = copy.deepcopy(base)
            patch.inject(model, LoRA(r=2 + 2 * place), targets)
            for factor in patch.trainable(model).values():
                nn.init.normal_(factor, std=0.3)
            payload = layers.rows(Adapter.of(model))
            patch.merge(model, check=False)
            merged.append(model)
            changed = threading.Condition(threading.RLock())
            leases.append(Lease(Generation(f"check{place}", f"{place + 1:064x}", payload), changed, lambda _: None))
        ids = torch.randint(64, (40,)).tolist()
    wanted = [_greedy(model, ids, 4) for model in merged]
    engine = make(base, layers, EngineSettings(requests=4, batch_tokens=24, kv_tokens=512, page=16))
    engine.start()
    try:
        streams = [engine.submit(ids, Sampling(4), lease) for lease in [*leases, *leases]]
        said = [[token.id for token in stream.result()[0]] for stream in streams]
    finally:
        engine.stop()
    if said != wanted + wanted:
        raise LoricaError("mixed adapters do not give what merged weights give with this version of transformers")


def model_is_its_own(model: Any, ids: list[int]) -> Callable[[Engine], None]:
    """Ask the model now, and the engine later, for one token after `ids`; the later check raises where they differ."""
    close = _CLOSE.get(model.dtype, _CLOSE_HALF)
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].float(), 0)

    def check(engine: Engine) -> None:
        tokens, end = engine.submit(ids, Sampling(1, ignore_eos=True, logprobs=0), None).result()
        if not tokens:
            raise LoricaError(f"this model cannot be served by it: {end.error}")
        if not _near(tokens[0], logs, close):
            raise LoricaError("this model gives other answers through it")

    return check


def _near(token: Token, logs: Tensor, close: float) -> bool:
    own = float(logs[token.id])
    return abs((token.logprob or 0.0) - own) < close and float(logs.max()) - own < close


def _greedy(model: Any, ids: list[int], count: int) -> list[int]:
    said: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            said.append(int(model(input_ids=torch.tensor([ids + said], device=model.device)).logits[0, -1].argmax()))
    return said


def _tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 3
    return model.requires_grad_(False)
