"""Try ranks and learning rates in one pass over one base: `python sweep.py [MODEL] [OUT] [STEPS]`."""

import sys

import lorica
from lorica.data import Record
from lorica.train import many
from lorica.train.grid import members

name, out, steps = (sys.argv[1:] + ["smollm2-135m", "runs/sweep", "20"][len(sys.argv) - 1 :])[:3]

rows = [Record("pair", prompt=f"{a} plus {b} is", completion=str(a + b)) for a in range(6) for b in range(6)]
grid = members(lorica.TrainSettings(steps=int(steps), batch=4), {"rank": [2, 8], "lr": [1e-4, 1e-3]})

model, tok = lorica.load(name)
sweep = many.train(model, tok, rows, grid, out=out)
for row in sweep.rows:
    print(f"{row.name:<16}{row.after:.3f}")
print(f"go on with {sweep.pick}: {sweep.why}")
