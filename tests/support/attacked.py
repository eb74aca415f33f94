"""A server under attack, as a test sees it: how to reach it, and what it costs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.server.raw_client import RawClient
from tests.support.attacked_server import DISK_SIZE
from tests.support.certificates import Authority
from tests.support.processes import PATIENCE_SECONDS, Process, memory

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
        self.port = int(process.wait_for("serving").rpartition(" ")[2])
        """On 127.0.0.1, where connections can be reset."""
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


class Servers:
    """Servers under attack, one for each way to run it. As a context manager, they end well or the test does not."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[str, Process]] = {}
        self._stack = ExitStack()

    def get(self, limits: dict[str, Any], tls: str) -> tuple[str, Process]:
        """Return the socket and the process of a server with these limits (JSON); ``tls``: off, on or require."""
        key = json.dumps([limits, tls])
        if key not in self._running or not self._running[key][1].running:
            self._running[key] = self._start(json.dumps(limits), tls)
        return self._running[key]

    def _start(self, limits: str, tls: str) -> tuple[str, Process]:
        # Unix sockets need a short name.
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdstream-"))
        if tls != "off":
            Authority().server(Path(directory) / "tls")
        path = f"{directory}/socket"
        arguments = "tests.support.attacked_server", path, directory, limits, tls
        process = self._stack.enter_context(Process(sys.executable, "-m", *arguments))
        process.wait_for("serving")
        return path, process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            for process in (process for _path, process in self._running.values() if process.running):
                began = time.monotonic()
                assert process.stop(signal.SIGTERM) == 0, str(process)
                assert time.monotonic() - began < PATIENCE_SECONDS / 2
                assert not [line for line in process.lines if "Traceback" in line or "Error" in line], str(process)


async def until(condition: Callable[[], object]) -> None:
    """Ask again and again until the condition holds (the test's own time limit is the bound)."""
    while not condition():
        await asyncio.sleep(0.005)
