"""What a client with an export open can make the server spend: memory that is not its own, and everybody's time."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING

import pytest

from nbdstream.server.limits import Limits
from nbdstream.wire.nbd import REQUEST, Cmd, Err, ReplyType
from tests.server.raw_client import RawClient, request, write_request
from tests.support.attacked import DISK_BYTES, Attacked, Servers, until
from tests.support.attacked_server import COMB_SIZE, DISK_COMB_END, HUGE_SIZE, NUMBERS, PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
HUGE = 0xFFFFFFFF
CONNECTION = 512 << 10
"""Bytes: a receive buffer, and what Python and the loop keep of a connection."""


@pytest.fixture
def servers() -> Iterator[Servers]:
    """A server for each test: what an earlier one has freed and kept must not count for the next."""
    with Servers() as servers:
        yield servers


def stop_reading(client: RawClient) -> None:
    """Take nothing any more but what the kernel takes."""
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]


# -- memory -------------------------------------------------------------------------------------------------


async def test_writes_of_64_mib_that_are_announced_and_begun_cost_next_to_nothing(attacked: Attacked) -> None:
    async with attacked.grows_by_at_most(50 * CONNECTION):
        for _ in range(50):
            client = await attacked.open("huge")
            client.send(request(Cmd.WRITE, 1, 0, 64 * MIB) + b"x")
        assert await (await attacked.open()).read(4, 4) == b"\0\0\0\1"


async def test_refused_writes_of_4_gib_that_are_announced_cost_next_to_nothing(attacked: Attacked) -> None:
    async with attacked.grows_by_at_most(50 * CONNECTION):
        for _ in range(50):
            client = await attacked.open("comb")
            client.send(request(Cmd.WRITE, 1, 0, HUGE) + bytes(1000))
        assert await (await attacked.open()).read(4, 4) == b"\0\0\0\1"


@pytest.mark.parametrize("export", ["disk", "huge", "comb"])
async def test_clients_that_ask_for_much_and_never_read_cost_a_bounded_amount(attacked: Attacked, export: str) -> None:
    async with attacked.grows_by_at_most(20 * (CONNECTION + Limits().reply_backlog)):
        for _ in range(20):
            client = await attacked.open(export)
            stop_reading(client)
            client.send(b"".join(request(Cmd.READ, cookie, 0, 32 * MIB) for cookie in range(16)))
        assert await (await attacked.open()).read(4, 4) == b"\0\0\0\1"
        await asyncio.sleep(0.5)  # for it to do what it would do with the requests


async def test_errors_and_extents_that_nobody_reads_cost_a_bounded_amount(attacked: Attacked) -> None:
    async with attacked.grows_by_at_most(20 * (CONNECTION + 2 * Limits().reply_backlog)):
        for number in range(20):
            client = await attacked.open("comb", structured=True, contexts=["base:allocation"])
            stop_reading(client)
            command = Cmd.BLOCK_STATUS if number % 2 else Cmd.RESIZE
            client.send(request(command, 1, 0, COMB_SIZE) * 20_000)
        assert await (await attacked.open()).read(4, 4) == b"\0\0\0\1"
        await asyncio.sleep(0.5)


async def test_large_writes_in_a_row_keep_to_the_bytes_in_flight(attacked: Attacked) -> None:
    async with attacked.grows_by_at_most(2 * (CONNECTION + Limits().bytes_in_flight)):
        client = await attacked.open()
        for cookie in range(12):
            client.send(write_request(cookie, DISK_BYTES - (32 * MIB), bytes(32 * MIB)))
            await client.writer.drain()
        assert {(await client.reply()).cookie for _ in range(12)} == set(range(12))


# -- time ---------------------------------------------------------------------------------------------------


async def test_reads_by_the_thousand_let_others_have_their_turn(attacked: Attacked) -> None:
    clients = [await attacked.open() for _ in range(8)]
    wanted = 5000

    async def flood(client: RawClient) -> None:
        client.send(b"".join(request(Cmd.READ, cookie, cookie * 512, 512) for cookie in range(wanted)))
        for cookie in range(wanted):
            chunk = await client.reply(512)
            assert (chunk.cookie, chunk.error) == (cookie, 0)

    await asyncio.gather(*map(flood, clients))


async def test_reads_of_64_mib_let_others_have_their_turn(attacked: Attacked) -> None:
    clients = [await attacked.open(export) for export in ("huge", "huge", "comb", "disk")]

    async def flood(client: RawClient) -> None:
        length = min(64 * MIB, client.size)
        client.send(b"".join(request(Cmd.READ, cookie, 0, length) for cookie in range(4)))
        left = 4 * (16 + length)
        while left:
            left -= len(await client.reader.read(min(left, MIB)))

    await asyncio.gather(*map(flood, clients))


async def test_cache_of_a_whole_disk_by_the_hundred_lets_others_have_their_turn(attacked: Attacked) -> None:
    clients = [await attacked.open() for _ in range(10)]
    for client in clients:
        client.send(request(Cmd.CACHE, 1, 0, client.size) * 4)
    for client in clients:
        assert {(await client.reply()).error for _ in range(4)} == {0}


async def test_cache_of_almost_4_gib_lets_others_have_their_turn(attacked: Attacked) -> None:
    client = await attacked.open("huge")
    client.send(b"".join(request(Cmd.CACHE, cookie, HUGE_SIZE - HUGE, HUGE) for cookie in range(8)))
    assert [(await client.reply()).error for _ in range(8)] == [0] * 8


async def test_zeroes_and_trims_of_4_gib_by_the_hundred_let_others_have_their_turn(attacked: Attacked) -> None:
    client = await attacked.open("huge")
    for cookie in range(200):
        command = Cmd.TRIM if cookie % 2 else Cmd.WRITE_ZEROES
        client.send(request(command, cookie, 0, HUGE))
    assert [(await client.reply()).error for _ in range(200)] == [0] * 200


async def test_flushes_by_the_thousand_let_others_have_their_turn(attacked: Attacked) -> None:
    client = await attacked.open()
    client.send((write_request(1, 0, NUMBERS[:512]) + request(Cmd.FLUSH, 2)) * 1000)
    assert [(await client.reply()).error for _ in range(2000)] == [0] * 2000


async def test_an_image_of_holes_between_every_two_pages_is_described_in_bounded_replies(attacked: Attacked) -> None:
    client = await attacked.open("comb", structured=True, contexts=["base:allocation"])
    client.send(request(Cmd.BLOCK_STATUS, 1, 0, COMB_SIZE) * 200)
    for _ in range(200):
        chunk = await client.reply()
        assert chunk.type == ReplyType.BLOCK_STATUS
        extents = list(struct.iter_unpack("!II", chunk.payload[4:]))
        assert extents[:2] == [(PAGE, 0), (PAGE, 3)]
        assert len(extents) <= 1 << 20


async def test_questions_for_extents_by_the_thousand_let_others_have_their_turn(attacked: Attacked) -> None:
    clients = [await attacked.open(structured=True, contexts=["base:allocation"]) for _ in range(10)]
    wanted = 100
    for client in clients:
        client.send(request(Cmd.BLOCK_STATUS, 1, len(NUMBERS), DISK_COMB_END - len(NUMBERS)) * wanted)
    for client in clients:
        assert {(await client.reply()).type for _ in range(wanted)} == {ReplyType.BLOCK_STATUS}


async def test_a_request_that_comes_byte_by_byte_keeps_nobody_waiting(attacked: Attacked) -> None:
    slow = [await attacked.open() for _ in range(50)]
    asked = request(Cmd.READ, 5, 4, 4)
    for at in range(REQUEST.size):
        for client in slow:
            client.send(asked[at : at + 1])
        await asyncio.sleep(0.01)
    for client in slow:
        assert (await client.reply(4)).payload == b"\0\0\0\1"


@pytest.mark.parametrize("limits", [{"connections": 20}])
async def test_connections_that_do_nothing_are_bounded_and_their_places_free_again(attacked: Attacked) -> None:
    idle = [await attacked.open() for _ in range(19)]
    assert await (await attacked.connect()).closed()
    for client in idle:
        client.writer.transport.abort()
    await until(lambda: attacked.count_descriptors() <= attacked.descriptors)
    assert (await (await attacked.open()).ask(Cmd.WRITE, 1 << 40, 1, payload=b"x")).error == Err.ENOSPC
