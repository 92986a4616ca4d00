"""An engine that says what a test wants, and a tokenizer of bytes, in which every umlaut is two tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorica.serve.engine import End, Sampling, Stream, Token, TooLong
from lorica.serve.leases import Lease

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def make_tok() -> PreTrainedTokenizerFast:
    vocab = {char: byte for byte, char in bytes_to_unicode().items()} | {"<s>": 256, "</s>": 257}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tok.chat_template = TEMPLATE
    return tok


def ids(text: str) -> list[int]:
    return list(text.encode())


class Request:
    """One that was submitted; `say` and `end` answer it, as an engine would from its own thread."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, lease: Lease | None, space: str) -> None:
        self.prompt, self.sampling, self.lease = bytes(prompt).decode(errors="replace"), sampling, lease
        self.adapter = lease.name if lease else None
        self.stream = Stream(lambda: self.end("cancelled"))
        self.left, self.space = sampling.max_tokens, space

    def say(self, text: str) -> None:
        for token in ids(text):
            if not self.left:
                return self.end("length")
            self.left -= 1
            top = tuple((token + place, -1.0 - place) for place in range(self.sampling.logprobs or 0))
            self.stream.put(Token(token, -1.0, top))
        return None

    def end(self, reason: Any = "stop", **more: Any) -> None:
        if self.lease:
            self.lease.release()
        self.stream.put(End(reason, **more))


class Fake:
    """Answers at once with `answer(request)`, or, without it, leaves requests to the test."""

    max_context = 200

    def __init__(self, answer: Callable[[Request], str] | None = None, kv_tokens: int = 1000) -> None:
        self.answer, self.kv_tokens = answer, kv_tokens
        self.requests: list[Request] = []
        self.alive = True

    def start(self) -> None: ...

    def stop(self) -> None:
        self.alive = False
        for request in self.open:
            request.end("cancelled")

    @property
    def open(self) -> list[Request]:
        return [request for request in self.requests if not request.stream.ended]

    def submit(self, prompt: Sequence[int], sampling: Sampling, lease: Lease | None, space: str = "") -> Stream:
        if len(prompt) + sampling.max_tokens > self.kv_tokens:
            raise TooLong("never")
        request = Request(prompt, sampling, lease, space)
        self.requests.append(request)
        if self.answer:
            request.say(self.answer(request))
            if not request.stream.ended:
                request.end()
        return request.stream

    def pause(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def facts(self) -> dict[str, Any]:
        running = sorted({request.adapter for request in self.open if request.adapter})
        return {
            "engine": "fake",
            "waiting": 0,
            "loading": 0,
            "running": len(self.open),
            "waiting_adapters": [],
            "running_adapters": running,
            "kv_blocks": 100,
            "kv_blocks_used": 25,
            "steps": 7,
            "prompt_tokens": 40,
            "cached_tokens": 10,
            "generated_tokens": 30,
            "restarts": 0,
        }
