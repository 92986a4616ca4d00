"""What a model is worth: held-out loss, answers, and how sure the numbers are."""

from lorica.evaluate.generation import generate, stop_ids, stream
from lorica.evaluate.loss import LossResult, loss
from lorica.evaluate.metrics import ClassRow, bootstrap, exact, per_class, wilson

__all__ = [
    "ClassRow",
    "LossResult",
    "bootstrap",
    "exact",
    "generate",
    "loss",
    "per_class",
    "stop_ids",
    "stream",
    "wilson",
]
