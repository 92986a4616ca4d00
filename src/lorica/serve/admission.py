"""Who begins next: what fits in memory, in fair turns, behind a queue that is never longer than was agreed.

A request is a turn for each answer it wants. A turn begins when the keys and values of its whole prompt and longest
answer fit beside those of all running ones, so that the cache can never overflow, and when the adapters of one step
stay below a number of bytes: a step reads every distinct adapter once, so its extra time is that many bytes over the
memory's bandwidth, however many requests share it.

Among those that wait, the tenant that was served least goes first: a virtual token counter, as in S-LoRA, of the tokens
of prompts and answers, those included that running turns may come to. A tenant that comes back begins at the least of
those active, so idling saves nothing up. A turn that does not fit yet is passed by others, but only so often; then all
wait for it.

Everything here runs in one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lorica.errors import LoricaError
from lorica.serve.engine import TooLong
from lorica.serve.keys import Tenant

# A turn that does not fit is passed this often at most; then all others wait for it.
_PASSES = 32
# Adapters of the first turns that wait are loaded ahead.
_AHEAD = 4


class Overloaded(LoricaError):
    """Not now. `retry_after`: seconds after which it is worth asking again."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = max(1, math.ceil(retry_after))


@dataclass(frozen=True)
class Limits:
    """What may be under way.

    Attributes:
        kv_tokens: tokens of prompts and longest answers together: the capacity of the cache of keys and values.
        running: turns at once.
        waiting: turns that wait, of all tenants.
        adapter_bytes: of the distinct adapters of running turns; one alone may be larger.
        page: the cache is given out in blocks of so many tokens.
    """

    kv_tokens: int
    running: int = 32
    waiting: int = 256
    adapter_bytes: float = math.inf
    page: int = 1


@dataclass(eq=False)
class Turn:
    """One answer that is wanted: wait for `begun`, and `end` it, whatever happens."""

    tenant: Tenant
    adapter: str | None
    tokens: int
    _admission: Admission
    _ready: asyncio.Future[None]
    passed: int = 0
    since: float = field(default_factory=time.monotonic)

    async def begun(self) -> None:
        """Wait until it may begin. Overloaded if it is pushed out of the queue."""
        await self._ready

    def end(self, used: int = 0) -> None:
        """It is over, begun or not; `used` tokens of prompt and answer. Any number of times."""
        self._admission._end(self, used)


class Admission:
    """The queue of one server.

    Args:
        limits: see `Limits`.
        nbytes: size of an adapter, by name.
        prefetch: called with names of adapters that will be wanted soon.
    """

    def __init__(
        self,
        limits: Limits,
        nbytes: Callable[[str], int] = lambda name: 0,
        prefetch: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.limits, self._nbytes, self._prefetch = limits, nbytes, prefetch
        self.running: set[Turn] = set()
        self._queues: dict[Tenant, deque[Turn]] = {}
        self._served: dict[Tenant, int] = {}
        self._due: dict[Tenant, float] = {}  # when a tenant's rate is used up to, by time.monotonic
        self._seconds = 1.0  # a turn's usual length

    @property
    def waiting(self) -> list[Turn]:
        """The turns that have not begun."""
        return [turn for queue in self._queues.values() for turn in queue]

    def enter(self, tenant: Tenant, adapter: str | None, sizes: Sequence[int]) -> list[Turn]:
        """Queue a turn for each size (tokens of the prompt and the longest answer); all or none.

        Raises:
            TooLong: one could never begin.
            Overloaded: the queue is full, or the tenant's rate is used up.
        """
        page = self.limits.page
        sizes = [-(-size // page) * page for size in sizes]
        if max(sizes) > self.limits.kv_tokens:
            raise TooLong(
                f"{max(sizes):,} tokens of prompt and answer; the cache of this server holds {self.limits.kv_tokens:,}"
            )
        if len(sizes) > self.limits.waiting:
            raise TooLong(f"{len(sizes):,} answers at once; at most {self.limits.waiting:,} may wait")
        self._take_rate(tenant)
        self._make_room(tenant, len(sizes))
        if tenant not in self._active():
            floor = min((self._served[other] for other in self._active()), default=0)
            self._served[tenant] = max(self._served.get(tenant, 0), floor)
        loop = asyncio.get_running_loop()
        turns = [Turn(tenant, adapter, size, self, loop.create_future()) for size in sizes]
        self._queues.setdefault(tenant, deque()).extend(turns)
        self._begin()
        return turns

    def _active(self) -> set[Tenant]:
        return {turn.tenant for turn in self.running} | set(self._queues)

    def _take_rate(self, tenant: Tenant) -> None:
        """Count a request against a tenant's rate: a minute's worth at once, then one every 60 / rate seconds."""
        if tenant.rate is None:
            return
        now = time.monotonic()
        due = max(self._due.get(tenant, 0.0), now) + 60 / tenant.rate
        if due - now > 60:
            raise Overloaded(f"more than {tenant.rate:g} requests a minute", due - now - 60)
        self._due[tenant] = due

    def _make_room(self, tenant: Tenant, count: int) -> None:
        """In a full queue, whoever holds most of it gives way: one tenant's flood does not shut out another."""
        lengths = Counter({each: len(queue) for each, queue in self._queues.items()})
        lengths[tenant] += count
        pushed = []
        while lengths.total() > self.limits.waiting:
            longest, length = lengths.most_common(1)[0]
            if length <= lengths[tenant]:
                raise Overloaded(
                    f"{self.limits.waiting:,} answers wait already", self._seconds * len(self.waiting) / self._slots
                )
            pushed.append(self._queues[longest][-1 - (len(self._queues[longest]) - length)])
            lengths[longest] -= 1
        for turn in pushed:
            self._leave(turn)
            if not turn._ready.done():
                turn._ready.set_exception(
                    Overloaded("others wait too, and this key has most of the queue", self._seconds)
                )

    @property
    def _slots(self) -> int:
        return max(1, len(self.running))

    def _begin(self) -> None:
        """Let begin whatever may."""
        while turn := self._next():
            self._leave(turn)
            self.running.add(turn)
            turn.since = time.monotonic()
            turn._ready.set_result(None)
        soon = dict.fromkeys(turn.adapter for turn in self._in_turn() if turn.adapter)
        for name in itertools.islice(soon, _AHEAD):
            self._prefetch(name)

    def _next(self) -> Turn | None:
        if len(self.running) >= self.limits.running:
            return None
        passed: list[Turn] = []
        room = self.limits.kv_tokens - sum(turn.tokens for turn in self.running)
        there = {name: self._nbytes(name) for turn in self.running if (name := turn.adapter)}
        for turn in self._in_turn():
            if turn._ready.done():  # called off; its task is about to end it
                continue
            if turn.tokens <= room and self._may_step(turn.adapter, there):
                for other in passed:
                    other.passed += 1
                return turn
            if turn.passed >= _PASSES:
                return None
            passed.append(turn)
        return None

    def _in_turn(self) -> Iterator[Turn]:
        """Waiting turns of tenants below their cap: those of the least served one first."""
        held = Counter(turn.tenant for turn in self.running)
        taken = Counter(self._served)
        for turn in self.running:
            taken[turn.tenant] += turn.tokens
        free = [each for each in self._queues if each.concurrency is None or held[each] < each.concurrency]
        for tenant in sorted(free, key=taken.__getitem__):
            yield from self._queues[tenant]

    def _may_step(self, adapter: str | None, there: Mapping[str, int]) -> bool:
        """Whether an adapter may be in a step beside those of running turns, given with their bytes."""
        if not there or adapter is None or adapter in there:
            return True
        return self._nbytes(adapter) + sum(there.values()) <= self.limits.adapter_bytes

    def _leave(self, turn: Turn) -> None:
        queue = self._queues[turn.tenant]
        queue.remove(turn)
        if not queue:
            del self._queues[turn.tenant]

    def _end(self, turn: Turn, used: int) -> None:
        if turn in self.running:
            self.running.remove(turn)
            self._served[turn.tenant] += used
            self._seconds += 0.1 * (time.monotonic() - turn.since - self._seconds)
        elif turn in self._queues.get(turn.tenant, ()):
            self._leave(turn)
            turn._ready.cancel()
        elif turn._ready.done() and not turn._ready.cancelled():
            turn._ready.exception()  # pushed out, and whoever asked has gone: heard
        self._begin()
