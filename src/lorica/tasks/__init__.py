"""What a model is trained for, as one object: how a row becomes an example, its loss, its measures, how it is shown.

| task     | a row                         | the model                          | loss of an example          |
|----------|-------------------------------|------------------------------------|-----------------------------|
| lm       | chat, prompt and answer, text | continues text                     | nats of its labelled tokens |
| classify | one text or two, and a label  | AutoModelForSequenceClassification | nats of its label           |
| regress  | one text or two, and a score  | the same, with one output          | squared error               |

Training, measuring and answering know no task: they ask the one that `task_of` finds in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.data import label_names, read_labelled
from lorica.insertion import insertion
from lorica.models import is_classifier, labels_of
from lorica.plan import config_of
from lorica.tasks.language import Language
from lorica.tasks.sequences import Sequences, longest

__all__ = ["COLUMNS", "SCORE", "Language", "Sequences", "Task", "columns_of", "labels_in", "task_for", "task_of"]

Task = Language | Sequences
# The settings that say how columns become rows.
COLUMNS = ("map", "prompt", "completion", "system")
# The one label of a model that predicts a number.
SCORE = "score"


def task_of(model: Any) -> Task:
    """The task that a model is made for."""
    if not is_classifier(model):
        return Language()
    own = insertion(model)
    return Sequences(labels_of(model.config), longest(model), own.size if own else 0)


def task_for(name: str, source: str | Path, columns: Mapping[str, str | None], model: str = "") -> Task:
    """The task of this name on these rows, for a model that is not loaded: only its config is read."""
    labels = labels_in(name, source, columns)
    if not labels:
        return Language()
    positions = getattr(config_of(model).get_text_config(), "max_position_embeddings", None) if model else None
    return Sequences(labels, positions or 1 << 30)


def columns_of(settings: Any) -> dict[str, str | None]:
    """The settings `COLUMNS` of whatever has them, None where they say nothing."""
    return {name: getattr(settings, name, "") or None for name in COLUMNS}


def labels_in(task: str, source: str | Path, columns: Mapping[str, str | None]) -> tuple[str, ...]:
    """The labels that a head for `task` on these rows has to tell apart; none for `lm` and `auto`."""
    if task == "regress":
        return (SCORE,)
    if task != "classify":
        return ()
    found = read_labelled(source, task, map=columns.get("map"))
    return label_names([*found.rows, *(found.valid or [])])
