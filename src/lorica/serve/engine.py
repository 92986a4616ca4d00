"""What an engine takes and gives: prompts with a `Sampling` and a `Lease` in, a `Stream` of `Token`s and one `End` out.

Whoever asks for text sees only this file, `leases.py` and `store.py`; `bridge.py` and `plain.py` are the engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lorica.errors import LoricaError, all_faults
from lorica.serve.leases import Lease

Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Attributes:
        max_tokens: at most so many are generated.
        temperature: 0 is greedy: the likeliest token, whatever `top_p`, `top_k` and `seed` say.
        top_p: only the smallest set of tokens whose probabilities sum to this (1: all).
        top_k: only so many likeliest tokens (0: all).
        seed: the same seed gives the same tokens, whatever else is in the batch; None draws one.
        stop_ids: a token that ends the text; it is not part of it.
        ignore_eos: do not stop at the model's own end tokens.
        logprobs: None for no log-probabilities, or how many of the likeliest tokens to report beside each chosen one.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)!r}, which must be {need}"
            for name, good, need in (
                ("max_tokens", self.max_tokens >= 1, "at least 1"),
                ("temperature", 0 <= self.temperature < float("inf"), "0 or a positive number"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("top_k", self.top_k >= 0, "0 (all) or more"),
                ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "None, or 0 to 20"),
            )
            if not good
        ]
        if faults:
            raise all_faults("these sampling settings cannot be used:", faults)


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; where asked for, its log-probability in nats (before temperature) and the likeliest others'.

    `top` is pairs of id and log-probability, the likeliest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """Why a request ended, and how many tokens of its prompt came from the prefix cache.

    `stop`: an end or stop token; `length`: `max_tokens` or the model's context; `cancelled`; `error`, with its text.
    """

    reason: Reason
    cached_tokens: int = 0
    error: str | None = None


class TooLong(LoricaError):
    """A prompt that can never be served: longer than the context, or than the cache of keys and values."""


class Stream:
    """A request's tokens as they come, then its `End`. Read it in one place, blocking or async::

    for item in stream: ...
    async for item in stream: ...
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._items: deque[Token | End] = deque()
        self._filled = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._on_cancel: Callable[[], None] | None = on_cancel
        self._ended = self._read_out = False

    def put(self, item: Token | End) -> None:
        """Hand over the next item; the engine's side. After an `End` nothing more is taken."""
        with self._filled:
            if self._ended:
                return
            self._ended = isinstance(item, End)
            self._items.append(item)
            self._filled.notify()
            waiter = self._waiter
        if waiter:
            with contextlib.suppress(RuntimeError):  # the reader's event loop was closed: nobody is there to be woken
                waiter[0].call_soon_threadsafe(waiter[1].set)

    def cancel(self) -> None:
        """Stop generating; an `End` with `cancelled` follows soon. From any thread, any number of times."""
        with self._filled:
            call, self._on_cancel = self._on_cancel, None
            if self._ended or call is None:
                return
        call()

    @property
    def ended(self) -> bool:
        """Whether the engine is done with it, read out or not."""
        return self._ended

    def result(self) -> tuple[list[Token], End]:
        """Wait for everything."""
        *tokens, end = list(self)
        assert isinstance(end, End)
        return tokens, end  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Token | End]:
        return self

    def __next__(self) -> Token | End:
        with self._filled:
            if self._read_out:
                raise StopIteration
            self._filled.wait_for(lambda: self._items)
            return self._taken()

    def __aiter__(self) -> AsyncIterator[Token | End]:
        return self

    async def __anext__(self) -> Token | End:
        if self._read_out:
            raise StopAsyncIteration
        if self._waiter is None:
            with self._filled:
                self._waiter = (asyncio.get_running_loop(), asyncio.Event())
        event = self._waiter[1]
        while True:
            event.clear()
            with self._filled:
                if self._items:
                    return self._taken()
            await event.wait()

    def _taken(self) -> Token | End:
        item = self._items.popleft()
        self._read_out = isinstance(item, End)
        return item


@dataclass(frozen=True)
class EngineSettings:
    """An engine's size.

    Attributes:
        requests: at most so many are decoded at once; the others wait in the engine's queue.
        batch_tokens: at most so many tokens in one step; a longer prompt is read in pieces.
        kv_tokens: how many tokens the cache of keys and values holds, of all requests together (0: what fits in a
            quarter of the free memory, at most `requests` times the model's context).
        page: tokens per block of that cache.
        prefix_cache: reuse the blocks of prompts that begin alike under the same adapter.
    """

    requests: int = 32
    batch_tokens: int = 512
    kv_tokens: int = 0
    page: int = 32
    prefix_cache: bool = True


class Engine(Protocol):
    """One base model and whatever adapters its requests lease."""

    max_context: int  # of prompt and answer together, in tokens
    kv_tokens: int  # total capacity of the cache of keys and values, in tokens

    def start(self) -> None:
        """Begin to decode, after a check that two adapters give what their merged weights give."""

    def stop(self) -> None:
        """End every request that is not done, as cancelled, and free what the engine holds."""

    def submit(self, ids: Sequence[int], sampling: Sampling, lease: Lease | None, space: str = "") -> Stream:
        """Queue a prompt; returns at once, also while the adapter is loading. None asks the base.

        Prompts are found in the prefix cache by requests of their own `space` only: who is told how much of a prompt
        was there would learn what others asked.

        The engine owns the lease from here on and releases it when the request ends, also where this raises.

        Raises:
            TooLong: it can never be served.
            LoricaError: an empty prompt, an id that is not in the vocabulary, an engine that is not running.
        """
        ...

    def pause(self) -> AbstractContextManager[None]:
        """No step runs for the length of the block; requests stay as they are."""
        ...

    def facts(self) -> dict[str, Any]:
        """Numbers for metrics; see `FACTS`."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it decodes, or can again: False only before `start`, after `stop`, and when it gave up."""
        ...


# The keys of `Engine.facts`. Counters only grow; the others are of the moment.
FACTS = {
    "engine": "name of the engine: bridge or plain",
    "waiting": "requests not yet in the batch, those whose adapter is loading among them",
    "loading": "requests that wait for their adapter",
    "running": "requests in the batch",
    "waiting_adapters": "names of the adapters of waiting requests",
    "running_adapters": "names of the adapters of running requests",
    "kv_blocks": "blocks of the cache",
    "kv_blocks_used": "of them held by requests",
    "steps": "counter of forward passes",
    "prompt_tokens": "counter of prompt tokens of ended requests",
    "cached_tokens": "counter of those that came from the prefix cache",
    "generated_tokens": "counter",
    "restarts": "counter of times the loop died and was built again",
}
