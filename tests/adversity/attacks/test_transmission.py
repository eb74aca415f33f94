"""What a client can do with an export open: bounds that wrap, streams that fall out of step, goodbyes of all kinds."""

from __future__ import annotations

import asyncio
import socket
import struct
from itertools import count

import pytest

from nbdstream.wire.nbd import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Cmd,
    CmdFlag,
    Err,
    Opt,
    ReplyType,
)
from tests.server.raw_client import RawClient, extended_request, info_data, meta_data, option, request, write_request
from tests.support.attacked import DISK_BYTES, Attacked
from tests.support.attacked_server import DISK_SIZE, HUGE_SIZE, NUMBERS, PAGE

LAST = (1 << 64) - 1
HUGE = 0xFFFFFFFF
RESET = struct.pack("ii", 1, 0)
"""For SO_LINGER: to close is to reset."""
PAYLOAD = bytes(range(256)) * 4096
PAYLOADLESS = [Cmd.READ, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS]


async def in_step(client: RawClient) -> bool:
    """Whether the next request is understood and answered as if nothing had happened."""
    return await client.read(4096, 4096) == NUMBERS[4096:8192]


# -- bounds -------------------------------------------------------------------------------------------------

BEYOND = [
    (DISK_SIZE, 1),
    (DISK_SIZE - 1, 2),
    (0, DISK_SIZE + 1),
    (DISK_SIZE + 1, 0),
    (0, HUGE),
    (LAST, 1),
    (LAST, HUGE),
    (LAST - 4095, 4096),
    (LAST - HUGE + 1, HUGE),
    (1 << 63, 4096),
    ((1 << 63) - 1, HUGE),
    ((1 << 32) - 1, 1),
    (1 << 32, HUGE),
    (LAST, 0),
]


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
async def test_no_bound_wraps_around(attacked: Attacked, structured: bool) -> None:
    client = await attacked.open(structured=structured, contexts=["base:allocation"] if structured else [])
    for command in PAYLOADLESS:
        for offset, length in BEYOND:
            chunk = await client.ask(command, offset, length)
            expected = {Err.ENOSPC} if command == Cmd.WRITE_ZEROES else {Err.EINVAL, Err.EOVERFLOW}
            assert chunk.error in expected, (command, offset, length)
    for offset, length in BEYOND:
        if length <= 4096:
            chunk = await client.ask(Cmd.WRITE, offset, length, payload=bytes(length))
            assert chunk.error == Err.ENOSPC, (offset, length)
    assert await client.read(0, len(NUMBERS)) == NUMBERS


async def test_zeroes_and_trims_of_almost_4_gib_are_done_to_their_end(attacked: Attacked) -> None:
    client = await attacked.open("huge")
    for command in (Cmd.WRITE_ZEROES, Cmd.TRIM):
        for offset in (123, HUGE_SIZE - HUGE):
            ends = offset, offset + (64 << 20), offset + HUGE - 1000
            for at in ends:
                assert await client.write(at, b"x" * 1000) == 0
            assert (await client.ask(command, offset, HUGE)).error == 0
            if command == Cmd.WRITE_ZEROES:
                assert [await client.read(at, 1000) for at in ends] == [bytes(1000)] * 3
    assert await client.read(HUGE_SIZE - 1, 1) == b"\0"


@pytest.mark.parametrize("flags", [0, CmdFlag.REQ_ONE])
async def test_block_status_of_almost_4_gib_at_any_offset(attacked: Attacked, flags: int) -> None:
    client = await attacked.open("huge", structured=True, contexts=["base:allocation"])
    for offset, length in [(0, HUGE), (1, HUGE), (HUGE_SIZE - 1, 1), (HUGE_SIZE - HUGE, HUGE), (12345, 1)]:
        chunk = await client.ask(Cmd.BLOCK_STATUS, offset, length, flags=flags)
        assert chunk.type == ReplyType.BLOCK_STATUS
        extents = list(struct.iter_unpack("!II", chunk.payload[4:]))
        assert extents
        assert all(extent for extent, _ in extents)
        assert sum(extent for extent, _ in extents[:-1]) < length
        assert not flags or (len(extents) == 1 and extents[0][0] <= length)


async def test_no_64_bit_length_wraps_around(attacked: Attacked) -> None:
    client = await attacked.open(extended=True, contexts=["base:allocation"])
    for command in PAYLOADLESS:
        for offset, length in [*BEYOND, (0, LAST), (1, LAST), (LAST, LAST), (DISK_SIZE, 1 << 63), (1, 1 << 32)]:
            chunk = await client.ask(command, offset, length)
            expected = {Err.ENOSPC} if command == Cmd.WRITE_ZEROES else {Err.EINVAL, Err.EOVERFLOW}
            assert chunk.error in expected, (command, offset, length)
    assert await in_step(client)


async def test_zeroes_of_more_than_4_gib_are_done_to_their_end(attacked: Attacked) -> None:
    client = await attacked.open("huge", extended=True)
    ends = 123, (1 << 32) + 5, HUGE_SIZE - 1000
    for at in ends:
        assert await client.write(at, b"x" * 1000) == 0
    assert (await client.ask(Cmd.WRITE_ZEROES, 123, HUGE_SIZE - 123)).error == 0
    other = await attacked.open("huge")
    assert [await other.read(at, 1000) for at in ends] == [bytes(1000)] * 3


async def test_extended_payloads_that_nobody_expects_keep_the_stream_in_step(attacked: Attacked) -> None:
    client = await attacked.open(extended=True, contexts=["base:allocation"])
    for command in (*PAYLOADLESS, Cmd.FLUSH, Cmd.RESIZE, 99):
        for payload in (b"x", PAYLOAD, extended_request(Cmd.WRITE_ZEROES, 99, 0, 4096) * 1000):
            assert (await client.ask(command, 0, payload=payload)).error == Err.EINVAL, command
    assert await in_step(client)


@pytest.mark.parametrize("length", [(64 << 20) + 1, LAST])
async def test_an_extended_payload_that_is_too_long_is_not_waited_for(attacked: Attacked, length: int) -> None:
    client = await attacked.open(extended=True)
    header = EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, CmdFlag.PAYLOAD_LEN, Cmd.WRITE, 1, 0, length)
    client.send(header + bytes(1000))
    assert await client.closed()


async def test_filters_of_block_status_that_lie_are_refused(attacked: Attacked) -> None:
    client = await attacked.open(extended=True, contexts=["base:allocation"])
    asked = struct.pack("!Q", 4096)
    for payload in (
        b"x",
        asked,
        asked + b"xyz",
        asked + struct.pack("!I", 77),
        asked + struct.pack("!II", 1, 1),
        asked + struct.pack("!I", 1) * 100_000,
        struct.pack("!QI", LAST, 1),
        struct.pack("!QI", 0, 1),
    ):
        assert (await client.ask(Cmd.BLOCK_STATUS, 0, payload=payload)).error == Err.EINVAL, payload[:32]
    assert await in_step(client)


# -- staying in step ----------------------------------------------------------------------------------------

WRONG_WRITES = [
    ("disk", 0, 0x8000, Err.EINVAL),
    ("disk", 0, CmdFlag.DF | CmdFlag.REQ_ONE, Err.EINVAL),
    ("disk", DISK_SIZE, 0, Err.ENOSPC),
    ("disk", LAST, 0, Err.ENOSPC),
    ("comb", 0, 0, Err.EPERM),
]
"""Export, offset, flags, and what they are refused with."""


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
async def test_the_payload_of_a_wrong_write_is_not_taken_for_requests(attacked: Attacked, structured: bool) -> None:
    # A payload of requests: done, they would write over the numbers.
    inner = write_request(99, 0, b"y" * 100) * 5000
    for export, offset, flags, expected in WRONG_WRITES:
        client = await attacked.open(export, structured=structured)
        for payload in (b"x", PAYLOAD, inner):
            chunk = await client.ask(Cmd.WRITE, offset, len(payload), flags=flags, payload=payload)
            assert chunk.error == expected, (export, offset, flags)
        assert await client.read(0, PAGE) == (NUMBERS[:PAGE] if export == "disk" else b"x" * PAGE)


async def test_a_write_longer_than_allowed_is_refused_when_it_has_passed(attacked: Attacked) -> None:
    client = await attacked.open("huge")
    length = (64 << 20) + 1
    async with attacked.grows_by_at_most(4 << 20):
        client.send(request(Cmd.WRITE, 1, 0, length))
        for _ in range(64):
            client.send(bytes(1 << 20))
            await client.writer.drain()
        client.send(b"\0")
        assert (await client.reply()).error == Err.EINVAL
    assert await client.read(0, 4) == bytes(4)


async def test_a_length_on_a_command_without_payload_swallows_nothing(attacked: Attacked) -> None:
    client = await attacked.open()
    for command in (8, 9, 100, 0xFFFF):
        for length in (0, 28, 4096, HUGE):
            assert (await client.ask(command, 0, length)).error == Err.EINVAL
    assert (await client.ask(Cmd.FLUSH, 0, HUGE)).error == Err.EINVAL
    assert await in_step(client)


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("export", ["disk", "comb"])
async def test_every_flag_on_every_command_is_done_or_refused(
    attacked: Attacked, export: str, structured: bool
) -> None:
    client = await attacked.open(export, structured=structured)
    allowed = {0, Err.EINVAL, Err.EPERM, Err.ENOTSUP}
    for command in (*PAYLOADLESS, Cmd.WRITE, Cmd.FLUSH, Cmd.RESIZE):
        length = 0 if command == Cmd.FLUSH else 512
        payload = b"x" * 512 if command == Cmd.WRITE else b""
        for flags in (*(1 << bit for bit in range(16)), 0xFFFF):
            chunk = await client.ask(
                command, DISK_BYTES - 512 if export == "disk" else 0, length, flags=flags, payload=payload
            )
            assert chunk.error in allowed, (command, flags)
            if flags > CmdFlag.FAST_ZERO:
                assert chunk.error == Err.EINVAL, (command, flags)
    assert len(await client.read(0, PAGE)) == PAGE


async def test_fast_zero_where_it_was_not_offered_is_refused(attacked: Attacked) -> None:
    client = await attacked.open("comb", structured=True)
    assert (await client.ask(Cmd.WRITE_ZEROES, 0, PAGE, flags=CmdFlag.FAST_ZERO)).error == Err.EINVAL
    assert await client.read(0, PAGE) == b"x" * PAGE


async def test_a_request_without_its_magic_ends_its_own_connection(attacked: Attacked) -> None:
    other = await attacked.open()
    for garbage in (
        REQUEST.pack(REQUEST_MAGIC + 1, 0, 0, 1, 0, 4096),
        option(Opt.LIST) * 2,
        option(Opt.STARTTLS) * 2,
        bytes(28),
        request(Cmd.READ, 1, 0, 16)[1:] + b"xx",
    ):
        client = await attacked.open()
        client.send(garbage)
        assert await client.closed()
        assert await in_step(other)


async def test_one_cookie_for_everything_is_answered_each_time(attacked: Attacked) -> None:
    client = await attacked.open(structured=True)
    client.send(request(Cmd.READ, 7, 0, 4) * 1000 + write_request(7, DISK_BYTES - 4, b"data") * 100)
    answered = [await client.reply() for _ in range(1100)]
    assert {(chunk.cookie, chunk.error) for chunk in answered} == {(7, 0)}
    assert await in_step(client)


# -- goodbyes -----------------------------------------------------------------------------------------------


def session(structured: bool) -> bytes:
    """All that a client says in its life: an option and a command of every kind."""
    cookies = count(1)
    said = struct.pack("!I", 3) + option(Opt.LIST) + option(Opt.INFO, info_data("disk", [1, 2, 3])) + option(99, b"x")
    if structured:
        said += option(Opt.STRUCTURED_REPLY) + option(Opt.LIST_META_CONTEXT, meta_data("disk"))
        said += option(Opt.SET_META_CONTEXT, meta_data("disk", "base:allocation"))
    said += option(Opt.GO, info_data("disk"))
    at = DISK_BYTES - PAGE
    for command in PAYLOADLESS:
        said += request(command, next(cookies), at, PAGE)
    said += write_request(next(cookies), at, b"payload") + write_request(next(cookies), at, b"refused", flags=0x80)
    return said + request(Cmd.FLUSH, next(cookies)) + request(Cmd.DISC, next(cookies))


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("how", ["reset", "shut", "unread"])
async def test_clients_that_vanish_at_every_byte_of_a_session(attacked: Attacked, how: str, structured: bool) -> None:
    stream = session(structured)
    for length in range(len(stream) + 1):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(attacked.path)
            if how != "unread":
                client.recv(18)
            client.sendall(stream[:length])
            if how == "shut":
                client.shutdown(socket.SHUT_WR)
        if not length % 50:
            await attacked.quiet()
    await attacked.quiet()
    assert await in_step(await attacked.open())


async def test_connections_that_are_reset_at_any_moment_take_nobody_along(attacked: Attacked) -> None:
    stream = session(structured=True)
    for number in range(300):
        with socket.create_connection(("127.0.0.1", attacked.port)) as client:
            client.sendall(stream[: number * len(stream) // 300])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    await attacked.quiet()
    assert await in_step(await attacked.open())


async def test_what_is_sent_behind_disc_is_not_done(attacked: Attacked) -> None:
    client = await attacked.open()
    client.send(request(Cmd.READ, 1, 0, 4096) + request(Cmd.DISC, 2) + write_request(3, 0, b"late") + b"garbage" * 9999)
    assert (await client.reply(4096)).payload == NUMBERS[:4096]
    assert await client.closed()
    assert await (await attacked.open()).read(0, 4096) == NUMBERS[:4096]


async def test_clients_that_go_on_sending_behind_disc_are_cut_off(attacked: Attacked) -> None:
    client = await attacked.open()
    client.send(request(Cmd.DISC, 1))

    async def flood() -> None:
        while True:
            client.send(bytes(1 << 20))
            await client.writer.drain()

    with pytest.raises(ConnectionError):
        await flood()


async def test_a_client_that_leaves_with_much_in_flight_takes_nobody_along(attacked: Attacked) -> None:
    for goodbye in (b"", request(Cmd.DISC, 1)):
        for _ in range(10):
            client = await attacked.open()
            at = DISK_BYTES - (8 << 20)
            client.send(b"".join(write_request(cookie, at, PAYLOAD) for cookie in range(4)))
            client.send(request(Cmd.READ, 5, 0, 4 << 20) * 20 + goodbye)
            await asyncio.sleep(0)
            client.writer.transport.abort()
    await attacked.quiet()
    assert await in_step(await attacked.open())
