"""What cannot be streamed, or not to there, is refused, and leaves everything as it was."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed.opening import create_file
from nbdstream.errors import ImageError, ImageLockedError, ListenError, NbdstreamError, SourceError, WrongSourceError
from nbdstream.stream.disk import DiskStream
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, some_bytes, stop_on_the_way, stream_all
from tests.support import qed
from tests.support.descriptors import open_files

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("short_pauses")


async def refused(uri: str, path: str, error: type[NbdstreamError], match: str, *, socket: str | None = None) -> None:
    """Nothing is made, changed, or kept open."""
    existed = os.path.lexists(path)
    before = qed_bytes(path) if existed else b""
    others = set(threading.enumerate())  # of tests in which a side died, as far as one process can
    with pytest.raises(error, match=match) as raised:
        await DiskStream.start(uri, path, socket=socket)
    assert "\n" not in str(raised.value)
    assert os.path.lexists(path) == existed
    if existed:
        assert qed_bytes(path) == before
    async with asyncio.timeout(5):  # the thread of a source that was tried ends by and by
        while kept(path, others):
            await asyncio.sleep(0.001)


def kept(path: str, others: set[threading.Thread]) -> list[str]:
    """What is still there of an image and of a source: descriptors, threads that are none of the ``others``."""
    threads = set(threading.enumerate()) - others
    found = [thread.name for thread in threads if thread.name.startswith(("qed", "nbd-source"))]
    found += open_files()
    return [name for name in found if path in name or not name.startswith(("/", "pipe:", "socket:", "anon_inode:"))]


def qed_bytes(path: str) -> bytes:
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read()


async def test_a_source_that_is_not_there_makes_no_overlay(directory: str, path: str) -> None:
    uri = f"nbd+unix:///?socket={directory}/nobody"
    await refused(uri, path, SourceError, "nobody")
    await refused(uri, path, SourceError, "nobody", socket=f"{directory}/guest")
    assert not os.path.exists(f"{directory}/guest")


async def test_without_a_socket_a_resume_needs_its_source(server: SourceServer, path: str) -> None:
    await stop_on_the_way(server, path)
    await server.stop()
    await refused(server.uri, path, SourceError, "connect")


@pytest.mark.parametrize("uri", ["nbd+unix:///", "http://host/disk", "/disk.raw", "nbd://host:port/"])
async def test_what_is_no_nbd_uri_is_refused(path: str, uri: str) -> None:
    await refused(uri, path, SourceError, ".")


@pytest.mark.parametrize("socket", [None, "guest"])
async def test_a_source_of_another_size_is_refused(
    server: SourceServer, path: str, directory: str, socket: str | None
) -> None:
    await stop_on_the_way(server, path)
    await server.stop()
    server.disk = SourceDisk(some_bytes(41 * CLUSTER))
    await server.start()
    await refused(server.uri, path, WrongSourceError, "another disk", socket=socket and f"{directory}/{socket}")


async def test_an_overlay_of_another_source_is_refused(server: SourceServer, path: str) -> None:
    create_file(path, 40 * CLUSTER, cluster_size=CLUSTER, table_size=4, backing_name="nbd://elsewhere/disk")
    await refused(server.uri, path, ImageError, "nbd://elsewhere/disk")


async def test_an_image_that_was_independent_of_another_source_is_refused(server: SourceServer, path: str) -> None:
    await stream_all(server.uri, path)
    await refused("nbd://elsewhere/disk", path, ImageError, "elsewhere")


async def test_an_image_that_never_was_an_overlay_is_refused(server: SourceServer, path: str) -> None:
    qed.create(path, 40 * CLUSTER)
    await refused(server.uri, path, ImageError, "remembers none")


async def test_a_file_that_is_no_qed_image_is_refused(server: SourceServer, path: str) -> None:
    with open(path, "wb") as file:
        file.write(bytes(1 << 20))
    await refused(server.uri, path, ImageError, "not a QED image")


async def test_a_directory_and_a_dangling_link_are_refused(server: SourceServer, path: str, tmp_path: Path) -> None:
    await refused(server.uri, str(tmp_path), ImageError, "directory")
    os.symlink("nowhere", path)
    await refused(server.uri, path, ImageError, "No such file")


async def test_a_directory_that_does_not_exist_is_refused(server: SourceServer, tmp_path: Path) -> None:
    await refused(server.uri, str(tmp_path / "missing" / "overlay"), ImageError, "No such file")


async def test_an_overlay_that_somebody_has_open_is_refused(server: SourceServer, path: str) -> None:
    async with await DiskStream.start(server.uri, path, speed=1):
        with pytest.raises(ImageLockedError, match=path):
            await DiskStream.start(server.uri, path)


async def test_a_socket_that_cannot_be_had_makes_no_overlay(server: SourceServer, path: str, directory: str) -> None:
    await refused(server.uri, path, ListenError, ".", socket=server.path)
    await refused(server.uri, path, ListenError, ".", socket=f"{directory}/missing/guest")


async def test_a_full_disk_makes_no_overlay(server: SourceServer, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    await refused(server.uri, path, ImageError, "No space left")
