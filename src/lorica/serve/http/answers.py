"""One request: a task for each choice reads the engine's tokens and makes them text; the reply is whole or events.

A choice holds its turn until the engine is done with it, not until a slow reader has read it: what is not read yet
waits as text, at most as long as the answer may be. If the reader leaves, or the time is up, every choice is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from lorica.errors import LoricaError
from lorica.serve.admission import Overloaded, Turn
from lorica.serve.engine import End, Sampling, Token, TooLong
from lorica.serve.http.completions import Piece, Shape
from lorica.serve.http.shapes import Refused
from lorica.serve.keys import Tenant
from lorica.serve.store import Unknown
from lorica.serve.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from lorica.serve.http.service import Service


@dataclass
class Counts:
    """Of one request, for `usage`, the log and the metrics."""

    prompt: int = 0
    output: int = 0
    cached: int = 0
    first: float | None = None  # when its first token came, by time.monotonic
    finished: Counter[str] = field(default_factory=Counter)  # choices by why they ended

    def usage(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class Job:
    """A request as the engine needs it."""

    tenant: Tenant
    model: str
    adapter: str | None
    prompts: Sequence[list[int]]
    n: int
    sampling: Sampling
    stops: tuple[str, ...]
    shape: Shape
    stream: bool
    include_usage: bool


class Answer:
    """The choices of a request under way: pieces as they come. `async with`, so that nothing runs on."""

    def __init__(self, service: Service, job: Job) -> None:
        self._service, self._job = service, job
        self.counts = Counts(prompt=sum(map(len, job.prompts)))
        self._pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._began = time.monotonic()
        self._name = job.adapter or service.settings.base
        self._next_token = service.metrics.between_tokens(self._name)

    async def __aenter__(self) -> Answer:
        job = self._job
        sizes = [len(ids) + job.sampling.max_tokens for ids in job.prompts for _ in range(job.n)]
        turns = self._service.admission.enter(job.tenant, job.adapter, sizes)
        self._tasks = [asyncio.create_task(self._run(choice, turn)) for choice, turn in enumerate(turns)]
        return self

    async def __aexit__(self, *_: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces until every choice has finished; what came in the meantime is joined. Raises what a choice raised."""
        left = len(self._tasks)
        while left:
            joined: dict[int, Piece] = {}
            came = [await self._pieces.get()]
            while not self._pieces.empty():
                came.append(self._pieces.get_nowait())
            for piece in came:
                if isinstance(piece, BaseException):
                    raise piece
                joined.setdefault(piece.choice, Piece(piece.choice)).join(piece)
            for piece in joined.values():
                if piece.finish:
                    self.counts.finished[piece.finish] += 1
                    left -= 1
                yield piece

    async def _run(self, choice: int, turn: Turn) -> None:
        used = 0
        try:
            await turn.begun()
            used = len(self._job.prompts[choice // self._job.n])
            async for piece in self._read(choice):
                used += len(piece.tokens)
                self._pieces.put_nowait(piece)
        except Exception as fault:
            self._pieces.put_nowait(fault)
        finally:
            turn.end(used)

    async def _read(self, choice: int) -> AsyncIterator[Piece]:
        job, service = self._job, self._service
        ids = job.prompts[choice // job.n]
        sampling = job.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + choice % job.n)
        lease = service.store.lease(job.adapter) if job.adapter else None
        stream = service.engine.submit(ids, sampling, lease, job.tenant.name)
        try:
            writing = _Writing(Detokenizer(service.tok, ids), StopStrings(job.stops), choice)
            last = None
            async for item in stream:
                if isinstance(item, End):
                    self.counts.cached += item.cached_tokens
                    yield writing.finish(_reason(item, writing.stopped))
                elif not writing.stopped:
                    self.counts.output += 1
                    last = self._heard(last)
                    if piece := writing.add(item):
                        yield piece
                    if writing.stopped:
                        stream.cancel()
        finally:
            stream.cancel()

    def _heard(self, last: float | None) -> float:
        """A token has come: when, for the metrics."""
        now = time.monotonic()
        if self.counts.first is None:
            self.counts.first = now
            self._service.metrics.first_token(self._name, now - self._began)
        elif last is not None:
            self._next_token(now - last)
        return now


class _Writing:
    """Tokens of one choice -> pieces. A token is shown once its text is."""

    def __init__(self, words: Detokenizer, stops: StopStrings, choice: int) -> None:
        self._words, self._stops, self._choice = words, stops, choice
        self._tokens: list[tuple[Token, int]] = []
        self._length = self._shown = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.found

    def add(self, token: Token) -> Piece | None:
        """The text that `token` makes certain, if any."""
        self._tokens.append((token, self._length))
        text = self._words.add(token.id)
        self._length += len(text)
        shown = self._stops.add(text)
        return self._piece(shown) if shown else None

    def finish(self, reason: str) -> Piece:
        """What was held back, and why it ended."""
        rest = ""
        if not self.stopped:
            rest = self._stops.add(self._words.end())
            rest += "" if self.stopped else self._stops.end()
        piece = self._piece(rest, all_tokens=not self.stopped)
        piece.finish = "stop" if self.stopped else reason
        return piece

    def _piece(self, text: str, all_tokens: bool = False) -> Piece:
        self._shown += len(text)
        count = len(self._tokens) if all_tokens else sum(start < self._shown for _, start in self._tokens)
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        return Piece(self._choice, text, tokens)


def _reason(end: End, stopped: bool) -> str:
    if end.reason == "error":
        raise Refused(500, end.error or "the engine failed")
    if end.reason == "cancelled" and not stopped:
        raise Refused(503, "the server is stopping")
    return "length" if end.reason == "length" else "stop"


class Reply:
    """The response to a job: an ASGI application of one request."""

    def __init__(self, service: Service, job: Job) -> None:
        self._service, self._job = service, job
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or why there is none. Ends early when the client leaves."""
        work = asyncio.create_task(self._work(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                scope["state"]["told"]["status"] = 499  # nginx's number for a client that has left
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled() and (fault := work.exception()):
            raise fault

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._service.settings.timeout):
                async with self._service.under_way(self._job, scope["state"]["told"]) as answer:
                    await (self._events if self._job.stream else self._whole)(answer, scope, receive, send)
        except Exception as fault:
            refused = refusal(fault)
            scope["state"]["told"]["status"] = refused.status
            if not self._begun:
                await refused_response(refused)(scope, receive, send)
            elif self._job.stream:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):  # one who does not read would keep us
                        await _event(send, json.dumps(refused.body))
                        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
        job = self._job
        whole: dict[int, Piece] = {}
        async for piece in answer.pieces():
            whole.setdefault(piece.choice, Piece(piece.choice)).join(piece)
        choices = [job.shape.choice(whole[choice]) for choice in sorted(whole)]
        body = job.shape.envelope.whole(choices, answer.counts.usage())
        self._begun = True
        await JSONResponse(body)(scope, receive, send)

    async def _events(self, answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
        shape, with_usage, named = self._job.shape, self._job.include_usage, set[int]()
        async for piece in answer.pieces():
            if not self._begun:
                await _start_events(send)
                self._begun = True
            if piece.choice not in named:
                named.add(piece.choice)
                if opening := shape.opening(piece.choice):
                    await _event(send, shape.envelope.event([opening], with_usage))
            await _event(send, shape.envelope.event([shape.delta(piece)], with_usage))
        if with_usage:
            await _event(send, shape.envelope.event([], True, answer.counts.usage()))
        await _event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _start_events(send: Send) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would collect events
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _event(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def refusal(fault: Exception) -> Refused:
    """What a fault is to the one who asked. What is nobody's fault but ours is raised on."""
    match fault:
        case Refused():
            return fault
        case Overloaded():
            return Refused(429, str(fault), retry_after=fault.retry_after)
        case TooLong():
            return Refused(400, str(fault), param="max_tokens")
        case Unknown():
            return Refused(404, str(fault), param="model")
        case LoricaError():
            return Refused(400, str(fault))
        case TimeoutError():
            return Refused(504, "the answer took longer than this server allows")
    raise fault


def refused_response(refused: Refused) -> JSONResponse:
    """An error as a response."""
    headers = {} if refused.retry_after is None else {"retry-after": str(refused.retry_after)}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(refused.body, refused.status, headers=headers)
