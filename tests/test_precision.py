"""Products are made in the format that the machine multiplies fast, whatever the weights are kept in."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lorica
import tiny
from lorica.fast import Fast
from lorica.kernels import precision
from lorica.kernels.elementwise import ACTIVATIONS
from lorica.kernels.lowrank import GatedMLP, Group, Matrix, SameInput, Update


@pytest.fixture(params=[True, False], ids=["slow in bf16", "fast in bf16"])
def machine(request, monkeypatch):
    wide = torch.float32 if request.param else torch.bfloat16
    monkeypatch.setattr(precision, "_cpu_computes_in", lambda dtype: wide if dtype == torch.bfloat16 else torch.float32)
    return request.param


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("has, pays, wide", [({}, True, True), ({"amx_bf16": True}, False, False)])
def test_a_cpu_widens_what_it_multiplies_slowly(monkeypatch, has, pays, wide):
    precision._cpu_computes_in.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(precision, "_bf16_pays", lambda: pays)
    assert precision.computes_in(draw(1)) == (torch.float32 if wide else torch.bfloat16)
    assert precision.computes_in(draw(1, dtype=torch.float16)) == torch.float32
    assert precision.computes_in(draw(1, dtype=torch.float32)) == torch.float32
    precision._cpu_computes_in.cache_clear()


def test_products_of_any_code_are_widened_where_they_are_slow(machine):
    x, W, b = draw(40, 8), draw(11, 8), draw(11)
    wide = torch.addmm(b.float(), x.float(), W.float().T).bfloat16()
    with precision.widened(W):
        several = torch.nn.functional.linear(x, W, b)
        few = torch.nn.functional.linear(x[:3], W, b)
        lying = torch.addmm(b, x[:3], W.T.contiguous())
    assert several.dtype == torch.bfloat16
    assert torch.equal(few, torch.nn.functional.linear(x[:3], W, b))
    if machine:
        assert torch.equal(several, wide) and torch.equal(lying, wide[:3])
    else:
        assert torch.equal(several, torch.nn.functional.linear(x, W, b))


def test_a_large_matrix_is_multiplied_in_slices(machine, monkeypatch):
    monkeypatch.setattr(precision, "SLICE", 20)
    a, W, b = draw(3, 8), draw(11, 8), draw(3, 11)
    rows = precision.mm_rows(a, W, a.new_empty(3, 11))
    columns = precision.mm_columns(b, W, b.new_empty(3, 8))
    torch.testing.assert_close(rows.float(), a.float() @ W.float().T, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(columns.float(), b.float() @ W.float(), rtol=1e-2, atol=1e-2)
    assert rows.dtype == columns.dtype == torch.bfloat16


def test_a_fused_group_gives_what_fp32_gives_and_keeps_the_formats(machine):
    gate, up, down = (Matrix(draw(*shape)) for shape in ((12, 8), (12, 8), (8, 12)))
    updates = tuple(Update(k, 0.5, (0, 5)) for k in (0, 1))
    factors = [draw(*shape, dtype=torch.float32).requires_grad_() for shape in ((2, 8), (12, 2), (2, 8), (12, 2))]
    last = [draw(*shape, dtype=torch.float32).requires_grad_() for shape in ((2, 12), (8, 2))]
    x = draw(1, 5, 8).requires_grad_()
    wide, narrow = Group((gate, up), updates), Group((down,), (Update(0, 0.5, (0, 5)),))
    y = GatedMLP.apply(x, wide, narrow, ACTIVATIONS["silu"], *factors, *last)
    y.sum().backward()

    plain = [each.detach().clone().requires_grad_() for each in (x.float(), *factors, *last)]
    z, A1, B1, A2, B2, A3, B3 = plain
    one = z @ gate.weight.float().T + 0.5 * z @ A1.T @ B1.T
    two = z @ up.weight.float().T + 0.5 * z @ A2.T @ B2.T
    h = torch.nn.functional.silu(one) * two
    wanted = h @ down.weight.float().T + 0.5 * h @ A3.T @ B3.T
    wanted.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    found = (y, *(each.grad for each in (x, *factors, *last)))
    for ours, theirs in zip(found, (wanted, *(each.grad for each in plain)), strict=True):
        assert (ours.float() - theirs).abs().max() <= 0.04 * theirs.abs().max()
    assert all(each.grad.dtype == torch.float32 for each in factors)


def test_one_input_of_several_projections_is_kept_as_it_came(machine):
    group = Group((Matrix(draw(6, 4)), Matrix(draw(3, 4))), (Update(1, 2.0, (0, 5)),))
    x, A, B = draw(5, 4), draw(2, 4, dtype=torch.float32).requires_grad_(), draw(3, 2, dtype=torch.float32)
    y, z = SameInput.apply(x, group, A, B)
    assert y.dtype == z.dtype == torch.bfloat16
    assert y.grad_fn.saved_tensors[0].dtype == torch.bfloat16


def test_layers_that_no_update_acts_on_are_widened_too(machine):
    """GPT-2 with an update on half of its projections: no product of a whole layer stays in a slow format."""

    made = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._schema.name.removeprefix("aten::").rstrip("_") in ("mm", "addmm"):
                made.append(out.dtype)
            return out

    model = tiny.gpt2().bfloat16()
    lorica.inject(model, lorica.LoRA(r=2), "qv")
    tiny.stir(model)
    x = torch.randn(1, 6, model.config.n_embd, generator=torch.Generator().manual_seed(0)).bfloat16()
    block, found = model.transformer.h[0], {}
    for name, forward in (("plain", contextlib.nullcontext()), ("fast", Fast(model).on())):
        given = x.clone().requires_grad_()
        with forward, Products():
            made.clear()
            y = block.mlp(block.attn.c_proj(given))
            y.float().square().sum().backward()
        found[name] = (y, given.grad)
    assert made and set(made) == {torch.float32 if machine else torch.bfloat16}
    for plain, fast in zip(found["plain"], found["fast"], strict=True):
        assert fast.dtype == torch.bfloat16
        torch.testing.assert_close(fast.float(), plain.float(), rtol=0.05, atol=0.02 * plain.abs().max().item())
