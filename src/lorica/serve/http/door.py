"""What every request passes: an id, the key, draining, and a line in the log when it is over."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorica.serve.http.answers import refused_response
from lorica.serve.http.service import Service
from lorica.serve.http.shapes import Refused

_ID = re.compile(r"[\w.:-]{1,128}")
_OPEN = ("/health", "/version", "/metrics")


class Door:
    """Around the routes.

    Args:
        line: takes each line of the access log: JSON, without prompts, answers or keys.
    """

    def __init__(self, app: ASGIApp, service: Service, line: Callable[[str], None] | None = None) -> None:
        self._app, self._service, self._line = app, service, line
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        told: dict[str, Any] = {"id": given if _ID.fullmatch(given) else uuid.uuid4().hex}
        scope["state"] = {**scope.get("state", {}), "told": told}
        began = time.monotonic()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.setdefault("status", message["status"])
                MutableHeaders(scope=message)["x-request-id"] = told["id"]
            await send(message)

        self.inside += 1
        try:
            self._enter(scope, headers)
            await self._app(scope, receive, sending)
        except Refused as fault:
            await refused_response(fault)(scope, receive, sending)
        finally:
            self.inside -= 1
            self._note(scope, told, time.monotonic() - began)

    def _enter(self, scope: Scope, headers: Headers) -> None:
        if scope["path"] in _OPEN:
            return
        if self._service.draining:
            raise Refused(503, "this server is stopping", retry_after=5)
        tenant = self._service.tenant(headers.get("authorization", ""))
        scope["state"]["tenant"], scope["state"]["told"]["tenant"] = tenant, tenant.name

    def _note(self, scope: Scope, told: dict[str, Any], seconds: float) -> None:
        if scope["path"] in _OPEN:
            return
        if told.get("status", 500) >= 400:
            self._service.metrics.refuse(told.get("status", 500))
        if self._line is None:
            return
        names = ("id", "tenant", "model", "status", "prompt_tokens", "output_tokens", "ttft")
        line = {
            "time": stamp(),
            "method": scope["method"],
            "path": scope["path"],
            **{name: told[name] for name in names if name in told},
            "seconds": round(seconds, 4),
        }
        self._line(json.dumps(line, ensure_ascii=False))


def stamp() -> str:
    """The time, as lines of the log have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
