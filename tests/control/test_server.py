"""The control socket: several clients, each in order, all of them bounded, and none in the way of anything else."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdstream.control import server
from nbdstream.control.arguments import Arguments, Int
from nbdstream.control.server import MOST_CLIENTS, MOST_UNSENT, ControlServer
from nbdstream.errors import ListenError, NbdstreamError
from nbdstream.wire.qmp import MAXIMUM_MESSAGE, ErrorClass, QmpError
from tests.control.conftest import RawClient

if TYPE_CHECKING:
    from nbdstream.control.commands import Commands


class Number(Arguments):
    number: Int


class Gate:
    """A command that takes as long as it is told to."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun = asyncio.Event()
        self.done: list[int] = []

    async def pass_through(self, arguments: Number) -> object:
        self.begun.set()
        await self.open.wait()
        self.done.append(arguments.number)
        return {"number": arguments.number}


@pytest.fixture
def gate(commands: Commands) -> Gate:
    gate = Gate()
    commands.add("x-pass", Number, gate.pass_through)
    return gate


# The socket.


async def test_it_is_private_and_gone_in_the_end(directory: str, commands: Commands) -> None:
    async with ControlServer(f"{directory}/control") as control:
        assert stat.S_IMODE(os.stat(control.path).st_mode) == 0o600
        await control.begin(commands)
        (await RawClient.negotiate(control.path)).close()
    assert not os.path.exists(control.path)


async def test_its_mode_can_be_chosen(directory: str) -> None:
    async with ControlServer(f"{directory}/control", mode=0o660) as control:
        assert stat.S_IMODE(os.stat(control.path).st_mode) == 0o660
    assert not os.path.exists(control.path)


async def test_before_it_begins_nobody_can_connect_and_nobody_else_can_have_it(
    control: ControlServer, commands: Commands
) -> None:
    with pytest.raises(ConnectionRefusedError):
        await RawClient.connect(control.path)
    await control.begin(commands)
    with pytest.raises(ListenError, match="another server answers there"):
        ControlServer(control.path)
    (await RawClient.negotiate(control.path)).close()


# Commands.


async def test_the_qemu_qmp_library_is_served_as_it_is(control: ControlServer, commands: Commands) -> None:
    await control.begin(commands)
    client = QMPClient("test")
    await client.connect(control.path)
    assert client.greeting
    version = await client.execute("query-version")
    assert version == client.greeting.QMP.version
    assert isinstance(version, dict)
    assert set(version["qemu"]) == {"major", "minor", "micro"}
    names = await client.execute("query-commands")
    assert {"name": "query-commands"} in names  # type: ignore[operator]
    with pytest.raises(ExecuteError) as caught:
        await client.execute("nothing")
    assert caught.value.error_class == "CommandNotFound"
    assert str(caught.value) == "The command nothing has not been found"
    await client.disconnect()


async def test_quit_is_answered_and_stops(control: ControlServer, commands: Commands, stopped: asyncio.Event) -> None:
    await control.begin(commands)
    client = await RawClient.negotiate(control.path)
    assert await client.execute("quit") == {}
    await stopped.wait()
    client.close()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NbdstreamError("it\n did not  work"), "it did not work"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("odd"), "odd"),
        (ZeroDivisionError("a mistake of ours"), "Internal error: the log has more"),
    ],
)
async def test_whatever_fails_is_one_error(
    control: ControlServer, commands: Commands, error: Exception, text: str
) -> None:
    async def fail(_arguments: Arguments) -> object:
        raise error

    commands.add("x-fail", Arguments, fail)
    await control.begin(commands)
    client = await RawClient.negotiate(control.path)
    assert await client.execute("x-fail") == {"class": "GenericError", "desc": text}
    assert await client.refusal("x-fail", a=1) == "Parameter 'a' is unexpected"
    client.close()


async def test_an_error_has_its_class(control: ControlServer, commands: Commands) -> None:
    async def fail(_arguments: Arguments) -> object:
        raise QmpError("none", ErrorClass.DEVICE_NOT_ACTIVE)

    commands.add("x-fail", Arguments, fail)
    await control.begin(commands)
    client = await RawClient.negotiate(control.path)
    assert await client.execute("x-fail") == {"class": "DeviceNotActive", "desc": "none"}
    client.close()


async def test_answers_come_in_the_order_of_the_commands(
    control: ControlServer, commands: Commands, gate: Gate
) -> None:
    await control.begin(commands)
    client = await RawClient.negotiate(control.path)
    client.send("x-pass", number=1)
    client.writer.write(b"nonsense\n")
    client.send("query-commands")
    await gate.begun.wait()
    gate.open.set()
    assert (await client.receive())["return"] == {"number": 1}
    assert "JSON parse error" in (await client.receive())["error"]["desc"]
    assert isinstance((await client.receive())["return"], list)
    client.close()


async def test_a_client_that_waits_holds_up_nobody_else(control: ControlServer, commands: Commands, gate: Gate) -> None:
    await control.begin(commands)
    waiting, other = await RawClient.negotiate(control.path), await RawClient.negotiate(control.path)
    waiting.send("x-pass", number=1)
    await gate.begun.wait()
    assert await other.execute("query-version")
    gate.open.set()
    assert (await waiting.receive())["return"] == {"number": 1}
    waiting.close()
    other.close()


async def test_a_command_is_done_though_its_client_leaves(
    control: ControlServer, commands: Commands, gate: Gate
) -> None:
    await control.begin(commands)
    client = await RawClient.negotiate(control.path)
    client.send("x-pass", number=1)
    await gate.begun.wait()
    client.close()
    gate.open.set()
    async with asyncio.timeout(10):
        while not gate.done:
            await asyncio.sleep(0.001)


async def test_what_was_sent_before_the_end_of_the_stream_is_answered(
    control: ControlServer, commands: Commands
) -> None:
    await control.begin(commands)
    client = await RawClient.connect(control.path)
    client.writer.write(b'{"execute": "qmp_capabilities"} {"execute": "query-version", "id": 5}')
    client.writer.write_eof()
    lines = (await client.reader.read()).splitlines()
    assert len(lines) == 3
    assert b'"id": 5' in lines[-1]
    client.close()


# Events.


async def test_an_event_goes_to_everybody_who_has_negotiated(control: ControlServer, commands: Commands) -> None:
    await control.begin(commands)
    one, two = await RawClient.negotiate(control.path), await RawClient.negotiate(control.path)
    silent = await RawClient.connect(control.path)
    await silent.receive()
    control.emit("X_EVENT", {"a": 1})
    for client in (one, two):
        message = await client.receive()
        assert (message["event"], message["data"]) == ("X_EVENT", {"a": 1})
        assert set(message["timestamp"]) == {"seconds", "microseconds"}
    silent.send("qmp_capabilities")
    assert await silent.receive() == {"return": {}}
    for client in (one, two, silent):
        client.close()


async def test_the_last_events_reach_clients_before_it_closes(directory: str, commands: Commands) -> None:
    async with ControlServer(f"{directory}/control") as control:
        await control.begin(commands)
        client = await RawClient.negotiate(control.path)
        control.emit("X_LAST", {})
    assert (await client.receive())["event"] == "X_LAST"
    assert await client.ended()
    client.close()


async def test_what_is_being_done_is_given_up_when_it_closes(directory: str, commands: Commands, gate: Gate) -> None:
    async with ControlServer(f"{directory}/control") as control:
        await control.begin(commands)
        client = await RawClient.negotiate(control.path)
        client.send("x-pass", number=1)
        await gate.begun.wait()
    assert await client.ended()
    assert not gate.done
    client.close()


# Bounds.


async def test_more_clients_than_may_be_are_turned_away(control: ControlServer, commands: Commands) -> None:
    await control.begin(commands)
    clients = [await RawClient.negotiate(control.path) for _ in range(MOST_CLIENTS)]
    late = await RawClient.connect(control.path)
    assert await late.ended()
    late.close()
    clients.pop().close()
    async with asyncio.timeout(10):
        while len(control._clients) == MOST_CLIENTS:
            await asyncio.sleep(0.001)
    clients.append(await RawClient.negotiate(control.path))
    for client in clients:
        client.close()


async def test_a_client_that_takes_no_events_is_cut_off_and_the_others_are_not(
    control: ControlServer, commands: Commands
) -> None:
    await control.begin(commands)
    deaf, other = await RawClient.negotiate(control.path), await RawClient.negotiate(control.path)
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    event = {"text": "x" * 10_000}
    sent = 0
    while len(control._clients) == 2:
        control.emit("X_LONG", event)
        sent += 1
        await other.event("X_LONG")
        assert sent * 10_000 < 4 * MOST_UNSENT, "it is still there"
    assert await other.execute("query-version")
    deaf.close()
    other.close()


async def test_a_client_that_takes_no_answers_is_not_read_from(control: ControlServer, commands: Commands) -> None:
    await control.begin(commands)
    deaf = await RawClient.negotiate(control.path)
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    command = b'{"execute": "query-commands"}' * 100
    sent = 0
    while deaf.writer.transport.get_write_buffer_size() < 1 << 20:
        deaf.writer.write(command)
        sent += len(command)
        await asyncio.sleep(0.001)
        assert sent < 64 << 20, "all of it was taken"
    (served,) = control._clients
    assert served._writer.transport.get_write_buffer_size() < 256 << 10
    deaf.writer.transport.abort()


@pytest.mark.parametrize("data", [b"[" * 100, b'"' + b"x" * MAXIMUM_MESSAGE])
async def test_what_cannot_be_followed_is_answered_and_ends_the_connection(
    control: ControlServer, commands: Commands, data: bytes
) -> None:
    await control.begin(commands)
    client = await RawClient.negotiate(control.path)
    client.writer.write(data)
    assert "error" in await client.receive()
    assert await client.ended()
    client.close()


async def test_a_flood_of_commands_leaves_the_loop_to_others(control: ControlServer, commands: Commands) -> None:
    await control.begin(commands)
    client = await RawClient.negotiate(control.path)
    turns, answered = 0, asyncio.Event()

    async def count() -> None:
        nonlocal turns
        while not answered.is_set():
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count())
    client.writer.write(b'{"execute":"query-version"}' * 500)
    for _ in range(500):
        await client.receive()
    answered.set()
    await counting
    assert turns >= 500
    client.close()


async def test_a_client_that_does_not_read_does_not_keep_it_from_closing(
    control: ControlServer, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_LINGER_SECONDS", 0.05)
    await control.begin(commands)
    deaf = await RawClient.negotiate(control.path)
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    for _ in range(MOST_UNSENT // 10_000):
        control.emit("X_LONG", {"text": "x" * 10_000})
    async with asyncio.timeout(10):
        await control.close()
    assert not control._clients
    deaf.close()
