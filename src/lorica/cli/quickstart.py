"""`lorica quickstart`: the whole story on a real model, in minutes, on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lorica.cli.parse import Common


@dataclass(kw_only=True)
class Settings(Common):
    """Fine-tune SmolLM2-135M to write function calls, and see what changed."""

    steps: int = 40
    """Updates of 8 examples."""
    rows: int = 50
    """Test rows that are answered by each model."""
    rank: int = 8
    """Rank of the update, r in the paper."""
    seed: int = 0
    """Seed of the factor A and of the order of the rows."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the base: auto is bf16 where the device computes it natively, else fp32."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, mps."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Do it and say what came of it."""
    from lorica.cli.terminal import console, progress
    from lorica.quickstart import quickstart
    from lorica.train.report import Terminal
    from lorica.train.settings import TrainSettings

    training = TrainSettings(
        rank=settings.rank,
        alpha=2.0 * settings.rank,
        steps=settings.steps,
        eval_every=max(1, settings.steps // 2),
        eval_rows=24,
        sample=0,
        seed=settings.seed,
        dtype=settings.dtype,
        device=settings.device,
    )
    with progress(settings.quiet) as tell:
        if settings.quiet:
            result = quickstart(training, rows=settings.rows, out=settings.out or None, tell=tell, report=None)
        else:
            with Terminal(console) as report:
                result = quickstart(training, rows=settings.rows, out=settings.out or None, tell=tell, report=report)
    if settings.json:
        return result
    _say(result)
    return 0


def _say(result: dict[str, Any]) -> None:
    from lorica.cli.terminal import say, size, table

    share = 100 * result["share"]
    say(f"model      {result['model']}, {result['dtype']}")
    counts = f"{result['trainable']:,} of {result['total']:,} parameters ({share:.2f} %)"
    say(f"trained    {counts}, {result['train_rows']} rows")
    say(f"adapter    {size(result['adapter_bytes'])}, the model {size(result['model_bytes'])}")
    say()
    kinds = {"base": "before", "base, two examples in the prompt": "few_shot", "tuned": "after"}
    rows = [[name, *_cells(result[key])] for name, key in kinds.items()]
    table(["unseen functions", "loss", "parses", "solved", "95 % interval"], rows)
    for answer in result["answers"]:
        say()
        function, _, request = answer["prompt"].partition("\n")
        say(f"function   {_line(function)}")
        say(f"request    {_line(request)}")
        say(f"base       {_line(answer['base'])}")
        say(f"tuned      {_line(answer['tuned'])}   {'solved' if answer['solved'] else 'not solved'}")
    say()
    same = f"same top token {result['same_top_merged']:.1%}"
    say(f"merged     max logit difference {result['max_logit_diff_merged']:.2g}, {same}")
    exact = "every weight as before, to the bit" if result["unmerge_exact"] else "THE WEIGHTS DIFFER"
    say(f"unmerged   {exact} (keeping them took {size(result['kept_bytes'])})")
    say(f"switch     {result['switch_ms']:.1f} ms to take the adapter off or put it on")
    peak = size(result["peak_rss_bytes"])
    say(f"took       {result['seconds']:.0f} s, {result['train_seconds']:.0f} s of it training; peak {peak}")
    say(f"run        {result['run']}   (curve.png, README.md, best/)")
    say(f"note       {result['note']}")
    for place, command in enumerate(result["next"]):
        say(f"{'next' if not place else '':<11}{command}")


def _cells(measured: dict[str, Any]) -> list[str]:
    interval = f"{measured['low']:.0%} - {measured['high']:.0%}"
    return [f"{measured['loss']:.3f}", f"{measured['parses']:.0%}", f"{measured['metric']:.0%}", interval]


def _line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:97] + "..."
