"""What can be done with each method, on each way of keeping weights: docs/methods.md says it, and this tries it.

`PYTHONPATH=src:tests:tests/models python tests/methods/test_table.py` writes the page anew.
"""

from __future__ import annotations

from pathlib import Path

import laws
from lorica import TrainSettings
from lorica.errors import LoricaError
from lorica.methods import METHODS
from lorica.train.recipe import method_of
from test_experts import mixture
from test_quantised import packed
from tiny import MODELS

PAGE = Path(__file__).parent.parent.parent / "docs" / "methods.md"
STORAGES = {
    "linear": MODELS["llama"],
    "conv1d": MODELS["gpt2"],
    "experts": mixture("mixtral"),
    "nf4": packed("nf4"),
    "int8": packed("int8"),
}
GIVEN = {"bitfit": {"add_biases": True}}
# The methods of special tokens start elsewhere than at the base: docs/prefix.md.
SHOWN = {name: entry for name, entry in METHODS.items() if entry.neutral}


def tried(make, name: str) -> str:
    try:
        laws.step_zero_is_the_base(make, method_of(TrainSettings(method=name, **GIVEN.get(name, {}))), "all-linear")
    except LoricaError:
        return "refused"
    return "works"


def rendered() -> str:
    head = ["method", "what is trained", "reads", "rate", "merges", "one pass for many", *STORAGES]
    rows = []
    for name, entry in SHOWN.items():
        cells = [f"`{name}`", entry.what, ", ".join(entry.reads) or "-", f"{entry.lr:g}"]
        cells += ["no" if entry.unmergeable else "yes", "yes" if entry.shares else "no"]
        rows.append([*cells, *(tried(make, name) for make in STORAGES.values())])
    table = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*HEAD, *table]) + "\n" + NOTES


HEAD = [
    "# Methods",
    "",
    "`lorica train MODEL DATA --method NAME`: LoRA, and what the paper compares it with (section 5.1). Filled by",
    "`tests/methods/test_table.py`, which tries each method on each storage (works: step zero is the base model to the",
    "bit). `reads` are the settings of `lorica train` that a method reads; another one is an error. `rate` is the",
    "default learning rate beside LoRA's.",
    "",
]
NOTES = """
Every method takes packs, exactly. An adapter of a method that PEFT does not know is saved in the same two files under a
type of our own (`LORICA_ADAPTER_H`), which PEFT refuses.

**Selections.** `full` trains every parameter, `top2` the last blocks (`--blocks`), `bitfit` every bias; where a model
has none, `--add-biases` gives its linear layers biases of zero, which then cannot be merged. What is trained is a copy,
so that taking it off is exact, and costs its memory once more; packed weights cannot be trained.

**Adapter layers**, `x + up(act(down(x)))` of width `--bottleneck`. `adapter-h` (Houlsby et al.) has one after each
attention and MLP, before their residual connections, `adapter-l` (Lin et al.) one after each block through a LayerNorm
of its own, `adapter-p` (Pfeiffer et al.) one after each MLP and its LayerNorm, `adapter-d` (AdapterDrop) the same in
the upper blocks only. They are layers more in every pass (the paper's table 1: up to 30 % slower at batch 1) and cannot
be merged; take them to compare with, and LoRA to use.

Special tokens with learned rows: [prefix.md](prefix.md).
"""


def test_the_page_says_what_works():
    assert PAGE.read_text() == rendered()


if __name__ == "__main__":
    PAGE.write_text(rendered())
