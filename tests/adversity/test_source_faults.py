"""Faults between source and streamer, at every phase of their conversation: the guest sees none of them.

The guest is a client that writes and reads all the time and knows what it must find. Where nothing protects the bytes
on the line only what frames them is corrupted: a payload that is changed on a plain line is changed for everybody.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.block.raw import RawImage
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.server.tls import TlsPolicy, server_context
from nbdstream.stream import source as source_module
from nbdstream.stream.disk import DiskStream
from nbdstream.stream.preparation import create_overlay
from nbdstream.stream.source import SourceOptions
from tests.support.certificates import Authority
from tests.support.client import READ, WRITE, LostError, NbdClient
from tests.support.harness import LocalPair, Pairs, make_image
from tests.support.processes import wait_until
from tests.support.proxy import Proxy
from tests.support.qed import content, qemu_check
from tests.support.workload import DiskModel, Workload, examine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
SIZE = 3 * MIB
EIO = 5


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_FIRST_PAUSE_SECONDS", 0.01)


def begin(pair: LocalPair, *, job: bool = True, **options: Any) -> None:
    """Start the streamer over the overlay."""
    chosen = SourceOptions(**{"connections": 2, "stall": 0.3} | options)
    start = DiskStream.start(pair.uri, pair.overlay, socket=pair.guest_socket, options=chosen, job=job)
    pair.disk = pair.on_loop(start)


def source_of(pair: LocalPair) -> bytes:
    with open(pair.image, "rb") as file:
        return file.read()


@pytest.fixture
def pair(pairs: Pairs, seed: int) -> LocalPair:
    """The source is served, and an overlay is made; nothing is streamed yet."""
    pair = pairs.local()
    make_image(pair.image, SIZE, random.Random(seed), [(0, MIB), (MIB + 65536, MIB), (SIZE - MIB // 2, MIB // 2)])
    pair.start_source()
    pair.on_loop(create_overlay(pair.uri, pair.overlay, cluster_size=65536, table_size=4))
    return pair


def survives(pair: LocalPair, seed: int, **how: Any) -> None:
    """Stream beside a guest that works all the time; in the end everything is there, and right."""
    model = DiskModel(source_of(pair))
    begin(pair, **how)
    with Workload(pair.guest_socket, model, seed) as work:
        pair.wait_until_independent()
        work.wait_for(20)
    assert not work.faults
    assert not examine(pair.guest_socket, model)
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    assert content(pair.overlay) == model.contents()


PHASES = {
    "greeting": range(0, 18, 6),
    "options": range(18, 300, 40),
    "extents and first data": range(300, 2000, 400),
    "data": range(70_000, MIB, 300_000),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_connection_that_is_cut_or_hangs_is_no_fault_of_the_disk(
    pairs: Pairs, pair: LocalPair, seed: int, phase: str, fault: str
) -> None:
    for count in PHASES[phase]:
        arm: Callable[[int], None] = pair.faults.cut_after if fault == "cut" else pair.faults.stall_after
        arm(count)
        survives(pair, seed)
        pair.on_loop(asyncio.sleep(0))
        again = pairs.local()
        again.image = pair.image
        again.start_source()
        again.on_loop(create_overlay(again.uri, again.overlay, cluster_size=65536, table_size=4))
        pair = again


FIELDS = {"magic": 0, "flags": 5, "type": 7, "cookie": 12, "length": 16, "offset": 20}
"""Of a chunk with data, in bytes from its start (proto.md, "Structured reply chunk message")."""


@pytest.mark.parametrize("field", FIELDS)
def test_a_corrupt_header_is_found_out(pair: LocalPair, field: str) -> None:
    source = source_of(pair)
    begin(pair, connections=1, job=False)
    with pair.guest() as guest:
        guest.read(0, 512)
        made = pair.faults.connections
        pair.faults.corrupt_after(FIELDS[field])  # nothing is on the line: the next byte is a reply's first
        assert guest.read(2 * MIB - 65536, 65536) == source[2 * MIB - 65536 : 2 * MIB]
        assert pair.faults.connections > made
    disk = pair.disk
    assert disk

    async def whole() -> None:
        disk.start_job()
        await disk.wait()

    pair.on_loop(whole())
    assert pair.stop_streamer()
    assert content(pair.overlay) == source


@pytest.fixture
def tls_line(pairs: Pairs, tmp_path: Path, seed: int) -> Iterator[tuple[LocalPair, Proxy, str, str]]:
    """A source inside TLS over TCP behind a proxy; with the URI, and the client's certificates."""
    authority = Authority()
    certificates, ours = tmp_path / "server", tmp_path / "client"
    authority.server(certificates)
    authority.client(ours)
    pair = pairs.local(direct=True)
    make_image(pair.image, SIZE, random.Random(seed), [(0, SIZE)])

    async def serve() -> tuple[NbdServer, RawImage]:
        image = await RawImage.open(pair.image)
        server = NbdServer(
            [Export("", image, writable=False)],
            tls=TlsPolicy(server_context(str(certificates), verify_peer=False), required=True),
        )
        await server.listen_tcp("localhost", 0)
        return server, image

    server, image = pair.on_loop(serve())
    port = int(server.uris[0].rpartition(":")[2].rstrip("/"))
    with Proxy(("127.0.0.1", port)) as proxy:
        yield pair, proxy, f"nbds://localhost:{proxy.address[1]}", str(ours)

    async def stop() -> None:
        await server.close(0.0)
        await image.close()

    pair.on_loop(stop())


def test_inside_tls_any_byte_may_be_corrupt(tls_line: tuple[LocalPair, Proxy, str, str], seed: int) -> None:
    pair, proxy, uri, certificates = tls_line
    rng = random.Random(seed)
    source = source_of(pair)
    options = SourceOptions(connections=1, stall=1.0, tls_certificates=certificates)
    pair.disk = pair.on_loop(DiskStream.start(uri, pair.overlay, socket=pair.guest_socket, options=options, job=False))
    length = 128 << 10
    with pair.guest() as guest:
        for offset in range(0, SIZE, 2 * length):
            made = proxy.connections
            proxy.corrupt_after(rng.randrange(length))
            assert guest.read(offset, length) == source[offset : offset + length]
            assert proxy.connections > made
    disk = pair.disk

    async def whole() -> None:
        disk.start_job()
        await disk.wait()

    pair.on_loop(whole())
    assert pair.stop_streamer()
    assert content(pair.overlay) == source


def test_a_slow_and_delayed_line_is_only_slow(pair: LocalPair, seed: int) -> None:
    pair.faults.delay = 0.02
    pair.faults.trickle = 0.002
    pair.faults.chunk = 16 << 10
    survives(pair, seed, stall=5.0)


def test_with_eio_the_guest_gets_eio_for_remote_clusters_only(pair: LocalPair) -> None:
    source = source_of(pair)
    begin(pair, hold=0.2, job=False)
    with pair.guest() as guest:
        assert guest.read(0, 65536) == source[:65536]
        pair.kill_source()
        waiting = guest.submit(READ, MIB + 65536, 4096)
        assert guest.read(0, 65536) == source[:65536]
        reply = guest.receive()
        assert (reply.cookie, reply.error) == (waiting, EIO)
        guest.submit(WRITE, MIB + 65536 + 512, 512, b"x" * 512)
        assert guest.receive().error == EIO
        guest.write(65536, b"y" * 65536)
        guest.write(10, b"z" * 10)
        guest.flush()
        assert guest.read(65536, 65536) == b"y" * 65536
        pair.start_source()
        wait_until(lambda: pair.disk and pair.disk.snapshot().since is None, "the source")
        assert guest.read(MIB + 65536, 4096) == source[MIB + 65536 :][:4096]


def test_a_stop_while_requests_are_held_closes_their_connection_unanswered(pair: LocalPair) -> None:
    begin(pair, job=False)
    guest = NbdClient(pair.guest_socket)
    pair.kill_source()
    guest.submit(READ, MIB + 65536, 4096)
    wait_until(lambda: pair.disk and pair.disk.snapshot().waiting, "the request")
    pair.stop_streamer()
    with pytest.raises(LostError):
        guest.receive()
    guest.close()
