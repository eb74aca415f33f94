"""A server on a unix socket, on the loop of production and on Python's own."""

from __future__ import annotations

import asyncio
import shutil
import struct
import tempfile
from typing import TYPE_CHECKING

import pytest
import uvloop

from nbdstream.server.export import Export
from nbdstream.server.limits import Limits
from nbdstream.server.server import NbdServer
from tests.server.memory_device import MemoryDevice
from tests.server.raw_client import RawClient

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from nbdstream.server.tls import TlsPolicy


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every test of the server runs on both."""
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
def directory() -> Iterator[str]:
    """A directory with a short name, as unix sockets need it."""
    path = tempfile.mkdtemp(prefix="nbdstream-")
    yield path
    shutil.rmtree(path)


class Harness:
    """Starts servers and connects clients, and sees to the end of both."""

    def __init__(self, directory: str) -> None:
        self.path = f"{directory}/socket"
        self.servers: list[NbdServer] = []
        self.clients: list[RawClient] = []

    async def serve(self, *exports: Export, limits: Limits | None = None, tls: TlsPolicy | None = None) -> NbdServer:
        server = NbdServer(exports, limits=limits or Limits(), tls=tls)
        await server.listen_unix(self.path)
        self.servers.append(server)
        return server

    async def serve_device(self, device: MemoryDevice, *, limits: Limits | None = None) -> NbdServer:
        return await self.serve(Export("disk", device, writable=not device.read_only), limits=limits)

    async def connect(self) -> RawClient:
        client = await RawClient.connect(self.path)
        self.clients.append(client)
        return client

    async def open(
        self,
        name: str = "",
        *,
        structured: bool = False,
        extended: bool = False,
        contexts: Sequence[str] = (),
        tls: ssl.SSLContext | None = None,
    ) -> RawClient:
        client = await self.connect()
        await client.greet()
        if tls:
            await client.start_tls(tls)
        await client.go(name, structured=structured, extended=extended, contexts=contexts)
        return client

    async def until(self, condition: Callable[[], object]) -> None:
        """Let the loop turn until the condition holds (the test's own time limit is the bound)."""
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def harness(directory: str) -> AsyncIterator[Harness]:
    harness = Harness(directory)
    yield harness
    for client in harness.clients:
        await client.close()
    for server in harness.servers:
        await server.close(1)


MEGABYTE = struct.pack("!262144I", *range(1 << 18))
"""Different everywhere."""


@pytest.fixture
async def device() -> MemoryDevice:
    """A megabyte."""
    return MemoryDevice(MEGABYTE)
