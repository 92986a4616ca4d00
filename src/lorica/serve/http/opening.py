"""From names to a server that is ready: base, adapters, engine, service."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica import formats, models
from lorica.adapter import Adapter
from lorica.errors import LoricaError, all_faults
from lorica.evaluate import stop_ids
from lorica.models.wheels import Progress
from lorica.serve import open_engine
from lorica.serve.admission import Limits
from lorica.serve.dominant import Dominant
from lorica.serve.engine import EngineSettings
from lorica.serve.http.service import Service, ServiceSettings
from lorica.serve.keys import Keys
from lorica.serve.memory import ADAPTER_SHARE
from lorica.serve.places import CONFIG, TENSORS
from lorica.serve.requests import kv_bytes
from lorica.serve.rows import Layers
from lorica.serve.store import Store


@dataclass(frozen=True)
class Thing:
    """What is served: the base as it is loaded and called, and adapters by name."""

    base: str
    name: str
    adapters: Mapping[str, Path | str]


@dataclass(frozen=True)
class Size:
    """How large a server is; 0 leaves a size to what this machine has.

    Attributes:
        kv_memory: bytes of the cache of keys and values.
        adapter_memory: bytes of adapters in memory.
        running, waiting: answers at once, and in the queue.
        adapter_share: adapters read in one step, as a share of the base's bytes.
    """

    kv_memory: int = 0
    adapter_memory: int = 0
    running: int = 32
    waiting: int = 256
    adapter_share: float = ADAPTER_SHARE


@dataclass
class Opened:
    """A server that is ready to listen, and what to say about it."""

    service: Service
    model: models.Description
    device: str
    kv_token: int
    note: str


def resolve(thing: str, named: Sequence[str], served_name: str = "") -> Thing:
    """What `MODEL NAME=PATH ...` means. MODEL may be an adapter or a run: it is served by its own name on its base.

    LoricaError with every fault of the names.
    """
    adapters: dict[str, Path | str] = {}
    faults: list[str] = []
    base = thing
    if thing not in models.BUILTIN and (folder := models.adapter_folder(thing, weights=False)):
        base = Adapter.load(folder).meta.get("base_model", "")
        if not base:
            raise LoricaError(f"the adapter {folder} names no base model: lorica serve MODEL NAME={thing}")
        adapters[Path(thing).expanduser().resolve().name] = folder
    for each in named:
        name, equals, path = each.partition("=")
        if not equals or not name or not path:
            faults.append(f"{each}: write NAME=PATH, as in sql=runs/sql")
        elif name in adapters:
            faults.append(f"{each}: there is another {name}")
        elif not Path(path).expanduser().exists():
            adapters[name] = path  # a hub id, which the store may be allowed to fetch
        elif not (folder := models.adapter_folder(path)) or not _is_peft(folder):
            faults.append(f"{each}: no adapter in PEFT's layout: lorica convert {path} --to peft -o DIR writes one")
        else:
            adapters[name] = folder
    if faults:
        raise all_faults("these adapters cannot be served:", faults)
    name = served_name or (Path(base).name if Path(base).expanduser().exists() else base)
    return Thing(base, name, adapters)


def _is_peft(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG, TENSORS))


@contextlib.contextmanager
def opened(
    thing: Thing,
    size: Size,
    settings: ServiceSettings,
    *,
    root: Path | None = None,
    hub: Sequence[str] = (),
    keys: Keys | None = None,
    merging: Callable[[str], None] | None = None,
    deterministic: bool = False,
    progress: Progress | None = None,
    **how: str,
) -> Iterator[Opened]:
    """A running engine with its adapters, until the block ends. `how`: dtype, device and quantize of `models.load`.

    With `merging`, which is told of it, the adapter that most tokens are for is merged; `deterministic`: see
    `serve.open_engine`.
    The adapters that were named are loaded first: LoricaError, with all that cannot be.
    """
    model, tok = models.load(thing.base, progress=progress, **how)
    about = models.describe(model)
    layers = Layers(model, deterministic)
    each = kv_bytes(model.config.get_text_config(), model.dtype.itemsize)
    engine_settings = EngineSettings(requests=size.running, kv_tokens=size.kv_memory // each)
    store = Store(
        layers.read,
        root,
        thing.adapters,
        limit=size.adapter_memory or None,
        hub=hub,
        reserved=[thing.name],
        template=formats.chat_template,
    )
    with contextlib.closing(store):
        engine, note = open_engine(model, layers, engine_settings, stop_ids(model, tok))
        try:
            _load(store, thing.adapters)
            # What runs at once has to fit in memory at once, else adapters in use keep others waiting for room.
            step = min(size.adapter_share * about.nbytes, size.adapter_memory or math.inf)
            limits = Limits(
                kv_tokens=engine.kv_tokens,
                running=size.running,
                waiting=size.waiting,
                adapter_bytes=step,
                page=engine_settings.page,
            )
            service = Service(engine, store, tok, settings, limits, keys=keys)
            with contextlib.ExitStack() as closing:
                closing.callback(service.close)
                if merging:
                    closing.callback(Dominant(engine, layers, store, merging).close)
                yield Opened(service, about, str(model.device), each, note)
        finally:
            engine.stop()


def _load(store: Store, adapters: Mapping[str, Path | str]) -> None:
    leases = [store.lease(name) for name in adapters]
    faults = []
    for lease in leases:
        lease.wait()
        if error := lease.generation.error:
            faults.append(f"{lease.name}: {error}")
        lease.release()
    if faults:
        raise all_faults("these adapters cannot be served:", faults)
