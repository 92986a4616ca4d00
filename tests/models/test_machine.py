"""Words for devices and number formats."""

from __future__ import annotations

import pytest
import torch

from lorica import LoricaError
from lorica.kernels import precision
from lorica.models import machine, resolve_device, resolve_dtype


@pytest.mark.parametrize(
    "found, pays, native",
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True, True),
        ({"avx512_bf16": True, "amx_bf16": False}, False, False),
        ({"avx512_bf16": False, "amx_bf16": True}, False, True),
        ({"avx512_f": True, "avx512_bf16": False}, True, False),
        ({}, True, False),
    ],
)
def test_auto_is_bf16_only_where_the_cpu_has_the_instructions_and_they_pay(monkeypatch, found, pays, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(precision, "_bf16_pays", lambda: pays)
    assert resolve_dtype("auto", "cpu") == (torch.bfloat16 if native else torch.float32)


def test_auto_asks_a_gpu_for_hardware_and_not_for_emulation(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: bool(asked.append(including_emulation))
    )
    assert machine.native_bf16(torch.device("cuda")) is False
    assert asked == [False]


def test_the_capabilities_have_the_names_that_are_asked_for():
    found = torch.cpu.get_capabilities()
    if found.get("architecture") != "x86_64":
        pytest.skip("the names are those of x86 CPUs")
    assert {"avx512_bf16", "amx_bf16"} <= set(found)


def test_an_unknown_dtype_gets_the_nearest_suggested():
    with pytest.raises(LoricaError, match="unknown dtype 'bf61': auto, fp32, bf16, fp16; did you mean 'bf16'"):
        resolve_dtype("bf61")


def test_words_and_torch_dtypes_are_both_taken():
    assert resolve_dtype("fp16", "cpu") == resolve_dtype(torch.float16) == torch.float16


def test_auto_takes_the_first_gpu_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device() == torch.device("cuda")


@pytest.mark.parametrize(
    "word, said", [("cuda:99", "no device cuda:99: torch .* sees"), ("gpu", "unknown device 'gpu'")]
)
def test_a_device_that_is_not_there_is_an_error(word, said):
    with pytest.raises(LoricaError, match=said):
        resolve_device(word)


def test_the_peak_is_that_of_the_format_training_multiplies_in(monkeypatch):
    made = []
    monkeypatch.setattr(machine, "computes_in", lambda x: torch.float32 if x.dtype == torch.bfloat16 else x.dtype)
    monkeypatch.setattr(torch, "mm", lambda x, w: made.append(x.dtype))
    assert machine._gemm_rate("bf16", "cpu", 8, 0.0) > 0
    assert set(made) == {torch.float32}
