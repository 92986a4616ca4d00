"""Records -> text through the model's own chat template -> tokens and a loss mask -> batches.

1. `read`: .jsonl .json .csv .parquet, a folder, a hub id; five formats, or any table by `map` and templates
2. `split`: rows held out, by seed
3. `encode`: token ids, and which of them are to be predicted
4. `collate`, `Sampler`: tensors, and their order
5. `prompt_ids`: what to generate from, and the answer to compare with
6. `read_labelled`, `label_names`, `encode_labelled`: the same for rows with a label or a score
7. `bfcl`: the quickstart's set and its metric
"""

from lorica.data import bfcl
from lorica.data.batch import Sampler, collate
from lorica.data.encoding import Encoded, EncodeReport, Example, encode, marked
from lorica.data.holdout import split
from lorica.data.labelled import LabelledRow, label_names, read_labelled
from lorica.data.reading import read
from lorica.data.records import Record, Records
from lorica.data.sequences import LabelledExample, encode_labelled
from lorica.data.template import prompt_ids, render_chat

__all__ = [
    "EncodeReport",
    "Encoded",
    "Example",
    "LabelledExample",
    "LabelledRow",
    "Record",
    "Records",
    "Sampler",
    "bfcl",
    "collate",
    "encode",
    "encode_labelled",
    "label_names",
    "marked",
    "prompt_ids",
    "read",
    "read_labelled",
    "render_chat",
    "split",
]
