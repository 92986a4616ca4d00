"""The fast path of a patched model, for the length of a block: same function, fewer passes, less kept.

    quick = Fast(model)
    with quick.on():
        model(...)            # forward and backward

Inside, patched layers run as the fused low-rank linear, and three kinds of module that most decoders are made of run as
one operation each: RMSNorm, the gated MLP, and attention with rotary positions, whose projections read one input. A
module is taken over only if it is built that way and a random input gave what its own forward gives; everything else
runs as it is. Nothing outside the block changes, so the plain path stays the reference.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from lorica.errors import LoricaError
from lorica.kernels.documents import NAME, Documents, attending, attention, current, documents
from lorica.kernels.elementwise import ACTIVATIONS, Activation, RMSNorm, Rotary
from lorica.kernels.lowrank import GatedMLP, Group, Matrix, SameInput, Update
from lorica.kernels.precision import computes_in
from lorica.lowrank import LowRank
from lorica.state import CHILD, Patches, plain_class

# How far a rewritten module may be from its own forward, relative to the largest value.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# What a module raises on trial that is built otherwise than it looks.
_UNLIKE = (RuntimeError, TypeError, NotImplementedError, AttributeError, IndexError, ValueError)


class Fast:
    """What the kernels can take over of a model: found and tried once, then switched on for as long as a block lasts.

    Adapters may be added, switched or filled in between; a model that was patched anew needs a new one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forwards: dict[nn.Module, Callable] = {}
        salts: dict[int, int] = {}
        for path, module in model.named_modules():
            if isinstance(module, Patches):
                layer = path.removesuffix(f".{CHILD}")
                salts |= {id(part): zlib.crc32(f"{layer}/{name}".encode()) for name, part in _parts(module)}
        verdicts: dict[Any, bool] = {}
        options = _asked(model)
        with attending(model):
            for module in model.modules():
                if "forward" in module.__dict__ or getattr(module, CHILD, None) is not None or _drops(module):
                    continue  # someone else's, such as the hooks of a model spread over devices; or it is patched
                for forward in (_norm(module), _mlp(module, salts), _attention(module, salts, options.get(module))):
                    if forward is not None and _same(module, forward, verdicts):
                        self.forwards[module] = forward
        head = getattr(model, "get_output_embeddings", lambda: None)()  # which `kernels.head` multiplies with
        for module in model.modules():
            if module in self.forwards:
                continue
            if getattr(module, CHILD, None) is None:
                if module is not head and _dense(module) and _narrow(module):
                    self.forwards[module] = _frozen(module)
            elif _dense(module):
                self.forwards[module] = _linear(module, salts)
            elif _followed(module):
                self.forwards[module] = _follow(module)

    @property
    def names(self) -> list[str]:
        """The classes of the modules that are taken over."""
        return sorted({type(module).__name__ for module in self.forwards})

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Run the model through the kernels; it attends inside `kernels.documents`, where there are any."""
        with contextlib.ExitStack() as undo:
            undo.enter_context(attending(self.model))
            for module, forward in self.forwards.items():
                module.forward = forward  # type: ignore[method-assign,assignment]
                undo.callback(delattr, module, "forward")
            yield


def _parts(patches: Patches) -> Iterator[tuple[str, nn.Module]]:
    """Every patch of a layer by part; the same part of two adapters has one name."""
    for adapter in patches.values():
        yield from adapter.items()  # type: ignore[union-attr,operator]


def _drops(module: nn.Module) -> bool:
    """Whether a module drops something while it trains, which no trial would show."""
    return any(isinstance(child, nn.Dropout) and child.p for child in module.children())


def _dense(layer: Any) -> bool:
    """Whether a layer is a frozen matrix that only low-rank updates act on."""
    if layer is None or layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return False
    patches = getattr(layer, CHILD, None)
    kind = plain_class(layer) if patches is not None else type(layer)
    if kind not in (nn.Linear, Conv1D) or not layer.weight.is_floating_point():
        return False
    if any(parameter.requires_grad for parameter in layer._parameters.values() if parameter is not None):
        return False
    return patches is None or all(isinstance(part, LowRank) for _, part in _parts(patches))


def _followed(layer: Any) -> bool:
    """Whether all patches of a layer act on its output, and on each token by itself."""
    return "forward" not in layer.__dict__ and all(
        getattr(part, "by_token", False) for _, part in _parts(getattr(layer, CHILD))
    )


def _whole(here: Documents, tokens: int, layer: nn.Module) -> None:
    """LoricaError where a layer sees a choice of the tokens, of adapters that are mixed."""
    if tokens != here.starts[-1]:
        raise LoricaError(f"{type(layer).__name__} sees {tokens:,} of {here.starts[-1]:,} tokens: whose, is not known")


def _group(layers: Sequence[nn.Module], tokens: int, salts: dict[int, int]) -> tuple[Group, list[Tensor]]:
    """Layers that read one input of so many tokens, with the updates that act now, and their factors."""
    matrices, found = [], []
    here = current()
    if here and here.owners:
        _whole(here, tokens, layers[0])
    for k, layer in enumerate(layers):
        matrices.append(Matrix(layer.weight, layer.bias, isinstance(layer, Conv1D)))  # type: ignore[arg-type]
        patches = getattr(layer, CHILD, None)
        if patches is None:
            continue
        for owner, start, stop in here.shares if here and here.owners else [(patches.active, 0, tokens)]:
            for part in patches.parts_of(owner).values() if owner in patches else ():
                drop = part.dropout.p if layer.training and isinstance(part.dropout, nn.Dropout) else 0.0
                gains = [] if part.m is None else [part.gain(layer)]
                update = Update(k, part.scale, (start, stop), part.rows, drop, salts.get(id(part), 0), bool(gains))
                found.append((update, *part.factors, gains))
    found.sort(key=lambda each: each[0].tokens)
    factors = [factor for _, A, B, _ in found for factor in (A, B)]
    factors += [gain for *_, gains in found for gain in gains]
    return Group(tuple(matrices), tuple(update for update, *_ in found)), factors


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _linear(layer: nn.Module, salts: dict[int, int]) -> Callable:
    """A patched layer by itself."""

    def forward(x: Tensor) -> Tensor:
        here = current()
        if here and not here.owners and _tokens(x) != here.starts[-1]:
            # A head at some positions, or an expert: dropout would not know which tokens these are.
            return type(layer).forward(layer, x)  # type: ignore[operator]
        group, factors = _group((layer,), _tokens(x), salts)
        return SameInput.apply(x, group, *factors)[0] if factors else plain_class(layer).forward(layer, x)

    return forward


def _narrow(layer: Any) -> bool:
    """Whether a layer is kept in a format that its device multiplies more slowly than a wider one."""
    return computes_in(layer.weight) != layer.weight.dtype


def _frozen(layer: Any) -> Callable:
    """A layer that nothing acts on."""

    def forward(x: Tensor) -> Tensor:
        matrix = Matrix(layer.weight, layer.bias, isinstance(layer, Conv1D))
        return SameInput.apply(x, Group((matrix,), ()))[0]

    return forward


def _follow(layer: Any) -> Callable:
    """A layer whose patches act on each token of its output: in a mixed pass, each adapter's on its own tokens."""

    def forward(*args: Any, **kwargs: Any):
        here = current()
        if not (here and here.owners):
            return type(layer).forward(layer, *args, **kwargs)
        out = plain_class(layer).forward(layer, *args, **kwargs)
        y, *more = out if isinstance(out, tuple) else (out,)
        _whole(here, _tokens(y), layer)
        pieces = []
        for owner, start, stop in here.shares:
            piece, patches = y.narrow(-2, start, stop - start), getattr(layer, CHILD)
            for part in patches.parts_of(owner).values() if owner in patches else ():
                piece = part(layer, lambda piece=piece: piece)
            pieces.append(piece)
        y = torch.cat(pieces, -2)
        return (y, *more) if isinstance(out, tuple) else y

    return forward


def _norm(module: nn.Module) -> Callable | None:
    """``w x / rms(x)``, or ``(1 + w) x / rms(x)`` as Gemma has it."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = type(module).__name__.endswith("RMSNorm")
    if not named or not isinstance(weight, Tensor) or weight.requires_grad or not isinstance(eps, float):
        return None
    if (
        weight.is_meta
        or (weight == 0).all()
        or _far(module(probe := _random(weight)), RMSNorm.apply(probe, weight, eps))
    ):
        scale = (1 + weight.float()).to(weight.dtype)
        return lambda x: RMSNorm.apply(x, scale, eps)
    return lambda x: RMSNorm.apply(x, module.weight, eps)


def _mlp(module: Any, salts: dict[int, int]) -> Callable | None:
    """``down(act(gate x) * up x)``."""
    layers: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down = layers
    act = _activation(getattr(module, "act_fn", None))
    if act is None or not all(_dense(layer) for layer in layers):
        return None

    def forward(x: Tensor) -> Tensor:
        wide, first = _group((gate, up), _tokens(x), salts)
        narrow, second = _group((down,), _tokens(x), salts)
        return GatedMLP.apply(x, wide, narrow, act, *first, *second)

    return forward


def _attention(module: Any, salts: dict[int, int], options: dict[str, Any] | None) -> Callable | None:
    """Rotary attention with one input for queries, keys and values; their norms, where there are any, are its own."""
    layers: list[Any] = [getattr(module, name, None) for name in _QKV]
    if options is None or not all(_dense(layer) for layer in layers):
        return None

    def forward(hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **kwargs: Any):
        if current() is None or kwargs.get("past_key_values") is not None or position_embeddings is None:
            return type(module).forward(module, hidden_states, position_embeddings, attention_mask, **kwargs)
        group, factors = _group(layers, _tokens(hidden_states), salts)
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        q, k, v = (states.view(shape) for states in SameInput.apply(hidden_states, group, *factors))
        q, k = (norm(x) if (norm := getattr(module, name, None)) else x for name, x in (("q_norm", q), ("k_norm", k)))
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        q, k, v = (x.transpose(1, 2) for x in (Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin), v))
        dropout = module.attention_dropout if module.training else 0.0
        out, _ = attention(module, q, k, v, attention_mask, dropout=dropout, **options)
        return module.o_proj(out.flatten(2)), None

    return forward


_QKV = ("q_proj", "k_proj", "v_proj")
_SPY = f"{NAME}_options"
_asking: dict[nn.Module, dict[str, Any]] = {}


def _spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any):
    """An attention function that only takes down what a module hands to its own: scale, window, softcap."""
    _asking[module] = {
        name: value for name, value in options.items() if name in ("scaling", "sliding_window", "softcap")
    }
    return query.transpose(1, 2), None


AttentionInterface.register(_SPY, _spy)


@torch.no_grad()
def _asked(model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """The options of every attention that looks like one with rotary positions, as it gives them itself."""
    _asking.clear()
    with attending(model, _SPY):
        for module in model.modules():
            if all(hasattr(module, name) for name in (*_QKV, "o_proj", "head_dim")):
                with contextlib.suppress(*_UNLIKE):
                    module(**_attention_input(module))
    return dict(_asking)


def _attention_input(module: Any) -> dict[str, Any]:
    x = _random(module.q_proj.weight, 1, 5)
    half = _random(x.new_empty(module.head_dim // 2), 2, 1, 5)
    tables = (torch.cat((half[0], half[0]), -1), torch.cat((half[1], half[1]), -1))
    return {"hidden_states": x, "position_embeddings": tables, "attention_mask": None}


def _activation(act: Any) -> Activation | None:
    """The entry of `ACTIVATIONS` that computes what a module's activation computes."""
    if act is None:
        return None
    probe = torch.linspace(-4, 4, 33)
    with torch.no_grad():
        wanted = act(probe)
    return next((known for known in ACTIVATIONS.values() if torch.allclose(known.forward(probe), wanted)), None)


def _random(weight: Tensor, *shape: int) -> Tensor:
    """A random input for a module, which leaves the random state as it was."""
    generator = torch.Generator().manual_seed(0)
    size = (*shape, weight.shape[-1]) if shape else (3, weight.shape[-1])
    return torch.randn(size, generator=generator).to(weight)


@torch.no_grad()
def _same(module: nn.Module, forward: Callable, verdicts: dict[Any, bool]) -> bool:
    """Whether the rewritten forward gives what the module's own gives; tried once per class, shape and traits."""
    weights = [parameter for parameter in module.parameters() if parameter.ndim]
    kind = (type(module), weights[0].shape, weights[0].dtype, _traits(module))
    if kind not in verdicts:
        mode = module.training
        module.eval()
        try:
            verdicts[kind] = weights[0].is_meta or not _differs(module, forward)
        except _UNLIKE:
            verdicts[kind] = False
        finally:
            module.train(mode)
    return verdicts[kind]


def _traits(module: nn.Module) -> tuple:
    """What modules of one class may differ in: a window, whether there are rotary positions, a scale."""
    plain = ((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str | None))
    return tuple(sorted((name, repr(value)) for name, value in plain if name not in ("layer_idx", "training")))


def _differs(module: nn.Module, forward: Callable) -> bool:
    if hasattr(module, "q_proj"):
        given = _attention_input(module)
        with documents(Documents((2, 3))):
            return _far(module(**given)[0], forward(**given)[0])
    x = _random(module.gate_proj.weight if hasattr(module, "gate_proj") else module.weight, 1, 3)  # type: ignore
    return _far(module(x), forward(x))


def _far(a: Tensor, b: Tensor) -> bool:
    limit = CLOSE.get(a.dtype, 0.0) * max(a.abs().max().item(), 1e-6)
    return not (a - b).abs().max().item() <= limit
