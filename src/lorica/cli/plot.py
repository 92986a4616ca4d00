"""`lorica plot RUN...`: the curves of one or more runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from lorica.cli.parse import Common


@dataclass(kw_only=True)
class Settings(Common):
    """Draw training and held-out loss of runs into one picture (-o curves.png, .svg or .pdf)."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run folders."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Draw and say where."""
    from lorica.cli.terminal import say
    from lorica.train.curve import draw

    out = settings.out or "curves.png"
    draw(settings.runs, out)
    if settings.json:
        return {"picture": str(out), "runs": list(settings.runs)}
    say(str(out))
    return 0
