"""What all requests share: the engine, the adapters, the queue, and what a request means here."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorica import formats
from lorica.data import render_chat
from lorica.data.template import bos_ids, text_ids
from lorica.errors import LoricaError, nearest
from lorica.serve.admission import Admission, Limits
from lorica.serve.engine import Engine, Sampling
from lorica.serve.http.answers import Answer, Job
from lorica.serve.http.completions import ChatShape, TextShape
from lorica.serve.http.metrics import Metrics
from lorica.serve.http.shapes import AliasRequest, ChatRequest, LoadRequest, Refused, TextRequest, UnloadRequest
from lorica.serve.keys import Keys, Tenant
from lorica.serve.leases import Lease
from lorica.serve.places import looks
from lorica.serve.store import Status, Store, Unknown

# Of a token: more than any text has on the average, though single tokens (of spaces) may be longer.
_CHARACTERS = 32
# OpenAI's default for /v1/completions.
_TEXT_TOKENS = 16


@dataclass(frozen=True)
class ServiceSettings:
    """What a server promises.

    Attributes:
        base: the name under which the base model is served.
        root: where it came from.
        max_new: longest answer of a chat that names no length, in tokens.
        timeout: seconds that a request may take, waiting and reading included.
        body_bytes: largest body of a request.
        anybody: the tenant of all requests where there are no keys.
        max_context: longest prompt and answer together (0: what the engine takes).
    """

    base: str
    root: str = ""
    max_new: int = 1024
    timeout: float = 600.0
    body_bytes: int = 8 * 2**20
    max_context: int = 0
    anybody: Tenant = field(default_factory=lambda: Tenant("anybody", admin=True))


class Service:
    """One base model and its adapters, as the routes see it.

    Args:
        keys: who may ask; without them everybody may.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        tok: Any,
        settings: ServiceSettings,
        limits: Limits,
        *,
        keys: Keys | None = None,
    ) -> None:
        self.engine, self.store, self.tok, self.settings, self.keys = engine, store, tok, settings, keys
        self.admission = Admission(limits, nbytes=self._nbytes, prefetch=self._prefetch)
        self.metrics = Metrics(engine, store, self.admission)
        self.created = int(time.time())
        self.draining = False
        # One thread: a tokenizer does not bear two.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="lorica-encoding")
        self._template_in = functools.lru_cache(1024)(lambda folder, looks: formats.chat_template(folder))
        self._tok_with = functools.lru_cache(64)(self._with_template)

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.settings.max_context or self.engine.max_context, self.engine.max_context)

    # Who and what

    def tenant(self, authorization: str) -> Tenant:
        """Who sent this header. `Refused` (401) for nobody we know."""
        if self.keys is None:
            return self.settings.anybody
        kind, _, key = authorization.partition(" ")
        found = self.keys.tenant(key.strip()) if kind.lower() == "bearer" and key else None
        if found is None:
            what = "this API key is not known here" if key else "an API key is needed: Authorization: Bearer KEY"
            raise Refused(401, what)
        return found

    def adapter(self, tenant: Tenant, model: str) -> str | None:
        """The adapter that a `model` names, `base:adapter` too; None for the base. `Refused` (403, 404)."""
        name = model.removeprefix(f"{self.settings.base}:")
        if not tenant.may_use(name):
            raise Refused(403, f"this API key may not use the model {name!r}", param="model")
        if name == self.settings.base:
            return None
        found = None
        with contextlib.suppress(Unknown):
            found = self.store.find(name)
        if not found or found.state == "unloaded":
            known = [self.settings.base, *(each.name for each in self.store.status())]
            near = nearest(name, filter(tenant.may_use, known))
            raise Refused(404, f"the model {name!r} does not exist here{near}", param="model")
        return name

    def cards(self, tenant: Tenant) -> list[dict[str, Any]]:
        """What `tenant` may ask for, as /v1/models lists it."""
        base = [self.card(None)] if tenant.may_use(self.settings.base) else []
        there = (each for each in self.store.status() if each.state not in ("unloaded", "failed"))
        return base + [self.card(each) for each in there if tenant.may_use(each.name)]

    def card(self, status: Status | None) -> dict[str, Any]:
        """One model: an adapter or alias, or the base."""
        settings = self.settings
        return {
            "id": status.name if status else settings.base,
            "object": "model",
            "created": int(status.loaded) or self.created if status else self.created,
            "owned_by": "lorica",
            "root": (status.alias_of or status.path) if status else settings.root or settings.base,
            "parent": settings.base if status else None,
            "max_model_len": self.context,
        }

    # Answers

    async def chat(self, tenant: Tenant, asked: ChatRequest) -> Job:
        """A conversation as a job."""
        adapter = self.adapter(tenant, asked.model)
        self._bounded("messages", sum(len(message.content) for message in asked.messages))
        tok = await self._tok_of(adapter)
        if not tok.chat_template:
            raise Refused(400, "this model has no chat template: use /v1/completions", param="model")
        if asked.top_logprobs and not asked.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        messages = [
            message.model_dump(exclude_none=True) | ({"role": "system"} if message.role == "developer" else {})
            for message in asked.messages
        ]

        def encode() -> list[list[int]]:
            return text_ids([render_chat(messages, tok, add_generation_prompt=True)], tok)

        try:
            prompts = await self._in_thread(encode)
        except LoricaError as fault:
            raise Refused(400, str(fault), param="messages") from fault
        shape = ChatShape(tok, asked.model, asked.top_logprobs if asked.logprobs else None)
        longest = asked.max_completion_tokens or asked.max_tokens
        return self._job(tenant, asked, adapter, prompts, shape, self._room(prompts, longest, self.settings.max_new))

    async def text(self, tenant: Tenant, asked: TextRequest) -> Job:
        """Texts or token ids to continue as a job."""
        adapter = self.adapter(tenant, asked.model)
        if len(asked.prompt) * asked.n > (most := self.admission.limits.waiting):
            raise Refused(400, f"{len(asked.prompt):,} prompts at once; at most {most:,} may wait", param="prompt")

        for each in asked.prompt:
            if isinstance(each, str):
                self._bounded("prompt", len(each))

        def encode(text: str) -> list[int]:
            return bos_ids(self.tok) + text_ids([text], self.tok)[0]

        # One at a time, so that others come in between.
        prompts = [await self._in_thread(encode, each) if isinstance(each, str) else each for each in asked.prompt]
        shape = TextShape(self.tok, asked.model, asked.logprobs)
        return self._job(tenant, asked, adapter, prompts, shape, self._room(prompts, asked.max_tokens, _TEXT_TOKENS))

    def _bounded(self, field: str, length: int) -> None:
        """Refuse characters that cannot be few enough tokens before a tokenizer is busy with them."""
        if length > (most := _CHARACTERS * self.context):
            told = f"{length:,} characters; this model's context of {self.context:,} tokens holds {most:,} at most"
            raise Refused(400, told, param=field)

    def _room(self, prompts: Sequence[list[int]], longest: int | None, default: int) -> int:
        """Tokens that each answer may have: as many as were asked for, or by default as many as there is room for."""
        context, tokens = self.context, max(map(len, prompts))
        if not all(prompts):
            raise Refused(400, "the prompt is empty", param="prompt")
        if tokens + (longest or 1) > context:
            wanted = f" and {longest:,} for the answer" if longest else ""
            told = f"this model's context is {context:,} tokens; you asked for {tokens:,} in the prompt{wanted}"
            raise Refused(400, told, param="max_tokens" if tokens < context else "prompt")
        return longest or min(default, context - tokens, max(1, self.engine.kv_tokens - tokens))

    def _job(
        self,
        tenant: Tenant,
        asked: ChatRequest | TextRequest,
        adapter: str | None,
        prompts: Sequence[list[int]],
        shape: ChatShape | TextShape,
        room: int,
    ) -> Job:
        if not self.engine.alive:
            raise Refused(503, "the engine is not running")
        sampling = Sampling(
            max_tokens=room,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=max(0, asked.top_k),
            seed=asked.seed,
            stop_ids=tuple(asked.stop_token_ids),
            ignore_eos=asked.ignore_eos,
            logprobs=shape.logprobs,
        )
        return Job(
            tenant=tenant,
            model=asked.model,
            adapter=adapter,
            prompts=prompts,
            n=asked.n,
            sampling=sampling,
            stops=tuple(asked.stop),
            shape=shape,
            stream=asked.stream,
            include_usage=asked.stream_options.include_usage,
        )

    @contextlib.asynccontextmanager
    async def under_way(self, job: Job, told: dict[str, Any]) -> AsyncIterator[Answer]:
        """The answer to a job, counted and noted in `told` (for the log) when it is over."""
        began = time.monotonic()
        async with Answer(self, job) as answer:  # who is not let in is not counted
            try:
                yield answer
            finally:
                counts, name = answer.counts, job.adapter or self.settings.base
                told["prompt_tokens"], told["output_tokens"] = counts.prompt, counts.output
                told["ttft"] = round(counts.first - began, 4) if counts.first else None
                self.metrics.ended(name, job.tenant.name, counts, time.monotonic() - began)

    # Adapters

    async def load(self, asked: LoadRequest) -> dict[str, Any]:
        """Load a new adapter, or one of a known name again; returns its card when it can be asked."""
        name = asked.lora_name
        with contextlib.suppress(Unknown):
            there = self.store.find(name)
            if there.state in ("resident", "pinned") and not asked.load_inplace:
                raise Refused(
                    409, f"{name!r} is loaded already; give load_inplace: true to load it again", param="lora_name"
                )
        with self.store.load(name, asked.lora_path, pin=asked.pinned) as lease:
            await _read(lease)
            if error := lease.generation.error:
                raise Refused(400, f"{name!r} cannot be loaded: {error}", param="lora_path")
        return self.card(self.store.find(name))

    def unload(self, asked: UnloadRequest) -> None:
        """No new requests for it; those under way finish."""
        self.store.unload(asked.lora_name)

    def alias(self, asked: AliasRequest) -> str | None:
        """Switch or forget an alias; returns what it stood for."""
        if asked.lora_name is None:
            self.store.unalias(asked.alias)
            return None
        if asked.alias == self.settings.base:
            raise Refused(409, f"{asked.alias!r} is the base model", param="alias")
        return self.store.alias(asked.alias, asked.lora_name)

    def close(self) -> None:
        """Let go of threads."""
        self._encoding.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, call, *given)

    async def _tok_of(self, adapter: str | None) -> Any:
        """The tokenizer with the chat template that an adapter was trained through."""
        if adapter is None:
            return self.tok
        status = self.store.find(adapter)
        template, folder = status.template, Path(status.path)
        if template is None and (found := looks(folder)):
            template = self._template_in(folder, found)
        elif template is None:  # of a hub, and not here yet
            with self.store.lease(adapter) as lease:
                await _read(lease)
                template = lease.generation.template
        return self._tok_with(template)

    def _with_template(self, template: str | None) -> Any:
        if not template or template == self.tok.chat_template:
            return self.tok
        tok = copy.copy(self.tok)
        tok.chat_template = template
        return tok

    def _nbytes(self, adapter: str) -> int:
        with contextlib.suppress(Unknown):
            status = self.store.find(adapter)
            # Not in memory yet: its files are about as large.
            return status.nbytes or sum(size for _, size, _ in looks(status.path) or ())
        return 0

    def _prefetch(self, adapter: str) -> None:
        with contextlib.suppress(LoricaError):
            self.store.prefetch(adapter)


async def _read(lease: Lease) -> None:
    """Wait until a load is over, well or not."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    lease.when_done(lambda: _soon(loop, done.set))
    await done.wait()


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
