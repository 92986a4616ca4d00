"""The laws on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

import laws
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
