"""README.md of an adapter: what was trained, on what, how, what came of it, how to use it, and what it is not.

`card` is for a run folder on this machine, `hub_card` for the adapter alone on a model hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# vLLM takes only these as --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Methods whose adapters are in PEFT's own layout.
_OF_PEFT = ("lora", "dora")
# What model hubs call the task of a model, by what PEFT calls it.
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}


def card(facts: Mapping[str, Any]) -> str:
    """The card of a run as Markdown, with the metadata block that model hubs read.

    `facts` are those of `train.setup.facts` and what came of the run (`run`, `steps`, `best_step`, `before`, `after`,
    `seconds`, `peak_rss_bytes`), with `curve` true where there is a picture.
    """
    base = facts["model"]
    parts = [
        _head("" if Path(base).is_absolute() else base, _TASKS.get(facts.get("task", ""), "")),
        f"# {facts['run']}",
        f"A {_kind(facts)} adapter for `{base}`, trained with lorica. `best/` is the adapter of the {_best(facts)}"
        f" (update {facts['best_step']:,}), `last/` the newest; both are in {_layout(facts)}.",
        "## Results\n\n" + _results(facts),
        "![loss while training](curve.png)" if facts.get("curve") else "",
        "## Data\n\n" + _data(facts),
        "## Settings\n\n" + _settings(facts),
        "All of them are in `run.toml`; `lorica train -c run.toml` repeats the run.",
        "## Use\n\n" + _use(facts, "best", thing="."),
        "## Limits\n\n" + _limits(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_card(facts: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The card of an adapter on a model hub, whose repository holds it at its top.

    Args:
        facts: those of `card` where the run is known, with `model` the base's hub id, and of any adapter: `repo`,
            `rank` (the largest), `scales`, `targets_found` (layers by name), `trainable`, `task`, `layout` (PEFT's
            type), `vllm_refuses` (why vLLM cannot read it, or empty), `trained_on` (what the base was while training,
            if not the hub's weights), `license` (or empty), `sha256` (of what it does).
        files: sha256 by name, of everything that lies beside the card.
    """
    base, known = facts["model"], "steps" in facts
    link = f"[`{base}`](https://huggingface.co/{base})"
    parts = [
        _head(base, facts["task"], facts["license"]),
        f"# {facts['repo'].rpartition('/')[2]}",
        f"A {_kind(facts)} adapter for {link}, trained with lorica.",
        "## Results\n\n" + (_results(facts) if "before" in facts else _UNMEASURED),
        "![loss while training](curve.png)" if "curve.png" in files else "",
        "## Data\n\n" + _data(facts) if known else "",
        "## Settings\n\n" + (_settings(facts) if known else _settings_of_adapter(facts)),
        "All of them are in `run.toml`." if "run.toml" in files else "",
        "## Use\n\n" + _hub_use(facts),
        "## Limits\n\n" + _limits(facts),
        "## Files\n\n" + _table(("file", "sha256"), [(f"`{name}`", f"`{digest}`") for name, digest in files.items()]),
        f"sha256 of the scales and tensors, whatever the file: `{facts['sha256']}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# What PEFT calls the tasks that are no language model's.
_TASKS = {"classify": "SEQ_CLS", "regress": "SEQ_CLS"}
_UNMEASURED = "No measurement is known of this adapter."


def _head(base: str, task: str = "", license: str = "") -> str:
    """The metadata block; its keys are those that Hugging Face's hub reads."""
    pipeline = _PIPELINES.get(task, "")
    tags = ["lora", "lorica", *([f"base_model:adapter:{base}"] if base else [])]
    lines = {
        "base_model": base,
        "base_model_relation": "adapter" if base else "",
        "library_name": "peft",
        "license": license,
        "pipeline_tag": pipeline,
    }
    said = [f"{key}: {_yaml(value)}" for key, value in lines.items() if value]
    return "\n".join(["---", *said, "tags:", *(f"- {_yaml(tag)}" for tag in tags), "---"])


def _yaml(text: str) -> str:
    """Text as a YAML scalar: as it is where that cannot be misread, else as a JSON string, which YAML takes too."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*(:[\w./-]+)*", text) and text.lower() not in ("null", "true", "false", "no")
    return text if plain else json.dumps(text)


def _best(facts: Mapping[str, Any]) -> str:
    by = facts.get("best_by", "loss")
    return "lowest held-out loss" if by == "loss" else f"highest held-out {by}"


def _kind(facts: Mapping[str, Any]) -> str:
    return {"lora": "LoRA", "dora": "DoRA"}.get(facts["method"], f"`{facts['method']}`")


def _layout(facts: Mapping[str, Any]) -> str:
    if facts["method"] in _OF_PEFT:
        return "PEFT's layout"
    return "the two files of PEFT's layout, marked as a method that PEFT does not know: lorica reads them"


def _results(facts: Mapping[str, Any]) -> str:
    spent = f"{facts['seconds']:,.0f} s, at most {facts['peak_rss_bytes'] / 1e9:.1f} GB of resident memory"
    if facts["before"] is None:
        return f"No rows were held out, so nothing was measured. Training took {spent}."
    unit, measures = facts.get("unit", "nats per token"), facts.get("measures") or {}
    head = ["", f"held-out loss ({unit})", *measures]
    rows = [
        [name, f"{loss:.4f}", *(f"{measured[key]:.4f}" for key in measures)]
        for name, loss, measured in (
            ("base" if not measures else "base, its head new", facts["before"], facts.get("measures_before") or {}),
            ("with this adapter", facts["after"], measures),
        )
    ]
    lines = _table(head, rows)
    return f"{lines}\n\nMeasured on {facts['held_out']:,} held-out examples. Training took {spent}."


def _data(facts: Mapping[str, Any]) -> str:
    name = f"`{Path(facts['data']).name}`" if facts["data"] else "Examples handed over in memory"
    text = f"{name}: {facts['train']:,} examples to train on, {facts['held_out_all']:,} held out."
    if counts := {label: count for label, count in (facts.get("labels") or {}).items() if count is not None}:
        text += f" Labels: {', '.join(f'`{label}` {count:,}' for label, count in counts.items())}."
    return text + "".join(f"\n- {note}" for note in facts["notes"])


def _settings(facts: Mapping[str, Any]) -> str:
    rows = {
        **_method(facts),
        "trained parameters": f"{facts['trainable']:,} ({facts['share']:.2%} of {facts['parameters']:,})",
        "updates": f"{facts['steps']:,} of {facts['batch']:,} examples",
        "learning rate": f"{facts['lr']:g}, {facts['schedule']}",
        "base in": facts["dtype"],
        "seed": facts["seed"],
    }
    return _table(("", ""), list(rows.items()))


def _method(facts: Mapping[str, Any]) -> dict[str, str]:
    if facts["method"] not in _OF_PEFT:
        return {"method": f"{facts['method']}: {facts['detail']}", "places": f"{facts['layers']:,}"}
    return {
        "method": f"{facts['method']}, rank {facts['rank']}, alpha {facts['alpha']:g} (scale {facts['scale']:g})",
        "targets": f"{facts['targets']} ({facts['layers']:,} matrices)",
    }


def _settings_of_adapter(facts: Mapping[str, Any]) -> str:
    scales = ", ".join(f"{scale:g}" for scale in facts["scales"])
    update = f", rank {facts['rank']} at most, scale {scales}"
    rows = {
        "method": facts["method"] + (update if facts["method"] in _OF_PEFT else f": {facts['detail']}"),
        "targets": facts["targets_found"],
        "trained parameters": f"{facts['trainable']:,}",
    }
    return _table(("", ""), list(rows.items()))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([re.sub(" +", " ", f"| {' | '.join(head)} |"), "|" + "---|" * len(head), *lines])


def _use(facts: Mapping[str, Any], adapter: str, thing: str) -> str:
    """How to load it; `adapter` is its folder, `thing` what lorica's commands take."""
    base, labels = facts["model"], list(facts.get("labels") or ())
    if facts["method"] not in _OF_PEFT:
        return "\n\n".join([_lorica(base, adapter, thing, labels), _elsewhere(facts, thing, labels)])
    parts = [_lorica(base, adapter, thing, labels), _peft(base, adapter, labels), _merged(thing, labels)]
    if labels:
        return "\n\n".join(parts)
    if facts["method"] == "dora":
        parts.append(_only_merged("they know no DoRA"))
    else:
        parts += [_vllm(base, adapter, facts["rank"]), _llama_cpp(thing)]
    return "\n\n".join(parts)


def _only_merged(why: str) -> str:
    return f"vLLM, llama.cpp and Ollama take the merged model only: {why}."


def _elsewhere(facts: Mapping[str, Any], thing: str, labels: Sequence[str]) -> str:
    """What other programs can do with a method of which only lorica knows."""
    if facts["unmergeable"]:
        return f"Other programs cannot use it: it cannot be merged, since {facts['unmergeable']}."
    if labels:
        return _merged(thing, labels)
    return "\n\n".join([_merged(thing), _only_merged(f"they know no {facts['method']}")])


def _hub_use(facts: Mapping[str, Any]) -> str:
    base, repo, rank = facts["model"], facts["repo"], facts["rank"]
    if facts["method"] not in _OF_PEFT or facts.get("labels"):
        return _use(facts, repo, repo)
    parts = [_lorica(base, repo, repo)]
    if facts["layout"] == "LORA":
        parts.append(_peft(base, repo))
    parts.append(_merged(repo))
    if facts["layout"] == "LORA" and not facts["vllm_refuses"]:
        parts += [_vllm(base, repo, rank), _llama_cpp(repo)]
    else:
        why = facts["vllm_refuses"] or "it is no plain LoRA"
        parts.append(_only_merged(why))
    return "\n\n".join(parts)


def _lorica(base: str, adapter: str, thing: str, labels: Sequence[str] = ()) -> str:
    given = f", labels={list(labels)!r}" if labels else ""
    return f"""With lorica:

```bash
lorica chat {thing}
```

```python
import lorica
model, tok = lorica.load("{base}"{given})
lorica.Adapter.load("{adapter}").apply(model)
```"""


def _peft(base: str, adapter: str, labels: Sequence[str] = ()) -> str:
    kind, given = _class(labels), f", num_labels={len(labels)}" if labels else ""
    return f"""With PEFT:

```python
from peft import PeftModel
from transformers import {kind}
model = PeftModel.from_pretrained({kind}.from_pretrained("{base}"{given}), "{adapter}")
```"""


def _merged(thing: str, labels: Sequence[str] = ()) -> str:
    return f"""With transformers alone, after `lorica merge {thing} -o merged`:

```python
from transformers import {_class(labels)}
model = {_class(labels)}.from_pretrained("merged")
```"""


def _class(labels: Sequence[str]) -> str:
    return "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"


def _vllm(base: str, adapter: str, rank: int) -> str:
    largest = next((size for size in _VLLM_RANKS if size >= rank), rank)
    return f"""With vLLM:

```bash
vllm serve {base} --enable-lora --max-lora-rank {largest} --lora-modules mine={adapter}
```"""


def _llama_cpp(thing: str) -> str:
    return f"""With llama.cpp, over the same base model as a GGUF file (`--to ollama` writes what Ollama takes):

```bash
lorica convert {thing} --to gguf -o adapter.gguf
llama-cli -m base.gguf --lora adapter.gguf
```"""


def _limits(facts: Mapping[str, Any]) -> str:
    measured = facts.get("before") is not None
    lines = [
        "It changes what the base model does on data like its own; what it does elsewhere was not measured.",
        "It works on the base model it was trained on, and keeps that model's licence, knowledge and biases.",
    ]
    if measured:
        what = " and ".join(["The loss", *(["agreement with the labels"] if facts.get("measures") else [])])
        verb = "are" if facts.get("measures") else "is"
        lines.append(f"{what} {verb} all that was measured: not the answers themselves, nor their safety or fairness.")
    if measured and not facts["after"] < facts["before"]:
        lines.append("Its held-out loss is not lower than the base's.")
    elif measured:
        lines.append("The best of several measurements was kept, so its held-out loss is slightly optimistic.")
    if facts.get("trained_on"):
        lines.append(f"While training, the base was {facts['trained_on']}, not the hub's own weights.")
    return "\n".join(f"- {line}" for line in lines)
