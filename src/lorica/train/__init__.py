"""Training: one loop that does not know the method, a run folder, and a resume that continues to the bit.

1. `settings`: `TrainSettings`, every flag; the rules for what is left open
2. `examples`: rows of any origin -> what is trained on and what is held out, with a fingerprint
3. `loop`, `optimizer`: the update, and law 4
4. `guards`: law 7
5. `state`: save and restore everything (law 6)
6. `folder`, `report`, `curve`: the run folder, the terminal, the picture
7. `run`: `train` puts them together
8. `many`, `member`, `ranking`, `grid`, `search`: several adapters in one pass (`many.train`), ranked; a rate found so

`lorica.train(model, tok, data, settings)` is `run.train`: the package itself can be called.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

_HOME = {
    "Interrupted": "lorica.train.run",
    "Run": "lorica.train.run",
    "TrainSettings": "lorica.train.settings",
    "train": "lorica.train.run",
}
__all__ = ["Interrupted", "Run", "TrainSettings", "train"]

if TYPE_CHECKING:
    from lorica.train.run import Interrupted, Run, train
    from lorica.train.settings import TrainSettings


class _Callable(types.ModuleType):
    """The package, which is also the function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Run:
        from lorica.train.run import train

        return train(*args, **kwargs)


# The settings must be readable without torch, so the rest loads on first use.
def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


sys.modules[__name__].__class__ = _Callable
