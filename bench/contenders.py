"""One contender in one process: reads token ids, trains, prints one line of JSON. Started by `train.py`.

Every contender trains a rank 8 update of all linear layers with AdamW at 2e-4 on the same batches in the same order.
A name is FAMILY_HOW: `default`, or a dtype, then rows per micro-batch (those of a step sorted by length and
accumulated; left out: all of a step at once), then what else the library offers (`FLAGS`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R, ALPHA, LR = 8, 16, 2e-4
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "unsloth", "unsloth_zoo", "lorica")
# low: PEFT keeps the adapter in the base's dtype. free: TRL lays a micro-batch end to end. compile: Unsloth's layers.
FLAGS = ("low", "free", "compile")
used: dict[str, Any] = {}


def chosen(how: str, work: dict[str, Any]) -> tuple[str, int, set[str]]:
    """``(dtype, rows per micro-batch, flags)`` of what follows the family in a name."""
    dtype, *rest = how.split("_")
    micro = next((int(part) for part in rest if part.isdigit()), work["batch"])
    flags = {part for part in rest if not part.isdigit()}
    if flags - set(FLAGS) or work["batch"] % micro:
        raise SystemExit(f"no contender is called {how}")
    return dtype, micro, flags


def versions() -> dict[str, str]:
    """Of every library that this interpreter has, which need not be the parent's."""
    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def main() -> None:
    """``contenders.py NAME FILE``: FILE holds `model` (a folder), `rows` ``[ids, first label]`` and `batches`."""
    name, path = sys.argv[1:3]
    work = json.loads(Path(path).read_text())
    digest = hashlib.sha256(json.dumps(work["rows"]).encode()).hexdigest()
    family, _, how = name.partition("_")
    began = time.perf_counter()
    steps = {"lorica": lorica, "peft": peft, "plain": plain, "trl": trl, "unsloth": unsloth}[family](how, work)
    warm = work["warm"]
    seconds = sum(step["seconds"] for step in steps[warm:])
    tokens = sum(len(work["rows"][i][0]) for batch in work["batches"][warm:] for i in batch)
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    told = {
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak,
        "losses": [step["loss"] for step in steps],
        "total_seconds": time.perf_counter() - began,
        "warm_seconds": sum(step["seconds"] for step in steps[:warm]),
        "sha256": digest,
        "versions": versions(),
        "settings": used,
    }
    print(json.dumps(told), flush=True)
    os._exit(0)  # trackers of some libraries wait for a network at the end


def lorica(how: str, work: dict[str, Any]) -> list[dict[str, float]]:
    """Our own, as a user would: `how` is the dtype, or dtype and rank."""
    import lorica
    from lorica.data import Example

    dtype, _, rank = how.partition("_")
    model, tok = lorica.load(work["model"], dtype=dtype)
    rows = [Example(ids, [i >= first for i in range(len(ids))]) for ids, first in work["rows"]]
    settings = lorica.TrainSettings(
        rank=int(rank or R), alpha=ALPHA, lr=LR, schedule="constant", warmup=0.0, steps=len(work["batches"]),
        batch=work["batch"], sample=0, save_every=1e9, eval_every=10**9, clip=1.0, max_len=8192,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        run = lorica.train(model, tok, rows, settings, out=Path(out) / "run")
        events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["kind"] == "step"]


def peft(how: str, work: dict[str, Any]) -> list[dict[str, float]]:
    """PEFT under transformers' Trainer: padded batches, full logits, its defaults."""
    import torch
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    dtype, micro, _ = chosen(how, work)
    bf16 = dtype == "bf16"
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.bfloat16 if bf16 else torch.float32)
    model = _peft(model)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(bf16=bf16, **_arguments(work, out, micro))
        collate = DataCollatorForSeq2Seq(_tokenizer(work))
        return _timed(Trainer, model=model, args=arguments, train_dataset=_dataset(work, micro), data_collator=collate)


def trl(how: str, work: dict[str, Any]) -> list[dict[str, float]]:
    """TRL's SFTTrainer: its defaults, or checkpointing off, a dtype and small micro-batches of like length."""
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    dtype, micro, flags = chosen(how, work)
    options: dict[str, Any] = {}
    if dtype != "default":
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        options = {"gradient_checkpointing": False, "bf16": dtype == "bf16", "model_init_kwargs": {"dtype": kind}}
        options |= {"padding_free": True} if "free" in flags else {}
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(**_arguments(work, out, micro), **options)
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM")
        return _timed(
            SFTTrainer, model=work["model"], args=arguments, train_dataset=_dataset(work, micro), peft_config=config,
            processing_class=_tokenizer(work),
        )  # fmt: skip


def unsloth(how: str, work: dict[str, Any]) -> list[dict[str, float]]:
    """Unsloth's CPU backend: its defaults (bf16 where the CPU has it), or checkpointing off in a dtype."""
    dtype, micro, flags = chosen(how, work)
    if "compile" in flags:
        os.environ["UNSLOTH_CPU_COMPILE"] = "1"
    import torch
    import unsloth  # noqa: F401 - before trl, as it asks
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    kind = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model, tok = FastLanguageModel.from_pretrained(work["model"], max_seq_length=2048, dtype=kind, load_in_4bit=False)
    options: dict[str, Any] = {} if dtype == "default" else {"use_gradient_checkpointing": False}
    model = FastLanguageModel.get_peft_model(
        model, r=R, lora_alpha=ALPHA, target_modules=LINEAR, lora_dropout=0, bias="none", **options
    )
    precision: dict[str, Any] = {}
    if dtype != "default":  # its own trainer would turn both on again
        precision = {"bf16": dtype == "bf16", "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(**_arguments(work, out, micro), **precision)
        data = _dataset(work, micro)
        return _timed(SFTTrainer, model=model, args=arguments, train_dataset=data, processing_class=tok)


def plain(how: str, work: dict[str, Any]) -> list[dict[str, float]]:
    """PEFT in a plain loop at its best: rows of like length together, the head at labels only, fused AdamW.

    `how` is dtype and rows per micro-batch. In bf16 the adapter is fp32, as PEFT has it.
    """
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    dtype, micro, flags = chosen(how, work)
    torch.manual_seed(0)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=kind)
    model = _peft(model, autocast_adapter_dtype="low" not in flags).train()
    inner = model.base_model.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    used.update(dtype=dtype, micro=micro, flags=sorted(flags), attention=model.config._attn_implementation)
    steps = []
    for batch in work["batches"]:
        began = time.perf_counter()
        rows = sorted((work["rows"][i] for i in batch), key=lambda row: len(row[0]))
        labels = sum(len(ids) - first for ids, first in rows)
        total = 0.0
        for at in range(0, len(rows), micro):
            part = rows[at : at + micro]
            longest = len(part[-1][0])
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            goal = torch.full((len(part), longest), -100)
            for k, (row, first) in enumerate(part):
                ids[k, : len(row)] = torch.tensor(row)
                goal[k, first - 1 : len(row) - 1] = torch.tensor(row[first:])
            # Padding comes after every real token, so causal attention needs no mask.
            hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = inner.lm_head(hidden[goal >= 0]).float()
            loss = F.cross_entropy(logits, goal[goal >= 0], reduction="sum") / labels
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": total, "seconds": time.perf_counter() - began})
    return steps


def _peft(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM")
    return get_peft_model(model, config, **options)


def _tokenizer(work: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(work["model"])
    tok.pad_token = tok.pad_token or tok.eos_token
    return tok


def _arguments(work: dict[str, Any], out: str, micro: int) -> dict[str, Any]:
    """What is the same under every trainer: the optimisation, and no logs, files or trackers."""
    return {
        "output_dir": out, "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": work["batch"] // micro, "max_steps": len(work["batches"]),
        "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip


def _dataset(work: dict[str, Any], micro: int) -> Any:
    """Rows in the order of the batches, as ids and labels; within a step by length where it is cut into micro-batches.

    The rows of a step stay the rows of that step, so that losses compare with those of the others.
    """
    from datasets import Dataset

    order: list[Any] = []
    for batch in work["batches"]:
        rows = [work["rows"][i] for i in batch]
        order += sorted(rows, key=lambda row: len(row[0])) if micro < work["batch"] else rows
    return Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in order],
            "labels": [[-100] * first + ids[first:] for ids, first in order],
        }
    )


def _timed(kind: Any, **arguments: Any) -> list[dict[str, float]]:
    """Train with a trainer of transformers' family, its rows in their order; the seconds and the loss of each step."""
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **options: Any) -> None:
            marks.append(time.perf_counter())

        def on_train_end(self, *args: Any, **options: Any) -> None:
            marks.append(time.perf_counter())

    class InOrder(kind):  # type: ignore[misc,valid-type]
        def _get_train_sampler(self, *args: Any, **options: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    trainer = InOrder(callbacks=[Clock()], **arguments)
    told = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "optim")
    used.update(
        {
            name: str(getattr(trainer.args, name))
            for name in (*told, "padding_free", "packing")
            if hasattr(trainer.args, name)
        }
    )
    weights = {"trained" if part.requires_grad else "frozen": str(part.dtype) for part in trainer.model.parameters()}
    used.update(weights, attention=trainer.model.config._attn_implementation)
    trainer.train()
    losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    return [{"loss": loss, "seconds": took} for loss, took in zip(losses, seconds, strict=True)]


if __name__ == "__main__":
    main()
