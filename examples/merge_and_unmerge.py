"""Fold an adapter into its model and take it out again, to the bit: `python merge_and_unmerge.py [MODEL]`."""

import sys

import torch

import lorica

model, tok = lorica.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", dtype="fp32")
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
ids = tok("one two three", return_tensors="pt").input_ids

lorica.inject(model, lorica.LoRA(r=4), targets="qv")
for tensor in lorica.trainable(model).values():
    torch.nn.init.normal_(tensor, std=0.02)  # what a training would do

with torch.no_grad():
    beside = model(ids).logits
    lorica.merge(model)
    print("merged, logits differ by", (model(ids).logits - beside).abs().max().item())
lorica.unmerge(model)
lorica.eject(model)
same = all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
print("every weight as before:", same)
