"""A model behind a server that speaks OpenAI's API, as somebody to talk to; Python's own library is all it takes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
from collections.abc import Generator, Sequence
from typing import Any
from urllib.parse import urlsplit

from lorica.errors import LoricaError, nearest

KEY = "LORICA_API_KEY"


class Remote:
    """One model of a server; `toggle` changes between an adapter and the base that the server names as its parent.

    Args:
        url: of the API: ``http://localhost:8000/v1``; without a path, /v1 is meant.
        model: its name there; without one, the first adapter, else the first model.
        key: sent as the API key; without one, that in the environment variable LORICA_API_KEY.

    Raises:
        LoricaError: no such server or model.
    """

    def __init__(self, url: str, model: str = "", key: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoricaError(f"{url} is not the address of a server: write http://localhost:8000/v1")
        self._parts, self._path = parts, parts.path.rstrip("/") or "/v1"
        self._key = key or os.environ.get(KEY, "")
        cards = self._asked("GET", "/models")["data"]
        names = [card["id"] for card in cards]
        adapters = [card for card in cards if card.get("parent")]
        if not cards or (model and model not in names):
            raise LoricaError(
                f"{url} has no model {model!r}{nearest(model, names)}; it has {', '.join(names) or 'none'}"
            )
        card = next((card for card in cards if card["id"] == model), (adapters or cards)[0])
        self.model, self._own, self._parent = card["id"], card["id"], card.get("parent")

    @property
    def plain(self) -> bool:
        return False

    @property
    def adapted(self) -> bool:
        return self._parent is not None

    @property
    def tuned(self) -> bool:
        return self.adapted and self.model == self._own

    def toggle(self) -> None:
        if not self._parent:
            raise LoricaError(f"{self.model} is no adapter of that server; it is all there is")
        self.model = self._parent if self.tuned else self._own

    def answer(
        self, messages: Sequence[dict[str, str]], *, max_new: int, temperature: float, seed: int
    ) -> Generator[str, None, None]:
        """The next message in pieces; closing the generator hangs up, which ends it on the server too."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_new,
            "temperature": temperature,
            "seed": seed,
            "stream": True,
        }
        with contextlib.closing(self._open("POST", "/chat/completions", body)) as reply:
            for line in reply:
                said = line.decode().strip().removeprefix("data:").strip()
                if said == "[DONE]":
                    return
                if said and (found := _whole(json.loads(said)))["choices"]:
                    yield found["choices"][0]["delta"].get("content") or ""
        raise LoricaError("the server stopped in the middle of its answer")

    def _asked(self, method: str, path: str) -> Any:
        with contextlib.closing(self._open(method, path, None)) as reply:
            return _whole(json.loads(reply.read()))

    def _open(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        headers = {"content-type": "application/json", "connection": "close"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        where = f"{self._parts.scheme}://{self._parts.netloc}{self._path}{path}"
        try:
            connection = kind(self._parts.netloc, timeout=600)
            connection.request(method, self._path + path, body and json.dumps(body), headers)
            reply = connection.getresponse()
        except (OSError, http.client.HTTPException, ssl.SSLError) as fault:
            raise LoricaError(f"{where} cannot be reached: {fault}") from fault
        if reply.status != 200:
            raise LoricaError(f"{where}: {_message(reply.read()) or reply.reason}")
        return reply


def _message(body: bytes) -> str:
    """What an error says, in OpenAI's form or not."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"]["message"])
    return body.decode(errors="replace").strip()[:200]


def _whole(found: Any) -> Any:
    """A reply, unless it is an error in the middle of a stream."""
    if "error" in found:
        raise LoricaError(str(found["error"].get("message", found["error"])))
    return found
