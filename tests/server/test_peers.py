"""Real clients against the server, on a raw image and the loop of production: libnbd, QEMU, fio."""

from __future__ import annotations

import asyncio
import json
import os
import random
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.raw import RawImage
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from tests.support.processes import PATIENCE_SECONDS, Process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

SIZE = 16 << 20

# nbdsh needs the system's Python, which has libnbd.
SYSTEM_PATH = os.environ | {"PATH": f"/usr/bin:/bin:/usr/sbin:/sbin:{os.environ['PATH']}"}


async def run(*command: str, status: int = 0) -> str:
    """Run a command to its end and return what it said."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=SYSTEM_PATH
    )
    output, errors = await process.communicate()
    assert process.returncode == status, errors.decode()
    return output.decode() or errors.decode()


class Served:
    """Two exports: "disk" (writable, the default) and "copy" (the same contents, read-only)."""

    def __init__(self, directory: str, tmp_path: Path, server: NbdServer) -> None:
        self.image = str(tmp_path / "disk")
        self.copy = str(tmp_path / "copy")
        self.scratch = str(tmp_path / "scratch")
        self.socket = f"{directory}/socket"
        self.uri = f"nbd+unix:///disk?socket={self.socket}"
        self.copy_uri = f"nbd+unix:///copy?socket={self.socket}"
        self.server = server


def make_image(path: Path, seed: int) -> None:
    """Data, holes and an end that is not aligned."""
    numbers = random.Random(seed)
    with path.open("wb") as file:
        for start in range(0, SIZE, 4 << 20):
            file.seek(start)
            file.write(numbers.randbytes(1 << 20))
        file.truncate(SIZE + 1536)


@pytest.fixture
async def served(directory: str, tmp_path: Path, seed: int) -> AsyncIterator[Served]:
    devices = []
    for name, writable in (("disk", True), ("copy", False)):
        make_image(tmp_path / name, seed)
        devices.append(await RawImage.open(str(tmp_path / name), writable=writable))
    disk, copy = devices
    server = NbdServer(
        [Export("disk", disk, writable=True, description="a disk"), Export("copy", copy, writable=False)]
    )
    served = Served(directory, tmp_path, server)
    await server.listen_unix(served.socket)
    yield served
    await server.close()
    for device in devices:
        await device.close()


async def test_nbdinfo_tells_what_the_export_is(served: Served) -> None:
    (export,) = json.loads(await run("nbdinfo", "--json", served.uri))["exports"]
    assert export["export-size"] == SIZE + 1536
    assert export["description"] == "a disk"
    assert export["contexts"] == ["base:allocation"]
    yes = "can_cache can_df can_fast_zero can_flush can_fua can_multi_conn can_trim can_zero"
    assert all(export[name] for name in yes.split())
    assert not export["is_read_only"]
    assert (export["block_size_minimum"], export["block_size_maximum"]) == (1, 64 << 20)
    (export,) = json.loads(await run("nbdinfo", "--json", served.copy_uri))["exports"]
    assert export["is_read_only"]


async def test_nbdinfo_lists_every_export(served: Served) -> None:
    listed = json.loads(await run("nbdinfo", "--json", "--list", f"nbd+unix://?socket={served.socket}"))
    assert [export["export-name"] for export in listed["exports"]] == ["disk", "copy"]


async def test_qemu_nbd_and_nbd_client_list_every_export(served: Served) -> None:
    listed = await run("qemu-nbd", "-L", "-k", served.socket)
    assert "export: 'disk'" in listed
    assert "description: a disk" in listed
    assert "export: 'copy'" in listed
    listed = await run("nbd-client", "-unix", "-l", served.socket)
    assert listed.split()[-2:] == ["disk", "copy"]


async def test_nbdinfo_maps_the_holes(served: Served) -> None:
    extents = json.loads(await run("nbdinfo", "--json", "--map", served.uri))
    assert sum(extent["length"] for extent in extents) == SIZE + 1536
    assert [(extent["offset"], extent["type"]) for extent in extents[:3]] == [(0, 0), (1 << 20, 3), (4 << 20, 0)]


@pytest.mark.parametrize("requests", ["1", "64"])
async def test_nbdcopy_copies_everything_out(served: Served, requests: str) -> None:
    await run("nbdcopy", f"--requests={requests}", served.copy_uri, served.scratch)
    with open(served.copy, "rb") as one, open(served.scratch, "rb") as other:
        assert one.read() == other.read()


async def test_nbdcopy_copies_everything_in(served: Served, tmp_path: Path) -> None:
    make_image(tmp_path / "new", 99)
    await run("nbdcopy", "--flush", "--destination-is-zero", "/dev/null", served.uri)
    await run("nbdcopy", "--flush", str(tmp_path / "new"), served.uri)
    with open(served.image, "rb") as one, open(tmp_path / "new", "rb") as other:
        assert one.read() == other.read()


async def test_qemu_img_reads_compares_and_converts(served: Served) -> None:
    info = json.loads(await run("qemu-img", "info", "--output=json", served.copy_uri))
    assert info["virtual-size"] == SIZE + 1536
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", served.uri, served.copy_uri)
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.copy_uri, served.scratch)
    await run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", served.copy_uri, served.scratch)
    extents = json.loads(await run("qemu-img", "map", "-f", "raw", "--output=json", served.copy_uri))
    assert [extent["zero"] for extent in extents[:4]] == [False, True, False, True]


async def test_qemu_img_converts_into_the_export(served: Served, tmp_path: Path) -> None:
    make_image(tmp_path / "new", 98)
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(tmp_path / "new"), served.uri)
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "new"), served.uri)


async def test_qemu_io_writes_zeroes_discards_and_flushes(served: Served) -> None:
    commands = [
        "write -P 0x11 1000 70000",
        "write -f -P 0x22 512k 300k",
        "write -z 64k 64k",
        "write -z -u 256k 64k",
        "discard 1M 1M",
        "flush",
        "read -P 0x11 1000 64536",
        "read -P 0x00 64k 64k",
        "read -P 0x22 512k 300k",
        "read -P 0x00 256k 64k",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    output = await run("qemu-io", "-f", "raw", *arguments, served.uri)
    assert "error" not in output.lower()
    assert "failed" not in output.lower()
    with open(served.image, "rb") as file:
        assert os.pread(file.fileno(), 300 << 10, 512 << 10) == b"\x22" * (300 << 10)


async def test_qemu_io_cannot_write_a_read_only_export(served: Served) -> None:
    output = await run("qemu-io", "-f", "raw", "-c", "write 0 512", served.copy_uri, status=1)
    assert "Permission denied" in output
    assert await run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", served.copy_uri)


NBDSH = """
h.set_strict_mode(0)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated()

def fails(errno, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno == errno, error
    else:
        assert False, (call, arguments)

size = h.get_size()
h.pwrite(b"x" * (64 << 20 >> 3), 0, nbd.CMD_FLAG_FUA)
assert h.pread(100, 1000) == b"x" * 100
assert h.pread(65536, 0, nbd.CMD_FLAG_DF) == b"x" * 65536
fails("EINVAL", h.pread, 512, size)
fails("ENOSPC", h.pwrite, b"x" * 512, size)
fails("ENOSPC", h.zero, 512, size)
fails("EINVAL", h.trim, 512, size)
fails("EINVAL", h.cache, 512, size)
fails("EINVAL", h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
h.zero(1 << 20, 0, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(1 << 20, 0) == bytes(1 << 20)
h.trim(1 << 20, 1 << 20)
h.cache(size, 0)
h.flush()
fails("EINVAL", h.block_status, 512, 0, lambda *_: 0)
h.shutdown()
"""


async def test_nbdsh_gets_every_answer_right(served: Served) -> None:
    await run("nbdsh", "-c", f"uri = {served.uri!r}", "-c", NBDSH)


@pytest.mark.parametrize("depth", [1, 32])
async def test_fio_verifies_what_it_wrote(served: Served, depth: int) -> None:
    await run(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randrw", "--bsrange=512-256k"),
        *(
            "--bs_unaligned",
            "--size=8m",
            f"--iodepth={depth}",
            "--fsync=16",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ),
    )


async def test_eight_connections_see_one_disk(served: Served) -> None:
    await run("nbdcopy", "--connections=8", "--flush", served.copy, served.uri)
    await run("nbdcopy", "--connections=8", served.uri, served.scratch)
    with open(served.copy, "rb") as one, open(served.scratch, "rb") as other:
        assert one.read() == other.read()


async def test_tcp_serves_as_well(served: Served) -> None:
    await served.server.listen_tcp("127.0.0.1", 0)
    uri = next(uri for uri in served.server.uris if uri.startswith("nbd://") and uri.endswith("/copy"))
    await run("nbdcopy", uri, served.scratch)
    with open(served.copy, "rb") as one, open(served.scratch, "rb") as other:
        assert one.read() == other.read()


async def test_nbdkit_serves_us_on_as_a_proxy(served: Served, directory: str) -> None:
    await run(
        *("nbdkit", "-U", f"{directory}/proxy", "nbd", f"uri={served.copy_uri}"),
        *("--run", f"nbdcopy nbd+unix:///?socket={directory}/proxy {served.scratch}"),
    )
    with open(served.copy, "rb") as one, open(served.scratch, "rb") as other:
        assert one.read() == other.read()


async def test_qemu_storage_daemon_serves_us_on(served: Served, directory: str) -> None:
    server = f"server.type=unix,server.path={served.socket}"
    await served_on(f"driver=nbd,node-name=disk,read-only=on,export=copy,{server}", [], directory, served.scratch)
    with open(served.copy, "rb") as one, open(served.scratch, "rb") as other:
        assert one.read() == other.read()


async def served_on(node: str, objects: Sequence[str], directory: str, destination: str) -> None:
    """Copy what QEMU's storage daemon reads from its block node ``disk``."""
    proxy = f"{directory}/proxy"
    with Process(
        *("qemu-storage-daemon", *objects, "--blockdev", node, "--nbd-server", f"addr.type=unix,addr.path={proxy}"),
        *("--export", "type=nbd,id=disk,node-name=disk,name="),
    ):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not os.path.exists(proxy):
                await asyncio.sleep(0.01)
        await run("nbdcopy", f"nbd+unix:///?socket={proxy}", destination)
