"""Servers for the tests of remote exports, a proxy in front of them, and what is asked of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any

from nbdstream.block.remote.export import RemoteExport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def pattern(offset: int, length: int) -> bytes:
    """What nbdkit's pattern plugin holds: every eight bytes their own offset, big-endian."""
    first = offset // 8
    words = range(first, (offset + length + 7) // 8)
    return struct.pack(f">{len(words)}Q", *(word * 8 for word in words))[offset % 8 : offset % 8 + length]


class Servers:
    """NBD servers as processes. They are handed a socket that listens already, so nobody has to wait for them."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="nbd-")  # short, for the names of sockets
        self._names = itertools.count()
        self._processes: list[subprocess.Popen[bytes]] = []

    def path(self, name: str) -> str:
        return os.path.join(self.directory, f"{next(self._names)}{name}")

    def nbdkit(self, *arguments: str, tcp: bool = False) -> str:
        """Start nbdkit; return its URI."""
        return self._start(["nbdkit", "-f", "--exit-with-parent", *arguments], tcp=tcp)

    def qemu_nbd(self, *arguments: str, export: str = "") -> str:
        """Start qemu-nbd; return its URI."""
        return self._start(["qemu-nbd", "-t", "-e", "8", "-f", "raw", "-x", export, *arguments], export=export)

    def kill(self) -> None:
        while self._processes:
            process = self._processes.pop()
            process.kill()
            process.wait()

    def _start(self, command: list[str], *, tcp: bool = False, export: str = "") -> str:
        if tcp:
            listener = socket.create_server(("127.0.0.1", 0))
            uri = f"nbd://127.0.0.1:{listener.getsockname()[1]}/{export}"
        else:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path := self.path("sock"))
            listener.listen()
            uri = f"nbd+unix:///{export}?socket={path}"
        with listener:
            # sd_listen_fds(3): descriptor 3, for the process whose id is named.
            activate = f'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&{listener.fileno()}'
            process = subprocess.Popen(["bash", "-c", activate, "-", *command], pass_fds=[listener.fileno()])
        self._processes.append(process)
        return uri


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def connected(uri: str, **options: Any) -> AsyncIterator[RemoteExport]:
    export = await RemoteExport.connect(uri, **options)
    try:
        yield export
    finally:
        await export.close()


async def read(export: RemoteExport, offset: int, length: int) -> bytes:
    return b"".join(await export.read(offset, length))


class Proxy:
    """Passes connections on to a unix socket, and can break one of them."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_unix_connection(self._upstream)
        self.writers.append(writer)
        self._tasks += [
            asyncio.create_task(self._pump(reader, other_writer)),
            asyncio.create_task(self._pump(other_reader, writer)),
        ]

    async def close(self) -> None:
        await asyncio.gather(*self._tasks)

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
