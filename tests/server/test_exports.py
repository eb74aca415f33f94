"""Exports that are added and removed while the server serves, and the clients that are in the middle of something."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from nbdstream.server.export import Export
from nbdstream.wire.nbd import Cmd, Opt, Rep
from tests.server.raw_client import info_data, request, write_request

if TYPE_CHECKING:
    from tests.server.conftest import Harness
    from tests.server.memory_device import MemoryDevice
    from tests.server.raw_client import RawClient


async def kinds(client: RawClient, name: str) -> list[int]:
    """How GO is answered."""
    return [kind for kind, _ in await client.opt(Opt.GO, info_data(name))]


async def test_who_connects_later_can_open_an_export_that_is_added(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    server.add_export(Export("more", device, writable=False))
    assert server.uris == [f"nbd+unix:///{name}?socket={harness.path}" for name in ("disk", "more")]
    client = await harness.open("more")
    assert len(await client.read(0, 16)) == 16


async def test_an_export_of_a_name_that_is_there_is_not_added(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    with pytest.raises(ValueError, match="one name"):
        server.add_export(Export("disk", device, writable=False))


async def test_an_export_for_certain_clients_is_not_added_without_tls(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    with pytest.raises(ValueError, match="without TLS"):
        server.add_export(Export("more", device, writable=False, allow={"client"}))


async def test_a_client_in_its_handshake_cannot_open_what_is_removed(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    client = await harness.connect()
    await client.greet()
    await server.remove_export(server.exports[0])
    for name in ("disk", ""):
        assert await kinds(client, name) == [Rep.ERR_POLICY]
    assert server.uris == []


async def test_the_empty_name_is_not_passed_on(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve(
        Export("disk", device, writable=False), Export("other", device, writable=False, description="another disk")
    )
    await server.remove_export(server.exports[0])
    late = await harness.connect()
    await late.greet()
    assert await kinds(late, "") == [Rep.ERR_UNKNOWN]
    assert (await kinds(late, "other"))[-1] == Rep.ACK
    server.add_export(Export("disk", device, writable=False))
    await harness.open("")


async def test_the_clients_of_what_is_removed_are_cut_off_and_no_others(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve(Export("a", device, writable=True), Export("b", device, writable=True))
    gone, staying = await harness.open("a"), await harness.open("b")
    await server.remove_export(server.exports[0])
    assert await gone.closed()
    assert len(await staying.read(0, 16)) == 16


async def test_when_it_is_removed_nothing_of_it_is_in_flight(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    export = server.exports[0]
    client = await harness.open()
    device.slow = True
    device.gate.clear()
    client.send(request(Cmd.READ, 1, 0, 4) + write_request(2, 0, b"data"))
    await harness.until(lambda: device.reading)
    async with asyncio.timeout(10):
        await server.remove_export(export)
    assert export.connections == 0
    assert server.connection_count == 0
