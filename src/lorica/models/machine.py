"""Where a model goes and in which number format: device and dtype words -> what torch takes, and what is there."""

from __future__ import annotations

import functools
import time

import psutil
import torch

from lorica.errors import LoricaError, nearest
from lorica.kernels.precision import computes_in, cpu_multiplies_bf16

# What glibc's heap keeps of a training beyond what is asked for, whatever its size: pieces that it cannot join
# (docs/LOG.md).
HEAP = 150_000_000
# Of `gemm_peak`, what a training step reached (docs/LOG.md): its products are smaller, and not all it does is products.
EFFICIENCY = {"cpu": 0.55, "cuda": 0.7}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device for a word: `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        LoricaError: no such word, or this machine or this torch has no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise LoricaError(f"unknown device {str(device)!r}: auto, cpu, cuda, cuda:1, mps") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise LoricaError(
            f"no device {found}: torch {torch.__version__} sees {count} CUDA device{'' if count == 1 else 's'} here"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise LoricaError("no device mps: this machine or this torch has none")
    return found


def resolve_dtype(dtype: str | torch.dtype = "auto", device: str | torch.device = "auto") -> torch.dtype:
    """The dtype for a word: `fp32`, `bf16`, `fp16`, or `auto`: bf16 where `device` computes it natively, else fp32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if native_bf16(resolve_device(device)) else torch.float32
    if dtype not in DTYPES:
        raise LoricaError(f"unknown dtype {dtype!r}: auto, {', '.join(DTYPES)}{nearest(dtype, ['auto', *DTYPES])}")
    return DTYPES[dtype]


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware, so that bf16 is faster than fp32 and not slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return cpu_multiplies_bf16()


def room(device: torch.device) -> tuple[int, int]:
    """Bytes that this process may hold on a device, and those that it holds there now or will for no tensor."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], 0
    held = psutil.Process().memory_info().rss
    return psutil.virtual_memory().available + held, held + HEAP


@functools.cache
def gemm_peak(dtype: str, device: str = "cpu", seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, the median over a time, in the format that training makes it in.

    Of 2048^3, on a GPU 8192^3, or of the largest below it that takes no more than the time.
    """
    size, rate, largest = 256, 0.0, 2048 if device == "cpu" else 8192
    while size <= largest and (not rate or 2 * size**3 / rate < seconds):
        rate = _gemm_rate(dtype, device, size, seconds if size == largest else 0.0)
        size *= 2
    return rate


def step_rate(dtype: str, device: str = "cpu") -> float:
    """FLOP/s of a training step, as far as it is known from `gemm_peak`."""
    return gemm_peak(dtype, device) * EFFICIENCY.get(torch.device(device).type, EFFICIENCY["cpu"])


def _gemm_rate(dtype: str, device: str, size: int, seconds: float) -> float:
    kept = torch.empty(0, device=device, dtype=DTYPES[dtype])
    x, w = (torch.randn(size, size, device=device, dtype=computes_in(kept)) for _ in range(2))
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3:
        began = time.perf_counter()
        torch.mm(x, w)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / sorted(times)[len(times) // 2]
