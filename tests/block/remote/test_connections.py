"""Connections that hang, break one by one, or carry what is in a hurry: none of it holds up what could go on."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
from functools import partial
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.remote import connections as connections_module
from nbdstream.block.remote.export import RemoteExport
from tests.block.remote.peers import pattern
from tests.support.processes import wait_until
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20


class Source:
    """nbdkit behind a proxy."""

    def __init__(self, directory: str, *, delay: str = "0") -> None:
        path = f"{directory}/nbdkit"
        self.process = subprocess.Popen(
            ["nbdkit", "-f", "--exit-with-parent", "-U", path, "--filter=delay", "pattern", "64M", f"rdelay={delay}"]
        )
        wait_until(lambda: os.path.exists(path), "nbdkit")
        self.proxy = Proxy(path, f"{directory}/proxy")
        self.uri = f"nbd+unix:///?socket={directory}/proxy"

    def close(self) -> None:
        self.proxy.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def directory() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="nbd-")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def source(directory: str) -> Iterator[Source]:
    source = Source(directory)
    yield source
    source.close()


async def settled(export: RemoteExport, connections: int) -> None:
    """Wait until so many connections are ready."""
    while len(export._thread._connections.ready) != connections:
        await asyncio.sleep(0.001)


# What hangs.


async def test_a_server_that_stops_answering_is_noticed(source: Source) -> None:
    export = await RemoteExport.connect(source.uri, connections=1, stall=0.2)
    source.proxy.stall()
    with pytest.raises(OSError, match="lost") as error:
        await export.read(0, 4096)
    assert error.value.errno == errno.ECONNRESET
    assert await export.lost == "no answer for 0.2 seconds"
    await export.close()


async def test_a_connection_that_is_idle_may_be_silent(source: Source) -> None:
    export = await RemoteExport.connect(source.uri, connections=1, stall=0.05)
    await export.read(0, 4096)
    await asyncio.sleep(0.2)
    assert not export.lost.done()
    assert b"".join(await export.read(8, 512)) == pattern(8, 512)
    await export.close()


async def test_an_answer_that_takes_long_and_comes_bit_by_bit_is_waited_for(source: Source) -> None:
    export = await RemoteExport.connect(source.uri, connections=1, stall=0.3)
    source.proxy.trickle = 0.02
    source.proxy.chunk = 64 << 10
    data = b"".join(await export.read(0, 2 * MIB))  # 32 pieces: twice as long as it may be silent
    assert data == pattern(0, 2 * MIB)
    await export.close()


async def test_one_silent_connection_of_several_is_given_up_alone(source: Source) -> None:
    export = await RemoteExport.connect(source.uri, connections=3, stall=0.2)
    await settled(export, 3)
    source.proxy.stall_link(0)
    reads = await asyncio.gather(*(export.read(i * MIB, MIB) for i in range(12)), return_exceptions=True)
    failed = [answer for answer in reads if isinstance(answer, OSError)]
    assert 0 < len(failed) < 12
    assert {error.errno for error in failed} == {errno.ECONNRESET}
    assert not export.lost.done()
    await export.close()


async def test_a_dead_peer_is_looked_for_by_the_kernel(directory: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = ["nbdkit", "-f", "--exit-with-parent", "pattern", "1M"]
        activate = f'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&{listener.fileno()}'
        process = subprocess.Popen(["bash", "-c", activate, "-", *command], pass_fds=[listener.fileno()])
    try:
        export = await RemoteExport.connect(f"nbd://127.0.0.1:{port}/", connections=1, stall=12)
        (handle,) = export._thread._connections.ready
        with socket.socket(fileno=os.dup(handle.fd)) as own:
            assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 12000
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 6
        await export.close()
    finally:
        process.kill()
        process.wait()


# What breaks and is made again.


async def test_a_connection_that_broke_alone_is_made_again(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "_REOPEN_SECONDS", 0.05)
    export = await RemoteExport.connect(source.uri, connections=3)
    await settled(export, 3)
    source.proxy.cut_link(1)
    await settled(export, 2)
    await settled(export, 3)
    assert not export.lost.done()
    assert b"".join(await export.read(0, MIB)) == pattern(0, MIB)
    await export.close()


async def test_attempts_become_rarer_while_they_are_in_vain(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "_REOPEN_SECONDS", 0.05)
    monkeypatch.setattr(connections_module, "_LONGEST_REOPEN_SECONDS", 0.4)
    export = await RemoteExport.connect(source.uri, connections=2)
    await settled(export, 2)
    source.proxy.refusing = True
    before = source.proxy.connections
    source.proxy.cut_link(1)
    await asyncio.sleep(1.0)
    assert 2 <= source.proxy.connections - before <= 5  # at 0.05, 0.15, 0.35, 0.75
    assert b"".join(await export.read(0, 512)) == pattern(0, 512)
    await export.close()


# What is in a hurry, and what memory there is.


async def test_what_is_read_at_the_same_time_is_received_together(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = await RemoteExport.connect(source.uri, connections=3)
    await settled(export, 3)
    source.proxy.stall()
    reading = [asyncio.create_task(export.read(i * 4096, 4096)) for i in range(48)]
    await asyncio.sleep(0.05)
    mailbox = export._thread._mailbox
    sleep, sleeps = mailbox.sleep, itertools.count()
    monkeypatch.setattr(mailbox, "sleep", lambda milliseconds: (next(sleeps), sleep(milliseconds))[1])
    source.proxy.flow()
    for i, task in enumerate(reading):
        assert b"".join(await task) == pattern(i * 4096, 4096)
    assert next(sleeps) < 12  # with one reply of each connection a round it would be 16 and more
    await export.close()


async def test_what_is_read_goes_to_other_connections_where_much_is_on_its_way(source: Source) -> None:
    export = await RemoteExport.connect(source.uri, connections=3)
    await settled(export, 3)
    source.proxy.stall()
    reading = [asyncio.create_task(export.read(i * MIB, MIB)) for i in range(6)]
    await asyncio.sleep(0.05)
    assert [len(handle.in_flight) for handle in export._thread._connections.ready] == [2, 2, 2]
    source.proxy.flow()
    await asyncio.gather(*reading)
    await export.close()


async def test_a_copy_in_a_hurry_that_is_given_up_is_told_of_once(source: Source, directory: str) -> None:
    export = await RemoteExport.connect(source.uri, connections=1)
    told: list[OSError | None] = []
    with tempfile.TemporaryFile(dir=directory) as file:
        export._thread._stopping = True  # what comes now is not taken up any more
        copy = export.copy_soon(0, MIB, file.fileno(), 0, lambda _zero, error: told.append(error))
        export.hurry(copy)
        await export.close()
    (error,) = told
    assert error
    assert error.errno == errno.ECANCELED


async def test_a_copy_in_a_hurry_overtakes_the_others(directory: str) -> None:
    source = Source(directory, delay="50ms")
    export = await RemoteExport.connect(source.uri, connections=1, memory=2 * MIB)
    done: list[int] = []

    def arrived(number: int, _zero: int | None, error: OSError | None) -> None:
        assert not error
        done.append(number)

    with tempfile.TemporaryFile(dir=directory) as file:
        copies = [export.copy_soon(i * MIB, MIB, file.fileno(), i * MIB, partial(arrived, i)) for i in range(8)]
        await asyncio.sleep(0.01)
        export.hurry(copies[7])
        export.hurry(copies[7])
        while len(done) < 8:
            await asyncio.sleep(0.001)
    assert done.index(7) <= 2
    assert sorted(done) == list(range(8))
    await export.close()
    source.close()


async def test_what_is_on_its_way_takes_no_more_memory_than_there_is(source: Source) -> None:
    source.proxy.stall()
    source.proxy.flow()
    export = await RemoteExport.connect(source.uri, connections=4, memory=4 * MIB)
    source.proxy.stall()
    done: list[object] = []
    with tempfile.TemporaryFile() as file:
        for i in range(40):
            export.copy_soon(i * MIB, MIB, file.fileno(), i * MIB, lambda zero, error: done.append(error))
        reading = [asyncio.create_task(export.read(i * MIB, MIB)) for i in range(40, 50)]
        await asyncio.sleep(0.1)
        assert export._thread._pool._reserved == 4 * MIB
        source.proxy.flow()
        for task, start in zip(reading, range(40, 50), strict=True):
            assert b"".join(await task) == pattern(start * MIB, MIB)
        while len(done) < 40:
            await asyncio.sleep(0.001)
        assert not any(done)
        assert export._thread._pool._reserved == 0
        assert os.pread(file.fileno(), 40 * MIB, 0) == pattern(0, 40 * MIB)
    await export.close()


async def test_a_request_that_is_longer_than_all_memory_has_it_alone(source: Source) -> None:
    export = await RemoteExport.connect(source.uri, memory=MIB)
    reads = await asyncio.gather(*(export.read(i * 8 * MIB, 8 * MIB) for i in range(4)))
    assert b"".join(b"".join(buffers) for buffers in reads) == pattern(0, 32 * MIB)
    await export.close()


async def test_failed_requests_give_their_memory_back(source: Source) -> None:
    export = await RemoteExport.connect(source.uri, connections=2, memory=2 * MIB)
    await settled(export, 2)
    source.proxy.stall()
    reading = [asyncio.create_task(export.read(i * MIB, MIB)) for i in range(10)]
    await asyncio.sleep(0.05)
    source.proxy.cut()
    answers = await asyncio.gather(*reading, return_exceptions=True)
    assert all(isinstance(answer, OSError) for answer in answers)
    assert export._thread._pool._reserved == 0
    await export.close()


async def test_a_mistake_in_the_thread_loses_the_export_and_leaves_nobody_waiting(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    export = await RemoteExport.connect(source.uri, connections=2)
    await settled(export, 2)
    source.proxy.stall()
    reading = [asyncio.create_task(export.read(i * MIB, MIB)) for i in range(4)]
    await asyncio.sleep(0.02)

    def mistaken(*_: object) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr(export._thread._connections, "expire", mistaken)
    monkeypatch.setattr(export._thread._connections, "_unwatch", mistaken)
    late = asyncio.create_task(export.read(0, 512))
    answers = await asyncio.gather(*reading, late, return_exceptions=True)
    assert all(isinstance(answer, OSError) for answer in answers)
    assert "nbdstream" in await export.lost
    assert "a mistake of ours" in caplog.text
    await export.close()
