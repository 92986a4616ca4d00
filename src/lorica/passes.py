"""How a model is asked for the loss of some examples: the fastest way in which it gives the loss of the plain one.

| way    | layout         | head                      | for                                                        |
|--------|----------------|---------------------------|------------------------------------------------------------|
| packed | end to end     | labelled rows, no logits  | attention through transformers' interface, a plain head    |
| rows   | end to end     | logits of labelled rows   | the same, with a head that is patched, trained or unknown  |
| narrow | padded         | logits of labelled columns| its own attention, `logits_to_keep`                        |
| plain  | padded         | all logits                | every model                                                |

Each is tried on two examples of different length before training; the first whose loss is the plain one's is used, and
what it is not is said once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.data import Example, collate
from lorica.data.pack import Pack, pack
from lorica.errors import LoricaError
from lorica.fast import Fast
from lorica.kernels.documents import Documents, documents
from lorica.kernels.head import bare, plain_head
from lorica.kernels.labelled import IGNORED, narrowed, takes_positions
from lorica.kernels.precision import widened

WAYS = ("packed", "rows", "narrow", "plain")
AGREE = {torch.float32: 1e-5}
AGREE_LOW = 1e-2  # where the base keeps eight bits of a number
APART = 1e-4  # the same, of two passes in which its tokens only stand elsewhere: it was 0 for every model that packs
TRIED = 1 << 22  # logits of each of the examples that are tried, which may be made at every position
# What a module raises that cannot take a pack; its answer is checked where it raises nothing.
_REFUSALS = (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError, IndexError)


class Passes:
    """The loss of examples under a model, in the way that was found for it.

    Args:
        model: as the loop trains it; unwrapped from what processes put around it.
        examples: what will be trained on; the two shortest of different length are tried.
        pad_id: pads where padding is needed.
        smooth: label smoothing.
        ways: those to try, in order.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        pad_id: int,
        smooth: float = 0.0,
        ways: Sequence[str] = WAYS,
    ) -> None:
        self.model, self.pad_id, self.smooth = model, pad_id, smooth
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        takes = inspect.signature(model.forward).parameters
        self.extra: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        self.takes_positions = takes_positions(model)
        self.quick: Fast | None = None
        self.way = "plain"
        self.way, self.note = self._choose(_pair(examples, TRIED // model.get_input_embeddings().weight.shape[0]), ways)

    @contextlib.contextmanager
    def __call__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        weights: Sequence[float] | None = None,
        keys: Sequence[int] = (),
        owners: Sequence[str] = (),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The loss of some examples, and what each contributes; the backward pass belongs into the block.

        Args:
            model: what to call, `self.model` or what is wrapped around it.
            weights: of each example's token losses; without, 1 / (labels of all), so that the loss is their mean.
            keys: a number per example that seeds its dropout.
            owners: an adapter per example, neighbours of one together; needs the ways packed or rows.

        Yields:
            loss: ``sum_i weights_i nats_i``, plus what the model adds itself (a router's loss).
            nats: ``[examples]`` sums of token losses, without gradient; empty in the ways narrow and plain.
        """
        with contextlib.ExitStack() as stack:
            if self.quick is None:
                assert weights is None and not owners, self.way
                batch: Any = self._padded(examples)
                rows = torch.empty(0)
            else:
                batch = pack(examples, self._device())
                rows = _spread(batch, weights)
                stack.enter_context(self.quick.on())
                stack.enter_context(documents(Documents(batch.lengths, tuple(keys), tuple(owners))))
            yield getattr(self, f"_{self.way}")(model, batch, rows)

    def _packed(self, model: nn.Module, batch: Pack, rows: Tensor) -> tuple[Tensor, Tensor]:
        with bare(self.model, rows, self.smooth) as found:
            out = model(**self._inputs(batch), logits_to_keep=batch.kept, labels=batch.wanted[None])
        (nll,) = found
        return out.loss, _sums(nll, batch.counts)

    def _rows(self, model: nn.Module, batch: Pack, rows: Tensor) -> tuple[Tensor, Tensor]:
        kept = {"logits_to_keep": batch.kept} if self.takes_positions else {}
        logits = model(**self._inputs(batch), **kept).logits[0]
        logits = logits if kept else logits[batch.kept]
        nll = F.cross_entropy(logits.float(), batch.wanted, reduction="none", label_smoothing=self.smooth)
        return (nll * rows).sum(), _sums(nll.detach(), batch.counts)

    def _narrow(self, model: nn.Module, batch: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._own_loss(model, narrowed(batch))

    def _plain(self, model: nn.Module, batch: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._own_loss(model, batch)

    def _own_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with _smoothed(self.model, self.smooth):
            return model(**inputs, **self.extra).loss, torch.empty(0)

    def _padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {key: tensor.to(self._device()) for key, tensor in collate(examples, self.pad_id).items()}

    def _inputs(self, batch: Pack) -> dict[str, Any]:
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, **self.extra}

    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def _choose(self, pair: list[Example], ways: Sequence[str]) -> tuple[str, str]:
        """The first way that gives the plain loss on the pair, and why it is not the first there is."""
        if self._device().type == "meta":
            self.quick = Fast(self.model)  # a plan: there are no numbers to compare
            return "rows" if plain_head(self.model) is None or not self.takes_positions else "packed", ""
        mode = self.model.training
        self.model.eval()
        with widened(next(self.model.parameters())):
            wanted = float(self._plain(self.model, self._padded(pair), torch.empty(0))[0])
        reasons = []
        for way in ways:
            reason = self._refused(way, pair, wanted)
            if reason is None:
                break
            reasons.append(reason)
        else:
            raise LoricaError(f"this model takes none of the ways {', '.join(ways)}: {'; '.join(reasons)}")
        self.model.train(mode)
        return way, f"{_DONE[way]}: {'; '.join(dict.fromkeys(reasons))}" if reasons else ""

    def _refused(self, way: str, pair: list[Example], wanted: float) -> str | None:
        """Why a way is not for this model; None if it is."""
        self.way, self.quick = way, None
        if way == "plain":
            return None
        if way == "packed" and (plain_head(self.model) is None or not self.takes_positions):
            return "the output head is not a plain matrix"
        if way == "narrow" and not self.takes_positions:
            return "the model takes no logits_to_keep"
        try:
            self.quick = Fast(self.model) if way in ("packed", "rows") else None
            with self(self.model, pair) as (found, nats):
                loss = float(found)
            if self.quick and self._leaks(pair, nats):
                return "what one document of a pack says depends on another"
        except _REFUSALS as fault:
            return f"{type(fault).__name__} {(str(fault).splitlines() or [''])[0][:80]}".strip()
        limit = AGREE.get(next(self.model.parameters()).dtype, AGREE_LOW)
        if abs(loss - wanted) <= limit * abs(wanted):
            return None
        return f"{'a pack' if self.quick else 'a part of the logits'} gives the loss {loss:.6g}, not {wanted:.6g}"

    def _leaks(self, pair: list[Example], nats: Tensor) -> bool:
        """Whether a document says something else once the other stands behind it and reads otherwise.

        It does where it is seen by attention without a mask, or where a state or positions run on.
        """
        other = replace(pair[0], ids=[pair[0].ids[-1]] * len(pair[0].ids))  # an id that may be a label
        with self(self.model, [pair[1], other]) as (_, turned):
            # What is all but certain has few nats, and rounding goes by the logits.
            limit = AGREE.get(self.dtype, APART) * (float(nats[1]) + pair[1].labels)
            return not abs(float(turned[0]) - float(nats[1])) <= limit


_DONE = {
    "rows": "the loss is computed from logits",
    "narrow": "batches are padded",
    "plain": "batches are padded, with logits at every position",
}


def _pair(examples: Sequence[Example], most: int) -> list[Example]:
    """The shortest example and the shortest that is longer, the same at every resume; the longer first.

    Of a long one, about `most` tokens around its first label.
    """
    first = min(examples, key=lambda example: len(example.ids))
    longer = [example for example in examples if len(example.ids) > len(first.ids)]
    other = min(longer, key=lambda example: len(example.ids)) if longer else first
    return [_excerpt(other, max(16, most)), _excerpt(first, max(12, most * 3 // 4))]


def _excerpt(example: Example, size: int) -> Example:
    start = max(0, example.loss.index(True) - size // 2) if any(example.loss) else 0
    part = slice(start, start + size)
    return replace(example, ids=example.ids[part], loss=[False, *example.loss[part][1:]])


def _spread(batch: Pack, weights: Sequence[float] | None) -> Tensor:
    """A weight for each labelled row ``[n]``, from those of the documents."""
    device = batch.kept.device
    if weights is None:
        return torch.full((len(batch.kept),), 1 / len(batch.kept), device=device)
    counts = torch.tensor(batch.counts)
    return torch.tensor(weights, dtype=torch.float32).repeat_interleave(counts).to(device)


def _sums(nll: Tensor, counts: Sequence[int]) -> Tensor:
    """Sums of runs of `counts` rows: ``[n]`` to ``[documents]``."""
    return torch.stack([part.sum() for part in nll.split(list(counts))])


@contextlib.contextmanager
def _smoothed(model: nn.Module, smooth: float) -> Iterator[None]:
    """Let a model's own loss be smoothed for the length of a block."""
    if not smooth:
        yield
        return

    def loss(logits: Tensor, labels: Tensor, *args, shift_labels: Tensor | None = None, **kwargs) -> Tensor:
        goal = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shift_labels is None else shift_labels
        flat = logits.float().flatten(0, -2)
        return F.cross_entropy(flat, goal.flatten(), ignore_index=IGNORED, label_smoothing=smooth)

    kept = model.__dict__.get("_loss_function")
    model.loss_function = loss  # type: ignore[assignment]
    try:
        yield
    finally:
        if kept is None:
            del model._loss_function
        else:
            model._loss_function = kept
