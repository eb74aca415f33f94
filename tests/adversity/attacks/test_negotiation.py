"""What a client can do before it has opened an export (reference: CVE-2024-7409, CVE-2017-9524, CVE-2022-26495 ...)."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from nbdstream.wire.nbd import IHAVEOPT, OPTION, Cmd, Opt, Rep
from tests.server.raw_client import RawClient, counted, info_data, meta_data, option, request
from tests.support.attacked import Attacked, until

if TYPE_CHECKING:
    from collections.abc import Iterable

HUGE = 0xFFFFFFFF
INVALID, UNKNOWN, UNSUP, TOO_BIG, POLICY = (
    Rep.ERR_INVALID,
    Rep.ERR_UNKNOWN,
    Rep.ERR_UNSUP,
    Rep.ERR_TOO_BIG,
    Rep.ERR_POLICY,
)


def reset(path: str, data: bytes = b"") -> None:
    """Connect, say something, and be gone without a farewell."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.send(data)


async def opens_an_export(attacked: Attacked) -> bool:
    try:
        client = await attacked.open()
        return bool(await client.read(4, 4) == b"\0\0\0\1")
    except (ConnectionError, asyncio.IncompleteReadError):
        return False


# -- clients that take their time ---------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"handshake_time": 1.5}])
async def test_idle_handshakes_by_the_hundred_are_dropped_at_the_deadline(attacked: Attacked) -> None:
    idle = [await attacked.connect() for _ in range(300)]
    await asyncio.gather(*(client.closed() for client in idle))
    assert await opens_an_export(attacked)


@pytest.mark.parametrize("limits", [{"handshake_time": 1.5}])
async def test_a_byte_at_a_time_buys_no_more_time(attacked: Attacked) -> None:
    stream = struct.pack("!I", 3) + option(Opt.LIST) * 20

    async def drip(client: RawClient) -> int:
        for at in range(len(stream)):
            if client.writer.transport.is_closing() or client.reader.at_eof():
                return at
            client.send(stream[at : at + 1])
            await asyncio.sleep(0.05)
        return len(stream)

    slow = [await attacked.connect() for _ in range(100)]
    sent = await asyncio.gather(*map(drip, slow))
    assert max(sent) < len(stream)
    await attacked.quiet()
    assert await opens_an_export(attacked)


async def test_a_full_house_turns_strangers_away_and_has_room_again(attacked: Attacked) -> None:
    crowd = [await attacked.greet() for _ in range(100)]
    assert await (await attacked.connect()).closed()
    for client in crowd:
        client.writer.transport.abort()
    await until(lambda: attacked.count_descriptors() <= attacked.descriptors)
    assert await opens_an_export(attacked)


# -- clients that vanish ------------------------------------------------------------------------------------


async def test_clients_that_connect_and_leave_by_the_thousand(attacked: Attacked) -> None:
    for _ in range(1000):
        reset(attacked.path)
    await attacked.quiet()
    assert await opens_an_export(attacked)


async def test_strangers_that_speak_something_else(attacked: Attacked, seed: int) -> None:
    choices = random.Random(seed)
    probes = [b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\0" * 1000, b"\xff" * 1000]
    probes += [choices.randbytes(choices.randrange(1, 5000)) for _ in range(200)]
    for probe in probes:
        client = await attacked.connect()
        client.send(probe)
        client.writer.write_eof()
        assert await client.closed()


# -- options ------------------------------------------------------------------------------------------------

MALFORMED: list[tuple[str, int, bytes, Rep]] = [
    ("LIST with data", Opt.LIST, b"x", INVALID),
    ("STRUCTURED_REPLY with data", Opt.STRUCTURED_REPLY, b"x" * 1000, INVALID),
    ("STARTTLS with data", Opt.STARTTLS, b"x", INVALID),
    ("INFO of nothing", Opt.INFO, b"", INVALID),
    ("INFO shorter than its fixed part", Opt.INFO, bytes(5), INVALID),
    ("INFO with a name of 2^32-1", Opt.INFO, struct.pack("!I", HUGE) + b"disk\0\0", INVALID),
    ("INFO with a name one too long", Opt.INFO, struct.pack("!I", 7) + b"disk\0\0", INVALID),
    ("INFO with a name over its count", Opt.INFO, struct.pack("!I", 5) + b"disk\0\0", INVALID),
    ("INFO with a count too high", Opt.INFO, counted("disk") + struct.pack("!HH", 2, 1), INVALID),
    ("INFO with a count too low", Opt.INFO, counted("disk") + struct.pack("!HHH", 1, 1, 2), INVALID),
    ("INFO with 65535 items that are not there", Opt.INFO, counted("disk") + b"\xff\xff", INVALID),
    ("GO with a name of 4097", Opt.GO, info_data("x" * 4097), INVALID),
    ("GO with a NUL in the name", Opt.GO, info_data("disk\0"), INVALID),
    ("GO with a name of NULs", Opt.GO, info_data("\0\0\0\0"), INVALID),
    ("GO with a name that is not UTF-8", Opt.GO, counted(b"\xff\xfe\xfd") + bytes(2), INVALID),
    ("GO with a name of 257", Opt.GO, info_data("x" * 257), UNKNOWN),
    ("GO with a name of 3000", Opt.GO, info_data("x" * 3000), UNKNOWN),
    ("GO with a name of 4096", Opt.GO, info_data("x" * 4096), UNKNOWN),
    ("GO with control characters in the name", Opt.GO, info_data("\x1b[31m\r\n"), UNKNOWN),
    ("GO with half a megabyte", Opt.GO, bytes(512 << 10), TOO_BIG),
    ("SET_META_CONTEXT of nothing", Opt.SET_META_CONTEXT, b"", INVALID),
    ("SET_META_CONTEXT with bytes behind", Opt.SET_META_CONTEXT, meta_data("disk", "base:allocation") + b"x", INVALID),
    ("SET_META_CONTEXT with 2^32-1 queries", Opt.SET_META_CONTEXT, counted("disk") + b"\xff" * 4, INVALID),
    (
        "SET_META_CONTEXT with a query of 2^32-1",
        Opt.SET_META_CONTEXT,
        counted("disk") + struct.pack("!II", 1, HUGE) + b"base:",
        INVALID,
    ),
    ("SET_META_CONTEXT with a query of 4097", Opt.SET_META_CONTEXT, meta_data("disk", "x:" + "y" * 4095), INVALID),
    ("SET_META_CONTEXT with a NUL", Opt.SET_META_CONTEXT, meta_data("disk", "base:allocation\0"), INVALID),
    ("LIST_META_CONTEXT with bytes behind", Opt.LIST_META_CONTEXT, meta_data("disk", "base:") + bytes(100), INVALID),
    ("LIST_META_CONTEXT with a count too high", Opt.LIST_META_CONTEXT, counted("disk") + struct.pack("!I", 1), INVALID),
    ("LIST_META_CONTEXT of another export", Opt.LIST_META_CONTEXT, meta_data("none"), UNKNOWN),
    ("an unknown option with data", 99, b"x" * 5000, UNSUP),
    ("the withdrawn PEEK_EXPORT", Opt.PEEK_EXPORT, b"disk", UNSUP),
    ("option 2^32-1", HUGE, b"", UNSUP),
]


async def test_malformed_options_are_answered_and_the_connection_stays_in_step(attacked: Attacked) -> None:
    client = await attacked.greet()
    assert (await client.opt(Opt.STRUCTURED_REPLY))[-1][0] == Rep.ACK
    for what, number, data, expected in MALFORMED:
        replies = await client.opt(number, data)
        assert [kind for kind, _ in replies] == [expected], what
        text = replies[0][1]
        assert len(text) <= 4096, what
        assert text.decode().isprintable(), what
    assert (await client.opt(Opt.GO, info_data("disk")))[-1][0] == Rep.ACK
    assert await client.read(4, 4) == b"\0\0\0\1"


async def test_what_cannot_be_followed_ends_its_own_connection(attacked: Attacked) -> None:
    other = await attacked.open()
    for what, stream in {
        "GO with 4 GiB": OPTION.pack(IHAVEOPT, Opt.GO, HUGE),
        "an unknown option with 4 GiB": OPTION.pack(IHAVEOPT, 99, HUGE),
        "LIST with 32 MiB and a byte": OPTION.pack(IHAVEOPT, Opt.LIST, (32 << 20) + 1),
        "no magic": OPTION.pack(IHAVEOPT + 1, Opt.LIST, 0),
        "a request before any export": request(Cmd.READ, 1, 0, 4096),
        "EXPORT_NAME of no export": option(Opt.EXPORT_NAME, b"none"),
        "EXPORT_NAME of NULs": option(Opt.EXPORT_NAME, bytes(4)),
        "EXPORT_NAME of 4097 bytes": option(Opt.EXPORT_NAME, b"x" * 4097),
        "EXPORT_NAME that is not UTF-8": option(Opt.EXPORT_NAME, b"\xff"),
        "options without end": option(99) * 5000,
    }.items():
        client = await attacked.greet()
        client.send(stream)
        async with asyncio.timeout(10):
            assert await client.closed(), what
        assert await other.read(4, 4) == b"\0\0\0\1", what


async def test_client_flags_that_do_not_exist_end_the_connection(attacked: Attacked) -> None:
    for flags in (4, 0x80000003, HUGE):
        client = await attacked.connect()
        await client.greet(flags)
        assert await client.closed()


async def test_a_context_asked_for_10000_times_is_given_once(attacked: Attacked) -> None:
    client = await attacked.greet()
    await client.opt(Opt.STRUCTURED_REPLY)
    replies = await client.opt(Opt.SET_META_CONTEXT, meta_data("disk", *["base:allocation"] * 10_000))
    assert [kind for kind, _ in replies] == [Rep.META_CONTEXT, Rep.ACK]
    assert (await client.opt(Opt.GO, info_data("disk")))[-1][0] == Rep.ACK
    client.send(request(Cmd.BLOCK_STATUS, 1, 0, 4096))
    chunk = await client.reply()
    assert (chunk.cookie, chunk.error, chunk.flags) == (1, 0, 1)
    assert await client.read(4, 4) == b"\0\0\0\1"


# -- memory -------------------------------------------------------------------------------------------------


def long_options(count: int) -> Iterable[bytes]:
    for _ in range(count):
        yield OPTION.pack(IHAVEOPT, Opt.INFO, 32 << 20)
        for _ in range(32):
            yield bytes(1 << 20)


async def test_options_of_32_mib_are_skipped_and_not_kept(attacked: Attacked) -> None:
    client = await attacked.greet()
    async with attacked.grows_by_at_most(8 << 20):
        for piece in long_options(4):
            client.send(piece)
            await client.writer.drain()
        for _ in range(4):
            head = await client.reader.readexactly(20)
            kind, length = struct.unpack("!II", head[12:])
            assert kind == TOO_BIG
            await client.reader.readexactly(length)
    assert (await client.opt(Opt.LIST))[-1][0] == Rep.ACK


async def test_options_that_are_announced_and_begun_by_the_hundred_cost_little(attacked: Attacked) -> None:
    async with attacked.grows_by_at_most(32 << 20):
        for _ in range(90):
            client = await attacked.greet()
            client.send(OPTION.pack(IHAVEOPT, Opt.GO, 256 << 10) + b"x" * 1000)
        assert await opens_an_export(attacked)


async def test_replies_that_nobody_takes_are_not_piled_up(attacked: Attacked) -> None:
    async with attacked.grows_by_at_most(32 << 20):
        for _ in range(50):
            client = await attacked.greet()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(option(Opt.LIST) * 1000)
        assert await opens_an_export(attacked)
        await asyncio.sleep(0.3)
