"""A server without a network and without a model: real store, real queue, an engine that says what it is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorica import formats
from lorica.serve.admission import Limits
from lorica.serve.keys import Keys
from lorica.serve.places import CONFIG, TENSORS
from lorica.serve.store import Store

from .asgi import Client
from .fake import Fake, make_tok


@dataclass
class Payload:
    nbytes: int
    rank: int = 8


def read(folder: Path) -> Payload:
    from lorica.errors import LoricaError

    if (folder / CONFIG).read_text() == "bad":
        raise LoricaError("it is damaged")
    return Payload((folder / TENSORS).stat().st_size)


def put(folder: Path, floats: int = 100, **about: str) -> Path:
    """An adapter as far as the store and the routes look at it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(floats)}, folder / TENSORS, metadata={"lorica": json.dumps(about)})
    (folder / CONFIG).write_text("{}")
    return folder


@dataclass
class Server:
    """All parts of one server."""

    engine: Fake
    store: Store
    service: Any
    app: Any
    lines: list[dict[str, Any]]

    def client(self, key: str = "") -> Client:
        return Client(self.app, key)


@pytest.fixture(scope="session")
def tok():
    return make_tok()


@pytest.fixture
def root(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def serve(root, tok, tmp_path):
    """Build a server: `serve(answer)`, with limits, settings, more for the store and the text of a keys file."""
    from lorica.serve.http.routes import app
    from lorica.serve.http.service import Service, ServiceSettings

    made: list[Server] = []

    def build(answer=None, *, keys="", kv_tokens=1000, settings=None, store=None, **limits):
        engine = Fake(answer, kv_tokens)
        store = Store(
            read, root, reserved=["base"], template=formats.chat_template, **({"every": 0.02} | (store or {}))
        )
        found = None
        if keys:
            (tmp_path / "keys.toml").write_text(keys)
            found = Keys.read(tmp_path / "keys.toml")
        settings = ServiceSettings("base", **(settings or {}))
        service = Service(engine, store, tok, settings, Limits(kv_tokens, **limits), keys=found)
        lines: list[dict[str, Any]] = []
        made.append(Server(engine, store, service, app(service, lambda line: lines.append(json.loads(line))), lines))
        return made[-1]

    yield build
    for server in made:
        server.service.close()
        server.store.close()
