"""What a client can do around TLS: smuggle state and text past it (CVE-2021-3716), and handshakes that never end."""

from __future__ import annotations

import asyncio
import ssl
import struct
import time
from contextlib import suppress

import pytest

from nbdstream.server.limits import Limits
from nbdstream.wire.nbd import Cmd, CmdFlag, Err, Opt, Rep, TransmissionFlag
from tests.server.raw_client import RawClient, info_data, meta_data, option, request, write_request
from tests.support.attacked import DISK_BYTES, Attacked, Servers
from tests.support.attacked_server import NUMBERS

MIB = 1 << 20
CONNECTION = 2 * MIB
"""Bytes: a receive buffer, and what OpenSSL and the loop keep of a connection inside TLS."""

pytestmark = pytest.mark.parametrize("tls", ["on"])


def trusting() -> ssl.SSLContext:
    """A client that does not care who the server is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def client_hello() -> bytes:
    """The first bytes of a TLS client."""
    outgoing = ssl.MemoryBIO()
    client = trusting().wrap_bio(ssl.MemoryBIO(), outgoing)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def secure(attacked: Attacked) -> RawClient:
    """A client that haggles inside TLS."""
    client = await attacked.greet()
    await client.start_tls(trusting())
    return client


async def open_inside(attacked: Attacked, name: str = "") -> RawClient:
    """A client with an export open inside TLS."""
    client = await secure(attacked)
    await client.go(name)
    return client


async def acknowledged(client: RawClient) -> bool:
    """Whether STARTTLS is acknowledged, and the connection goes on from there."""
    head = await client.reader.readexactly(20)
    return struct.unpack("!QIII", head)[2:] == (Rep.ACK, 0)


# -- plain text before and behind STARTTLS ------------------------------------------------------------------


async def test_what_was_agreed_in_plain_text_does_not_hold_inside_tls(attacked: Attacked) -> None:
    client = await attacked.greet()
    assert (await client.opt(Opt.STRUCTURED_REPLY))[-1][0] == Rep.ACK
    assert (await client.opt(Opt.SET_META_CONTEXT, meta_data("disk", "base:allocation")))[-1][0] == Rep.ACK
    await client.start_tls(trusting())
    again = await client.opt(Opt.SET_META_CONTEXT, meta_data("disk", "base:allocation"))
    assert [kind for kind, _ in again] == [Rep.ERR_INVALID]
    await client.go("disk")
    assert not client.flags & TransmissionFlag.SEND_DF
    assert (await client.ask(Cmd.BLOCK_STATUS, 0, 4096)).error == Err.EINVAL
    assert await client.read(0, 4096) == NUMBERS[:4096]


async def test_extended_headers_in_plain_text_do_not_hold_inside_tls(attacked: Attacked) -> None:
    client = await attacked.greet()
    assert (await client.opt(Opt.EXTENDED_HEADERS))[-1][0] == Rep.ACK
    await client.start_tls(trusting())
    await client.go("disk")
    assert await client.read(0, 4096) == NUMBERS[:4096]


async def test_plain_text_behind_starttls_is_never_answered(attacked: Attacked) -> None:
    for behind in (
        b"x",
        option(Opt.LIST),
        option(Opt.STRUCTURED_REPLY) + option(Opt.GO, info_data("disk")),
        option(Opt.GO, info_data("disk")) + request(Cmd.READ, 1, 0, 4096),
        option(Opt.STARTTLS),
        client_hello(),
        b"x" * MIB,
    ):
        client = await attacked.greet()
        client.send(option(Opt.STARTTLS) + behind)
        said = b""
        with suppress(ConnectionError):
            while more := await client.reader.read(MIB):
                said += more
        # At most the acknowledgement and what TLS has to say of something that is no TLS.
        assert len(said) <= 20 + 7, said


async def test_plain_text_behind_the_acknowledgement_ends_the_connection(attacked: Attacked) -> None:
    for behind in (
        option(Opt.LIST),
        b"GET / HTTP/1.0\r\n\r\n" * 10,
        bytes(1000),
        b"\x16\x03\x01\xff\xff" + bytes(70_000),
    ):
        client = await attacked.greet()
        client.send(option(Opt.STARTTLS))
        assert await acknowledged(client)
        client.send(behind)
        assert await client.closed()


async def test_tls_inside_tls_is_refused(attacked: Attacked) -> None:
    client = await secure(attacked)
    assert [kind for kind, _ in await client.opt(Opt.STARTTLS)] == [Rep.ERR_INVALID]
    await client.go("disk")
    assert await client.read(0, 4096) == NUMBERS[:4096]


async def test_garbage_between_the_records_ends_its_own_connection(attacked: Attacked) -> None:
    other = await open_inside(attacked)
    for client in (await secure(attacked), await open_inside(attacked)):
        # Past the client's own TLS, as somebody on the line would do it.
        client.writer.transport.get_extra_info("socket")._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        with suppress(ssl.SSLError):
            assert await client.closed()
    assert await other.read(0, 4096) == NUMBERS[:4096]


# -- handshakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"handshake_time": 1.5}])
async def test_handshakes_that_never_end_are_dropped_at_the_deadline(attacked: Attacked) -> None:
    hello = client_hello()

    async def drip(client: RawClient, data: bytes) -> None:
        client.send(option(Opt.STARTTLS))
        assert await acknowledged(client)
        for at in range(len(data)):
            if client.writer.transport.is_closing() or client.reader.at_eof():
                break
            client.send(data[at : at + 1])
            await asyncio.sleep(0.05)
        assert await client.closed()

    clients = [await attacked.greet() for _ in range(90)]
    started = [b"", hello[:-1], hello]
    async with asyncio.timeout(15):
        await asyncio.gather(*(drip(client, started[at % 3]) for at, client in enumerate(clients)))
    await attacked.quiet()
    assert await (await open_inside(attacked)).read(0, 4) == NUMBERS[:4]


async def test_clients_that_vanish_at_every_byte_of_their_hello(attacked: Attacked) -> None:
    hello = client_hello()
    for length in range(0, len(hello) + 1, 3):
        client = await attacked.greet()
        client.send(option(Opt.STARTTLS))
        assert await acknowledged(client)
        client.send(hello[:length])
        client.writer.transport.abort()
    await attacked.quiet()
    assert await (await open_inside(attacked)).read(0, 4) == NUMBERS[:4]


async def test_handshakes_by_the_hundred_let_others_have_their_turn(attacked: Attacked) -> None:
    for _ in range(5):
        clients = await asyncio.gather(*(secure(attacked) for _ in range(40)))
        for client in clients:
            client.writer.transport.abort()
        await attacked.quiet()


async def test_clients_in_the_middle_of_everything_do_not_hold_up_the_end(tls: str) -> None:
    with Servers() as servers:
        attacked = Attacked(*servers.get({"handshake_time": 600.0, "linger_time": 2.0}, tls))
        for _ in range(10):
            await attacked.connect()
            await attacked.greet()
            for begun in (b"", client_hello()[:-1]):
                client = await attacked.greet()
                client.send(option(Opt.STARTTLS))
                assert await acknowledged(client)
                client.send(begun)
            await secure(attacked)
            (await open_inside(attacked)).send(request(Cmd.READ, 1, 0, 4)[:-1])
            client = await attacked.open("huge")
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(request(Cmd.READ, 1, 0, 32 * MIB) * 4)
        began = time.monotonic()
        assert attacked.process.stop() == 0, str(attacked.process)
        assert time.monotonic() - began < 20
        for client in attacked.clients:
            client.writer.transport.abort()


# -- with an export open ------------------------------------------------------------------------------------


async def test_a_refused_write_inside_tls_keeps_the_stream_in_step(attacked: Attacked) -> None:
    client = await open_inside(attacked, "comb")
    for length in (1, 4096, 8 * MIB):
        assert await client.write(0, bytes(length)) == Err.EPERM
    assert await client.write(0, b"data", flags=CmdFlag.NO_HOLE) in (Err.EPERM, Err.EINVAL)
    assert await client.read(0, 4096) == b"x" * 4096


async def test_writes_that_are_announced_inside_tls_cost_what_has_arrived(attacked: Attacked) -> None:
    async with attacked.grows_by_at_most(50 * CONNECTION):
        for number in range(50):
            client = await open_inside(attacked, "huge" if number % 2 else "comb")
            client.send(request(Cmd.WRITE, 1, 0, 64 * MIB) + b"x")
        assert await (await open_inside(attacked)).read(0, 4) == NUMBERS[:4]


async def test_clients_that_never_read_inside_tls_cost_a_bounded_amount(attacked: Attacked) -> None:
    # OpenSSL's buffer grows by a third more than it needs.
    async with attacked.grows_by_at_most(20 * (CONNECTION + Limits().reply_backlog * 4 // 3)):
        for number in range(20):
            client = await open_inside(attacked, ["disk", "huge"][number % 2])
            client.send(b"".join(request(Cmd.READ, cookie, 0, 32 * MIB) for cookie in range(16)))
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        assert await (await attacked.open()).read(0, 4) == NUMBERS[:4]
        await asyncio.sleep(0.5)


async def test_clients_that_leave_tls_without_a_farewell_take_nobody_along(attacked: Attacked) -> None:
    for data in (b"", request(Cmd.READ, 1, 0, 8 * MIB), write_request(1, DISK_BYTES - 100, b"x" * 100)[:-1]):
        for _ in range(10):
            client = await open_inside(attacked)
            client.send(data * 3)
            await asyncio.sleep(0)
            client.writer.transport.abort()
    await attacked.quiet()
    assert await (await open_inside(attacked)).read(0, 4) == NUMBERS[:4]
