"""What a model is worth: held-out loss, answers, and how sure the numbers are.

1. `loss`: nats per labelled token, whatever the batches
2. `generate`, `stream`, `stop_ids`: answers, many at once or one as it comes
3. `exact_match`, `per_class`, `wilson`, `bootstrap`, `paired`: numbers with 95 % intervals
4. `line_up`, `measure`, `against`: the base and several adapters on the same rows
5. `judge`, `Verdicts`, `agreement`: labels and scores, and how well they agree with what is right
6. `Answering`: answers to many rows in a file, in order, continued after a stop
7. `Talk`: a conversation with the adapter or without, `Here` or behind a server; `Judgement`: one text at a time
"""

from lorica.evaluate.answering import Answering
from lorica.evaluate.comparison import Contender, Score, against, inserted, line_up, measure, selected
from lorica.evaluate.generation import generate, stop_ids, stream
from lorica.evaluate.judgement import Judgement
from lorica.evaluate.judging import judge
from lorica.evaluate.loss import LossResult, loss
from lorica.evaluate.metrics import ClassRow, Difference, bootstrap, exact_match, paired, per_class, wilson
from lorica.evaluate.talk import Here, Talk
from lorica.evaluate.verdicts import Verdicts

__all__ = [
    "Answering",
    "ClassRow",
    "Contender",
    "Difference",
    "Here",
    "Judgement",
    "LossResult",
    "Score",
    "Talk",
    "Verdicts",
    "against",
    "bootstrap",
    "exact_match",
    "generate",
    "inserted",
    "judge",
    "line_up",
    "loss",
    "measure",
    "paired",
    "per_class",
    "selected",
    "stop_ids",
    "stream",
    "wilson",
]
