"""New tokens with only their rows trained: a patch of an embedding and of the output head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.errors import LoricaError


def ascending(ids: Sequence[int]) -> tuple[int, ...]:
    """Ids in their order, each once."""
    return tuple(sorted(set(ids)))


class TokenRows(nn.Module):
    """Trains some rows of a ``[num, dim]`` matrix and leaves the rest: of an embedding, or of an untied output head.

    `rows` holds the values themselves, not differences, so that they mean the same whatever the untrained rows of a
    newly resized embedding were filled with.
    """

    ids: Tensor
    first: Tensor

    def __init__(self, layer: nn.Module, ids: Sequence[int]) -> None:
        super().__init__()
        ids = ascending(ids)
        weight = layer.get_parameter("weight")
        if not 0 <= ids[0] <= ids[-1] < weight.shape[0]:
            raise LoricaError(
                f"token_rows names id {ids[-1] if ids[0] >= 0 else ids[0]}, but this embedding has "
                f"{weight.shape[0]} rows; call model.resize_token_embeddings(len(tokenizer)) first"
            )
        start = weight.detach()[list(ids)].float()
        self.rows = nn.Parameter(start.clone())
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        # What the head holds at these rows; not in the state dict because it is the base's, not the adapter's.
        self.register_buffer("first", start, persistent=False)

    def forward(self, layer: nn.Module, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Ids ``[...]`` to ``[..., dim]`` at an embedding; hidden ``[..., dim]`` to logits ``[..., num]`` at a head."""
        y = base(x)
        if not isinstance(layer, nn.Embedding):
            return self.logits(y, x)
        place = torch.searchsorted(self.ids, x).clamp_max(len(self.ids) - 1)
        rows = F.embedding(place, self.rows) * getattr(layer, "embed_scale", 1.0)
        return torch.where((self.ids[place] == x)[..., None], rows.to(y.dtype), y)

    def logits(self, y: Tensor, x: Tensor) -> Tensor:
        """Logits ``y [..., num]`` with those of the trained rows replaced, for hidden ``x [..., dim]``."""
        # Adding the difference keeps an untrained row's logit as it was to the bit; a second product would not.
        change = F.linear(x.to(self.rows.dtype), self.rows - self.first)
        return y.index_copy(-1, self.ids, (y[..., self.ids] + change).to(y.dtype))

    def fold(self, layer: nn.Module, W: Tensor) -> Tensor:
        """``W`` in fp32 with the trained rows in place: ``[dim, num]`` of an embedding, ``[num, dim]`` of a head."""
        rows, ids = self.rows.detach().float().to(W.device), self.ids.to(W.device)
        return W.index_copy(1, ids, rows.T) if isinstance(layer, nn.Embedding) else W.index_copy(0, ids, rows)

    def silent(self) -> bool:
        """Whether no row has moved."""
        return torch.equal(self.rows.detach(), self.first.to(self.rows))


class TiedTokenRows(nn.Module):
    """The output side of trained rows where embedding and head are one matrix. Owns no parameters."""

    def __init__(self, source: TokenRows) -> None:
        super().__init__()
        self.source = (source,)  # in a tuple, so that the rows are registered once, at the embedding

    def forward(self, layer: nn.Module, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Hidden ``[..., dim]`` to logits ``[..., num]``."""
        return self.source[0].logits(base(x), x)

    def fold(self, layer: nn.Module, W: Tensor) -> Tensor:
        """``W [num, dim]`` in fp32 with the trained rows in place."""
        return self.source[0].fold(layer, W)

    def silent(self) -> bool:
        """Whether no row has moved."""
        return self.source[0].silent()
