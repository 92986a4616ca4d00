"""The requests of an engine from `submit` to their `End`, whatever loop runs them.

A request waits for its adapter, then enters the loop; every token goes to its stream at once. It ends exactly once, and
its lease is released then. When the loop died, requests go on in the next one with what they have said so far; one that
was in the batch at several deaths is the likely cause and fails.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import psutil
import torch

from lorica.errors import LoricaError
from lorica.serve.engine import End, EngineSettings, Reason, Sampling, Stream, Token, TooLong
from lorica.serve.leases import Lease
from lorica.serve.rows import Rows
from lorica.serve.sampling import Chooser

_DEATHS = 2  # that a request may see while it is in the batch
_GIVE_UP = (5, 60.0)  # so many deaths of the loop in so many seconds


class Loop(Protocol):
    """What decodes."""

    max_context: int

    def build(self) -> None:
        """Make it, anew after it died."""

    def enter(self, request: Request) -> bool:
        """Take a request, with what it has said before; whether it did."""
        ...

    def leave(self, request: Request) -> None:
        """Drop a request, and `Requests.end` it."""


class Request:
    """One prompt and what has become of it."""

    def __init__(
        self, id: str, ids: Sequence[int], sampling: Sampling, lease: Lease | None, space: str, room: int
    ) -> None:
        self.id, self.ids, self.sampling, self.lease, self.space = id, list(ids), sampling, lease, space
        self.most = min(sampling.max_tokens, room)
        self.chooser = Chooser(sampling)
        self.ends: frozenset[int] = frozenset(sampling.stop_ids)
        self.said: list[int] = []
        self.stopped = self.cancelled = False  # an end token came; somebody called it off
        self.cached = self.deaths = 0
        self.state = "loading"
        self.rows: Rows | None = None
        self.digest = ""
        self.stream: Stream

    @property
    def left(self) -> int:
        """How many tokens it may still say."""
        return self.most - len(self.said)


def kv_bytes(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token in all layers of a text config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head * itemsize


def capacity(model: Any, settings: EngineSettings) -> tuple[int, int]:
    """Tokens that the cache of keys and values may hold, in whole pages, and those of one prompt and its answer.

    Unless the settings say, the cache takes a quarter of the free memory, and no more than can ever be used.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 17
    wanted = settings.kv_tokens
    if not wanted:
        each = kv_bytes(config, model.dtype.itemsize)
        cuda = model.device.type == "cuda"
        free = torch.cuda.mem_get_info(model.device)[0] if cuda else psutil.virtual_memory().available
        wanted = max(settings.page, min(free // 4 // each, settings.requests * context))
    tokens = -(-wanted // settings.page) * settings.page
    return tokens, min(context, tokens)


class Requests:
    """All requests that have not ended. New ones are taken while `accepting`.

    `by_id` is read by the loop without the lock.
    """

    def __init__(self, loop: Loop, vocab: int, ends: tuple[int, ...]) -> None:
        self.accepting = False
        self.by_id: dict[str, Request] = {}
        self._loop, self._vocab, self._ends = loop, vocab, ends
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._deaths: deque[float] = deque(maxlen=_GIVE_UP[0])
        self._counts = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}

    def close(self) -> None:
        """Take none any more, and end all there are."""
        with self._lock:
            self.accepting = False
        for id in list(self.by_id):
            self.end(id, "cancelled")

    def submit(self, ids: Sequence[int], sampling: Sampling, lease: Lease | None, space: str = "") -> Stream:
        """See `engine.Engine.submit`."""
        room = self._loop.max_context - len(ids)
        request = Request(f"r{next(self._numbers)}", ids, sampling, lease, space, room)
        if not sampling.ignore_eos:
            request.ends |= set(self._ends)
        request.stream = Stream(lambda: self._cancel(request))
        try:
            with self._lock:  # whoever stops taking requests, and ends those there are, sees this one or comes before
                self._check(ids)
                self.by_id[request.id] = request
        except BaseException:
            if lease:
                lease.release()
            raise
        if lease:
            lease.when_done(lambda: self._loaded(request))
        else:
            self._loaded(request)
        return request.stream

    def say(self, request: Request, token: Token | None) -> None:
        """The loop's next token of a request; None where its logits were no numbers."""
        if token is None:
            self.end(request.id, "error", "the model gave something that is not a number")
            self._loop.leave(request)
            return
        self._counts["generated_tokens"] += 1
        request.stopped = token.id in request.ends
        request.said.append(token.id)
        if not request.stopped:
            request.stream.put(token)

    def end(self, id: str, reason: Reason | None = None, error: str | None = None) -> None:
        """A request is over; where the loop only says so, why is known from its last token."""
        with self._lock:
            request = self.by_id.pop(id, None)
            if request is None:
                return
            request.state = "ended"
            self._counts["prompt_tokens"] += len(request.ids)
            self._counts["cached_tokens"] += request.cached
        reason = reason or ("stop" if request.stopped else "length")
        if request.lease:
            request.lease.release()
        request.stream.put(End(reason, request.cached, error))

    def restart(self, error: Exception) -> None:
        """The loop died: build it again and go on, but for what cannot."""
        now = time.monotonic()
        self._deaths.append(now)
        often = len(self._deaths) == _GIVE_UP[0] and now - self._deaths[0] < _GIVE_UP[1]
        if not self.accepting or often:
            with self._lock:
                self.accepting = False
            for id in list(self.by_id):
                self.end(id, "error", f"decoding failed: {error}")
            return
        with self._lock:
            for request in list(self.by_id.values()):
                request.deaths += request.state == "running"
                if request.cancelled:
                    self.end(request.id, "cancelled")
                elif request.deaths >= _DEATHS:
                    self.end(request.id, "error", f"decoding failed: {error}")
                elif request.stopped or request.left <= 0:
                    self.end(request.id)
            self._loop.build()
            for request in list(self.by_id.values()):
                if request.state != "loading":
                    self._enter(request)

    def facts(self) -> dict[str, Any]:
        """The part of `engine.FACTS` that is known here."""
        by_state: dict[str, list[str]] = {"loading": [], "waiting": [], "running": [], "ended": []}
        for request in list(self.by_id.values()):
            by_state[request.state].append(request.lease.name if request.lease else "")
        waiting = by_state["loading"] + by_state["waiting"]
        return {
            "waiting": len(waiting),
            "loading": len(by_state["loading"]),
            "running": len(by_state["running"]),
            "waiting_adapters": sorted({name for name in waiting if name}),
            "running_adapters": sorted({name for name in by_state["running"] if name}),
            **self._counts,
        }

    def _check(self, ids: Sequence[int]) -> None:
        if not self.accepting:
            raise LoricaError("this engine is not running")
        if not ids:
            raise LoricaError("the prompt is empty; it needs at least one token")
        if min(ids) < 0 or max(ids) >= self._vocab:
            raise LoricaError(f"the prompt has ids outside the vocabulary of {self._vocab:,}")
        if len(ids) >= self._loop.max_context:
            most = self._loop.max_context
            raise TooLong(f"the prompt has {len(ids):,} tokens; prompt and answer together may have {most:,}")

    def _loaded(self, request: Request) -> None:
        lease = request.lease
        if lease:
            generation = lease.generation
            if generation.error or not isinstance(generation.payload, Rows):
                self.end(request.id, "error", f"adapter {lease.name!r} cannot be loaded: {generation.error}")
                return
            request.rows, request.digest = generation.payload, generation.digest
        self._enter(request)

    def _enter(self, request: Request) -> None:
        with self._lock:
            if request.id not in self.by_id:
                return
            request.state = "waiting"
            # Where the loop is just dying it is not taken, and `restart` will come by.
            self._loop.enter(request)

    def _cancel(self, request: Request) -> None:
        with self._lock:
            request.cancelled = True
            if request.state == "loading":
                self.end(request.id, "cancelled")
            else:
                self._loop.leave(request)
