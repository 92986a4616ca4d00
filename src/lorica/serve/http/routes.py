"""The paths: OpenAI's, vLLM's for adapters, and those for whoever runs the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lorica import __version__
from lorica.errors import LoricaError
from lorica.serve.http.answers import Reply, refusal, refused_response
from lorica.serve.http.door import Door
from lorica.serve.http.service import Service
from lorica.serve.http.shapes import (
    AliasRequest,
    ChatRequest,
    LoadRequest,
    Refused,
    TextRequest,
    UnloadRequest,
    parse,
)
from lorica.serve.keys import Tenant

R = TypeVar("R", bound=BaseModel)
_BODY_SECONDS = 60.0
_LOGGED = 200  # characters of a model's name in the log, which is whatever somebody sent


def app(service: Service, line: Callable[[str], None] | None = None) -> Door:
    """The ASGI application; `line` takes the lines of the access log."""
    paths = _Paths(service)
    routes = [
        Route("/health", paths.health),
        Route("/version", paths.version),
        Route("/metrics", paths.metrics),
        Route("/v1/models", paths.models),
        Route("/v1/models/{model:path}", paths.model),
        Route("/v1/chat/completions", paths.chat, methods=["POST"]),
        Route("/v1/completions", paths.text, methods=["POST"]),
        Route("/v1/lora_alias", paths.alias, methods=["POST"]),
        *(Route(f"{at}/load_lora_adapter", paths.load, methods=["POST"]) for at in ("", "/v1")),
        *(Route(f"{at}/unload_lora_adapter", paths.unload, methods=["POST"]) for at in ("", "/v1")),
    ]
    faults = {HTTPException: _astray, Refused: _refused, LoricaError: _refused, Exception: _failed}
    return Door(Starlette(routes=routes, exception_handlers=faults), service, line)


async def _astray(request: Request, fault: Any) -> Response:
    told = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} does not take {request.method}"}
    return refused_response(Refused(fault.status_code, told.get(fault.status_code, str(fault.detail))))


async def _refused(_: Request, fault: Exception) -> Response:
    return refused_response(refusal(fault))


async def _failed(_: Request, fault: Exception) -> Response:
    return refused_response(Refused(500, "an error of this server; its log says more"))


class _Paths:
    """One method for each path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, _: Request) -> Response:
        service = self._service
        status = "stopping" if service.draining else "ok" if service.engine.alive else "the engine is not running"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def metrics(self, _: Request) -> Response:
        return Response(await self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._service.cards(_tenant(request))})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        adapter = self._service.adapter(_tenant(request), name)
        return JSONResponse(self._service.card(self._service.store.find(adapter) if adapter else None))

    async def chat(self, request: Request) -> Reply:
        asked = await self._asked(request, ChatRequest)
        return Reply(self._service, await self._service.chat(_tenant(request), asked))

    async def text(self, request: Request) -> Reply:
        asked = await self._asked(request, TextRequest)
        return Reply(self._service, await self._service.text(_tenant(request), asked))

    async def load(self, request: Request) -> Response:
        _only_admins(request)
        return JSONResponse(await self._service.load(await self._asked(request, LoadRequest)))

    async def unload(self, request: Request) -> Response:
        _only_admins(request)
        asked = await self._asked(request, UnloadRequest)
        self._service.unload(asked)
        return JSONResponse({"id": asked.lora_name, "object": "model", "deleted": True})

    async def alias(self, request: Request) -> Response:
        _only_admins(request)
        asked = await self._asked(request, AliasRequest)
        before = self._service.alias(asked)
        return JSONResponse({"alias": asked.alias, "to": asked.lora_name, "before": before})

    async def _asked(self, request: Request, kind: type[R]) -> R:
        """The body, read up to the limit and understood whole."""
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != "application/json":  # what a web page may not send here without asking first
            raise Refused(415, "send the body as Content-Type: application/json")
        limit = self._service.settings.body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise Refused(413, f"the body is larger than {limit:,} bytes")
        except (TimeoutError, ClientDisconnect) as fault:
            raise Refused(408, "the body did not come") from fault
        asked = parse(kind, bytes(body))
        name = getattr(asked, "model", None) or getattr(asked, "lora_name", None) or ""
        request.state.told["model"] = name[:_LOGGED]
        return asked


def _tenant(request: Request) -> Tenant:
    return request.state.tenant


def _only_admins(request: Request) -> None:
    if not _tenant(request).admin:
        raise Refused(403, "this needs the key of an admin")
