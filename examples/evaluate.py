"""Loss with and without an adapter on the same rows, with an interval: `python evaluate.py [MODEL]`."""

import sys
import tempfile

import lorica
from lorica import data, evaluate

name, steps = (sys.argv[1:] + ["smollm2-135m", "20"][len(sys.argv) - 1 :])[:2]
rows = [data.Record("pair", prompt=f"{a} plus {b} is", completion=str(a + b)) for a in range(6) for b in range(6)]

model, tok = lorica.load(name)
lorica.inject(model, lorica.LoRA(r=8))
with tempfile.TemporaryDirectory() as folder:
    lorica.train(model, tok, rows[::2], lorica.TrainSettings(steps=int(steps), batch=4), out=f"{folder}/run")

unseen = data.encode(rows[1::2], tok, max_len=256).examples
tuned = evaluate.loss(model, unseen)
with lorica.disabled(model):
    base = evaluate.loss(model, unseen)
print(f"base {base.loss:.3f}, tuned {tuned.loss:.3f} nats per token on {tuned.tokens} tokens")
pairs = [[total / count for total, count in result.per_row] for result in (tuned, base)]
print(evaluate.paired(*pairs))
