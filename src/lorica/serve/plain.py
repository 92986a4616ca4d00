"""A small engine for what the bridge cannot serve: other layer types, other versions of transformers.

Requests take turns, a token at a time, each with a cache of its own. Exact, with the same adapters, sampling and
streams; slower, since nothing is batched.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from lorica.serve.engine import EngineSettings, Sampling, Stream
from lorica.serve.leases import Lease
from lorica.serve.requests import Request, Requests, capacity
from lorica.serve.rows import Layers
from lorica.serve.sampling import choose


class Plain:
    """An `engine.Engine` that runs one request at a time; arguments as of `bridge.Bridge`."""

    def __init__(
        self, model: Any, layers: Layers, settings: EngineSettings | None = None, ends: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.layers = layers
        self.settings = settings or EngineSettings()
        self.kv_tokens, self.max_context = capacity(model, self.settings)
        self.requests = Requests(self, self.model.config.get_text_config().vocab_size, tuple(ends))
        self.steps = 0
        self._keeps: bool = self.model._supports_logits_to_keep()
        self._active: dict[str, tuple[Request, DynamicCache]] = {}
        self._queue: deque[Request] = deque()
        self._wake, self._turn = threading.Event(), threading.Lock()
        self._undo = contextlib.ExitStack()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """See `engine.Engine`."""
        self._undo.enter_context(self.layers.attached())
        self._undo.callback(self.layers.idle)
        self.requests.accepting = True
        self.build()

    def stop(self) -> None:
        """See `engine.Engine`."""
        self.requests.accepting = False
        self._wake.set()
        if self._thread:
            self._thread.join()
        self.requests.close()
        self._undo.close()

    def submit(self, ids: Sequence[int], sampling: Sampling, lease: Lease | None, space: str = "") -> Stream:
        """See `engine.Engine`."""
        return self.requests.submit(ids, sampling, lease, space)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """See `engine.Engine`."""
        with self._turn:
            yield

    @property
    def alive(self) -> bool:
        """See `engine.Engine`."""
        return self.requests.accepting

    def facts(self) -> dict[str, Any]:
        """See `engine.FACTS`."""
        page = self.settings.page
        held = sum(-(-(len(request.ids) + len(request.said)) // page) for request, _ in list(self._active.values()))
        counted = {"kv_blocks": self.kv_tokens // page, "kv_blocks_used": held, "steps": self.steps, "restarts": 0}
        return {"engine": "plain", **counted, **self.requests.facts()}

    def build(self) -> None:
        """Begin to take turns."""
        self._active.clear()
        self._thread = threading.Thread(target=self._work, name="lorica-plain", daemon=True)
        self._thread.start()

    def enter(self, request: Request) -> bool:
        """Queue a request."""
        self._queue.append(request)
        self._wake.set()
        return True

    def leave(self, request: Request) -> None:
        """Have it dropped at its next turn."""
        request.cancelled = True
        self._wake.set()

    def _work(self) -> None:
        while self.requests.accepting:
            while self._queue and self._room(self._queue[0]):
                request = self._queue.popleft()
                request.state = "running"
                self._active[request.id] = (request, DynamicCache(config=self.model.config))
            if not self._active:
                self._wake.wait(0.1)
                self._wake.clear()
            for request, cache in list(self._active.values()):
                with self._turn:
                    self._step(request, cache)
                if request.id not in self.requests.by_id:
                    del self._active[request.id]

    def _room(self, request: Request) -> bool:
        held = sum(len(each.ids) + each.most for each, _ in self._active.values())
        return len(self._active) < self.settings.requests and held + len(request.ids) + request.most <= self.kv_tokens

    @torch.no_grad()
    def _step(self, request: Request, cache: DynamicCache) -> None:
        if request.cancelled:
            self.requests.end(request.id, "cancelled")
            return
        try:
            ids = request.said[-1:] or request.ids
            parts = [(request.rows, len(ids))]
            self.layers.count(parts)
            self.layers.work = self.layers.plan(parts, [True] if self._keeps else None).work
            options = {"logits_to_keep": 1} if self._keeps else {}
            given = torch.tensor([ids], device=self.model.device)
            logits = self.model(input_ids=given, past_key_values=cache, use_cache=True, **options).logits[0, -1:]
            self.steps += 1
            self.requests.say(request, choose(logits.float(), [request.chooser])[0])
        except Exception as fault:  # a request that the model cannot run must not stop the others
            self.requests.end(request.id, "error", f"{type(fault).__name__}: {fault}")
        if request.stopped or request.left <= 0:
            self.requests.end(request.id)
