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
PAGES = {
    "lowrank": "methods-variants.md",
    "methods.selections": "methods-selections.md",
    "methods.adapters": "methods-adapters.md",
    "methods.prefix": "methods-prefix.md",
}


def tried(make, name: str) -> str:
    law = laws.step_zero_is_the_base if METHODS[name].neutral else laws.inject_and_eject_are_inverse
    try:
        law(make, method_of(TrainSettings(method=name, **GIVEN.get(name, {}))), "all-linear")
    except LoricaError:
        return "refused"
    return "works"


def rendered() -> str:
    head = ["method", "what is trained", "reads", "rate", "starts as the base"]
    head += ["packs", "merges", "mixed batch", "one pass for many", *STORAGES]
    rows = []
    for name, entry in METHODS.items():
        said = (entry.neutral, entry.packs, not entry.unmergeable, entry.mixes, entry.shares)
        cells = [f"[`{name}`]({PAGES[entry.home.partition(':')[0]]})", entry.what, ", ".join(entry.reads) or "-"]
        cells += [f"{entry.lr:g}", *("yes" if each else "no" for each in said)]
        rows.append([*cells, *(tried(make, name) for make in STORAGES.values())])
    table = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*HEAD, *table]) + "\n" + NOTES


HEAD = [
    "# Methods",
    "",
    "`lorica train MODEL DATA --method NAME`: LoRA, and what the paper compares it with (section 5.1). Filled by",
    "`tests/methods/test_table.py`, which tries each method on each storage (works: step zero is the base model to the",
    "bit; of a method that starts elsewhere, taking it off gives the base back to the bit). `reads` are the settings",
    "of `lorica train` that a method reads; another one is an error. `rate` is the default one beside LoRA's.",
    "",
]
NOTES = """
* **packs**: training lays examples end to end, and each gets what it gets alone.
* **merges**: it can be folded into the weights (`lorica merge`), at its default settings.
* **mixed batch**: `lorica serve` answers rows of one batch each with another adapter of it; others are refused by name.
* **one pass for many**: `--sweep` trains many adapters of it at once; others are to be trained one after another.

`tests/methods/test_declarations.py` tries each of these. Every method trains decoders and encoders; with
`--task classify` or `regress` the head is trained too, as in the paper's experiments.

An adapter of a method that PEFT does not know is saved in the same two files under a type of our own
(`LORICA_ADAPTER_H`), which PEFT refuses. Each family has a page: [LoRA and its variants](methods-variants.md),
[the model's own parameters](methods-selections.md), [adapter layers](methods-adapters.md),
[special tokens](methods-prefix.md).
"""


def test_the_page_says_what_works():
    assert PAGE.read_text() == rendered()


if __name__ == "__main__":
    PAGE.write_text(rendered())
