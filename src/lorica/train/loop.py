"""The training loop: draw, forward, backward, clip, update. It knows no method, no file and no terminal.

Law 4. An update's gradient is that of the sum of its token losses over the number of its predicted tokens. A model's
own forward returns the mean over one micro-batch, so each mean is weighted by its share of the predicted tokens:

    sum_i l_i / N  =  sum_m (n_m / N) mean_m          n_m of the N tokens are predicted in micro-batch m

`num_items_in_batch` would give the same where a model passes it on to its loss, but a model that does not swallows it
in silence; the weights are right for every model. Gradients are averaged over P processes, hence the factor P.

Law 6. The random state of an update is a function of (seed, update, process) alone, so there is none to save.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from lorica.data import Example, Sampler, collate
from lorica.kernels.labelled import agrees, narrowed
from lorica.train.examples import CPU_MICRO_TOKENS, MICRO_TOKENS, cut, labels_in
from lorica.train.guards import finite
from lorica.train.optimizer import Optimizer
from lorica.train.settings import TrainSettings, rate


@dataclass(frozen=True)
class Update:
    """One update. `loss` is in nats per predicted token, `norm` the gradient's before clipping, `seconds` its time.

    `tokens` are those read, padding aside; `labels` those predicted.
    """

    step: int
    loss: float
    lr: float
    norm: float
    tokens: int
    labels: int
    seconds: float


def updates(
    model: nn.Module,
    optimizer: Optimizer,
    examples: Sequence[Example],
    sampler: Sampler,
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    first: int,
    steps: int,
    pad_id: int,
) -> Iterator[Update]:
    """Make the updates `first` to `steps`; after each, the caller may measure, save or stop.

    `model` is as `accelerator.prepare` returned it, `settings.lr` is a number. The gradients of an update stay until
    the next. Raises `guards.NotFinite` before an update that would spoil the weights.
    """
    ask = _question(accelerator.unwrap_model(model), min(examples, key=lambda example: len(example.ids)), pad_id)
    for step in range(first, steps + 1):
        began = time.perf_counter()
        batch = [examples[index] for index in next(sampler)]
        set_seed(random.Random(f"{settings.seed}:{step}:{accelerator.process_index}").getrandbits(31))
        model.train()
        optimizer.clear()
        loss = _backward(model, batch, accelerator, settings.micro, ask)
        norm = optimizer.clip(settings.clip)
        finite(step, loss, norm)
        assert settings.lr is not None
        lr = rate(step, steps, settings.lr, settings.schedule, settings.warmup)
        optimizer.step(lr)
        tokens = sum(len(example.ids) for example in batch)
        yield Update(step, loss, lr, norm, tokens, labels_in(batch), time.perf_counter() - began)


def _question(model: nn.Module, shortest: Example, pad_id: int) -> Callable[[Sequence[Example]], dict[str, Any]]:
    """What makes a model's inputs of examples: with the head at labelled positions only, if its loss is then the same.

    That is tried on one example, the same at every resume.
    """
    device = next(model.parameters()).device
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def plain(examples: Sequence[Example]) -> dict[str, Any]:
        return {key: tensor.to(device) for key, tensor in collate(examples, pad_id).items()} | cache

    model.eval()
    return (lambda examples: narrowed(plain(examples))) if agrees(model, plain([shortest])) else plain


def _backward(
    model: nn.Module,
    batch: Sequence[Example],
    accelerator: Accelerator,
    micro: int | None,
    ask: Callable[[Sequence[Example]], dict[str, Any]],
) -> float:
    """Accumulate the gradient of one update; returns its loss over all processes."""
    device = next(model.parameters()).device
    fitting = CPU_MICRO_TOKENS if device.type == "cpu" else MICRO_TOKENS
    pieces = cut(batch, micro, accelerator.num_processes, fitting)
    pieces = pieces[accelerator.process_index :: accelerator.num_processes]
    total, loss = labels_in(batch), torch.zeros((), device=device)
    for last, piece in zip([False] * (len(pieces) - 1) + [True], pieces, strict=True):
        # A process without rows of its own still takes part in the others' sum, with weight zero.
        weight = labels_in(piece) / total
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            mean: Tensor = model(**ask(piece or batch[:1])).loss
            accelerator.backward(mean * (weight * accelerator.num_processes))
        loss += mean.detach() * weight
    return float(accelerator.reduce(loss, "sum"))
