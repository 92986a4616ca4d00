"""The laws on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

import laws
import lorica
from lorica.kernels import gpu
from lorica.kernels.documents import Documents, attention, documents
from lorica.kernels.elementwise import ACTIVATIONS, RMSNorm, Rotary
from lorica.passes import Passes
from test_fast import ROWS, adapted, apart, eager, gradients
from test_laws import CASES, case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "law",
    [laws.step_zero_is_the_base, laws.inject_and_eject_are_inverse, laws.merge_and_unmerge_are_inverse],
    ids=lambda law: law.__name__,
)
def test_law_holds_on_a_gpu(law, name, dtype):
    make, method, targets = case(name)
    assert law(lambda: make().to("cuda", dtype), method, targets) is None


def test_an_adapter_trained_on_the_cpu_acts_the_same_on_a_gpu(tmp_path):
    make, method, targets = case("llama all-linear")
    assert laws.save_and_load_are_inverse(lambda: make().cuda(), method, targets, tmp_path / "a") is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
def test_a_pack_on_a_gpu_gives_the_gradient_of_its_rows_alone_on_a_cpu(family, dtype, near):
    model = adapted(family).to("cuda", dtype)
    for parameter in lorica.trainable(model).values():
        parameter.data = parameter.data.float()
    passes = Passes(model, ROWS, 1)
    assert passes.way == "packed", passes.note
    with passes(model, ROWS) as (loss, _):
        loss.backward()
    found = {name: gradient.cpu() for name, gradient in gradients(model).items()}
    wanted, expected = eager(adapted(family))
    assert loss.item() == pytest.approx(wanted, rel=near)
    assert apart(found, expected) < near


@pytest.mark.parametrize("lengths", [(70, 128, 5, 300), (128, 128)], ids=["any", "one length"])
def test_attention_of_all_documents_is_one_kernel_on_a_gpu(lengths):
    """Against the plain reference: each document through torch's own attention."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(lengths), 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    with documents(Documents(lengths)):
        found, _ = attention(torch.nn.Module(), q, k, v, None)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        rows = (states[:, :, part].float() for states in (q, k, v))
        alone = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        assert (found[:, part].float() - alone.transpose(1, 2)).abs().max() < 0.03
        start += length


@pytest.mark.parametrize("act", gpu.GATES)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_a_gated_product_in_one_pass_is_the_product_of_its_parts(act, dtype, near):
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(37, 301, device="cuda", dtype=dtype) for _ in range(3))
    wide, known = [each.double() for each in (gate, up, dh)], ACTIVATIONS[act]
    wanted = [known.forward(wide[0]) * wide[1], known.backward(wide[2] * wide[1], wide[0])]
    wanted.append(wide[2] * known.forward(wide[0]))
    found = [gpu.gated(gate, up, act), *gpu.gated_backward(dh, gate, up, act)]
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= near * b.norm()


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_rotary_positions_in_one_pass_are_the_formula(dtype, near):
    torch.manual_seed(0)
    x = torch.randn(1, 9, 3, 32, device="cuda", dtype=dtype, requires_grad=True)
    cos, sin, dy = (torch.randn(1, 9, heads, 32, device="cuda", dtype=dtype) for heads in (1, 1, 3))
    wide = x.detach().double().requires_grad_()
    turned = torch.cat((-wide[..., 16:], wide[..., :16]), -1)
    expected = wide * cos.double() + turned * sin.double()
    found = Rotary.apply(x, cos, sin)
    ours, theirs = torch.autograd.grad(found, x, dy), torch.autograd.grad(expected, wide, dy.double())
    for a, b in zip((found, *ours), (expected, *theirs), strict=True):
        assert (a.double() - b).norm() <= near * b.norm()


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_a_softmax_becomes_its_gradient_in_place(dtype, near):
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 9001, device="cuda", dtype=dtype)
    wanted, weights, nll = torch.tensor([0, 9000, 4095, 4096, 7]).cuda(), torch.rand(5).cuda(), torch.empty(5).cuda()
    logs = logits.double().log_softmax(-1)
    expected = (logs.exp() - torch.nn.functional.one_hot(wanted, 9001)) * weights[:, None]
    gpu.softmax_gradient(logits, wanted, weights, nll)
    assert (logits.double() - expected).norm() <= near * expected.norm()
    assert torch.allclose(nll.double(), -logs.gather(1, wanted[:, None]).squeeze(1), rtol=1e-5)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_a_norm_in_one_pass_is_the_formula(dtype, near):
    torch.manual_seed(0)
    w = torch.rand(96, device="cuda", dtype=dtype) + 0.5
    x = torch.randn(7, 96, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(7, 96, device="cuda", dtype=dtype)
    wide = x.detach().double().requires_grad_()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()
    found = RMSNorm.apply(x, w, 1e-6)
    ours, theirs = (
        (found, *torch.autograd.grad(found, x, dy)),
        (expected, *torch.autograd.grad(expected, wide, dy.double())),
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() <= near * b.norm()
