"""`lorica convert A --to FORMAT -o OUT`: an adapter for another program, read back and compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lorica.cli.parse import Common

if TYPE_CHECKING:
    from lorica.adapter import Adapter
    from lorica.export import Exported


@dataclass(kw_only=True)
class Settings(Common):
    """Write an adapter in another layout, read it back, compare every update, and say what to type next."""

    thing: tyro.conf.Positional[str]
    """An adapter in any known layout, or a run."""
    to: Literal["peft", "loralib", "gguf", "mlx", "vllm", "ollama", "sglang", "ray"]
    """The layout. peft, vllm, sglang: a folder; gguf (llama.cpp), loralib: a file; ollama, ray: a folder with the
    file that the program starts from; mlx (mlx-lm): a folder whose layout was checked, but which was never run."""
    from_: Annotated[Literal["auto", "peft", "loralib", "gguf", "mlx"], tyro.conf.arg(name="from")] = "auto"
    """The layout it is in. loralib opens its pickles too, for tensors alone."""
    base: str = ""
    """The base model, where the adapter does not name it; it is written into the result."""
    alpha: float | None = None
    """lora_alpha of loralib's layers, which its files do not hold; the rank follows from the shapes."""
    slots: str = ""
    """Slots of loralib's fused layers (MergedLinear), '-' for those without an update: c_attn=q,-,v; ';' between."""
    kernels: str = ""
    """Kernel sizes of loralib's convolutions, which its files do not hold: conv1=3;conv2=5."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the file."""
    name: str = ""
    """What an engine is to call the adapter; without it, the name of OUT."""


def run(settings: Settings) -> dict[str, Any]:
    """Read, write, compare and print."""
    from lorica.errors import LoricaError
    from lorica.export import export

    if not settings.out:
        raise LoricaError("say where the result goes: -o OUT")
    adapter = _opened(settings)
    done = export(adapter, settings.to, settings.out, settings.dtype, settings.base, settings.name)
    if not settings.json:
        _say(settings, done)
    largest = max((each.largest for each in done.differences.values()), default=0.0)
    return {
        "converted": str(done.path),
        "to": settings.to,
        "dtype": settings.dtype,
        "max_difference": largest,
        "differences": {path: each.largest for path, each in done.differences.items()},
        "notes": done.notes,
        "next": done.next,
    }


def plan(settings: Settings) -> None:
    """What `run` would write: the adapter is read, nothing is written."""
    from lorica.cli.terminal import console
    from lorica.targets import names

    adapter = _opened(settings)
    found = names(str(target) for target in adapter.targets)
    console.print(f"would write {found} for {settings.to} to {settings.out or 'OUT'}, and read them back", markup=False)


def _opened(settings: Settings) -> Adapter:
    from lorica.export import open_adapter

    return open_adapter(
        settings.thing,
        settings.from_,
        base=settings.base,
        alpha=settings.alpha,
        slots=_slots(settings.slots),
        kernels=_kernels(settings.kernels),
    )


def _slots(text: str) -> dict[str, list[str]]:
    from lorica.errors import LoricaError

    found = {}
    for each in text.split(";") if text else []:
        end, equals, slots = each.strip().partition("=")
        if not equals or not end or not all(slots.split(",")):
            raise LoricaError(f"--slots {each}: write the layer, then its slots in order, as in c_attn=q,-,v")
        found[end] = slots.split(",")
    return found


def _kernels(text: str) -> dict[str, int]:
    from lorica.errors import LoricaError

    found = {}
    for each in text.split(";") if text else []:
        end, _, size = each.strip().partition("=")
        if not end or not size.isdigit() or not int(size):
            raise LoricaError(f"--kernels {each}: write the layer, then the size of its kernel, as in conv1=3")
        found[end] = int(size)
    return found


def _say(settings: Settings, done: Exported) -> None:
    """One row for all layers of one name: their number, the largest element, the largest difference."""
    from lorica.cli.terminal import say, size, table

    by_name: dict[str, list[Any]] = {}
    for path, each in done.differences.items():
        by_name.setdefault(path.rpartition(".")[2], []).append(each)
    rows = [
        (
            last,
            f"{len(each):,}",
            f"{max(one.size for one in each):.3g}",
            f"{worst:.2g}" if (worst := max(one.largest for one in each)) else "0",
        )
        for last, each in by_name.items()
    ]
    files = [done.path] if done.path.is_file() else [file for file in done.path.rglob("*") if file.is_file()]
    total = size(sum(file.stat().st_size for file in files))
    say(f"wrote {done.path} for {settings.to} in {settings.dtype}, {total}, and read it back")
    table(("update of", "layers", "largest element", "max difference"), rows)
    for note in done.notes:
        say(note)
    say(f"next:  {done.next}")
