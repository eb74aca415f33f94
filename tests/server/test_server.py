from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from typing import TYPE_CHECKING

import pytest

from nbdstream.errors import ListenError
from nbdstream.server.export import Export
from nbdstream.server.limits import Limits
from nbdstream.server.server import NbdServer
from nbdstream.wire.nbd import Cmd, Err, Opt, Rep, TransmissionFlag
from tests.server.memory_device import MemoryDevice
from tests.server.raw_client import RawClient, info_data, option, request, write_request

if TYPE_CHECKING:
    from tests.server.conftest import Harness

# -- exports ------------------------------------------------------------------------------------------------


async def test_several_exports_are_listed_and_the_first_is_the_default(harness: Harness) -> None:
    one, two = MemoryDevice(b"1" * 4096), MemoryDevice(b"2" * 8192, read_only=True)
    await harness.serve(Export("one", one, writable=True, description="first"), Export("two", two, writable=False))
    client = await harness.connect()
    await client.greet()
    listed = [data for kind, data in await client.opt(Opt.LIST) if kind == Rep.SERVER]
    assert listed == [b"\0\0\0\3onefirst", b"\0\0\0\3two"]
    assert await (await harness.open()).read(0, 4) == b"1111"
    assert await (await harness.open("two")).read(0, 4) == b"2222"


async def test_a_read_only_export_says_so_and_refuses_writes(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve(Export("disk", device, writable=False))
    client = await harness.open()
    assert client.flags & TransmissionFlag.READ_ONLY
    assert not client.flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)
    assert await client.write(0, b"data") == Err.EPERM
    assert device.data[:4] == bytes(4)


async def test_a_writable_export_advertises_what_it_can(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device)
    flags = TransmissionFlag((await harness.open(structured=True)).flags)
    names = "HAS_FLAGS SEND_FLUSH SEND_FUA SEND_TRIM SEND_WRITE_ZEROES SEND_DF CAN_MULTI_CONN SEND_CACHE SEND_FAST_ZERO"
    assert flags == sum(TransmissionFlag[name] for name in names.split())


async def test_an_export_for_one_client_refuses_the_second_and_is_free_again(
    harness: Harness, device: MemoryDevice
) -> None:
    server = await harness.serve(Export("disk", device, writable=True, max_connections=1))
    first = await harness.open()
    assert not first.flags & TransmissionFlag.CAN_MULTI_CONN
    second = await harness.connect()
    await second.greet()
    ((kind, text),) = await second.opt(Opt.GO, info_data("disk"))
    assert kind == Rep.ERR_POLICY
    assert b"as many clients as it allows (1)" in text
    await first.close()
    await harness.until(lambda: server.exports[0].connections == 0)
    assert (await second.opt(Opt.GO, info_data("disk")))[-1][0] == Rep.ACK


async def test_a_device_that_is_read_only_cannot_be_exported_writable(device: MemoryDevice) -> None:
    device.read_only = True
    with pytest.raises(ValueError, match="read-only"):
        Export("disk", device, writable=True)


async def test_two_exports_of_one_name_are_refused(device: MemoryDevice) -> None:
    with pytest.raises(ValueError, match="one name"):
        NbdServer([Export("disk", device, writable=True), Export("disk", device, writable=False)])


# -- listening ----------------------------------------------------------------------------------------------


async def test_a_unix_socket_is_private_and_removed_at_the_end(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    assert stat.S_IMODE(os.stat(harness.path).st_mode) == 0o600
    assert server.uris == [f"nbd+unix:///disk?socket={harness.path}"]
    await server.close()
    assert not os.path.exists(harness.path)


async def test_mode_and_group_of_a_unix_socket_can_be_chosen(directory: str, device: MemoryDevice) -> None:
    server = NbdServer([Export("", device, writable=False)])
    await server.listen_unix(f"{directory}/s", mode=0o660, group="daemon")
    status = os.stat(f"{directory}/s")
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, 1)
    with pytest.raises(ListenError, match="no group"):
        await server.listen_unix(f"{directory}/t", group="no-such-group")
    assert not os.path.exists(f"{directory}/t")
    await server.close()


async def test_the_socket_file_of_a_dead_server_is_replaced(harness: Harness, device: MemoryDevice) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(harness.path)
        dead.listen()
    await harness.serve_device(device)
    assert await (await harness.open()).read(0, 4) == bytes(4)


async def test_a_live_socket_is_never_taken(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device)
    with pytest.raises(ListenError, match="another server answers"):
        await NbdServer([Export("", device, writable=False)]).listen_unix(harness.path)
    assert await (await harness.open()).read(0, 4) == bytes(4)


async def test_what_is_no_socket_is_never_replaced(directory: str, device: MemoryDevice) -> None:
    path = f"{directory}/file"
    with open(path, "w") as file:
        file.write("precious")
    with pytest.raises(ListenError, match="no socket"):
        await NbdServer([Export("", device, writable=False)]).listen_unix(path)
    with open(path) as file:
        assert file.read() == "precious"


async def test_a_socket_file_that_another_made_is_not_removed(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    os.unlink(harness.path)
    with open(harness.path, "w"):
        pass
    await server.close()
    assert os.path.exists(harness.path)


@pytest.mark.parametrize("path", ["/no/such/directory/socket", "/tmp/" + "x" * 200])
async def test_a_path_that_cannot_be_bound_is_one_clear_line(path: str, device: MemoryDevice) -> None:
    with pytest.raises(ListenError, match="cannot listen on /"):
        await NbdServer([Export("", device, writable=False)]).listen_unix(path)


async def test_tcp_and_a_port_in_use(device: MemoryDevice) -> None:
    server = NbdServer([Export("", device, writable=False)])
    await server.listen_tcp("127.0.0.1", 0)
    port = int(server.uris[0].rsplit(":", 1)[1].rstrip("/"))
    client = RawClient(*await asyncio.open_connection("127.0.0.1", port))
    await client.greet()
    with pytest.raises(ListenError, match=f"port {port}: Address already in use"):
        await NbdServer([Export("", device, writable=False)]).listen_tcp("127.0.0.1", port)
    await client.close()
    await server.close()


async def test_a_host_that_does_not_exist_is_one_clear_line(device: MemoryDevice) -> None:
    with pytest.raises(ListenError, match="cannot listen on"):
        await NbdServer([Export("", device, writable=False)]).listen_tcp("no-such-host.invalid", 0)


async def test_a_socket_that_is_bound_already_is_served(directory: str, device: MemoryDevice) -> None:
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(f"{directory}/given")
    server = NbdServer([Export("", device, writable=False)])
    await server.listen_socket(bound)
    client = await RawClient.open(f"{directory}/given")
    assert await client.read(0, 4) == bytes(4)
    await client.close()
    await server.close()
    # Whoever made the file keeps it, as systemd does.
    assert os.path.exists(f"{directory}/given")


# -- what clients may cost ----------------------------------------------------------------------------------


async def test_a_client_that_does_not_finish_its_handshake_is_dropped(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device, limits=Limits(handshake_time=0.05))
    client = await harness.connect()
    await client.greet()
    assert await client.closed()
    await harness.until(lambda: server.handshake_count == 0)


async def test_a_client_that_opened_an_export_has_all_the_time(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device, limits=Limits(handshake_time=0.05))
    client, idle = await harness.open(), await harness.connect()
    assert await idle.closed()
    assert await client.read(0, 4) == bytes(4)


async def test_handshakes_are_limited_and_open_connections_go_on(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device, limits=Limits(handshakes=3))
    client = await harness.open()
    idle = [await harness.connect() for _ in range(3)]
    for each in idle:
        await each.greet()
    assert await (await harness.connect()).closed()
    assert await client.read(0, 4) == bytes(4)
    await idle[0].close()
    await harness.until(lambda: harness.servers[0].handshake_count == 2)
    assert await (await harness.open()).read(0, 4) == bytes(4)


async def test_connections_are_limited(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device, limits=Limits(connections=2))
    for _ in range(2):
        await harness.open()
    assert await (await harness.connect()).closed()


async def test_a_client_that_vanishes_at_any_byte_harms_nobody(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    witness = await harness.open()
    stream = struct.pack("!I", 3) + option(Opt.STRUCTURED_REPLY) + option(Opt.GO, info_data("disk"))
    stream += request(Cmd.READ, 1, 0, 4096) + write_request(2, 0, bytes(20))
    for length in range(len(stream)):
        client = await RawClient.connect(harness.path)
        client.send(stream[:length])
        await asyncio.sleep(0)
        client.writer.transport.abort()
    assert await witness.read(4, 4) == b"\0\0\0\1"
    await harness.until(lambda: (server.connection_count, server.handshake_count) == (1, 0))


async def test_a_handshake_that_takes_no_replies_is_bounded(harness: Harness) -> None:
    exports = [Export(f"{number}", MemoryDevice(0), writable=False, description="x" * 4096) for number in range(50)]
    await harness.serve(*exports)
    client = await harness.connect()
    await client.greet()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(option(Opt.LIST) * 100 + option(Opt.GO, info_data("")))
    await harness.until(lambda: harness.servers[0].handshake_count == 0)
    assert harness.servers[0].connection_count == 0


async def test_garbage_is_met_with_the_end_of_the_connection(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device)
    for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 100, bytes(4) + b"x" * 100):
        client = await harness.connect()
        client.send(garbage)
        with contextlib.suppress(ConnectionError):
            await client.reader.readexactly(18)
        assert await client.closed()


# -- the end ------------------------------------------------------------------------------------------------


async def test_closing_finishes_what_is_in_flight_and_refuses_what_comes(
    harness: Harness, device: MemoryDevice
) -> None:
    server = await harness.serve_device(device)
    client = await harness.open(structured=True)
    device.slow = True
    device.gate.clear()
    client.send(write_request(1, 0, b"last") + request(Cmd.READ, 2, 4, 4))
    await harness.until(lambda: device.reading)
    closing = asyncio.create_task(server.close())
    await asyncio.sleep(0)
    client.send(request(Cmd.READ, 3, 0, 4) + write_request(4, 0, b"late"))
    refused = [await client.reply(), await client.reply()]
    assert [(chunk.cookie, chunk.error) for chunk in refused] == [(3, Err.ESHUTDOWN), (4, Err.ESHUTDOWN)]
    device.gate.set()
    finished = {(await client.reply()).cookie, (await client.reply()).cookie}
    assert finished == {1, 2}
    assert await client.closed()
    await closing
    assert device.data[:4] == b"last"


async def test_closing_drops_idle_and_half_open_clients(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    idle, half_open = await harness.open(), await harness.connect()
    await half_open.greet()
    await server.close()
    assert await idle.closed()
    assert await half_open.closed()
    with pytest.raises(OSError, match="No such file"):
        await RawClient.connect(harness.path)


async def test_closing_gives_up_at_its_deadline(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    client = await harness.open()
    device.slow = True
    device.gate.clear()
    client.send(request(Cmd.READ, 1, 0, 4) + write_request(2, 0, b"data"))
    await harness.until(lambda: device.reading)
    await server.close(0.05)
    assert server.connection_count == 0
    assert await client.closed()


async def test_closing_does_not_wait_for_a_client_that_takes_no_replies(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    client = await harness.open()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(b"".join(request(Cmd.READ, cookie, 0, 1 << 20) for cookie in range(50)))
    await harness.until(lambda: server.exports[0].requests)
    await server.close(0.05)
    assert server.connection_count == 0


async def test_closing_twice_does_no_harm(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    await server.close()
    await server.close()
