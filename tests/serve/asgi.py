"""Requests to an ASGI application without a network: what came back, in the pieces in which it was sent."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answered:
    """A response as it is sent. `arrived` is set at each piece."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of each event; `[DONE]` as that text."""
        found = [part.removeprefix("data: ") for part in self.body.decode().split("\n\n") if part]
        return [each if each == "[DONE]" else json.loads(each) for each in found]


class Client:
    """One who asks `app`.

    `hang_up_after`: leaves after so many pieces of the body; `reading`: an event without which nothing more is read;
    not `whole`: the end of the request never comes.
    """

    def __init__(self, app: Any, key: str = "") -> None:
        self.app, self.key = app, key

    async def post(self, path: str, body: Any, **how: Any) -> Answered:
        return await self.send("POST", path, body, **how)

    async def get(self, path: str, **how: Any) -> Answered:
        return await self.send("GET", path, None, **how)

    async def send(
        self,
        method: str,
        path: str,
        body: Any,
        *,
        headers: dict[str, str] | None = None,
        hang_up_after: int | None = None,
        reading: asyncio.Event | None = None,
        into: Answered | None = None,
        whole: bool = True,
    ) -> Answered:
        answered = into or Answered()
        gone = asyncio.Event()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | (headers or {})
        if self.key:
            sent.setdefault("authorization", f"Bearer {self.key}")
        asked = iter([raw])

        async def receive() -> dict[str, Any]:
            for part in asked:
                return {"type": "http.request", "body": part, "more_body": not whole}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answered.status = message["status"]
                answered.headers = {key.decode(): value.decode() for key, value in message["headers"]}
                return
            if reading:
                await reading.wait()
            if not gone.is_set():
                answered.pieces.append(message.get("body", b""))
            if hang_up_after is not None and len(answered.pieces) >= hang_up_after:
                gone.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(key.lower().encode(), value.encode()) for key, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        if hang_up_after == 0:
            gone.set()
        await self.app(scope, receive, send)
        return answered
