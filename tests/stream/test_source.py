"""The source: requests are held while it is away and made again when it is back; it must be the one it was."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
from typing import TYPE_CHECKING

import pytest

from nbdstream.errors import SourceError
from nbdstream.extents import ExtentFlags
from nbdstream.stream import source as source_module
from nbdstream.stream.source import Source, SourceOptions, round_up
from nbdstream.uri import NbdUri
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, some_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(source_module, "_LONGEST_PAUSE_SECONDS", 0.02)


@pytest.fixture
async def source(server: SourceServer) -> AsyncIterator[Source]:
    source = server.source()
    await source.connect()
    yield source
    server.disk.gate.set()
    await source.close()


async def read(source: Source, offset: int, length: int) -> bytes:
    return b"".join(map(bytes, await source.read(offset, length)))


async def lost(source: Source) -> None:
    while source.connected:
        await asyncio.sleep(0.001)


class Copied:
    """A copy, waited for; ``wanted`` as the source sees it."""

    def __init__(self, source: Source, fd: int, offset: int, length: int, *, wanted: bool = True) -> None:
        self.wanted = wanted
        self.answer: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        source.copy_soon(offset, length, fd, 0, self._done, zero_unit=CLUSTER, urgent=False, wanted=lambda: self.wanted)

    def _done(self, zero: int | None, error: OSError | None) -> None:
        if error:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(zero)


async def test_what_the_source_has_is_read(source: Source, disk: SourceDisk) -> None:
    assert source.size == disk.size
    assert await read(source, 1000, 5000) == disk.data[1000:6000]


async def test_a_source_that_is_not_there_is_an_error_that_names_it(directory: str) -> None:
    source = Source(NbdUri.parse(f"nbd+unix:///?socket={directory}/nobody"))
    with pytest.raises(SourceError, match="nobody"):
        await source.connect()
    await source.close()


async def test_what_is_asked_before_the_source_is_there_waits_for_it(server: SourceServer, disk: SourceDisk) -> None:
    await server.stop()
    source = server.source()
    source.expect(disk.size)
    source.connect_later("not yet")
    reading = asyncio.create_task(read(source, 0, 100))
    asking = asyncio.create_task(source.extents(0, disk.size))
    await asyncio.sleep(0.01)
    assert not reading.done()
    await server.start()
    assert await reading == disk.data[:100]
    assert [extent.flags for extent in await asking] == [ExtentFlags.DATA]
    await source.close()


async def test_what_was_in_flight_when_the_source_went_is_answered_when_it_is_back(
    server: SourceServer, source: Source, disk: SourceDisk, tmp_path: Path
) -> None:
    disk.gate.clear()
    fd = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    reading = asyncio.create_task(read(source, 0, 100))
    copying = Copied(source, fd, CLUSTER, 2 * CLUSTER)
    while len(disk.reads) < 2:
        await asyncio.sleep(0.001)
    await server.stop()
    await lost(source)
    later = asyncio.create_task(read(source, 200, 100))
    disk.gate.set()
    await asyncio.sleep(0.01)
    assert not reading.done()
    await server.start()
    assert await reading == disk.data[:100]
    assert await later == disk.data[200:300]
    assert await copying.answer == 0
    assert os.pread(fd, 1 << 20, 0) == disk.data[CLUSTER : 3 * CLUSTER]
    os.close(fd)


async def test_a_source_that_goes_often_loses_no_request(
    server: SourceServer, source: Source, disk: SourceDisk
) -> None:
    answers: list[int] = []

    async def reader(number: int) -> None:
        for turn in range(30):
            offset = (number * 30 + turn) * 512
            assert await read(source, offset, 512) == disk.data[offset : offset + 512]
            answers.append(offset)

    readers = [asyncio.create_task(reader(number)) for number in range(8)]
    while not all(task.done() for task in readers):
        await server.stop()
        await server.start()
        goal = min(len(answers) + 20, 8 * 30)
        while len(answers) < goal and not all(task.done() for task in readers):
            await asyncio.sleep(0.001)
    await asyncio.gather(*readers)
    assert len(answers) == 8 * 30


async def test_it_tells_that_it_is_lost_and_that_it_is_back(server: SourceServer, source: Source) -> None:
    seen: list[bool] = []
    source.on_change = lambda: seen.append(source.connected)
    await server.stop()
    await lost(source)
    assert source.lost_since is not None
    assert source.lost_because
    with pytest.raises(SourceError):
        _ = source.export
    await server.start()
    await source.present()
    assert source.lost_since is None
    assert seen == [False, True]


async def test_pauses_between_attempts_grow_up_to_a_limit(
    server: SourceServer, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_FIRST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(source_module, "_LONGEST_PAUSE_SECONDS", 10.0)
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def at_once(seconds: float) -> None:
        if seconds >= 1.0:
            pauses.append(seconds)
        await sleep(0)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "sleep", at_once)
        await server.stop()
        while len(pauses) < 7:
            await sleep(0.001)
    assert pauses[:7] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]


async def test_another_disk_in_its_place_is_not_taken_and_the_right_one_is_waited_for(
    server: SourceServer, source: Source, disk: SourceDisk
) -> None:
    await server.stop()
    server.disk = SourceDisk(bytes(disk.size + 512))
    await server.start()
    reading = asyncio.create_task(read(source, 0, 100))
    while "another disk" not in source.lost_because:
        await asyncio.sleep(0.001)
    assert not source.connected
    assert not reading.done()
    await server.stop()
    server.disk = disk
    await server.start()
    assert await reading == disk.data[:100]


async def test_sizes_are_compared_as_qemu_does(server: SourceServer) -> None:
    await server.stop()
    server.disk = SourceDisk(some_bytes(1000))
    await server.start()
    for expected in (1000, 1024, 513):
        source = server.source()
        source.expect(expected)
        await source.connect()
        assert source.size == 1000
        await source.close()
    for expected in (512, 1025):
        source = server.source()
        source.expect(expected)
        with pytest.raises(SourceError, match="another disk"):
            await source.connect()
        await source.close()
    assert [round_up(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


async def test_an_error_of_the_server_is_passed_on(source: Source, disk: SourceDisk) -> None:
    disk.error = OSError(errno.EIO, "a bad sector")
    for request in (read(source, 0, 100), source.extents(0, 100)):
        with pytest.raises(OSError, match=r".") as error:
            await request
        assert error.value.errno == errno.EIO
    disk.error = None
    assert await read(source, 0, 100) == disk.data[:100]


async def test_whoever_does_not_wait_any_more_does_no_harm(
    server: SourceServer, source: Source, disk: SourceDisk
) -> None:
    disk.gate.clear()
    reading = asyncio.create_task(read(source, 0, 100))
    await disk.asked.wait()
    reading.cancel()
    await server.stop()
    await lost(source)
    waiting = asyncio.create_task(source.present())
    await asyncio.sleep(0)
    waiting.cancel()
    disk.gate.set()
    await server.start()
    assert await read(source, 0, 100) == disk.data[:100]


async def test_a_closed_source_does_not_come_back(server: SourceServer, source: Source) -> None:
    await server.stop()
    await lost(source)
    await source.close()
    await server.start()
    await asyncio.sleep(0.05)
    assert not source.connected


async def test_nbdkit_killed_and_started_again_is_the_same_source(directory: str) -> None:
    path = f"{directory}/nbdkit"
    command = ["nbdkit", "-f", "--exit-with-parent", "-U", path, "pattern", "1M"]
    source = Source(NbdUri.parse(f"nbd+unix:///?socket={path}"), options=SourceOptions(connections=4))
    source.expect(1 << 20)
    source.connect_later("not started yet")
    for _ in range(2):
        nbdkit = subprocess.Popen(command)
        try:
            assert (await read(source, 8, 8)) == (8).to_bytes(8, "big")
        finally:
            nbdkit.kill()
            nbdkit.wait()
        await lost(source)
        os.unlink(path)
    await source.close()


# How long requests wait.


async def failing(request: asyncio.Task[bytes]) -> int | None:
    with pytest.raises(OSError, match=r".") as error:
        await request
    return error.value.errno


async def test_with_no_patience_what_needs_the_source_fails_until_it_is_back(
    server: SourceServer, disk: SourceDisk
) -> None:
    source = Source(NbdUri.parse(server.uri), options=SourceOptions(connections=1, hold=0.0))
    await source.connect()
    disk.gate.clear()
    flying = asyncio.create_task(read(source, 0, 100))
    await disk.asked.wait()
    await server.stop()
    assert await failing(flying) == errno.EIO
    assert await failing(asyncio.create_task(read(source, 0, 100))) == errno.EIO
    present = asyncio.create_task(source.present())
    disk.gate.set()
    await server.start()
    await present
    assert await read(source, 0, 100) == disk.data[:100]
    await source.close()


async def test_patience_begins_anew_with_every_loss(server: SourceServer, disk: SourceDisk) -> None:
    source = Source(NbdUri.parse(server.uri), options=SourceOptions(connections=1, hold=0.2))
    await source.connect()
    for _ in range(2):
        await server.stop()
        await lost(source)
        waiting = asyncio.create_task(read(source, 0, 100))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await server.start()
        assert await waiting == disk.data[:100]
    await server.stop()
    await lost(source)
    began = asyncio.get_running_loop().time()
    assert await failing(asyncio.create_task(read(source, 0, 100))) == errno.EIO
    assert asyncio.get_running_loop().time() - began > 0.15
    await source.close()


async def test_what_nobody_waits_for_is_given_back_when_the_source_is_lost(
    server: SourceServer, source: Source, disk: SourceDisk, tmp_path: Path
) -> None:
    with open(tmp_path / "file", "wb") as file:
        disk.gate.clear()
        background = Copied(source, file.fileno(), 0, CLUSTER, wanted=False)
        wanted = Copied(source, file.fileno(), CLUSTER, CLUSTER)
        while len(disk.reads) < 2:
            await asyncio.sleep(0.001)
        await server.stop()
        with pytest.raises(OSError, match=r".") as error:
            await background.answer
        assert error.value.errno == errno.ECONNRESET
        late = Copied(source, file.fileno(), 0, CLUSTER, wanted=False)
        assert not late.answer.done()
        with pytest.raises(OSError, match=r"."):
            await late.answer
        disk.gate.set()
        await server.start()
        assert await wanted.answer == 0


async def test_a_mistake_of_ours_does_not_end_the_attempts(
    server: SourceServer, source: Source, disk: SourceDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistakes: list[int] = []

    async def check(_export: object) -> None:
        if len(mistakes) < 2:
            mistakes.append(1)
            raise ZeroDivisionError

    source.check = check
    await server.stop()
    await lost(source)
    await server.start()
    assert await read(source, 0, 100) == disk.data[:100]
    assert len(mistakes) == 2


# Further sources.


@pytest.fixture
async def second(directory: str, disk: SourceDisk) -> AsyncIterator[SourceServer]:
    """Another server of the same disk."""
    server = SourceServer(f"{directory}/second", disk)
    yield server
    await server.stop()


def of_both(server: SourceServer, second: SourceServer) -> Source:
    uris = map(NbdUri.parse, (server.uri, second.uri))
    return Source(*uris, options=SourceOptions(connections=1))


async def test_where_the_first_is_not_to_be_had_the_next_one_is_taken(
    server: SourceServer, second: SourceServer, disk: SourceDisk
) -> None:
    source = of_both(server, second)
    await source.connect()
    assert str(source.uri) == server.uri
    await server.stop()
    await lost(source)
    waiting = asyncio.create_task(read(source, 0, 100))
    await second.start()
    assert await waiting == disk.data[:100]
    assert str(source.uri) == second.uri
    await server.start()
    assert await read(source, 0, 100) == disk.data[:100]
    assert str(source.uri) == second.uri  # what works is left as it is
    await second.stop()
    await lost(source)
    assert await read(source, 0, 100) == disk.data[:100]
    assert str(source.uri) == server.uri
    await source.close()


async def test_a_wrong_one_is_passed_over(
    server: SourceServer, second: SourceServer, disk: SourceDisk, caplog: pytest.LogCaptureFixture
) -> None:
    source = of_both(server, second)
    await source.connect()
    second.disk = SourceDisk(some_bytes(41 * CLUSTER))
    await second.start()
    reasons: list[str] = []
    source.on_change = lambda: reasons.append(source.lost_because)
    await server.stop()
    while not reasons or "another disk" not in reasons[-1]:
        await asyncio.sleep(0.001)
    assert not source.connected
    assert "another disk" in caplog.text
    await server.start()
    assert await read(source, 0, 100) == disk.data[:100]
    assert str(source.uri) == server.uri
    await source.close()


async def test_none_of_them_is_an_error_that_names_both(server: SourceServer, second: SourceServer) -> None:
    source = of_both(server, second)
    await server.stop()
    with pytest.raises(SourceError) as error:
        await source.connect()
    assert server.path in str(error.value)
    assert second.path in str(error.value)
    await source.close()
