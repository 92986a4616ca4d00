"""Several adapters on one base, switched in milliseconds: `python switch_adapters.py [MODEL]`."""

import sys
import time

import torch

import lorica

model, tok = lorica.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
ids = tok("one two three", return_tensors="pt").input_ids

for seed, name in enumerate(("sql", "support", "french")):
    torch.manual_seed(seed)
    lorica.inject(model, lorica.LoRA(r=8), targets="all-linear", name=name)
    for tensor in lorica.trainable(model).values():
        torch.nn.init.normal_(tensor, std=0.02)  # or lorica.Adapter.load(FOLDER).apply(model, name)


def told() -> list[float]:
    with torch.no_grad():
        return [round(value, 3) for value in model(ids).logits[0, -1, :3].tolist()]


for name in lorica.adapters(model):
    began = time.perf_counter()
    lorica.select(model, name)
    print(f"{name:<8}{1e3 * (time.perf_counter() - began):6.2f} ms   {told()}")
with lorica.disabled(model):
    print(f"{'base':<8}{'':>9}   {told()}")
