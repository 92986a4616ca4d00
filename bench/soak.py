"""A server under thousands of requests, many of them bad: no wrong answer, no memory that grows, a loop that lives.

python bench/soak.py --requests 10000 --json

It makes a tiny model and some adapters, starts `lorica serve` on them, asks everything once alone, then all at once:
good requests whole and streamed, hanging up in the middle, prompts that are too long, fields and models that are
unknown, wrong keys, readers that are slow, and adapters loaded again meanwhile. Answers are greedy, of prompts whose
likeliest tokens lead by enough that rounding does not decide, so each must be the one it was alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from measure import machine

LEAD = 0.02  # nats between the two likeliest tokens
ADMIN, USER = "sk-soak-admin-0123", "sk-soak-user-01234"
KEYS = f'[admin]\nkey = "{ADMIN}"\nadmin = true\n[user]\nkey = "{USER}"\n'
SOURCE = Path(__file__).parents[1] / "src"


def build(root: Path, adapters: int) -> Path:
    """A tiny random Llama with a tokenizer of bytes, and adapters of several ranks."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import lorica

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.4, bos_token_id=None, eos_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "model")
    alphabet = {char: place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet | {"<pad>": 256, "</s>": 257}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>").save_pretrained(root / "model")
    for place in range(adapters):
        model, _ = lorica.load(root / "model", dtype="fp32")
        lorica.inject(model, lorica.LoRA(r=2 << place % 4))
        for tensor in lorica.trainable(model).values():
            torch.nn.init.normal_(tensor, std=0.2)
        lorica.Adapter.of(model).save(root / "adapters" / f"a{place}")
    return root / "model"


class Asking:
    """Requests over plain sockets, one connection each."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def post(self, path: str, body: Any, key: str = USER, leave_after: int | None = None, slow: bool = False):
        """(status, body) of a request; (0, b"") where we hung up."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            raw = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\n"
            writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
            await writer.drain()
            if leave_after is not None:
                await reader.read(leave_after)
                return 0, b""
            got = b""
            while chunk := await reader.read(512 if slow else 1 << 16):
                got += chunk
                if slow:
                    await asyncio.sleep(0.02)
            head, _, rest = got.partition(b"\r\n\r\n")
            return int(head.split()[1]), _unchunked(rest) if b"chunked" in head.lower() else rest
        finally:
            writer.close()

    async def said(self, model: str, prompt: str, stream: bool = False, **how: Any) -> tuple[int, str]:
        """(status, text) of a completion; half a stream is no text."""
        body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "stream": stream}
        status, got = await self.post("/v1/completions", body, **how)
        if status != 200:
            return status, ""
        if not stream:
            return status, json.loads(got)["choices"][0]["text"]
        events = [part.removeprefix("data: ") for part in got.decode().split("\n\n") if part]
        if events[-1] != "[DONE]":
            return status, "(cut off)"
        return status, "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def _unchunked(raw: bytes) -> bytes:
    whole = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        whole, raw = whole + raw[: int(size, 16)], raw[int(size, 16) + 2 :]
    return whole


async def expectations(asking: Asking, models: list[str], wanted: int) -> dict[tuple[str, str], str]:
    """Prompts whose answers rounding cannot change, and what each model says to them alone."""
    draw, found = random.Random(0), {}
    for number in range(20 * wanted):
        prompt = "".join(draw.choices("abcdefgh ", k=draw.randint(1, 60))) + str(number)
        model = models[number % len(models)]
        body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "logprobs": 2}
        status, got = await asking.post("/v1/completions", body)
        assert status == 200, got
        choice = json.loads(got)["choices"][0]
        tops = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        if all(len(top) > 1 and top[0] - top[1] > LEAD for top in tops):
            found[model, prompt] = choice["text"]
        if len(found) == wanted:
            break
    return found


async def soak(asking: Asking, expected: dict[tuple[str, str], str], root: Path, options: Any, rss: Any) -> dict:
    """All requests, so many at once; what came of them."""
    draw, statuses, wrong, memory = random.Random(1), Counter(), [], []
    pairs, numbers = list(expected), iter(range(options.requests))

    async def one(number: int) -> None:
        model, prompt = pairs[number % len(pairs)]
        kind = draw.choices(
            ["whole", "stream", "leave", "long", "field", "nobody", "key", "slow", "reload"],
            [40, 30, 10, 4, 4, 4, 4, 3, 1],
        )[0]
        must = 200
        if kind == "leave":
            status, _ = await asking.said(model, prompt, stream=True, leave_after=draw.randint(1, 600))
            must = 0
        elif kind == "long":
            status, _ = await asking.said(model, prompt * 200)
            must = 400
        elif kind == "field":
            status, _ = await asking.post("/v1/completions", {"model": model, "prompt": prompt, "echo": True})
            must = 400
        elif kind == "nobody":
            status, _ = await asking.said("nobody", prompt)
            must = 404
        elif kind == "key":
            status, _ = await asking.said(model, prompt, key="sk-wrong-0123456789")
            must = 401
        elif kind == "reload":
            name = f"a{draw.randrange(options.adapters)}"
            body = {"lora_name": name, "load_inplace": True}
            status, _ = await asking.post("/v1/load_lora_adapter", body, key=ADMIN)
        else:
            status, text = await asking.said(model, prompt, stream=kind != "whole", slow=kind == "slow")
            if status == 200 and text != expected[model, prompt]:
                wrong.append((kind, model, prompt, text, expected[model, prompt]))
        statuses[kind, status] += 1
        if status not in (must, 429):
            wrong.append((kind, status))

    async def worker() -> None:
        for number in numbers:
            await one(number)
            if number % max(1, options.requests // 50) == 0:
                memory.append(rss())

    began = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(options.at_once)))
    return {"seconds": time.monotonic() - began, "statuses": statuses, "wrong": wrong, "memory": memory}


async def run(process: subprocess.Popen, port: int, root: Path, options: Any) -> dict[str, Any]:
    """Ask alone, ask all at once, ask alone again."""
    asking = Asking(port)
    models = ["model", *(f"a{place}" for place in range(options.adapters))]
    expected = await expectations(asking, models, options.prompts)
    it = psutil.Process(process.pid)
    found = await soak(asking, expected, root, options, lambda: it.memory_info().rss)
    after = [(await asking.said(*pair))[1] == text for pair, text in expected.items()]
    memory = found["memory"]
    early, late = memory[len(memory) // 5], memory[-1]
    return {
        "requests": options.requests,
        "seconds": round(found["seconds"], 1),
        "statuses": {f"{kind} {status}": count for (kind, status), count in sorted(found["statuses"].items())},
        "wrong": found["wrong"][:10],
        "wrong_count": len(found["wrong"]),
        "right_afterwards": f"{sum(after)} of {len(after)}",
        "memory_after_a_fifth": early,
        "memory_at_the_end": late,
        "memory_growth": round(late / early - 1, 4),
    }


def main() -> None:
    """Build, start, soak, stop, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=48)
    parser.add_argument("--adapters", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        model = build(root, options.adapters)
        (root / "keys.toml").write_text(KEYS)
        (root / "keys.toml").chmod(0o600)
        flags = ["--adapters", str(root / "adapters"), "--keys", str(root / "keys.toml"), "--port", "0", "--json"]
        flags += ["--log", str(root / "log.jsonl"), "--kv-memory", "16MB", "--concurrency", "16", "--dtype", "fp32"]
        argv = [sys.executable, "-m", "lorica", "serve", str(model), *flags]
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)}
        ) as it:
            port = int(json.loads(it.stdout.readline())["url"].rsplit(":", 1)[1].split("/")[0])
            found = asyncio.run(run(it, port, root, options))
            it.send_signal(signal.SIGTERM)
            found["exit"] = it.wait(60)
        found["log_lines"] = len((root / "log.jsonl").read_text().splitlines())
    finally:
        shutil.rmtree(root)
    report = {
        "settings": vars(options),
        "machine": machine(),
        "results": {"soak": found},
        "ratios": {"memory growth": found["memory_growth"], "wrong answers": found["wrong_count"]},
        "targets": {"memory growth": [0.02, "at most"], "wrong answers": [0, "at most"]},
        "floor": None,
    }
    print(json.dumps(report if options.json else found, indent=1))


if __name__ == "__main__":
    main()
