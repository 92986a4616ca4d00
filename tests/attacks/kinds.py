"""Every kind of file that lorica reads: a sound one, how it is damaged and read, and what is asked of the result.

`read` returns after a `LoricaError` or with something that `sound` has looked at; anything else is a fault of ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from model_files import save, write_gguf

import lorica
from attacks import mutations
from lorica import Adapter, LoRA, data, inspect
from lorica.formats import Contents, gguf, gguf_header, loralib, mlx, pair, peft
from lorica.models.checkpoint import read_folder
from lorica.train import folder as runs
from lorica.train import state
from lorica.train.run import settings_of
from tiny import gpt2, llama, stir

Damage = Callable[[random.Random, bytes], bytes]
CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
ROWS = [
    {"prompt": "what is 2 + 2?", "completion": "4"},
    {"prompt": 'say "hi"', "completion": "hi, ünïcode \u2713"},
    {"prompt": "a list", "completion": "1\n2"},
]
CHATS = [
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}], "tools": None},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [
            {"role": "user", "content": "time?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": '{"zone": "utc"}'}}]},
        ]
    },
]
EVENTS = [
    {"kind": "start", "run": "r", "model": "m", "lr": 0.1, "rank": 8, "targets": "all-linear"},
    {"kind": "step", "step": 1, "loss": 2.5, "lr": 0.1},
    {"kind": "eval", "step": 1, "held_out": 2.4, "best": True},
    {"kind": "end", "steps": 1, "planned": 1, "best_step": 1, "before": 3.0, "after": 2.4, "seconds": 1.0},
]


@dataclass(frozen=True)
class Kind:
    """`share` is its part of all files; `file` the one that is damaged, below the folder that `make` fills."""

    make: Callable[[Path], None]
    file: str
    damage: Damage
    read: Callable[[Path], Any]
    share: int = 10


def sound(contents: Contents) -> None:
    """An adapter that was accepted has finite tensors of the sizes that its targets say, and a finite scale each."""
    for key, tensor in contents.tensors.items():
        assert tensor.dtype == torch.float32 and tensor.numel() and tensor.isfinite().all(), key
    for target in contents.targets:
        A, B = (contents.tensors[f"{target.path}#{target.part or 'lora'}.{factor}"] for factor in "AB")
        rows = target.rows[1] - target.rows[0] if target.rows else target.shape[0]
        assert A.shape[-2] == B.shape[-1] == contents.method.rank_of(target.key), target
        assert (B.shape[-2], A.shape[-1]) == (rows, target.shape[1]), target
        assert abs(contents.method.scale_of(target.key)) < float("inf")
    assert all(isinstance(text, str) for text in contents.meta.values())


def adapter_folder(path: Path) -> None:
    """Reads as the commands do."""
    sound(Contents(*_parts(Adapter.load(path))))


def table(path: Path) -> None:
    """Rows that were accepted are text that can be written."""
    found = data.read(path)
    assert found.rows
    for row in [*found.rows, *(found.valid or []), *(found.test or [])]:
        json.dumps([row.prompt, row.completion, row.text, row.messages, row.tools]).encode()
        assert row.key.encode() and not row.lacks_answer


def _parts(adapter: Adapter) -> tuple[Any, ...]:
    return adapter.method, adapter.targets, adapter.tensors, adapter.meta


def _contents(make: Callable[[], torch.nn.Module] = llama, method: LoRA | None = None, targets: str = "qv") -> Contents:
    model = make()
    lorica.inject(model, method or LoRA(r=2, alpha=4), targets)
    stir(model)
    return Contents(*_parts(Adapter.of(model, meta={"base_model": "tiny", "stop_tokens": '["x"]'})))


def _text(path: Path, lines: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _csv(path: Path) -> None:
    path.joinpath("rows.csv").write_text('prompt,completion\nhello,hi\n"a ""b""","c\nd"\nünï,x\n', encoding="utf-8")


def _parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 2), path / "rows.parquet", compression="zstd")


def _state(path: Path) -> None:
    sampler = {"n": 3, "batch": 1, "seed": 0, "epoch": 0, "position": 1}
    here = state.State(
        step=1, before=3.0, best=2.5, best_step=1, tokens=30, seconds=1.5, measures={"f1": 0.5}, data="a", base="b",
        sampler=sampler, logs={"metrics.jsonl": 4},
    )  # fmt: skip
    (path / "metrics.jsonl").write_text("{}\n\n")
    tensors = {f"{part}/x": torch.ones(2, 3) for part in ("master", "exp_avg", "exp_avg_sq")}
    state.write(path, here, tensors | {"step/x": torch.tensor(1.0)})


def _read_state(path: Path) -> None:
    found = state.read(path)
    assert found is not None
    here, tensors = found
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert here.step >= 0 and here.seconds >= 0


def _run(path: Path) -> None:
    peft.write(path / "best", _contents())
    settings = lorica.TrainSettings().values() | {"model": "tiny", "data": "rows.jsonl"}
    runs.write_settings(path, settings, {"lorica": "0"})
    _text(path / "metrics.jsonl", EVENTS[:-1])


def _finished(path: Path) -> None:
    _run(path)
    _text(path / "metrics.jsonl", EVENTS)


def _read_run(path: Path) -> None:
    assert inspect.inspect(path)["kind"] == "run"
    json.dumps(settings_of(path).values())


def _read_log(path: Path) -> None:
    for event in runs.read_log(path / "metrics.jsonl"):
        assert isinstance(event["kind"], str)
    inspect.inspect(path)


def _read_gguf_model(path: Path) -> None:
    from gguf import GGUFReader

    gguf_header.check(path / "model.gguf")
    for tensor in GGUFReader(path / "model.gguf").tensors:
        assert tensor.data.nbytes == tensor.n_bytes


def _json(rng: random.Random, content: bytes) -> bytes:
    return mutations.json_text(rng, mutations.tree(rng, json.loads(content)))


def _model_json(rng: random.Random, content: bytes) -> bytes:
    return json.dumps(mutations.tree(rng, json.loads(content))).encode()


def _jsonl(rng: random.Random, content: bytes) -> bytes:
    if rng.randrange(2):
        return mutations.table(rng, content)
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(mutations.tree(rng, json.loads(lines[at])))
    return "\n".join([*lines, ""]).encode(errors="surrogatepass")


def _list(rng: random.Random, content: bytes) -> bytes:
    return json.dumps(mutations.tree(rng, json.loads(content))).encode() if rng.randrange(2) else _json(rng, content)


FUSED = {"method": LoRA(r=2, alpha=3), "targets": "c_attn[q,v]"}
PATTERNS = {"method": LoRA(r=2, alpha=6, ranks={"q_proj": 4}, alphas={r"layers\.1\..*": 3}), "targets": "qv"}
KINDS: dict[str, Kind] = {
    "peft config": Kind(lambda p: peft.write(p, _contents(**PATTERNS)), pair.CONFIG, _json, adapter_folder, 20),
    "peft tensors": Kind(
        lambda p: peft.write(p, _contents()), pair.TENSORS, mutations.safetensors, adapter_folder, 14
    ),
    "peft, fused": Kind(
        lambda p: peft.write(p, _contents(gpt2, **FUSED)), pair.TENSORS, mutations.safetensors, adapter_folder, 10
    ),
    "loralib": Kind(
        lambda p: loralib.write(p / "a.safetensors", _contents(gpt2, **FUSED)) and None,
        "a.safetensors", mutations.safetensors, lambda p: sound(loralib.read(p / "a.safetensors")), 12,
    ),
    "mlx config": Kind(lambda p: mlx.write(p, _contents()) and None, mlx.CONFIG, _json, adapter_folder, 6),
    "mlx tensors": Kind(
        lambda p: mlx.write(p, _contents(method=LoRA(r=2, alpha=4, dora=True))) and None,
        mlx.TENSORS, mutations.safetensors, adapter_folder, 8,
    ),
    "gguf adapter": Kind(
        lambda p: gguf.write(p / "a.gguf", _contents(), CONFIG) and None,
        "a.gguf", mutations.gguf, lambda p: sound(gguf.read(p / "a.gguf")), 16,
    ),
    "gguf model": Kind(
        lambda p: write_gguf(p / "model.gguf") and None, "model.gguf", mutations.gguf, _read_gguf_model, 3
    ),
    "state": Kind(_state, str(state.FILE), mutations.safetensors, _read_state, 10),
    "run.toml": Kind(_run, "run.toml", mutations.table, _read_run, 5),
    "metrics.jsonl": Kind(_finished, "metrics.jsonl", _jsonl, _read_log, 5),
    "rows.jsonl": Kind(
        lambda p: _text(p / "rows.jsonl", ROWS), "rows.jsonl", _jsonl, lambda p: table(p / "rows.jsonl"), 20
    ),
    "chat.jsonl": Kind(
        lambda p: _text(p / "rows.jsonl", CHATS), "rows.jsonl", _jsonl, lambda p: table(p / "rows.jsonl"), 20
    ),
    "rows.json": Kind(
        lambda p: (p / "rows.json").write_text(json.dumps(ROWS)) and None,
        "rows.json", _list, lambda p: table(p / "rows.json"), 10,
    ),
    "rows.csv": Kind(_csv, "rows.csv", mutations.table, lambda p: table(p / "rows.csv"), 10),
    "rows.parquet": Kind(_parquet, "rows.parquet", mutations.bytes_of, lambda p: table(p / "rows.parquet"), 10),
    "model config.json": Kind(
        lambda p: save(p) and None, "config.json", _model_json, lambda p: read_folder(p, torch.float32, str(p)), 1
    ),
    "model weights": Kind(
        lambda p: save(p) and None, "model.safetensors", mutations.safetensors,
        lambda p: read_folder(p, torch.float32, str(p)), 1,
    ),
}  # fmt: skip


class Bench:
    """A sound folder of one kind, in which one file is damaged again and again."""

    def __init__(self, kind: Kind, place: Path) -> None:
        self.kind, self.work = kind, place / "work"
        self.work.mkdir(parents=True)
        kind.make(self.work)
        kind.read(self.work)  # of a file that is refused as it is, no damage would show anything
        self.content = (self.work / kind.file).read_bytes()

    def damaged(self, seed: str) -> Path:
        """A folder with the damage that follows from `seed`."""
        (self.work / self.kind.file).write_bytes(self.kind.damage(random.Random(seed), self.content))
        return self.work
