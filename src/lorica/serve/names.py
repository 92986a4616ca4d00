"""What a name of a store stands for: the files of an adapter and its generations, or another name."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lorica.serve.leases import Generation, State, Status
from lorica.serve.places import Looks, Place, looks

_AGAIN = 30.0  # seconds after which a hub is asked again for what it did not give


@dataclass(eq=False)
class Entry:
    """An adapter. `State` is of the moment; under the store's lock."""

    place: Place
    proven: Place | None = None  # where a load succeeded last
    current: Generation | None = None  # what leases get; still loading where there was nothing before
    coming: Generation | None = None  # takes the place of `current` once it is loaded
    pinned: bool = False
    unloaded: bool = False
    seen: Looks | None = None  # what its files looked like when they were last read
    error: str | None = None
    failed: float = 0.0  # when, by time.monotonic

    @property
    def hopeless(self) -> bool:
        """Whether the last load failed, and another one now would too."""
        if self.error is None:
            return False
        if isinstance(self.place.path, str):
            return time.monotonic() - self.failed < _AGAIN
        return self.seen == looks(self.place.path)

    def loaded(self, generation: Generation, seen: Looks | None) -> None:
        """The load of `coming` is over, well or not."""
        self.coming, self.error = None, generation.error
        if generation.payload:
            self.proven, self.seen = self.place, seen
            if self.current and self.current is not generation:
                self.current.retired = True
            self.current = generation
            return
        if self.current is generation:
            self.current = None
        if self.proven in (None, self.place):
            self.failed, self.seen = time.monotonic(), seen
        else:
            self.place = self.proven  # what was served before is still found where it came from

    def retire(self) -> None:
        """No new leases of what there is."""
        for generation in (self.current, self.coming):
            if generation:
                generation.retired = True
        self.current = self.coming = None

    def status(self, name: str, leases: int, kept: Generation | None = None) -> Status:
        """Of what leases get now, or of a generation that an alias keeps."""
        now = kept or self.current or Generation(name)
        state: State = "failed" if self.error else "on disk"
        if kept:
            state = "pinned"
        elif self.unloaded:
            state = "unloaded"
        elif now.payload:
            state = "pinned" if self.pinned else "resident"
        elif self.current:
            state = "loading"
        return Status(
            name,
            state,
            str(self.place.path),
            digest=now.digest,
            nbytes=now.payload.nbytes if now.payload else 0,
            rank=now.payload.rank if now.payload else 0,
            leases=leases,
            used=now.used,
            loaded=now.loaded,
            load_seconds=now.seconds,
            error=self.error,
            template=now.template,
        )


@dataclass(frozen=True)
class Alias:
    """Another name for an adapter, or for one generation of it, which it keeps in memory."""

    name: str
    generation: Generation | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.generation.digest}" if self.generation else self.name


def nowhere() -> Entry:
    """For a generation that is kept though its files have gone."""
    return Entry(Place(Path(), False))
