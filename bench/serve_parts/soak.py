"""A server under thousands of requests, many of them bad: no wrong answer, no memory that grows, a loop that lives.

It makes a tiny model and some adapters, of which memory holds two thirds, starts `lorica serve` on them, asks
everything once alone, then all at once: good requests whole and streamed, hanging up in the middle, prompts that are
too long, fields and models that are unknown, wrong keys, readers that are slow, and adapters loaded again meanwhile.
Answers are greedy, of prompts whose likeliest tokens lead by enough that rounding does not decide, so each must be the
one it was alone, and again afterwards.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from measure import summary

LEAD = 0.02  # nats between the two likeliest tokens
AT_ONCE, ADAPTERS, PROMPTS = 48, 6, 200
ADMIN, USER = "sk-soak-admin-0123", "sk-soak-user-01234"
TENANTS = f'[admin]\nkey = "{ADMIN}"\nadmin = true\n[user]\nkey = "{USER}"\n'
SOURCE = Path(__file__).parents[2] / "src"
# Of hundred requests, and the status that each kind must have where it is not 200 (0: we hung up) or 429.
KINDS = {
    "whole": 40, "stream": 30, "leave": 10, "long": 4, "field": 4, "nobody": 4, "key": 4, "slow": 3, "reload": 1,
}  # fmt: skip
MUST = {"leave": 0, "long": 400, "field": 400, "nobody": 404, "key": 401}
# Of the server's metrics: deaths of its loop, and what must have come up.
RESTARTS = "lorica_engine_restarts_total"
COUNTED = (RESTARTS, "lorica_adapter_evictions_total", "vllm:prefix_cache_hits_total")


def build(root: Path) -> Path:
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
    for place in range(ADAPTERS):
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

    async def post(self, path: str, body: Any, key: str = USER, **how: Any) -> tuple[int, bytes]:
        """(status, body) of a request; (0, b"") where we hung up."""
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nauthorization: Bearer {key}\r\ncontent-length: {len(raw)}\r\n"
        return await self._answer(f"{head}content-type: application/json\r\n", raw, **how)

    async def get(self, path: str) -> tuple[int, bytes]:
        """(status, body) of what needs no key."""
        return await self._answer(f"GET {path} HTTP/1.1\r\n", b"")

    async def _answer(self, head: str, raw: bytes, leave_after: int | None = None, slow: bool = False):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"{head}host: x\r\nconnection: close\r\n\r\n".encode() + raw)
            await writer.drain()
            if leave_after is not None:
                await reader.read(leave_after)
                return 0, b""
            got = b""
            while chunk := await reader.read(256 if slow else 1 << 16):
                got += chunk
                if slow:
                    await asyncio.sleep(0.1)
            above, _, rest = got.partition(b"\r\n\r\n")
            return int(above.split()[1]), _unchunked(rest) if b"chunked" in above.lower() else rest
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


async def ask_all(asking: Asking, expected: dict[tuple[str, str], str], count: int, rss: Callable[[], int]) -> dict:
    """All requests, so many at once; what came of them."""
    draw, statuses, wrong, memory = random.Random(1), Counter(), [], []
    pairs, numbers = list(expected), iter(range(count))

    async def one(number: int) -> None:
        model, prompt = pairs[number % len(pairs)]
        (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
        must = MUST.get(kind, 200)
        if kind == "leave":
            status, _ = await asking.said(model, prompt, stream=True, leave_after=draw.randint(1, 600))
        elif kind == "long":
            status, _ = await asking.said(model, prompt * 400)
        elif kind == "field":
            status, _ = await asking.post("/v1/completions", {"model": model, "prompt": prompt, "echo": True})
        elif kind == "nobody":
            status, _ = await asking.said("nobody", prompt)
        elif kind == "key":
            status, _ = await asking.said(model, prompt, key="sk-wrong-0123456789")
        elif kind == "reload":
            body = {"lora_name": f"a{draw.randrange(ADAPTERS)}", "load_inplace": True}
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
            if number % max(1, count // 100) == 0:
                memory.append(rss())

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return {"statuses": statuses, "wrong": wrong, "memory": memory}


async def under_load(process: subprocess.Popen, port: int, count: int) -> dict[str, Any]:
    """Ask alone, ask all at once, ask alone again."""
    asking, it = Asking(port), psutil.Process(process.pid)
    models = ["model", *(f"a{place}" for place in range(ADAPTERS))]
    expected = await expectations(asking, models, PROMPTS)
    began = time.monotonic()
    found = await ask_all(asking, expected, count, lambda: it.memory_info().rss)
    seconds = time.monotonic() - began
    after = sum([(await asking.said(*pair))[1] == text for pair, text in expected.items()])
    _, metrics = await asking.get("/metrics")
    numbers = dict(re.findall(r"^(\S+) ([\d.e+]+)$", metrics.decode(), re.MULTILINE))
    counted = {name: int(float(numbers[name])) for name in COUNTED}
    # Of many looks at a time: what is being answered just then is no leak.
    fifth = len(found["memory"]) // 5
    early, late = (statistics.median(found["memory"][a:b]) for a, b in ((fifth, 2 * fifth), (-fifth, None)))
    return {
        **summary([count / seconds]),
        "unit": "requests/s",
        "statuses": {f"{kind} {status}": number for (kind, status), number in sorted(found["statuses"].items())},
        "wrong": found["wrong"][:10],
        "wrong_count": len(found["wrong"]) + len(expected) - after + counted[RESTARTS],
        "memory": [early, late],
        "counted": counted,
    }


def run(options: Any) -> dict[str, Any]:
    """Build, start, ask, stop. An end other than a clean one, or a kind that did not come up, is a RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = build(root)
        (root / "keys.toml").write_text(TENANTS)
        (root / "keys.toml").chmod(0o600)
        nbytes = sum(file.stat().st_size for file in root.glob("adapters/*/*.safetensors"))
        flags = ["--adapters", str(root / "adapters"), "--keys", str(root / "keys.toml"), "--port", "0", "--json"]
        flags += ["--log", str(root / "log.jsonl"), "--kv-memory", "16MB", "--concurrency", "16", "--dtype", "fp32"]
        flags += ["--adapter-memory", str(int(0.7 * nbytes)), "--adapter-share", "4"]
        argv = [sys.executable, "-m", "lorica", "serve", str(model), *flags]
        env = os.environ | {"PYTHONPATH": str(SOURCE)}
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as it:
            assert it.stdout is not None
            try:
                port = int(json.loads(it.stdout.readline())["url"].rsplit(":", 1)[1].split("/")[0])
                found = asyncio.run(under_load(it, port, options.soak))
            finally:
                it.send_signal(signal.SIGTERM)
            if ended := it.wait(60):
                raise RuntimeError(f"the server ended with {ended}")
    kinds = Counter(each.rsplit(" ", 1)[0] for each in found["statuses"])
    if never := [*(KINDS.keys() - kinds), *(name for name in COUNTED[1:] if not found["counted"][name])]:
        raise RuntimeError(f"this did not happen: {', '.join(never)}")
    ratios = {
        "soak: wrong answers": float(found["wrong_count"]),
        "soak: memory at the end / after a fifth": found["memory"][1] / found["memory"][0],
    }
    told = ", ".join(f"{each} {number:,}" for each, number in found["statuses"].items())
    notes = [f"soak: {told}", f"soak: {', '.join(f'{name} {number:,}' for name, number in found['counted'].items())}"]
    return {"results": {"soak": found}, "ratios": ratios, "notes": notes}
