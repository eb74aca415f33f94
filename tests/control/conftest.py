"""A control socket, raw clients for it, and a disk that is streamed from a source of a few clusters."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import QMPClient

from nbdstream.control.commands import Commands
from nbdstream.control.disk import DiskCommands
from nbdstream.control.server import ControlServer
from nbdstream.stream import source as source_module
from nbdstream.stream.disk import DiskStream
from tests.stream.conftest import directory, disk, records_of_their_own, server  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.stream.peers import SourceServer


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


class Heard:
    """What a client hears of, in its order."""

    def __init__(self, qmp: QMPClient) -> None:
        self.names: set[str] = set()
        """Of all events until now."""
        self._qmp = qmp

    async def until(self, name: str) -> dict[str, Any]:
        """Wait for an event, and return its data."""
        async with asyncio.timeout(20):
            while (event := await self.next())["event"] != name:
                pass
        data: dict[str, Any] = event["data"]
        return data

    async def next(self) -> dict[str, Any]:
        event = dict(await self._qmp.events.get())
        self.names.add(str(event["event"]))
        return event

    async def names_until(self, status: str) -> list[str]:
        """Return the names of events, and of the states instead of JOB_STATUS_CHANGE, up to a state."""
        names: list[str] = []
        async with asyncio.timeout(20):
            while not names or names[-1] != status:
                event = await self.next()
                changed = event["event"] == "JOB_STATUS_CHANGE"
                names.append(event["data"]["status"] if changed else event["event"])
        return names


async def execute(qmp: QMPClient, command: str, **arguments: object) -> Any:
    return await qmp.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})


@pytest.fixture
async def control(directory: str) -> AsyncIterator[ControlServer]:  # noqa: F811
    """It is bound, and nobody can connect yet."""
    async with ControlServer(f"{directory}/control") as control:
        yield control


@pytest.fixture
def stopped() -> asyncio.Event:
    """Set by ``quit``."""
    return asyncio.Event()


@pytest.fixture
def commands(stopped: asyncio.Event) -> Commands:
    return Commands(stopped.set)


@pytest.fixture
def overlay(tmp_path: Path) -> str:
    """Where the overlay is made."""
    return str(tmp_path / "overlay.qed")


@pytest.fixture
async def stream(
    server: SourceServer,  # noqa: F811
    overlay: str,
    control: ControlServer,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[DiskStream]:
    """A disk of 40 clusters that nothing streams yet, under control."""
    monkeypatch.setattr(source_module, "_FIRST_PAUSE_SECONDS", 0.01)
    async with await DiskStream.start(server.uri, overlay, job=False) as stream:
        DiskCommands(control.emit, stream).add_to(commands)
        await control.begin(commands)
        yield stream


@pytest.fixture
async def qmp(stream: DiskStream, control: ControlServer) -> AsyncIterator[QMPClient]:
    """The qemu.qmp library, connected."""
    client = QMPClient("test")
    await client.connect(control.path)
    yield client
    await client.disconnect()


@pytest.fixture
def heard(qmp: QMPClient) -> Heard:
    return Heard(qmp)
