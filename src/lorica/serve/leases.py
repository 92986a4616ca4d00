"""One load of one adapter, the right to use it, and what there is to say of a name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lorica.errors import LoricaError

State = Literal["on disk", "loading", "resident", "pinned", "unloaded", "failed"]


class Unknown(LoricaError):
    """No adapter has this name."""


class Payload(Protocol):
    """What a load makes of the files."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        ...

    @property
    def rank(self) -> int:
        """The largest rank."""
        ...


@dataclass(eq=False)
class Generation:
    """One load of one adapter. Without `payload` and `error` it is still loading.

    Attributes:
        digest: sha256 of the files, in hex; empty until they are read.
        leases: how many are out.
        used, loaded: seconds since 1970, of the last lease and of the end of the load, which took `seconds`.
        retired: no longer what its name stands for.
        template: the chat template that its files carry, empty for none; None where nobody has looked.
    """

    name: str
    digest: str = ""
    payload: Payload | None = None
    error: str | None = None
    leases: int = 0
    used: float = 0.0
    loaded: float = 0.0
    seconds: float = 0.0
    retired: bool = False
    template: str | None = None
    waiting: list[Callable[[], None]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the load is over, well or not."""
        return self.payload is not None or self.error is not None


class Lease:
    """The right to use one generation until `release`; also a context manager."""

    def __init__(
        self, generation: Generation, changed: threading.Condition, released: Callable[[Generation], None]
    ) -> None:
        self.generation, self._changed, self._released, self._held = generation, changed, released, True

    @property
    def name(self) -> str:
        """The adapter's own name, also where it was asked for by an alias."""
        return self.generation.name

    def when_done(self, call: Callable[[], None]) -> None:
        """Call back when the load is over: now if it is, else once from the loading thread."""
        with self._changed:
            if not self.generation.done:
                self.generation.waiting.append(call)
                return
        call()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the load is over; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.generation.done, timeout)

    def release(self) -> None:
        """Give it back; any number of times."""
        with self._changed:
            if self._held:
                self._held = False
                self._released(self.generation)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_) -> None:
        self.release()


@dataclass(frozen=True)
class Status:
    """One name, for lists and metrics. Times are seconds since 1970, 0 where it has not happened."""

    name: str
    state: State
    path: str
    digest: str = ""
    nbytes: int = 0
    rank: int = 0
    leases: int = 0  # of all its generations
    used: float = 0.0
    loaded: float = 0.0
    load_seconds: float = 0.0
    error: str | None = None  # of the last load
    alias_of: str | None = None
    template: str | None = None  # of what is in memory
