"""TLS on the server, by a client that says what it is told to: the upgrade, who gets in, what cannot be smuggled in."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.raw import RawImage
from nbdstream.server.export import Export
from nbdstream.server.limits import Limits
from nbdstream.server.server import NbdServer
from nbdstream.server.tls import TlsPolicy, server_context
from nbdstream.wire.nbd import Cmd, CmdFlag, Err, Opt, Rep, ReplyType
from tests.server.memory_device import MemoryDevice
from tests.server.raw_client import RawClient, info_data, meta_data, option, request, write_request
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.conftest import Harness


class Pki:
    """A server's certificate, and contexts for clients."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority()
        self.server = self.authority.server(directory / "server")
        self.clients = {name: self.authority.client(directory / name, name) for name in ("alice", "bob")}

    def policy(self, *, required: bool = True, verify: bool = False) -> TlsPolicy:
        return TlsPolicy(server_context(self.server, verify_peer=verify), required=required)

    def client(self, name: str | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=f"{self.server}/ca-cert.pem")
        if name:
            directory = self.clients[name]
            context.load_cert_chain(f"{directory}/client-cert.pem", f"{directory}/client-key.pem")
        return context


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


async def serve(harness: Harness, device: MemoryDevice, policy: TlsPolicy, limits: Limits | None = None) -> NbdServer:
    return await harness.serve(Export("disk", device, writable=True), limits=limits, tls=policy)


# -- the upgrade ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("structured", [False, True])
async def test_everything_works_inside_tls(
    harness: Harness, device: MemoryDevice, pki: Pki, slow: bool, structured: bool
) -> None:
    await serve(harness, device, pki.policy())
    device.slow = slow
    client = await harness.open(structured=structured, tls=pki.client())
    data = bytes(range(251)) * 3000
    assert await client.write(12345, data, flags=CmdFlag.FUA) == 0
    assert device.data[12345 : 12345 + len(data)] == data
    assert await client.read(0, 1 << 20) == device.data
    assert (await client.ask(Cmd.FLUSH)).error == 0
    client.send(request(Cmd.DISC, 1))
    assert await client.closed()


async def test_many_requests_at_once_are_all_answered(harness: Harness, device: MemoryDevice, pki: Pki) -> None:
    await serve(harness, device, pki.policy())
    client = await harness.open(tls=pki.client())
    client.send(b"".join(request(Cmd.READ, number, number * 512, 4096) for number in range(1000)))
    for number in range(1000):
        reply = await client.reply(4096)
        assert (reply.cookie, reply.payload) == (number, bytes(device.data[number * 512 : number * 512 + 4096]))


async def test_requests_may_come_a_byte_at_a_time(harness: Harness, device: MemoryDevice, pki: Pki) -> None:
    await serve(harness, device, pki.policy())
    client = await harness.connect()
    for byte in (3).to_bytes(4, "big") + option(Opt.STARTTLS):
        client.send(bytes([byte]))
        await asyncio.sleep(0)
    await client.reader.readexactly(18 + 20)
    await client.writer.start_tls(pki.client(), server_hostname="localhost")
    for byte in option(Opt.GO, info_data()) + write_request(1, 10, b"data"):
        client.send(bytes([byte]))
        await client.writer.drain()
    await client.reader.readexactly(20 + 12 + 20)
    assert (await client.reply()).error == 0
    assert await client.read(8, 8) == device.data[8:16]
    assert device.data[10:14] == b"data"


async def test_where_tls_is_required_there_is_nothing_without(harness: Harness, device: MemoryDevice, pki: Pki) -> None:
    await serve(harness, device, pki.policy())
    client = await harness.connect()
    await client.greet()
    assert [kind for kind, _ in await client.opt(Opt.GO, info_data())] == [Rep.ERR_TLS_REQD]
    assert [kind for kind, _ in await client.opt(Opt.LIST)] == [Rep.ERR_TLS_REQD]
    await client.start_tls(pki.client())
    await client.go()
    assert await client.read(0, 4) == device.data[:4]


async def test_where_tls_is_offered_it_can_be_left(harness: Harness, device: MemoryDevice, pki: Pki) -> None:
    await serve(harness, device, pki.policy(required=False))
    for context in (None, pki.client()):
        client = await harness.open(tls=context)
        assert await client.read(0, 4) == device.data[:4]


async def test_the_end_of_tls_is_said(harness: Harness, device: MemoryDevice, pki: Pki) -> None:
    """Without close_notify a client cannot tell an end from an attack."""
    await serve(harness, device, pki.policy())
    client = await harness.connect()
    await client.greet()
    await client.start_tls(pki.client())
    assert (await client.opt(Opt.ABORT)) == [(Rep.ACK, b"")]
    assert await client.reader.read() == b""  # a truncated stream would raise


# -- who gets in --------------------------------------------------------------------------------------------------


async def test_an_export_is_for_the_clients_that_it_names(harness: Harness, device: MemoryDevice, pki: Pki) -> None:
    private = Export("private", MemoryDevice(4096), writable=True, allow=["alice", "carol"])
    public = Export("public", device, writable=True)
    await harness.serve(public, private, tls=pki.policy(required=False, verify=True))
    await harness.open("private", tls=pki.client("alice"))
    bob = await harness.connect()
    await bob.greet()
    await bob.start_tls(pki.client("bob"))
    assert [data for _, data in await bob.opt(Opt.LIST)] == [b"\0\0\0\6public", b""]
    assert [kind for kind, _ in await bob.opt(Opt.INFO, info_data("private"))] == [Rep.ERR_POLICY]
    assert [kind for kind, _ in await bob.opt(Opt.GO, info_data("private"))] == [Rep.ERR_POLICY]
    plain = await harness.connect()
    await plain.greet()
    assert [kind for kind, _ in await plain.opt(Opt.GO, info_data("private"))] == [Rep.ERR_TLS_REQD]
    assert [data for _, data in await plain.opt(Opt.LIST)] == [b"\0\0\0\6public", b""]


async def test_an_export_that_names_its_clients_needs_a_server_with_tls() -> None:
    with pytest.raises(ValueError, match="without TLS"):
        NbdServer([Export("disk", MemoryDevice(4096), writable=False, allow=["alice"])])


async def test_a_client_without_a_certificate_does_not_get_in_where_they_are_verified(
    harness: Harness, device: MemoryDevice, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    server = await serve(harness, device, pki.policy(verify=True))
    client = await harness.connect()
    await client.greet()

    async def look() -> None:
        await client.start_tls(pki.client())
        await client.opt(Opt.LIST)  # with TLS 1.3 it learns only here that it was refused

    with pytest.raises((OSError, asyncio.IncompleteReadError)):
        await look()
    await harness.until(lambda: not server.handshake_count)
    assert "TLS failed" in caplog.text
    await harness.open(tls=pki.client("alice"))


async def test_the_uris_say_where_tls_is_needed(harness: Harness, device: MemoryDevice, pki: Pki) -> None:
    exports = [Export("a", device, writable=False), Export("b", device, writable=False, allow=["alice"])]
    server = await harness.serve(*exports, tls=pki.policy(required=False))
    assert [uri.partition("://")[0] for uri in server.uris] == ["nbd+unix", "nbds+unix"]


# -- what cannot be smuggled in -------------------------------------------------------------------------------------


async def test_nothing_that_was_negotiated_in_plain_text_survives_the_upgrade(
    harness: Harness, device: MemoryDevice, pki: Pki
) -> None:
    await serve(harness, device, pki.policy(required=False))
    client = await harness.connect()
    await client.greet()
    await client.opt(Opt.STRUCTURED_REPLY)
    await client.opt(Opt.SET_META_CONTEXT, meta_data("disk", "base:allocation"))
    await client.opt(Opt.EXTENDED_HEADERS)
    await client.start_tls(pki.client())
    await client.go("disk")
    status = await client.ask(Cmd.BLOCK_STATUS, 0, 4096)
    assert (status.type, status.error) == (None, Err.EINVAL)
    assert await client.read(0, 16) == device.data[:16]


@pytest.mark.parametrize("behind", [option(Opt.LIST), b"\x16", option(Opt.GO, info_data("disk")) + request(0, 1, 0, 9)])
async def test_plain_text_in_one_packet_with_starttls_ends_the_connection_unanswered(
    harness: Harness, device: MemoryDevice, pki: Pki, behind: bytes
) -> None:
    server = await serve(harness, device, pki.policy(required=False))
    client = await harness.connect()
    await client.greet()
    client.send(option(Opt.STARTTLS) + behind)
    assert await client.reader.read() == b""
    await harness.until(lambda: not server.handshake_count)
    await harness.open(tls=pki.client())


async def test_plain_text_in_a_packet_behind_starttls_is_never_taken_for_an_option(
    harness: Harness, device: MemoryDevice, pki: Pki
) -> None:
    server = await serve(harness, device, pki.policy(required=False))
    for turns in range(8):
        client = await harness.connect()
        await client.greet()
        client.send(option(Opt.STARTTLS))
        for _ in range(turns):
            await asyncio.sleep(0)
        client.send(option(Opt.GO, info_data("disk")) + request(Cmd.READ, 1, 0, 9))
        received = await client.reader.read()
        assert received[:20] in (b"", option_reply_to_starttls())
        # What may follow is a TLS alert, never a reply.
        assert received[20:21] in (b"", b"\x15")
    await harness.until(lambda: not (server.handshake_count or server.connection_count))


def option_reply_to_starttls() -> bytes:
    return bytes.fromhex("0003e889045565a9") + (5).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes(4)


# -- who takes their time, or leaves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01\x02\x00\x01\x00"])
async def test_the_time_for_the_handshake_covers_tls(
    harness: Harness, device: MemoryDevice, pki: Pki, hello: bytes
) -> None:
    server = await serve(harness, device, pki.policy(), Limits(handshake_time=0.3))
    client = await harness.connect()
    await client.greet()
    assert await client.opt(Opt.STARTTLS) == [(Rep.ACK, b"")]
    client.send(hello)
    assert await client.closed()
    await harness.until(lambda: not server.handshake_count)


async def test_haggling_inside_tls_has_the_same_deadline(harness: Harness, device: MemoryDevice, pki: Pki) -> None:
    server = await serve(harness, device, pki.policy(), Limits(handshake_time=0.3))
    client = await harness.connect()
    await client.greet()
    await client.start_tls(pki.client())
    assert await client.closed()
    await harness.until(lambda: not server.handshake_count)


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01\x02\x00\x01\x00"])
async def test_a_client_that_leaves_during_the_tls_handshake_is_forgotten(
    harness: Harness, device: MemoryDevice, pki: Pki, hello: bytes
) -> None:
    server = await serve(harness, device, pki.policy())
    client = await harness.connect()
    await client.greet()
    await client.opt(Opt.STARTTLS)
    client.send(hello)
    await client.writer.drain()
    client.writer.transport.abort()
    await harness.until(lambda: not server.handshake_count)
    await harness.open(tls=pki.client())


async def test_closing_the_server_drops_clients_in_their_tls_handshake(
    harness: Harness, device: MemoryDevice, pki: Pki
) -> None:
    server = await serve(harness, device, pki.policy())
    client = await harness.connect()
    await client.greet()
    await client.opt(Opt.STARTTLS)
    await server.close(5)
    assert server.handshake_count == 0
    assert await client.closed()


async def test_a_client_that_never_reads_costs_a_bounded_amount_inside_tls(
    harness: Harness, device: MemoryDevice, pki: Pki
) -> None:
    server = await serve(harness, device, pki.policy(), Limits(reply_backlog=1 << 20))
    client = await harness.open(tls=pki.client())
    (export,) = server.exports
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(b"".join(request(Cmd.READ, number, 0, 1 << 20) for number in range(200)))
    await harness.until(lambda: export.bytes_read >= 1 << 20)
    before = -1
    while before != export.bytes_read:
        before = export.bytes_read
        await asyncio.sleep(0.2)
    assert export.bytes_read < 16 << 20
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for number in range(200):
        assert (await client.reply(1 << 20)).cookie == number


async def test_what_is_cut_off_an_image_ends_a_connection_and_not_the_process(
    harness: Harness, tmp_path: Path, pki: Pki
) -> None:
    """A load from a mapped page that is gone is SIGBUS, and TLS looks at what it sends."""
    path = tmp_path / "disk"
    path.write_bytes(b"data" * (1 << 18))
    device = await RawImage.open(str(path))
    server = await harness.serve(Export("disk", device, writable=False), tls=pki.policy())
    client = await harness.open(tls=pki.client())
    assert await client.read(512 << 10, 4) == b"data"
    with path.open("r+b") as file:
        file.truncate(1024)
    client.send(request(Cmd.READ, 1, 512 << 10, 4096))
    try:
        assert (await client.reply(4096)).error == Err.EIO
    except (asyncio.IncompleteReadError, ConnectionError):
        await harness.until(lambda: not server.connection_count)
    client = await harness.open(tls=pki.client())
    assert await client.read(0, 4) == b"data"
    await server.close(5)
    await device.close()


# -- a client that is there already ---------------------------------------------------------------------------------


async def test_serving_one_client_ends_when_it_has_gone(harness: Harness, device: MemoryDevice, pki: Pki) -> None:
    for policy in (None, pki.policy()):
        server = NbdServer([Export("disk", device, writable=True)], tls=policy)
        harness.servers.append(server)
        ours, theirs = RawClient.pair()
        serving = asyncio.create_task(server.serve_client(theirs))
        client = await ours
        harness.clients.append(client)
        await client.greet()
        if policy:
            await client.start_tls(pki.client())
        await client.go("disk")
        assert await client.read(0, 4) == device.data[:4]
        assert not serving.done()
        client.send(request(Cmd.DISC, 1))
        await serving


async def test_serving_one_client_ends_when_it_opens_nothing(harness: Harness, device: MemoryDevice) -> None:
    server = NbdServer([Export("disk", device, writable=True)])
    harness.servers.append(server)
    ours, theirs = RawClient.pair()
    serving = asyncio.create_task(server.serve_client(theirs))
    client = await ours
    await client.greet()
    assert await client.opt(Opt.ABORT) == [(Rep.ACK, b"")]
    await client.close()
    await serving


async def test_a_reply_with_holes_arrives_whole_inside_tls(harness: Harness, tmp_path: Path, pki: Pki) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.write(b"x" * 65536)
        file.truncate(1 << 20)
    device = await RawImage.open(str(path))
    server = await harness.serve(Export("disk", device, writable=False), tls=pki.policy())
    client = await harness.open(structured=True, tls=pki.client())
    first = await client.ask(Cmd.READ, 0, 1 << 20)
    assert (first.type, first.payload[8:]) == (ReplyType.OFFSET_DATA, b"x" * 65536)
    second = await client.reply()
    assert (second.type, second.flags) == (ReplyType.OFFSET_HOLE, 1)
    await server.close(5)
    await device.close()
