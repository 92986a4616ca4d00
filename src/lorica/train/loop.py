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
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from lorica.data import Example, Sampler
from lorica.train.examples import CPU_MICRO_TOKENS, MICRO_TOKENS, cut, labels_in, packs
from lorica.train.guards import finite
from lorica.train.optimizer import Optimizer
from lorica.train.passes import Passes
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
    passes: Passes,
) -> Iterator[Update]:
    """Make the updates `first` to `steps`; after each, the caller may measure, save or stop.

    `model` is as `accelerator.prepare` returned it, `settings.lr` is a number. The gradients of an update stay until
    the next. Raises `guards.NotFinite` before an update that would spoil the weights.
    """
    for step in range(first, steps + 1):
        began = time.perf_counter()
        drawn = next(sampler)
        batch = [examples[index] for index in drawn]
        set_seed(random.Random(f"{settings.seed}:{step}:{accelerator.process_index}").getrandbits(31))
        keys = [random.Random(f"{settings.seed}:{step}:{index}").getrandbits(62) for index in drawn]
        model.train()
        optimizer.clear()
        loss = _backward(model, batch, keys, accelerator, settings.micro, passes)
        norm = optimizer.clip(settings.clip)
        finite(step, loss, norm)
        assert settings.lr is not None
        lr = rate(step, steps, settings.lr, settings.schedule, settings.warmup)
        optimizer.step(lr)
        tokens = sum(len(example.ids) for example in batch)
        yield Update(step, loss, lr, norm, tokens, labels_in(batch), time.perf_counter() - began)


def _backward(
    model: nn.Module,
    batch: Sequence[Example],
    keys: Sequence[int],
    accelerator: Accelerator,
    micro: int | None,
    passes: Passes,
) -> float:
    """Accumulate the gradient of one update; returns its loss over all processes."""
    device = next(model.parameters()).device
    fitting = CPU_MICRO_TOKENS if device.type == "cpu" else MICRO_TOKENS
    pieces = (packs if passes.quick else cut)(batch, micro, accelerator.num_processes, fitting)
    pieces = pieces[accelerator.process_index :: accelerator.num_processes]
    total, loss = labels_in(batch), torch.zeros((), device=device)
    for last, places in zip([False] * (len(pieces) - 1) + [True], pieces, strict=True):
        # A process without rows of its own still takes part in the others' sum, with weight zero.
        piece = [batch[i] for i in places]
        weight = labels_in(piece) / total
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with passes(model, piece or batch[:1], keys=[keys[i] for i in places or [0]]) as (mean, _):
                accelerator.backward(mean * (weight * accelerator.num_processes))
        loss += mean.detach() * weight
    return float(accelerator.reduce(loss, "sum"))
