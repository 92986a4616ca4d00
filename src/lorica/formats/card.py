"""README.md of a run: what was trained, on what, how, what came of it, how to use it, and what it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown, with the metadata block that model hubs read.

    `facts` are those of `train.setup.facts` and what came of the run (`run`, `steps`, `best_step`, `before`, `after`,
    `seconds`, `peak_rss_bytes`), with `curve` true where there is a picture.
    """
    local = Path(facts["model"]).is_absolute()
    base = [] if local else [f"base_model: {facts['model']}"]
    head = ["---", *base, "library_name: peft", "tags:", "- lora", "---"]
    parts = [
        "\n".join(head),
        f"# {facts['run']}",
        f"A LoRA adapter for `{facts['model']}`, trained with lorica. `best/` is the adapter of the lowest held-out"
        f" loss (update {facts['best_step']:,}), `last/` the newest; both are in PEFT's layout.",
        "## Results\n\n" + _results(facts),
        "![loss while training](curve.png)" if facts.get("curve") else "",
        "## Data\n\n" + _data(facts),
        "## Settings\n\n" + _settings(facts),
        "All of them are in `run.toml`; `lorica train -c run.toml` repeats the run.",
        "## Use\n\n" + _use(facts["model"], facts["rank"]),
        "## Limits\n\n" + _limits(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(facts: Mapping[str, Any]) -> str:
    spent = f"{facts['seconds']:,.0f} s, at most {facts['peak_rss_bytes'] / 1e9:.1f} GB of resident memory"
    if facts["before"] is None:
        return f"No rows were held out, so nothing was measured. Training took {spent}."
    rows = [("base", facts["before"]), ("with this adapter", facts["after"])]
    lines = ["| | held-out loss (nats per token) |", "|---|--:|", *(f"| {name} | {loss:.4f} |" for name, loss in rows)]
    return "\n".join(lines) + f"\n\nMeasured on {facts['held_out']:,} held-out examples. Training took {spent}."


def _data(facts: Mapping[str, Any]) -> str:
    name = f"`{Path(facts['data']).name}`" if facts["data"] else "Examples handed over in memory"
    text = f"{name}: {facts['train']:,} examples to train on, {facts['held_out_all']:,} held out."
    return text + "".join(f"\n- {note}" for note in facts["notes"])


def _settings(facts: Mapping[str, Any]) -> str:
    rows = {
        "method": f"{facts['method']}, rank {facts['rank']}, alpha {facts['alpha']:g} (scale {facts['scale']:g})",
        "targets": f"{facts['targets']} ({facts['layers']:,} matrices)",
        "trained parameters": f"{facts['trainable']:,} ({facts['share']:.2%} of {facts['parameters']:,})",
        "updates": f"{facts['steps']:,} of {facts['batch']:,} examples",
        "learning rate": f"{facts['lr']:g}, {facts['schedule']}",
        "base in": facts["dtype"],
        "seed": facts["seed"],
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _use(model: str, rank: int) -> str:
    # vLLM takes only these.
    largest = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
    return f"""With lorica:

```bash
lorica chat .
```

```python
import lorica
model, tok = lorica.load("{model}")
lorica.Adapter.load("best").apply(model)
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "best")
```

With transformers alone, after `lorica merge . -o merged`:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("merged")
```

With vLLM:

```bash
vllm serve {model} --enable-lora --max-lora-rank {largest} --lora-modules mine=best
```"""


def _limits(facts: Mapping[str, Any]) -> str:
    lines = [
        "It changes what the base model does on data like its own; what it does elsewhere was not measured.",
        "It works on the base model it was trained on, and keeps that model's licence, knowledge and biases.",
    ]
    if facts["before"] is not None and not facts["after"] < facts["before"]:
        lines.append("Its held-out loss is not lower than the base's.")
    elif facts["before"] is not None:
        lines.append("The best of several measurements was kept, so its held-out loss is slightly optimistic.")
    return "\n".join(f"- {line}" for line in lines)
