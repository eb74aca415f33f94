"""A control socket with a few commands, and raw clients for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.control.commands import Commands
from nbdstream.control.server import ControlServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
def directory() -> Iterator[str]:
    """A directory with a short name, as unix sockets need it."""
    path = tempfile.mkdtemp(prefix="nbdstream-")
    yield path
    shutil.rmtree(path)


class RawClient:
    """Sends bytes and reads lines of JSON."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: str) -> RawClient:
        return cls(*await asyncio.open_unix_connection(path, limit=1 << 22))

    @classmethod
    async def negotiate(cls, path: str) -> RawClient:
        client = await cls.connect(path)
        assert "QMP" in await client.receive()
        assert await client.execute("qmp_capabilities") == {}
        return client

    async def receive(self) -> dict[str, Any]:
        line = await self.reader.readline()
        assert line.endswith(b"\r\n"), line
        message: dict[str, Any] = json.loads(line)
        return message

    def send(self, name: str, **arguments: object) -> None:
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.writer.write(json.dumps({"execute": name, "arguments": given}).encode())

    async def execute(self, name: str, **arguments: object) -> Any:
        """Return what a command returns, or its error."""
        self.send(name, **arguments)
        while "event" in (answer := await self.receive()):
            pass
        return answer.get("return", answer.get("error"))

    async def refusal(self, name: str, **arguments: object) -> str:
        """Return the text of the error that a command is answered with."""
        return str((await self.execute(name, **arguments))["desc"])

    async def event(self, name: str) -> dict[str, Any]:
        """Wait for an event, and return its data."""
        while (message := await self.receive()).get("event") != name:
            pass
        data: dict[str, Any] = message["data"]
        return data

    async def ended(self) -> bool:
        """Wait until the server hangs up."""
        with contextlib.suppress(ConnectionError):
            return await self.reader.read() == b""
        return True

    def close(self) -> None:
        self.writer.close()


@pytest.fixture
async def control(directory: str) -> AsyncIterator[ControlServer]:
    """It is bound, and nobody can connect yet."""
    async with ControlServer(f"{directory}/control") as server:
        yield server


@pytest.fixture
def stopped() -> asyncio.Event:
    """Set by ``quit``."""
    return asyncio.Event()


@pytest.fixture
def commands(stopped: asyncio.Event) -> Commands:
    return Commands(stopped.set)
