"""A process that listens: it starts, says so, drains at the first signal and ends at the second."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from lorica.errors import LoricaError
from lorica.serve.http.door import Door
from lorica.serve.http.service import Service

FORCED = 130


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is told before a model is loaded. Port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as fault:
        sock.close()
        raise LoricaError(f"cannot listen on {host}:{port}: {fault.strerror}; choose another --port") from fault
    return sock


def run(
    door: Door, service: Service, sock: socket.socket, *, drain: float = 30.0, ready: Callable[[], None] | None = None
) -> int:
    """Serve until a signal; returns the exit code.

    SIGTERM or Ctrl-C: new requests get 503, those under way have `drain` seconds, then 0. Once more: at once.
    """
    return asyncio.run(_serve(door, service, sock, drain, ready))


async def _serve(
    door: Door, service: Service, sock: socket.socket, drain: float, ready: Callable[[], None] | None
) -> int:
    config = uvicorn.Config(
        door,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = _Server(config, asyncio.get_running_loop())
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if ready and server.started:
        ready()
    signalled = asyncio.create_task(server.signalled.wait())
    await asyncio.wait({serving, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    service.draining = True
    service.metrics.drain()
    await _emptied(door, server, drain)
    server.should_exit = True
    await serving
    return 0


async def _emptied(door: Door, server: Any, seconds: float) -> None:
    """Wait until no request is under way, or the time is up."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while door.inside and loop.time() < until and not server.should_exit:
        await asyncio.sleep(0.05)


class _Server(uvicorn.Server):
    """uvicorn, whose first signal we answer ourselves."""

    def __init__(self, config: uvicorn.Config, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(config)
        self.signalled = asyncio.Event()
        self._loop, self._signals = loop, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain; the second ends the process."""
        self._signals += 1
        if self._signals > 1:
            os._exit(FORCED)
        self._loop.call_soon_threadsafe(self.signalled.set)
