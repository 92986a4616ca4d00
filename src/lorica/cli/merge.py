"""`lorica merge X -o DIR`: fold an adapter into its model, verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from lorica.cli.parse import Common


@dataclass(kw_only=True)
class Settings(Common):
    """Write the model with the adapter folded in: a plain folder for any program, with no added latency."""

    thing: tyro.conf.Positional[str]
    """An adapter or a run; or a model, with --adapter."""
    adapter: str = ""
    """The adapter to put on the model, whatever base it names."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights: auto is bf16 where the device computes it natively, else fp32."""
    quantize: Literal["auto", "none", "nf4", "int8"] = "auto"
    """Fold into the base packed like this, and unpack it: auto is as the adapter was trained."""
    device: str = "auto"
    """Where to merge: auto, cpu, cuda, cuda:1, mps."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Merge and write."""
    from lorica import merge, models
    from lorica.cli.terminal import progress, say, size
    from lorica.errors import LoricaError
    from lorica.files import folder_atomic

    if not settings.out:
        raise LoricaError("say where the merged model goes: -o DIR")
    out = Path(settings.out)
    if out.exists():
        raise LoricaError(f"{out} is there already, and nothing is overwritten; give another folder")
    with progress(settings.quiet) as tell:
        opened = models.open_thing(
            settings.thing,
            dtype=settings.dtype,
            device=settings.device,
            quantize=settings.quantize,
            adapter=settings.adapter or None,
            progress=tell,
        )
    if opened.adapter is None:
        raise LoricaError(f"{settings.thing} is a plain model: there is nothing to merge; give its adapter or a run")
    report = merge(opened.model, keep=False)
    about = models.describe(opened.model)
    with models.quiet(), folder_atomic(out) as folder:
        opened.model.save_pretrained(folder)
        opened.tok.save_pretrained(folder)
    result = {
        "merged": str(out),
        "base": opened.base,
        "layers": report.layers,
        "dtype": about.dtype,
        "bytes": about.nbytes,
        "untied_bytes": report.untied_bytes,
        "max_logit_diff": report.max_logit_diff,
        "same_top": report.same_top,
    }
    if settings.json:
        return result
    say(f"merged {report.layers} layers in float32, wrote {about.dtype} ({size(about.nbytes)}) to {out}")
    if report.max_logit_diff is not None:
        say(f"max logit difference {report.max_logit_diff:.2g} on ten prompts, same top token {report.same_top:.1%}")
    if report.untied_bytes:
        added = size(report.untied_bytes)
        say(f"embedding and output head are two matrices now (+{added}): only one of them was tuned")
    say(f"next:  lorica chat {out}")
    return 0
