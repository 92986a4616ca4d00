"""The training loop: draw, forward, backward, clip, update. It knows no method, no file and no terminal.

Law 4. An update's gradient is that of the sum of its token losses over the number of its predicted tokens. A model's
own forward returns the mean over one micro-batch, so each mean is weighted by its share of the predicted tokens:

    sum_i l_i / N  =  sum_m (n_m / N) mean_m          n_m of the N tokens are predicted in micro-batch m

`num_items_in_batch` would give the same where a model passes it on to its loss, but a model that does not swallows it
in silence; the weights are right for every model. The optimizer adds up the gradients of all processes.

Law 6. The random state of an update is a function of (seed, update, process) alone, so there is none to save.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from lorica.data import Example, Sampler
from lorica.data.pack import micro_tokens, packs
from lorica.passes import Passes
from lorica.tasks.sequences import SequencePasses
from lorica.train.examples import cut, labels_in
from lorica.train.guards import finite
from lorica.train.memory import relieve
from lorica.train.optimizer import Optimizer
from lorica.train.settings import TrainSettings, rate

# What a loss is multiplied by so that fp16 holds its gradients, the next one where they overflow. Each update begins
# with the first, so that a resumed run repeats them.
FP16_SCALES = (2.0**14, 2.0**9, 2.0**4, 1.0)


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
    passes: Passes | SequencePasses,
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
        keys = dropout_keys(settings.seed, step, drawn)
        model.train()
        for scale in loss_scales(passes.dtype):
            optimizer.clear()
            spent = _backward(model, batch, keys, accelerator, settings.micro, passes, scale)
            # Both are read at once: each reading waits for the device.
            loss, norm = torch.stack((spent, optimizer.clip(settings.clip, scale).to(spent.device))).tolist()
            if math.isfinite(norm):
                break
        finite(step, loss, norm)
        assert settings.lr is not None
        lr = rate(step, steps, settings.lr, settings.schedule, settings.warmup)
        optimizer.step(lr)
        tokens = sum(len(example.ids) for example in batch)
        yield Update(step, loss, lr, norm, tokens, labels_in(batch), time.perf_counter() - began)


def loss_scales(dtype: torch.dtype) -> tuple[float, ...]:
    """What the loss of an update is multiplied by, on a base of this format: one after the other, until it fits."""
    return FP16_SCALES if dtype == torch.float16 else (1.0,)


def dropout_keys(seed: int, step: int, drawn: Sequence[int]) -> list[int]:
    """What seeds the dropout of each example drawn in an update."""
    return [random.Random(f"{seed}:{step}:{index}").getrandbits(62) for index in drawn]


def _backward(
    model: nn.Module,
    batch: Sequence[Example],
    keys: Sequence[int],
    accelerator: Accelerator,
    micro: int | None,
    passes: Passes | SequencePasses,
    scale: float,
) -> Tensor:
    """Accumulate this process's part of an update's gradient, times `scale`; returns the loss over all processes."""
    device = next(model.parameters()).device
    pieces = (packs if passes.quick else cut)(
        batch, micro, accelerator.num_processes, micro_tokens(device, passes.dtype)
    )
    pieces = pieces[accelerator.process_index :: accelerator.num_processes]
    total, loss = labels_in(batch), torch.zeros((), device=device)
    for places in pieces:
        # A process without rows of its own still takes part in the others' sum, with weight zero.
        piece = [batch[i] for i in places]
        weight = labels_in(piece) / total
        with passes(model, piece or batch[:1], keys=[keys[i] for i in places or [0]]) as (mean, _):
            (mean * (weight * scale)).backward()
        loss += mean.detach() * weight
        relieve()
    return accelerator.reduce(loss, "sum")
