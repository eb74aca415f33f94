"""What the guest's requests take: percentiles of a histogram, and of requests that nobody timed one by one."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from nbdstream.block.remote.export import RemoteExport
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.stream import latency as latency_module
from nbdstream.stream.latency import GuestLatency, Histogram
from tests.stream.peers import SourceDisk, some_bytes

if TYPE_CHECKING:
    import pytest

    from nbdstream.stream.snapshot import Latency


@given(st.lists(st.floats(2e-6, 500), min_size=1, max_size=300), st.sampled_from([0.5, 0.99, 1.0]))
def test_a_percentile_is_right_to_a_fifth(times: list[float], share: float) -> None:
    histogram = Histogram()
    for seconds in times:
        histogram.add(seconds)
    exact = sorted(times)[max(0, -(-int(len(times) * share * 1000) // 1000) - 1)]
    assert exact * 0.99 <= histogram.percentile(share) * 1.2
    slower = sum(seconds > histogram.percentile(share) for seconds in times)
    assert slower <= len(times) * (1 - share) + 1e-6


def test_times_out_of_all_bounds_are_counted() -> None:
    histogram = Histogram()
    for seconds in (-1.0, 0.0, 1e-9, 1e9):
        histogram.add(seconds)
    assert histogram.total == 4
    assert Histogram().percentile(0.99) == 0.0


def test_a_part_counts_by_its_weight() -> None:
    fast, all_ = Histogram(), Histogram()
    for _ in range(10):
        fast.add(0.0001)
    all_.add_all(fast, 99.5)
    for _ in range(5):
        all_.add(0.1)
    assert all_.summary().requests == 1000
    assert all_.percentile(0.99) < 0.0002
    assert all_.percentile(0.996) > 0.1


class Served:
    """A disk in memory behind a server, watched."""

    def __init__(self) -> None:
        self.disk = SourceDisk(some_bytes(1 << 20))
        self.export = Export("", self.disk, writable=False)
        self.server = NbdServer([self.export])
        self.needed: set[Any] = set()
        self.latency = GuestLatency([self.export], self.needed.__contains__)
        self.looks: list[Latency] = []

    async def start(self, directory: str) -> RemoteExport:
        await self.server.listen_unix(f"{directory}/guest")
        self.latency.start(self.looks.append)
        return await RemoteExport.connect(f"nbd+unix:///?socket={directory}/guest", connections=1)

    async def stop(self, guest: RemoteExport) -> None:
        self.latency.stop()
        await guest.close()
        await self.server.close(1.0)


async def test_requests_that_take_their_time_are_timed(directory: str) -> None:
    served = Served()
    guest = await served.start(directory)
    served.disk.gate.clear()
    asyncio.get_running_loop().call_later(0.05, served.disk.gate.set)
    await guest.read(0, 512)
    for _ in range(99):
        await guest.read(0, 512)
    local = served.latency.look()
    assert local.requests == 100
    assert local.p50 < 0.02
    assert served.latency.shown[0].p99 <= local.p99
    assert Histogram().summary() == served.latency.shown[1]
    await served.stop(guest)


async def test_those_that_need_the_source_are_told_apart(directory: str) -> None:
    served = Served()
    guest = await served.start(directory)
    read = served.disk.read

    async def from_afar(offset: int, length: int) -> Any:
        if offset:
            served.needed.add(asyncio.current_task())
            await asyncio.sleep(0.05)
        return await read(offset, length)

    served.disk.read = from_afar  # type: ignore[method-assign]
    await guest.read(0, 512)
    await guest.read(512, 512)
    served.latency.look()
    local, remote = served.latency.shown
    assert (local.requests, remote.requests) == (1, 1)
    assert local.p99 < 0.05 <= remote.p99
    await served.stop(guest)


async def test_those_that_are_answered_at_once_take_what_the_loop_takes(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served()
    monkeypatch.setattr(served.disk, "read_now", lambda offset, length: (served.disk.data[offset : offset + length],))
    guest = await served.start(directory)
    chance = random.Random(1)
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        await guest.read(0, 512)
        if chance.random() < 0.05:
            time.sleep(0.02)  # the loop stands still
    served.latency.look()
    local = served.latency.shown[0]
    assert local.requests > 20
    assert 0.005 < local.p99 < 0.1
    await served.stop(guest)


async def test_it_is_told_twice_a_second_and_not_after_the_end(directory: str) -> None:
    served = Served()
    guest = await served.start(directory)
    await guest.read(0, 512)
    while len(served.looks) < 2:
        await asyncio.sleep(0.01)
    await served.stop(guest)
    looks = len(served.looks)
    assert sum(look.requests for look in served.looks) == 1
    await asyncio.sleep(0.6)
    assert len(served.looks) == looks
    assert served.export.timed is None


async def test_while_nobody_asks_for_anything_nothing_is_sampled(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served()
    monkeypatch.setattr(latency_module, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(served.disk, "read_now", lambda offset, length: (served.disk.data[offset : offset + length],))
    guest = await served.start(directory)
    while "sample" in served.latency._timers:
        await asyncio.sleep(0.005)
    while "sample" not in served.latency._timers:
        await guest.read(0, 512)
    await served.stop(guest)
