"""One contender in one process: reads token ids, trains, prints one line of JSON. Started by `train.py`.

Every contender trains a rank 8 update of all linear layers with AdamW at 2e-4 on the same batches in the same order.
`*_best` differ from `*_default` only in what their libraries offer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R, ALPHA, LR = 8, 16, 2e-4


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
        "sha256": digest,
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

    bf16 = how == "bf16"
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.bfloat16 if bf16 else torch.float32)
    model = _peft(model)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(bf16=bf16, **_arguments(work, out))
        collate = DataCollatorForSeq2Seq(_tokenizer(work))
        return _timed(Trainer, model=model, args=arguments, train_dataset=_dataset(work), data_collator=collate)


def trl(how: str, work: dict[str, Any]) -> list[dict[str, float]]:
    """TRL's SFTTrainer: its defaults, or checkpointing off and fp32 where that is faster."""
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    best = how != "default"
    options: dict[str, Any] = {}
    if best:
        options = {"gradient_checkpointing": False, "bf16": how == "bf16"}
        options["model_init_kwargs"] = {"dtype": torch.bfloat16 if how == "bf16" else torch.float32}
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(**_arguments(work, out), **options)
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM")
        return _timed(
            SFTTrainer, model=work["model"], args=arguments, train_dataset=_dataset(work), peft_config=config,
            processing_class=_tokenizer(work),
        )  # fmt: skip


def unsloth(how: str, work: dict[str, Any]) -> list[dict[str, float]]:
    """Unsloth's CPU backend: its defaults (bf16 where the CPU has it), or checkpointing off in a dtype."""
    import torch
    import unsloth  # noqa: F401 - before trl, as it asks
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    kind = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32}[how]
    model, tok = FastLanguageModel.from_pretrained(work["model"], max_seq_length=2048, dtype=kind, load_in_4bit=False)
    options = {} if how == "default" else {"use_gradient_checkpointing": False}
    model = FastLanguageModel.get_peft_model(
        model, r=R, lora_alpha=ALPHA, target_modules=LINEAR, lora_dropout=0, bias="none", **options
    )
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(**_arguments(work, out))
        return _timed(SFTTrainer, model=model, args=arguments, train_dataset=_dataset(work), processing_class=tok)


def plain(how: str, work: dict[str, Any]) -> list[dict[str, float]]:
    """PEFT in a plain loop at its best: rows of like length together, the head at labels only, fused AdamW.

    `how` is dtype and rows per micro-batch. In bf16 the adapter is fp32, as PEFT has it.
    """
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    dtype, _, micro = how.partition("_")
    torch.manual_seed(0)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = _peft(AutoModelForCausalLM.from_pretrained(work["model"], dtype=kind)).train()
    inner = model.base_model.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    steps = []
    for batch in work["batches"]:
        began = time.perf_counter()
        rows = sorted((work["rows"][i] for i in batch), key=lambda row: len(row[0]))
        labels = sum(len(ids) - first for ids, first in rows)
        total = 0.0
        for at in range(0, len(rows), int(micro)):
            part = rows[at : at + int(micro)]
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


def _peft(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM"))


def _tokenizer(work: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(work["model"])
    tok.pad_token = tok.pad_token or tok.eos_token
    return tok


def _arguments(work: dict[str, Any], out: str) -> dict[str, Any]:
    """What is the same under every trainer: the optimisation, and no logs, files or trackers."""
    return {
        "output_dir": out, "per_device_train_batch_size": work["batch"], "max_steps": len(work["batches"]),
        "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip


def _dataset(work: dict[str, Any]) -> Any:
    """Rows in the order of the batches, as ids and labels."""
    from datasets import Dataset

    order = [work["rows"][i] for batch in work["batches"] for i in batch]
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
    trainer.train()
    losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    return [{"loss": loss, "seconds": took} for loss, took in zip(losses, seconds, strict=True)]


if __name__ == "__main__":
    main()
