"""Opening what an operator names: formats are named by the operator alone, and each layer finds the next."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.chain import open_device, open_device_or_uri
from nbdstream.block.overlay import Overlay
from nbdstream.block.raw import RawImage
from nbdstream.errors import ImageError, NbdstreamError, SourceError
from nbdstream.extents import ExtentFlags
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from tests.support import qed
from tests.support.memory import MemoryDevice

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nbdstream.block.device import BlockDevice

SIZE = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> str:
    (tmp_path / "disk.raw").write_bytes(b"\x11" * SIZE)
    return str(tmp_path / "disk.raw")


@pytest.fixture
def overlay(raw: str) -> str:
    """A QED overlay of the raw disk, by a name that is relative to its directory."""
    path = os.path.join(os.path.dirname(raw), "overlay.qed")
    qed.create(path, SIZE, backing="disk.raw")
    qed.qemu_io(path, "write -P 0x22 0 64k")
    return path


@pytest.fixture
async def uri() -> AsyncIterator[str]:
    directory = tempfile.mkdtemp(prefix="nbdstream-")
    server = NbdServer([Export("", MemoryDevice(b"\x33" * SIZE), writable=False)])
    await server.listen_unix(f"{directory}/socket")
    yield server.uris[0]
    await server.close(1)
    shutil.rmtree(directory)


async def content(device: BlockDevice, offset: int, length: int) -> bytes:
    try:
        buffers = device.read_now(offset, length) or await device.read(offset, length)
        return b"".join(map(bytes, buffers))
    finally:
        await device.close()


async def test_without_a_format_an_image_is_raw(raw: str) -> None:
    device = await open_device(raw, None, [], writable=False)
    assert isinstance(device, RawImage)
    assert await content(device, 0, 10) == b"\x11" * 10


async def test_without_a_format_a_qed_image_is_refused_with_a_hint(overlay: str) -> None:
    with pytest.raises(ImageError, match="-f qed"):
        await open_device(overlay, None, [], writable=False)


async def test_a_qed_image_is_raw_if_the_operator_says_so(overlay: str) -> None:
    assert await content(await open_device(overlay, "raw", [], writable=False), 0, 4) == b"QED\0"


async def test_a_backing_file_is_found_beside_its_overlay(overlay: str) -> None:
    device = await open_device(overlay, "qed", ["raw"], writable=False)
    assert isinstance(device, Overlay)
    assert await content(device, 65530, 12) == b"\x22" * 6 + b"\x11" * 6


async def test_without_a_format_for_it_a_backing_file_is_not_opened(overlay: str) -> None:
    with pytest.raises(ImageError, match="--backing-format"):
        await open_device(overlay, "qed", [], writable=False)
    await (await open_device(overlay, "raw", [], writable=True)).close()  # nothing is kept locked


async def test_alone_an_image_is_described_without_its_backing_file(overlay: str) -> None:
    device = await open_device(overlay, "qed", [], writable=False, alone=True)
    assert [extent.flags for extent in await device.extents(0, SIZE)] == [
        ExtentFlags.DATA,
        ExtentFlags.REMOTE,
    ]
    await device.close()


async def test_a_chain_of_images_needs_a_format_for_each(overlay: str, tmp_path: Path) -> None:
    top = str(tmp_path / "top.qed")
    qed.create(top, SIZE, backing="overlay.qed", backing_format="qed")
    qed.qemu_io(top, "write -P 0x44 512k 64k")
    device = await open_device(top, "qed", ["qed", "raw"], writable=False)
    extents = await device.extents(0, SIZE)
    assert [extent.depth for extent in extents] == [2, 3, 1, 3]
    assert await content(device, 0, 10) == b"\x22" * 10
    with pytest.raises(ImageError, match="--backing-format"):
        await open_device(top, "qed", ["qed"], writable=False)


@pytest.mark.parametrize("formats", [["raw", "raw"], ["raw", "qed"]])
async def test_more_formats_than_layers_are_refused(overlay: str, formats: list[str]) -> None:
    with pytest.raises(ImageError, match="raw image has no backing file"):
        await open_device(overlay, "qed", formats, writable=False)


async def test_a_format_for_a_backing_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = qed.create(str(tmp_path / "image"), SIZE)
    with pytest.raises(ImageError, match="no backing file"):
        await open_device(path, "qed", ["raw"], writable=False)


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("lower", ["image", "other"], ids=["itself", "its overlay"])
async def test_a_chain_without_end_is_refused(tmp_path: Path, lower: str, *, writable: bool) -> None:
    path = qed.create(str(tmp_path / "image"), SIZE, backing=lower, backing_format="qed")
    qed.create(str(tmp_path / "other"), SIZE, backing="image", backing_format="qed")
    with pytest.raises(ImageError, match="the chain has no end"):
        await open_device(path, "qed", ["qed", "qed", "raw"], writable=writable)


async def test_a_chain_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = qed.create(str(tmp_path / "image"), SIZE, backing="other", backing_format="qed")
    with pytest.raises(NbdstreamError, match="64"):
        await open_device(path, "qed", ["qed"] * 65, writable=False)


@pytest.mark.parametrize(("below", "above"), [(300_000, SIZE), (SIZE, 300_032)])
async def test_layers_may_differ_in_size(tmp_path: Path, below: int, above: int) -> None:
    (tmp_path / "disk.raw").write_bytes(b"\x11" * below)
    path = qed.create(str(tmp_path / "image"), above, backing="disk.raw")
    device = await open_device(path, "qed", ["raw"], writable=False)
    assert sum(extent.length for extent in await device.extents(0, above)) == above
    assert await content(device, 0, above) == (b"\x11" * below).ljust(above, b"\0")[:above]


async def test_a_deep_chain_is_read_through(tmp_path: Path, raw: str) -> None:
    name = os.path.basename(raw)
    for layer in range(12):
        path = qed.create(str(tmp_path / f"layer{layer}"), SIZE, backing=name, backing_format="raw")
        await write(path, layer * 4096, bytes([layer + 1]) * 4096)
        name = f"layer{layer}"
    device = await open_device(str(tmp_path / name), "qed", ["qed"] * 11 + ["raw"], writable=False)
    data = await content(device, 0, 65536)
    assert data == b"".join(bytes([layer + 1]) * 4096 for layer in range(12)) + b"\x11" * 16384


async def write(path: str, offset: int, data: bytes) -> None:
    """Write into a layer, over what its own backing files hold."""
    layers = int(path.rpartition("layer")[2])
    device = await open_device(path, "qed", ["qed"] * layers + ["raw"], writable=True)
    await device.write(offset, data)
    await device.close()


@pytest.mark.parametrize("name", ["json:{}", "ssh://host/disk", "fat:dir", "http://host/disk"])
async def test_other_backing_names_than_paths_and_nbd_are_refused(tmp_path: Path, name: str) -> None:
    path = qed.create(str(tmp_path / "image"), SIZE, backing=name)
    with pytest.raises(ImageError, match="only paths and NBD URIs"):
        await open_device(path, "qed", ["raw"], writable=False)


async def test_a_colon_behind_a_slash_is_part_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "co:lon.raw").write_bytes(b"\x55" * SIZE)
    path = qed.create(str(tmp_path / "image"), SIZE, backing="./co:lon.raw")
    assert await content(await open_device(path, "qed", ["raw"], writable=False), 0, 4) == b"\x55" * 4


async def test_a_missing_backing_file_is_named_and_the_image_let_go(tmp_path: Path) -> None:
    path = qed.create(str(tmp_path / "image"), SIZE, backing="missing.raw")
    with pytest.raises(ImageError, match=r"missing\.raw"):
        await open_device(path, "qed", ["raw"], writable=False)
    (tmp_path / "missing.raw").write_bytes(bytes(SIZE))
    await (await open_device(path, "qed", ["raw"], writable=True)).close()


@pytest.mark.parametrize("image_format", ["raw", "qed"])
async def test_a_backing_file_that_is_a_fifo_keeps_nobody_waiting(tmp_path: Path, image_format: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = qed.create(str(tmp_path / "overlay"), SIZE, backing=str(tmp_path / "pipe"))
    with pytest.raises(ImageError, match="pipe is neither a regular file nor a block device"):
        await open_device(path, "qed", [image_format], writable=False)


async def test_an_overlay_of_an_export_is_opened_with_it(tmp_path: Path, uri: str) -> None:
    path = qed.create(str(tmp_path / "image"), SIZE, backing=uri)
    device = await open_device(path, "qed", ["raw"], writable=False)
    assert await content(device, 70000, 10) == b"\x33" * 10


async def test_an_export_is_opened_by_its_uri(uri: str) -> None:
    assert await content(await open_device_or_uri(uri, None, []), 0, 10) == b"\x33" * 10


@pytest.mark.parametrize(("image_format", "backing"), [("qed", []), (None, ["raw"])])
async def test_what_is_behind_a_uri_is_raw(uri: str, image_format: str | None, backing: list[str]) -> None:
    with pytest.raises(ImageError, match="raw"):
        await open_device_or_uri(uri, image_format, backing)


async def test_a_uri_that_nobody_listens_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        await open_device_or_uri(f"nbd+unix:///?socket={tmp_path}/nobody", None, [])
