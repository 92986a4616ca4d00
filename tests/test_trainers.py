"""A patched model is a plain torch model to anybody's training loop."""

from __future__ import annotations

import pytest
import torch

import lorica
from laws import close
from lorica import Adapter, LoRA
from tiny import gpt2, inputs, llama, logits


def rows(count: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 64, (count, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("make, targets", [(llama, "all-linear"), (gpt2, "paper")], ids=["llama", "gpt2 fused q and v"])
def test_a_plain_loop_trains_the_adapter_and_leaves_the_base(make, targets, tmp_path):
    model = make()
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    lorica.inject(model, LoRA(r=4), targets)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = inputs(model)
    losses = []
    for _ in range(20):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    tuned = logits(model)
    Adapter.of(model).save(tmp_path / "adapter")
    again = make()
    Adapter.load(tmp_path / "adapter").apply(again)
    assert torch.equal(logits(again), tuned)
    lorica.merge(again)
    assert close(logits(again), tuned)
    lorica.eject(model)
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())


def test_the_transformers_trainer_trains_the_adapter_and_leaves_the_base(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = llama()
    before = logits(model)
    lorica.inject(model, LoRA(r=4), "all-linear")
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, learning_rate=1e-2, report_to=[], logging_steps=1, save_steps=6, use_cpu=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(32))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.equal(logits(model.eval()), before)
    lorica.eject(model)
    assert torch.equal(logits(model), before)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6").eval()
    assert torch.equal(logits(saved), before)
