"""Train an adapter from rows in memory: `python train_from_rows.py [MODEL] [OUT] [STEPS]`."""

import sys

import lorica
from lorica.data import Record

name, out, steps = (sys.argv[1:] + ["smollm2-135m", "runs/colours", "20"][len(sys.argv) - 1 :])[:3]

fruits = {"banana": "yellow", "cherry": "red", "lime": "green", "plum": "purple", "lemon": "yellow", "apple": "red"}
rows = [Record("pair", prompt=f"Colour of a {fruit}?", completion=colour) for fruit, colour in fruits.items()] * 4

model, tok = lorica.load(name)
lorica.inject(model, lorica.LoRA(r=8, alpha=16), targets="all-linear")
print(lorica.count(model))
run = lorica.train(model, tok, rows, lorica.TrainSettings(steps=int(steps), batch=4), out=out)
print(f"held out {run.before:.3f} -> {run.after:.3f}; the adapter is in {run.path / 'best'}")
