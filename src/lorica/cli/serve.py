"""`lorica serve MODEL a=path b=path`: OpenAI's API over one base and many adapters."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lorica.cli.parse import Common, WrongUse

if TYPE_CHECKING:
    from lorica.serve.http.opening import Opened, Thing

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(kw_only=True)
class Settings(Common):
    """Serve MODEL and adapters, each under its name, through OpenAI's API. The first Ctrl-C (or SIGTERM) lets running
    requests finish; the second ends at once. docs/serving.md says more."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A built-in alias, a hub id, a folder or a .gguf file; or an adapter or a run, which is served on its base."""
    named: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME=PATH")] = ()
    """Adapters: a folder in PEFT's layout or a run, and the name to ask for."""
    adapters: str = ""
    """A folder of adapters, DIR/NAME/, which is watched: what appears is served, what changes is read again."""
    host: str = "127.0.0.1"
    """Where to listen. Beyond this machine it takes --keys, or --open."""
    port: int = 8000
    """0 takes a free one."""
    served_name: str = ""
    """What to call the base. Default: MODEL as given, of a folder its last part."""
    keys: str = ""
    """A TOML file of API keys: who may use which models, how much, and who may load adapters."""
    open: bool = False
    """Listen beyond this machine without keys. Nobody may load or unload adapters then."""
    hub: tuple[str, ...] = ()
    """Patterns of hub ids that may be fetched as adapters: acme/*."""
    max_context: int = 0
    """Longest prompt and answer together in tokens. Default: the model's."""
    max_new: int = 1024
    """Longest answer of a chat that names no length, in tokens."""
    kv_memory: str = ""
    """Memory for keys and values: 4GB. Default: a quarter of what is free. Off a GPU, those of running answers may take
    half as much again."""
    adapter_memory: str = ""
    """Memory for adapters: 2GB; those used least lately give way. Default: no limit."""
    adapter_share: float = 0.2
    """Adapters in one step, as a share of the base's bytes: about the share of time that they add."""
    merge_dominant: bool = False
    """Merge the adapter that most tokens are for into a second copy of the weights that it changes, while it is so.
    Its tokens cost what the base's do then, those of others somewhat more. Answers stay the same within rounding."""
    deterministic: bool = False
    """Compute every request by itself: the same prompt, adapter, settings and seed give the same bits, whatever else is
    asked. Slower, since nothing is batched."""
    concurrency: int = 32
    """Answers at once; keys may have limits of their own."""
    max_waiting: int = 256
    """Answers that wait; beyond, requests get 429 and are told when to come again."""
    timeout: float = 600.0
    """Seconds that a request may take in all."""
    drain: float = 30.0
    """Seconds that running requests have after the first signal."""
    log: str = ""
    """Add the access log, a line of JSON for each request, to this file. Default: stderr."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the base: auto is bf16 where the device computes it natively, else fp32."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """How the base's linear layers are kept."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


def run(settings: Settings) -> int:
    """Serve until a signal."""
    from lorica.cli.terminal import progress
    from lorica.serve.http import opening, server
    from lorica.serve.http.routes import app
    from lorica.serve.http.service import ServiceSettings
    from lorica.serve.keys import Keys, Tenant

    size = _size(settings)
    _check(settings)
    keys = Keys.read(settings.keys) if settings.keys else None
    thing = opening.resolve(settings.model, settings.named, settings.served_name)
    promised = ServiceSettings(
        thing.name,
        root=thing.base,
        max_new=settings.max_new,
        timeout=settings.timeout,
        max_context=settings.max_context,
        anybody=Tenant("anybody", admin=server.is_local(settings.host)),
    )
    with server.listen(settings.host, settings.port) as sock, _lines(settings) as line:
        with progress(settings.quiet or settings.json) as tell:
            how = {"dtype": settings.dtype, "device": settings.device, "quantize": settings.quantize}
            root = Path(settings.adapters).expanduser() if settings.adapters else None
            merging = _merging(line) if settings.merge_dominant else None
            opened = opening.opened(
                thing,
                size,
                promised,
                root=root,
                hub=settings.hub,
                keys=keys,
                merging=merging,
                deterministic=settings.deterministic,
                progress=tell,
                **how,
            )
            with opened as ready:
                host = f"[{settings.host}]" if ":" in settings.host else settings.host
                url = f"http://{host}:{sock.getsockname()[1]}/v1"
                return server.run(
                    app(ready.service, line),
                    ready.service,
                    sock,
                    drain=settings.drain,
                    ready=lambda: _say(settings, ready, thing, url),
                )


def plan(settings: Settings) -> None:
    """The memory that `run` would take, from shapes; nothing is loaded."""
    from lorica import models
    from lorica.cli.terminal import say, size
    from lorica.models.machine import DTYPES
    from lorica.plan import config_of
    from lorica.serve import memory
    from lorica.serve.http import opening

    _check(settings)
    thing = opening.resolve(settings.model, settings.named, settings.served_name)
    kind = models.resolve_dtype(settings.dtype, settings.device)
    dtype = next(name for name, dtype in DTYPES.items() if dtype == kind)
    there = {name: Path(path) for name, path in thing.adapters.items()}
    if settings.adapters:
        there |= {
            path.parent.name: path.parent for path in sorted(Path(settings.adapters).glob("*/adapter_config.json"))
        }
    sizes = _size(settings)
    found = memory.predict(config_of(thing.base), dtype, settings.quantize, sizes.kv_memory, there)
    say(f"{'base':<10}{thing.name}   {size(found.weights)} in {dtype}")
    holds = f"{found.kv_tokens:,} tokens in {size(sizes.kv_memory)}" if found.kv_tokens else "a quarter of what is free"
    say(f"{'kv':<10}{size(found.kv_token)} a token; {holds}")
    for name, nbytes in found.adapters.items():
        say(f"{'adapter':<10}{name}   {size(nbytes)}   {nbytes / found.weights:.2%} of the base")
    if kept := memory.kept(sizes.kv_memory, models.resolve_device(settings.device)):
        say(f"{'copies':<10}up to {size(kept)} for those of running answers")
    total = found.weights + sizes.kv_memory + kept + sum(found.adapters.values())
    say(f"{'in all':<10}{size(total)}{'' if sizes.kv_memory else ' and keys and values'}")


def _check(settings: Settings) -> None:
    """What cannot be meant."""
    from lorica.serve.http import server

    faults = [
        f"--{name.replace('_', '-')} must be {least} or more"
        for name, least in (("port", 0), ("max_new", 1), ("concurrency", 1), ("max_waiting", 1), ("drain", 0))
        if getattr(settings, name) < least
    ]
    if settings.timeout <= 0 or settings.adapter_share <= 0:
        faults.append("--timeout and --adapter-share must be above 0")
    if settings.merge_dominant and settings.quantize != "none":
        faults.append("--merge-dominant needs a base that is not quantised")
    if settings.merge_dominant and settings.deterministic:
        faults.append("--merge-dominant changes the last bits of answers, which --deterministic forbids")
    if settings.keys and settings.open:
        faults.append("--open is for a server without --keys")
    if not (settings.keys or settings.open or server.is_local(settings.host)):
        faults.append(
            f"--host {settings.host} can be reached by others: give --keys FILE, or --open to serve whoever asks"
        )
    if faults:
        raise WrongUse("\n".join(faults))


def _size(settings: Settings) -> Any:
    from lorica.serve.http.opening import Size

    return Size(
        kv_memory=_bytes("--kv-memory", settings.kv_memory),
        adapter_memory=_bytes("--adapter-memory", settings.adapter_memory),
        running=settings.concurrency,
        waiting=settings.max_waiting,
        adapter_share=settings.adapter_share,
    )


def _bytes(flag: str, text: str) -> int:
    """A size as people write it."""
    if not text:
        return 0
    found = re.fullmatch(r"([\d.]+)\s*([KMG]?I?B?)", text.strip().upper())
    if not found or found[2] not in _UNITS:
        raise WrongUse(f"{flag} is {text!r}; it must be a size such as 500MB or 2GB")
    return int(float(found[1]) * _UNITS[found[2]])


@contextmanager
def _lines(settings: Settings) -> Iterator[Callable[[str], None] | None]:
    """Where the lines of the access log go."""
    if settings.log:
        with open(settings.log, "a", encoding="utf-8", buffering=1) as file:
            yield lambda line: print(line, file=file)
    elif settings.quiet:
        yield None
    else:
        yield lambda line: print(line, file=sys.stderr, flush=True)


def _merging(line: Callable[[str], None] | None) -> Callable[[str], None]:
    """Merges and their ends are lines of the log beside the requests."""
    from lorica.serve.http.door import stamp

    def tell(text: str) -> None:
        if line:
            line(json.dumps({"time": stamp(), "merge_dominant": text}, ensure_ascii=False))

    return tell


def _say(settings: Settings, opened: Opened, thing: Thing, url: str) -> None:
    """What is served, and how to ask."""
    from lorica.cli.terminal import console, say, size

    service, about = opened.service, opened.model
    there = [each for each in service.store.status() if not each.alias_of]
    tokens = service.engine.kv_tokens
    if settings.json:
        told = {
            "url": url,
            "base": thing.name,
            "adapters": [each.name for each in there],
            "max_model_len": service.context,
            "kv_tokens": tokens,
            "weight_bytes": about.nbytes,
            "adapter_bytes": service.store.nbytes,
        }
        print(json.dumps(told), flush=True)
        return
    if opened.note:
        console.print(f"note: {opened.note}", markup=False)
    kept = f"{about.dtype} on {opened.device}   {size(about.nbytes)}"
    say(f"base      {thing.name}   {about.parameters / 1e6:,.0f}M {kept}")
    say(f"adapters  {_some([each.name for each in there]) or 'none'}   {size(service.store.nbytes)} in memory")
    if settings.adapters:
        say(f"          watching {settings.adapters}")
    say(
        f"memory    keys and values of {tokens:,} tokens, {size(tokens * opened.kv_token)};"
        f" a request may have {service.context:,}"
    )
    who = f"{len(service.keys):,} keys" if service.keys else "everybody" if settings.open else "this machine"
    say(f"open to   {who}")
    say(f"at        {url}   (GET /v1/models, /health, /metrics)")
    model = next((each.name for each in there), thing.name)
    chats = bool(service.tok.chat_template)
    ask = {"messages": [{"role": "user", "content": "Hello"}]} if chats else {"prompt": "Hello"}
    key = " -H 'Authorization: Bearer KEY'" if service.keys else ""
    body = shlex.quote(json.dumps({"model": model, **ask}))
    path = "chat/completions" if chats else "completions"
    say(f"try       curl {url}/{path}{key} -H 'Content-Type: application/json' -d {body}")
    say(f"next:  lorica chat {url} --model {model}")


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])} and {len(names) - 6:,} more"
