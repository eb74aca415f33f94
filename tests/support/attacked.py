"""A server under attack, as a test sees it: how to reach it, and what it costs."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from tests.server.raw_client import RawClient
from tests.support.attacked_server import DISK_SIZE
from tests.support.processes import Process, memory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

WITNESS_BYTES = 4 << 20
"""The end of ``disk``, which belongs to the well-behaved client."""

DISK_BYTES = DISK_SIZE - WITNESS_BYTES
"""What attacks on ``disk`` keep to."""


class Attacked:
    """The server under attack."""

    def __init__(self, path: str, process: Process) -> None:
        self.path = path
        self.process = process
        self.clients: list[RawClient] = []
        self.descriptors = 0
        """Files and sockets that it has open when nobody attacks it."""

    def count_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> int:
        """What nobody but the process itself is the reason for, in bytes: mapped images are page cache."""
        return memory(self.process.pid, "RssAnon", "RssShmem")

    async def connect(self) -> RawClient:
        """Connect and say nothing."""
        # Blocking, since asyncio takes a full backlog for a connection that is on its way.
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(self.path)
        client = RawClient(*await asyncio.open_unix_connection(sock=connected))
        self.clients.append(client)
        return client

    async def greet(self) -> RawClient:
        """Connect and exchange greetings."""
        client = await self.connect()
        await client.greet()
        return client

    async def open(
        self, name: str = "", *, structured: bool = False, extended: bool = False, contexts: Sequence[str] = ()
    ) -> RawClient:
        """Open an export."""
        client = await self.greet()
        await client.go(name, structured=structured, extended=extended, contexts=contexts)
        return client

    async def quiet(self) -> None:
        """Wait until it has let go of every client but the witness."""
        await until(lambda: self.count_descriptors() <= self.descriptors)

    @asynccontextmanager
    async def grows_by_at_most(self, most: int) -> AsyncIterator[None]:
        """What is done within may cost the server so many bytes, at any moment of it."""
        before = peak = self.memory()
        done = asyncio.Event()

        async def watch() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, self.memory())
                with suppress(TimeoutError):
                    await asyncio.wait_for(done.wait(), 0.005)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            done.set()
            await watching
        peak = max(peak, self.memory())
        print(f"memory: {before >> 10} KiB before, {peak >> 10} KiB at most")
        assert peak - before <= most, f"{(peak - before) >> 20} MiB"


async def until(condition: Callable[[], object]) -> None:
    """Ask again and again until the condition holds (the test's own time limit is the bound)."""
    while not condition():
        await asyncio.sleep(0.005)
