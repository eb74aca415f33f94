from __future__ import annotations

import asyncio
import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.flush import SharedFlush
from nbdstream.block.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Disk:
    """Stands in for fdatasync: it lets a sync begin and end when the test wants it to."""

    def __init__(self) -> None:
        self.syncs = 0
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.error: OSError | None = None

    def fdatasync(self, _fd: int) -> None:
        self.syncs += 1
        self.begun.release()
        assert self.may_end.acquire(timeout=60)
        if self.error:
            raise self.error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(os, "fdatasync", disk.fdatasync)
    return disk


@pytest.fixture
async def barrier() -> AsyncIterator[SharedFlush]:
    worker = Worker("sync")
    yield SharedFlush(-1, worker, "image.raw")
    await worker.close()


async def test_flushes_that_come_together_share_one_sync(disk: Disk, barrier: SharedFlush) -> None:
    disk.may_end.release()
    await asyncio.gather(*(barrier.flush() for _ in range(50)))
    assert disk.syncs == 1


async def test_a_flush_during_a_sync_waits_for_one_more(disk: Disk, barrier: SharedFlush) -> None:
    first = asyncio.ensure_future(barrier.flush())
    await asyncio.to_thread(disk.begun.acquire)
    late = [asyncio.ensure_future(barrier.flush()) for _ in range(50)]
    disk.may_end.release()
    await first
    assert not any(flush.done() for flush in late)
    disk.may_end.release()
    await asyncio.gather(*late)
    assert disk.syncs == 2


async def test_every_flush_syncs_anew(disk: Disk, barrier: SharedFlush) -> None:
    for number in range(1, 4):
        disk.may_end.release()
        await barrier.flush()
        assert disk.syncs == number


async def test_a_failed_sync_is_final(disk: Disk, barrier: SharedFlush, caplog: pytest.LogCaptureFixture) -> None:
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    first = asyncio.ensure_future(barrier.flush())
    await asyncio.to_thread(disk.begun.acquire)
    late = asyncio.ensure_future(barrier.flush())
    await asyncio.sleep(0)
    disk.may_end.release()
    for flush in (first, late, barrier.flush()):
        with pytest.raises(OSError, match=r"image\.raw could not be flushed") as caught:
            await flush
        assert caught.value.errno == errno.EIO
    assert disk.syncs == 1  # a second one would claim success
    assert len(caplog.records) == 1
    assert "image.raw could not be flushed (No space left on device)" in caplog.text


async def test_a_cancelled_flush_leaves_the_others_alone(disk: Disk, barrier: SharedFlush) -> None:
    impatient, patient = asyncio.ensure_future(barrier.flush()), asyncio.ensure_future(barrier.flush())
    await asyncio.to_thread(disk.begun.acquire)
    impatient.cancel()
    disk.may_end.release()
    await patient
    assert impatient.cancelled()
