"""The laws that every method and storage inherits, each as a function of a fresh model, a method and its targets.

*To the bit* means `torch.equal`; *close* means within 1e-5 of the largest value, in fp32.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica import Adapter
from lorica.errors import LoricaError
from lorica.patch import Method
from tiny import logits, stir

Make = Callable[[], nn.Module]


def close(a: Tensor, b: Tensor, rtol: float = 1e-5) -> bool:
    """Whether two results differ by at most `rtol` of the largest of them."""
    return (a.float() - b.float()).abs().max().item() <= rtol * max(b.abs().max().item(), 1e-3)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def step_zero_is_the_base(make: Make, method: Method, targets: str) -> None:
    """Law 1, to the bit."""
    model = make()
    before = logits(model)
    lorica.inject(model, method, targets)
    assert torch.equal(logits(model), before)


def inject_and_eject_are_inverse(make: Make, method: Method, targets: str) -> None:
    """Law 2, to the bit: outputs, names, classes, ties and what requires a gradient."""
    model = make()
    before, outputs = weights_of(model), logits(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    lorica.inject(model, method, targets)
    stir(model)
    assert not torch.equal(logits(model), outputs)
    with lorica.disabled(model):
        assert torch.equal(logits(model), outputs)
    lorica.eject(model)
    assert same_weights(weights_of(model), before)
    assert torch.equal(logits(model), outputs)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted


def merge_and_unmerge_are_inverse(make: Make, method: Method, targets: str) -> None:
    """Laws 2 and 3: unmerging restores every tensor to the bit, merging keeps the function within the rounding.

    What cannot be merged says why, and acts as before.
    """
    model = make()
    lorica.inject(model, method, targets)
    stir(model)
    before, outputs = weights_of(model), logits(model)
    with lorica.disabled(model):
        base = logits(model)
    if method.unmergeable:
        with pytest.raises(LoricaError, match=re.escape(method.unmergeable)):
            lorica.merge(model)
        assert torch.equal(logits(model), outputs)
        return
    report = lorica.merge(model)
    merged = logits(model)
    exact = next(model.parameters()).dtype == torch.float32
    assert close(merged, outputs, 1e-5 if exact else 0.05)
    assert report.layers > 0
    assert report.max_logit_diff is not None
    assert report.max_logit_diff <= (1e-5 if exact else 0.05) * max(outputs.abs().max().item(), 1.0)
    with lorica.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)
    lorica.unmerge(model)
    assert same_weights(weights_of(model), before)
    assert torch.equal(logits(model), outputs)


def save_and_load_are_inverse(make: Make, method: Method, targets: str, folder: Path) -> None:
    """Law 2: an adapter from its file is the adapter, to the bit, and acts like it."""
    model = make()
    lorica.inject(model, method, targets)
    stir(model)
    adapter = Adapter.of(model)
    adapter.save(folder)
    loaded = Adapter.load(folder)
    assert loaded.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(loaded.tensors[key], adapter.tensors[key]) for key in adapter.tensors)
    assert loaded.sha256 == adapter.sha256
    fresh = make()
    loaded.apply(fresh)
    assert torch.equal(logits(fresh), logits(model))


def adapters_do_not_touch_each_other(make: Make, method: Method, targets: str) -> None:
    """Several adapters live on one model; switching, merged or not, gives each its own outputs to the bit."""
    model = make()
    base = logits(model)
    said = {}
    for place, name in enumerate(("a", "b")):
        lorica.inject(model, method, targets, name)
        stir(model, seed=place)
        said[name] = logits(model)
    assert not torch.equal(said["a"], said["b"])
    for name in ("a", "b", "a"):
        lorica.select(model, name)
        assert torch.equal(logits(model), said[name])
    lorica.select(model, None)
    assert torch.equal(logits(model), base)
    if not method.unmergeable:
        merged_they_switch_too(model, said)
    lorica.eject(model)
    assert torch.equal(logits(model), base)


def merged_they_switch_too(model: nn.Module, said: dict[str, Tensor]) -> None:
    """Selecting on a merged model merges the other adapter in its place."""
    exact = next(model.parameters()).dtype == torch.float32
    lorica.merge(model, "a")
    alone = logits(model)
    lorica.select(model, "b")
    assert close(logits(model), said["b"], 1e-5 if exact else 0.05)
    lorica.select(model, "a")
    assert torch.equal(logits(model), alone)


def a_copy_is_independent(make: Make, method: Method, targets: str) -> None:
    """`copy.deepcopy` of a patched model acts the same and shares nothing with it."""
    model = make()
    lorica.inject(model, method, targets)
    stir(model)
    twin = copy.deepcopy(model)
    outputs = logits(model)
    assert torch.equal(logits(twin), outputs)
    stir(twin, seed=5)
    assert not torch.equal(logits(twin), outputs)
    assert torch.equal(logits(model), outputs)


def only_the_adapter_learns(make: Make, method: Method, targets: str) -> None:
    """Every tensor of the adapter gets a gradient once it is off its start, and nothing else does."""
    model = make()
    lorica.inject(model, method, targets)
    stir(model)
    from tiny import inputs

    model(**inputs(model)).logits.float().pow(2).mean().backward()
    own = {id(parameter) for parameter in lorica.trainable(model).values()}
    for key, parameter in lorica.trainable(model).items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
    for name, parameter in model.named_parameters():
        assert id(parameter) in own or parameter.grad is None, name
