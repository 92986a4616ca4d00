"""LoRA on every storage: the table in docs/storages.md says what works and what is refused, and this fills it.

`PYTHONPATH=tests:tests/models python tests/test_storages.py` writes the table anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import laws
import lorica
from lorica import LoRA
from lorica.errors import LoricaError
from lorica.fast import Fast
from lorica.targets import resolve
from test_conv import net
from test_experts import mixture
from test_quantised import packed
from tiny import MODELS, logits, stir

TABLE = Path(__file__).parent.parent / "docs" / "storages.md"
SHOWN: dict[str, tuple[str, Callable, str]] = {
    "linear": ("`nn.Linear`", MODELS["llama"], "q_proj"),
    "conv1d": ("transformers' `Conv1D`", MODELS["gpt2"], "c_fc"),
    "embedding": ("`nn.Embedding`", MODELS["llama"], "embed_tokens"),
    "conv": ("`nn.Conv1d`, `2d`, `3d`", net(), "conv"),
    "conv in groups": ("the same, `groups` > 1", net(groups=3), "odd"),
    "experts": ("3-D expert parameters", mixture("mixtral"), "experts"),
    "nf4": ("bitsandbytes' `Linear4bit`", packed("nf4"), "q_proj"),
    "int8": ("bitsandbytes' `Linear8bitLt`", packed("int8"), "q_proj"),
}
METHOD = LoRA(r=6)


def starts(make: Callable, targets: str) -> str:
    laws.step_zero_is_the_base(make, METHOD, targets)
    laws.only_the_adapter_learns(make, METHOD, targets)
    return "works"


def merges(make: Callable, targets: str) -> str:
    model = make()
    lorica.inject(model, METHOD, targets)
    stir(model)
    before = logits(model)
    lorica.merge(model, check=False)
    assert laws.close(logits(model), before, 0.05)
    lorica.unmerge(model)
    assert torch.equal(logits(model), before)
    return "works"


def saves(make: Callable, targets: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        laws.save_and_load_are_inverse(make, METHOD, targets, Path(folder) / "adapter")
    return "works"


def drops(make: Callable, targets: str) -> str:
    model = make()
    lorica.inject(model, LoRA(r=6, dropout=0.1), targets)
    kept = [each for each in model.modules() if isinstance(each, torch.nn.Dropout) and each.p == 0.1]
    return "works" if len(kept) >= len(resolve(make(), targets)) else "ignored, as in PEFT"


def hastens(make: Callable, targets: str) -> str:
    model = make()
    paths = [target.path for target in resolve(model, targets)]
    lorica.inject(model, METHOD, targets)
    model.config._attn_implementation = "eager"
    stir(model)
    quick, before = Fast(model), logits(model)
    with quick.on():
        assert laws.close(logits(model), before)
    alone = all(model.get_submodule(path) in quick.forwards for path in paths)
    return "taken" if alone else "left as it is"


COLUMNS = {
    "trains": starts,
    "merge, unmerge": merges,
    "PEFT's layout": saves,
    "dropout": drops,
    "fast path": hastens,
}


def rendered() -> str:
    """The page: a row per storage, a cell per thing to do with it, and why where it is refused."""
    rows, reasons = [], []
    for name, (layer, make, targets) in SHOWN.items():
        cells = []
        for column, tried in COLUMNS.items():
            try:
                cells.append(tried(make, targets))
            except LoricaError as fault:
                cells.append("refused")
                reasons.append(f"- {name}, {column}: {str(fault).splitlines()[-1].strip(' -')}")
        rows.append(f"| {name} | {layer} | {' | '.join(cells)} |")
    head = ["storage", "layer", *COLUMNS]
    lines = [
        "# LoRA on every storage",
        "",
        "Filled by `tests/test_storages.py`, which tries each cell and fails where this page says something else.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *rows,
        "",
        "Refused, with the reason that is given:",
        "",
        *reasons,
    ]
    return "\n".join(lines) + "\n" + NOTES


NOTES = """
A convolution's A has the layer's own stride, padding, dilation and padding mode, so that the merged layer is the same
function. PEFT 0.21 gives A the stride and padding only: where a layer is dilated or does not pad with zeros, PEFT
computes something else from the same file. Everywhere else the two agree to the bit.

Experts get rank r each, whatever their number. Their update multiplies only the tokens that are sent to an expert; no
updated weight is made. A module that multiplies its experts outside transformers' experts interface is refused.
"""


def test_the_page_says_what_works():
    assert TABLE.read_text() == rendered()


if __name__ == "__main__":
    TABLE.write_text(rendered())
