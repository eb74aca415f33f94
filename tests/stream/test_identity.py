"""Whether a source is the right one: what came from it once is compared, and what the guest wrote is not."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.remote.export import RemoteExport
from nbdstream.errors import WrongSourceError
from nbdstream.stream.identity import compare
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, Streamed, some_bytes, streamed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def stream(server: SourceServer, tmp_path: Path) -> AsyncIterator[Streamed]:
    async with streamed(server, tmp_path / "overlay") as stream:
        yield stream


async def compared(stream: Streamed, server: SourceServer, seed: int = 0) -> int:
    export = await RemoteExport.connect(server.uri)
    try:
        return await compare(stream.overlay, export, random.Random(seed))
    finally:
        await export.close()


async def test_the_same_disk_is_the_same(stream: Streamed, server: SourceServer) -> None:
    await stream.fetch(0, 10)
    assert await compared(stream, server) >= 5


async def test_a_sample_is_bounded(stream: Streamed, server: SourceServer, disk: SourceDisk) -> None:
    await stream.fetch(0, 40)
    disk.reads.clear()
    assert await compared(stream, server) <= 16
    assert len(disk.reads) <= 16
    assert max(length for _, length in disk.reads) <= 65536


@pytest.mark.parametrize("cluster", [0, 9])
async def test_the_first_and_the_last_are_always_compared(
    stream: Streamed, server: SourceServer, disk: SourceDisk, cluster: int
) -> None:
    await stream.fetch(0, 10)
    disk.data[cluster * CLUSTER + 77] ^= 1
    with pytest.raises(WrongSourceError, match=f"another disk: it differs at {cluster * CLUSTER}"):
        await compared(stream, server)


async def test_another_disk_is_another_whatever_is_compared(
    stream: Streamed, server: SourceServer, disk: SourceDisk
) -> None:
    await stream.fetch(20, 22)
    disk.data[:] = some_bytes(40 * CLUSTER + 1)[:-1]
    for seed in range(5):
        with pytest.raises(WrongSourceError):
            await compared(stream, server, seed)


async def test_what_the_guest_wrote_is_not_compared(stream: Streamed, server: SourceServer) -> None:
    await stream.fetch(0, 10)
    await stream.overlay.write(0, b"the guest's")
    await stream.overlay.write(20 * CLUSTER, b"x" * CLUSTER)
    await stream.overlay.discard(9 * CLUSTER, CLUSTER)
    assert await compared(stream, server) > 0


async def test_with_nothing_local_nothing_can_be_compared(stream: Streamed, server: SourceServer) -> None:
    assert await compared(stream, server) == 0
    await stream.overlay.write(0, b"x" * CLUSTER)
    assert await compared(stream, server) == 0


async def test_zeroes_are_no_evidence(stream: Streamed, server: SourceServer, disk: SourceDisk) -> None:
    disk.data[:] = bytes(disk.size)
    await stream.fetch(0, 10)
    assert await compared(stream, server) == 0


async def test_a_write_during_the_comparison_is_no_difference(
    stream: Streamed, server: SourceServer, disk: SourceDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stream.fetch(0, 1)
    read = stream.image.read

    async def beside_a_guest(place: int, length: int) -> bytes:
        await stream.overlay.write(0, b"written meanwhile")
        return await read(place, length)

    monkeypatch.setattr(stream.image, "read", beside_a_guest)
    assert await compared(stream, server) == 0


async def test_a_source_that_cannot_be_read_is_an_error(
    stream: Streamed, server: SourceServer, disk: SourceDisk
) -> None:
    await stream.fetch(0, 1)
    disk.error = OSError(errno.EIO, "a bad sector")
    with pytest.raises(OSError, match=r"."):
        await compared(stream, server)
