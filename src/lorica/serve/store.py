"""Adapters on disk, loaded when asked for and evicted by bytes.

Every load of a name is a `Generation`, named by the sha256 of its files and never changed afterwards. A request holds
a `Lease` of one until it ends, so that a reload, an unload or an eviction cannot touch it: the next lease gets the new
generation, the old one is freed when its last lease is released.

One thread reads files; nobody else waits for a disk. Several processes may watch one folder.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lorica.errors import LoricaError, nearest
from lorica.serve.leases import Generation, Lease, Payload, Status, Unknown
from lorica.serve.names import Alias, Entry, nowhere
from lorica.serve.places import TENSORS, Looks, Places, digest, looks

_log = logging.getLogger(__name__)


class Store:
    """All adapters of one server.

    Args:
        read: turns a folder into a `Payload`, on the loading thread; raises `LoricaError`.
        root: the folder to watch, ``<root>/<name>/`` in vLLM's resolver layout.
        named: other adapters, ``{name: folder or hub id}``.
        limit: bytes of payloads in memory, leased ones included (None: no limit).
        hub: patterns of hub ids that may be downloaded (``["acme/*"]``); none by default.
        reserved: names that no adapter may have, such as the base model's.
        template: the chat template that a folder of an adapter carries.
        every: seconds between two looks at the files.
    """

    def __init__(
        self,
        read: Callable[[Path], Payload],
        root: Path | None = None,
        named: Mapping[str, str | Path] | None = None,
        *,
        limit: int | None = None,
        hub: Iterable[str] = (),
        reserved: Iterable[str] = (),
        template: Callable[[Path], str] | None = None,
        every: float = 2.0,
    ) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.loads = self.evictions = 0  # counters, for metrics
        self._read, self._limit, self._every, self._template = read, limit, every, template
        self._places = Places(root, hub, reserved)
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, Alias] = {}
        self._alive: list[Generation] = []  # loading or in memory
        self._leases: Counter[str] = Counter()  # of all generations of a name
        self._jobs: deque[tuple[Entry, Generation]] = deque()
        self._nbytes, self._closed = 0, False
        for name, given in (named or {}).items():
            self._places.check(name)
            self._entries[name] = Entry(self._places.place(given, trusted=True))
        self.scan()
        self._thread = threading.Thread(target=self._work, name="lorica-adapters", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading and watching."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self._thread.join()

    # Requests

    def lease(self, name: str) -> Lease:
        """A lease of what a name stands for now; its loading begins if it has to. Never waits.

        Raises:
            Unknown: no adapter has this name, or it was unloaded.
            LoricaError: its files, unchanged since, could not be loaded.
        """
        with self.changed:
            alias = self._aliases.get(name)
            if alias and alias.generation:
                return self._leased(alias.generation)
            return self._leased(self._wanted(alias.name if alias else name))

    def holding(self, payload: Payload) -> Lease | None:
        """A lease on the generation with this payload; None where it has gone, or is on its way."""
        with self.changed:
            found = [each for each in self._alive if each.payload is payload and not each.retired]
            return self._leased(found[0]) if found else None

    def prefetch(self, name: str) -> None:
        """Begin to load what will be asked for soon."""
        with self.changed:
            self._wanted(name)

    # The operator

    def load(self, name: str, given: str | Path | None = None, *, pin: bool = False) -> Lease:
        """Add a name, or read its files again; the lease is of the new generation. Running requests keep the old one.

        Args:
            given: a folder inside the root, or a hub id that is allowed; None where the name is known.
        """
        with self.changed:
            if given is not None:
                self._places.check(name)
                if name in self._aliases:
                    raise LoricaError(f"{name!r} is an alias of {self._aliases[name]}")
                place = self._places.place(given, trusted=False)
                entry = self._entries.setdefault(name, Entry(place))
                if entry.place != place and entry.coming:  # it is reading other files
                    entry.coming.retired = True
                    if entry.current is entry.coming:
                        entry.current = None
                    entry.coming = None
                entry.place = place
            entry = self._entry(name)
            entry.unloaded, entry.pinned = False, entry.pinned or pin
            return self._leased(self._begin(name, entry))

    def unload(self, name: str) -> None:
        """No new leases; the memory is freed when the last one is released. `load` brings it back."""
        with self.changed:
            entry = self._entry(name)
            entry.unloaded, entry.pinned = True, False
            entry.retire()
            self._fits()
            self.changed.notify_all()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep a name in memory, loading it where needed; or no longer."""
        with self.changed:
            self._entry(name).pinned = pinned
            if pinned:
                self._wanted(name)
            self._fits()
            self.changed.notify_all()

    def alias(self, alias: str, to: str) -> str | None:
        """Let `alias` stand for an adapter, or for one generation of it (``name@3fa9...``), which it keeps in memory.

        The next lease follows it. Returns what it stood for before, in the same form; giving that switches back.
        """
        with self.changed:
            self._places.check(alias)
            if alias in self._entries:
                raise LoricaError(f"{alias!r} is an adapter's own name, so it cannot be an alias")
            name, _, begins = to.partition("@")
            self._entry(name)
            generation = self._generation(name, begins) if begins else None
            if generation:
                self._taken(generation)
            before = self._aliases.get(alias)
            self._aliases[alias] = Alias(name, generation)
            if before and before.generation:
                self._released(before.generation)
            return str(before) if before else None

    def unalias(self, alias: str) -> None:
        """Forget an alias."""
        with self.changed:
            if alias not in self._aliases:
                raise Unknown(f"there is no alias {alias!r}{nearest(alias, self._aliases)}")
            if generation := self._aliases.pop(alias).generation:
                self._released(generation)

    # What is there

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads in memory."""
        return self._nbytes

    def find(self, name: str) -> Status:
        """What a name or alias stands for now. `Unknown` where it is neither."""
        with self.changed:
            if not (to := self._aliases.get(name)):
                return self._entry(name).status(name, self._leases[name])
            entry = self._entries.get(to.name)
            if entry is None and to.generation is None:
                return Status(name, "unloaded", "", alias_of=str(to))
            meant = (entry or nowhere()).status(to.name, self._leases[to.name], to.generation)
            return replace(meant, name=name, alias_of=str(to))

    def status(self) -> list[Status]:
        """Every name and alias, sorted."""
        with self.changed:
            return [self.find(name) for name in sorted([*self._entries, *self._aliases])]

    def scan(self) -> None:
        """Look at the files: new names appear, those that are gone get no new leases, changed ones are read again."""
        for name in self._places.names():
            if name not in self._entries and name not in self._aliases and (place := self._places.find(name)):
                with self.changed:
                    self._entries.setdefault(name, Entry(place))
        for name, entry in list(self._entries.items()):
            now = looks(entry.place.path)
            with self.changed:
                if now is None and not entry.place.trusted and isinstance(entry.place.path, Path):
                    self._entries.pop(name, entry).retire()
                elif now and now != entry.seen and entry.current and entry.current.payload:
                    self._begin(name, entry)
        with self.changed:
            self._fits()

    # Under the lock

    def _entry(self, name: str) -> Entry:
        if name not in self._entries and (place := self._places.find(name)):  # come since the last look
            self._entries[name] = Entry(place)
        if name not in self._entries:
            raise Unknown(f"there is no adapter {name!r}{nearest(name, [*self._entries, *self._aliases])}")
        return self._entries[name]

    def _wanted(self, name: str) -> Generation:
        """What the name stands for, beginning to load it where that is nothing."""
        entry = self._entry(name)
        if entry.unloaded:
            raise Unknown(f"adapter {name!r} was unloaded; it has to be loaded before it can be asked")
        if entry.current is None and entry.hopeless:
            raise LoricaError(f"adapter {name!r} cannot be loaded: {entry.error}")
        return entry.current or self._begin(name, entry)

    def _begin(self, name: str, entry: Entry) -> Generation:
        if entry.coming is None:
            entry.coming = Generation(name)
            entry.current = entry.current or entry.coming
            self._alive.append(entry.coming)
            self._jobs.append((entry, entry.coming))
            self.changed.notify_all()
        return entry.coming

    def _taken(self, generation: Generation) -> None:
        generation.leases += 1
        self._leases[generation.name] += 1

    def _leased(self, generation: Generation) -> Lease:
        self._taken(generation)
        generation.used = time.time()
        return Lease(generation, self.changed, self._released)

    def _released(self, generation: Generation) -> None:
        generation.leases -= 1
        self._leases[generation.name] -= 1
        if not generation.leases:
            self._fits()
            self.changed.notify_all()

    def _generation(self, name: str, begins: str) -> Generation:
        found = {each.digest: each for each in self._alive if each.name == name and each.payload}
        fitting = [each for digest, each in found.items() if digest.startswith(begins)]
        if len(fitting) != 1:
            raise Unknown(f"{len(fitting)} generations of {name!r} in memory begin with {begins!r}: {', '.join(found)}")
        return fitting[0]

    def _room(self, need: int) -> bool:
        """Whether `need` fits, others evicted; LoricaError where only an operator could make it fit."""
        held = {entry.current for entry in self._entries.values() if entry.pinned and entry.current}
        held |= {alias.generation for alias in self._aliases.values() if alias.generation}
        kept = sum(each.payload.nbytes for each in held if each.payload)
        if self._limit is not None and need + kept > self._limit:
            raise LoricaError(f"its {need} bytes do not fit beside the {kept} that are pinned, of {self._limit}")
        return self._fits(need)

    def _fits(self, need: int = 0) -> bool:
        """Free what is retired and free of leases, then the least recently used until `need` fits; whether it does."""
        for each in [each for each in self._alive if each.retired and each.done and not each.leases]:
            self._free(each)
        if self._limit is None or self._nbytes + need <= self._limit:
            return True
        idle = [
            (max(entry.current.used, entry.current.loaded), place, entry)  # loaded ahead is as good as used
            for place, entry in enumerate(self._entries.values())
            if entry.current and entry.current.payload and not entry.current.leases and not entry.pinned
        ]
        for _, _, entry in sorted(idle, key=lambda each: each[:2]):
            if self._nbytes + need <= self._limit:
                break
            assert entry.current
            self._free(entry.current)
            entry.current = None
            self.evictions += 1
        return self._nbytes + need <= self._limit

    def _free(self, generation: Generation) -> None:
        self._alive.remove(generation)
        if generation.payload:
            self._nbytes -= generation.payload.nbytes
            generation.payload = None

    # The loading thread

    def _work(self) -> None:
        look = time.monotonic() + self._every
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._jobs or self._closed, max(0.0, look - time.monotonic()))
                if self._closed:
                    return
                job = self._jobs.popleft() if self._jobs else None
            if job:
                self._run(*job)
            if time.monotonic() >= look:
                with contextlib.suppress(OSError):  # the root may be away for a moment, as on a network disk
                    self.scan()
                look = time.monotonic() + self._every

    def _run(self, entry: Entry, generation: Generation) -> None:
        began = time.monotonic()
        error, seen = None, looks(entry.place.path)
        payload: Payload | None = None
        try:
            seen, generation.digest, payload, generation.template = self._files(self._places.fetch(entry.place))
        except Exception as fault:  # one bad file must not end the thread that loads all others
            error = str(fault) if isinstance(fault, LoricaError) else f"{type(fault).__name__}: {fault}"
        with self.changed:
            generation.loaded, generation.seconds = time.time(), time.monotonic() - began
            generation.payload, generation.error = payload, error
            if payload:
                self._nbytes += payload.nbytes
                self.loads += 1
            else:
                self._alive.remove(generation)
            if entry.coming is generation:
                entry.loaded(generation, seen)
            self._fits()
            self.changed.notify_all()
            calls, generation.waiting = generation.waiting, []
        for call in calls:
            try:
                call()
            except Exception:  # nor may one who waited
                _log.exception("what followed the load of %s failed", generation.name)

    def _files(self, folder: Path) -> tuple[Looks, str, Payload, str | None]:
        """What the files looked like, their digest, payload and template, all of one moment; waits for room."""
        for _ in range(5):
            if (seen := looks(folder)) is None:
                raise LoricaError(f"the files of {folder} went away")
            size = (folder / TENSORS).stat().st_size
            with self.changed:
                if self._limit is not None and size > self._limit:
                    raise LoricaError(f"its {size} bytes are more than the {self._limit} that adapters may take")
                self.changed.wait_for(lambda size=size: self._room(size) or self._closed)  # type: ignore[misc]
            named, payload = digest(folder), self._read(folder)
            template = self._template(folder) if self._template else None
            if looks(folder) == seen:
                return seen, named, payload, template
        raise LoricaError(f"{folder} keeps changing while it is read")
