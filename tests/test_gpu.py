"""The laws on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

import laws
import lorica
from lorica.kernels.documents import Documents, attention, documents
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


def test_attention_of_all_documents_is_one_kernel_on_a_gpu():
    """Against the plain reference: each document through torch's own attention."""
    torch.manual_seed(0)
    lengths = (70, 128, 5, 300)
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
