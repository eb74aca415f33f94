"""When the server stays awake for the next request, with the time in the test's hand."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from nbdstream.server.export import Export
from nbdstream.server.polling import Polling

if TYPE_CHECKING:
    from tests.server.conftest import Harness
    from tests.server.memory_device import MemoryDevice

LONGEST = 50_000


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})


@pytest.fixture
def clock() -> Clock:
    return Clock()


def serve(polling: Polling, clock: Clock, *gaps: int) -> None:
    """Requests that arrive so long after the last reply, and are answered at once."""
    for gap in gaps:
        clock.now += gap
        polling.requested()
        polling.replied()


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_it_stays_awake_for_a_quick_client_as_long_as_it_may(clock: Clock) -> None:
    polling = Polling(LONGEST, clock=clock)
    serve(polling, clock, 10_000_000, 40_000)
    await turns()
    assert polling.awake
    clock.now += LONGEST - 1
    await turns()
    assert polling.awake
    clock.now += 1
    await turns()
    assert not polling.awake


async def test_each_reply_begins_the_time_anew(clock: Clock) -> None:
    polling = Polling(LONGEST, clock=clock)
    serve(polling, clock, 0, 40_000, 40_000)
    clock.now += 40_000
    await turns()
    assert polling.awake


async def test_a_first_request_is_no_sign_of_a_second(clock: Clock) -> None:
    polling = Polling(LONGEST, clock=clock)
    serve(polling, clock, 0)
    assert not polling.awake


async def test_it_sleeps_between_the_requests_of_a_slow_client(clock: Clock) -> None:
    polling = Polling(LONGEST, clock=clock)
    serve(polling, clock, *[2 * LONGEST] * 5)
    assert not polling.awake


async def test_having_looked_in_vain_it_sleeps_until_the_client_is_quick_again(clock: Clock) -> None:
    polling = Polling(LONGEST, clock=clock)
    serve(polling, clock, 0, 40_000)
    clock.now += LONGEST
    await turns()
    serve(polling, clock, 5 * LONGEST)
    assert not polling.awake
    serve(polling, clock, LONGEST, LONGEST)  # waking up is a part of that
    assert polling.awake


async def test_a_client_that_is_a_little_too_slow_is_looked_for_more_and_more_seldom(clock: Clock) -> None:
    polling = Polling(LONGEST, clock=clock)
    looks = 0
    for _ in range(1000):
        serve(polling, clock, 1000)
        looks += polling.awake
        clock.now += LONGEST
        await turns()
    assert 5 < looks < 12


async def test_one_look_that_pays_makes_up_for_all_in_vain(clock: Clock) -> None:
    polling = Polling(LONGEST, clock=clock)
    for _ in range(100):
        serve(polling, clock, 1000)
        clock.now += LONGEST
        await turns()
    serve(polling, clock, *[1000] * 50)
    assert polling.awake
    clock.now += LONGEST
    await turns()
    serve(polling, clock, 1000, 1000)
    assert polling.awake


async def test_zero_means_never(clock: Clock) -> None:
    polling = Polling(0, clock=clock)
    serve(polling, clock, 0, 0, 0)
    assert not polling.awake


async def test_the_only_processor_is_left_to_the_client(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    polling = Polling(LONGEST, clock=clock)
    serve(polling, clock, 0, 0, 0)
    assert not polling.awake


@pytest.mark.parametrize("hydrating", [False, True])
async def test_beside_a_stream_the_server_sleeps(harness: Harness, device: MemoryDevice, hydrating: bool) -> None:
    device.hydrating = hydrating
    server = await harness.serve(Export("", device, writable=True))
    server.polling = Polling(LONGEST, clock=Clock())
    client = await harness.open()
    await client.read(0, 4096)
    await client.read(0, 4096)
    assert server.polling.awake is not hydrating
    server.polling._until = 0  # or the loop would be awake to the end of the test


async def test_with_a_request_in_flight_the_server_sleeps(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve(Export("", device, writable=True))
    server.polling = Polling(LONGEST, clock=Clock())
    device.slow = True
    client = await harness.open()
    await client.read(0, 4096)
    await client.read(0, 4096)
    assert not server.polling.awake
