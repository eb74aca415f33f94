"""A raw image: a file or block device whose bytes are the disk's bytes."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nbdstream.block.device import ZEROES, BlockDevice, read_only_error, zero_buffers
from nbdstream.block.files import Run, open_image, punch_hole, runs, zero_range
from nbdstream.block.flush import SharedFlush
from nbdstream.block.folios import Folios
from nbdstream.block.locks import Sharing, take_locks
from nbdstream.block.mapping import Mapping
from nbdstream.block.prompt import PromptWriter
from nbdstream.block.qed.layout import MAGIC as QED_MAGIC
from nbdstream.block.readahead import ReadAhead
from nbdstream.block.worker import Worker, as_os_error, pwrite_all
from nbdstream.errors import ImageError
from nbdstream.extents import Extent, ExtentFlags

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nbdstream.block.device import Buffer, WriteDone

# One question for extents is answered with so many at most.
_MOST_EXTENTS = 1000
_SCRATCH_BYTES = 256 << 10
_STEP_BYTES = 1 << 20
# What takes longer to copy or to read has a thread of its own: a few long requests must not hold up short ones.
_SHORT_BYTES = 256 << 10
# The kernel reads no more than its own read-ahead for one hint, and 128 KiB is the default of that.
_HINT_BYTES = 128 << 10


class RawImage(BlockDevice):
    """A regular file or block device, exported byte by byte.

    What is in the page cache is sent from there without asking anybody, and small writes go there as long as nothing
    else changes the file. Everything else is done in threads: two for reads that must wait for the disk and two for
    writes, short ones and long ones; one for flushes, that writes need not wait for them; and one that tells the kernel
    early what will be read.
    """

    def __init__(self, path: str, fd: int, size: int, *, writable: bool) -> None:
        """Take over an open, locked image. Use :meth:`open`. Raises OSError, and then ``fd`` is still the caller's."""
        self.size = size
        self.read_only = not writable
        self._fd = fd
        self._mapping = Mapping(fd, max(size, 1))
        self._read_ahead = ReadAhead(size)
        self._reads = Worker("raw-read")
        self._long_reads = Worker("raw-long-read")
        self._hints = Worker("raw-hint")
        self._writes = Worker("raw-write")
        self._long_writes = Worker("raw-long-write")
        self._syncs = Worker("raw-sync")
        self._prompt = PromptWriter(fd, size, Folios(fd, self._mapping.part_folio))
        self._barrier = SharedFlush(fd, self._syncs, path)
        self._waiting = 0
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._closed = False

    @classmethod
    async def open(
        cls, path: str, *, writable: bool = False, probe: bool = True, sharing: Sharing | None = None
    ) -> RawImage:
        """Open an image and take QEMU's locks on it.

        ``probe`` refuses what looks like a QED image: nobody said that its raw bytes are wanted. ``sharing`` is
        WRITER or READER by default, as ``writable`` says. Raises ImageError, ImageLockedError.
        """
        sharing = sharing or (Sharing.WRITER if writable else Sharing.READER)
        fd, size = await asyncio.to_thread(_open, path, sharing, writable=writable, probe=probe)
        try:
            return cls(path, fd, size, writable=writable)
        except OSError as error:
            os.close(fd)
            raise ImageError(f"{path} cannot be mapped: {error.strerror}") from error

    # -- reading ----------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """Return a view of the page cache, if the range is there."""
        view = self._mapping.view_now(offset, length)
        return None if view is None else (view,)

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Wait for the disk, and return views of what is data and zeroes for what is not."""
        ahead = self._read_ahead.after(offset, length)
        if self._waiting:  # it will not be read at once: have the disk begin with it
            self._hints.submit(_ignore, _prefetch, self._fd, offset, length)
        if ahead:
            self._hints.submit(_ignore, _prefetch, self._fd, *ahead)
        self._waiting += 1
        try:
            found = await self._warm_in_turns(offset, length)
        finally:
            self._waiting -= 1
        buffers: list[Buffer] = []
        for run in found:
            if run.data:
                buffers.append(self._mapping.view(run.offset, run.end - run.offset))
            else:
                buffers += zero_buffers(run.end - run.offset)
        return buffers

    async def _warm_in_turns(self, offset: int, length: int) -> list[Run]:
        """Wait for the disk in steps, between which others have theirs."""
        worker = self._reads if length <= _SHORT_BYTES else self._long_reads
        found: list[Run] = []
        for start in range(offset, offset + length, _STEP_BYTES):
            step = min(_STEP_BYTES, offset + length - start)
            found += await worker.run(_warm, self._fd, self._scratch, start, step)
        return found

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Describe the range by what is allocated. Raises OSError."""
        return await self._reads.run(_extents, self._fd, offset, length)

    # -- writing ----------------------------------------------------------------------------------------------

    def write_at_once(self, offset: int, data: Buffer) -> bool:
        """Write whole pages into the page cache, if nothing is known that this would have to wait for."""
        if self.read_only or self._barrier.failed:
            return False
        return self._prompt.write(data, offset)

    def write_now(self, offset: int, data: Buffer, done: WriteDone) -> bool:
        """Write in a batch with others."""
        if self.read_only or self._barrier.failed:
            return False

        def written(_result: None, error: BaseException | None) -> None:
            self._prompt.held -= 1
            done(as_os_error(error))

        self._writer(data).submit(written, pwrite_all, self._fd, data, offset)
        self._prompt.held += 1
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        """Write. Raises OSError."""
        self._check_writable()
        with self._changing():
            await self._writer(data).run(pwrite_all, self._fd, data, offset)

    def _writer(self, data: Buffer) -> Worker:
        return self._writes if len(data) <= _SHORT_BYTES else self._long_writes

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast_only: bool = False) -> None:
        """Make a hole, or zeroes in allocated space, or write them where neither can be had. Raises OSError."""
        self._check_writable()
        with self._changing():
            if await self._long_writes.run(lambda: zero_range(self._fd, offset, length, may_unmap=may_unmap)):
                return
            if fast_only:
                raise OSError(errno.ENOTSUP, "zeroes can only be written here")
            for start in range(offset, offset + length, len(ZEROES)):
                self._check_writable()
                some = ZEROES[: offset + length - start]
                await self._long_writes.run(pwrite_all, self._fd, some, start)

    async def discard(self, offset: int, length: int) -> None:
        """Make a hole, where that can be had. Raises OSError."""
        self._check_writable()
        with self._changing():
            await self._long_writes.run(punch_hole, self._fd, offset, length)

    async def flush(self) -> None:
        """Make durable what was written. Raises OSError; a failure is final for this image."""
        if not self.read_only:
            with self._changing():
                await self._barrier.flush()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A thread works on the file meanwhile, and the loop would have to wait for it."""
        self._prompt.held += 1
        try:
            yield
        finally:
            self._prompt.held -= 1

    def _check_writable(self) -> None:
        if self.read_only:
            raise read_only_error()
        self._barrier.check()

    async def close(self) -> None:
        """Wait for everything that is under way, and close the file."""
        if self._closed:
            return
        self._closed = True
        reads, writes = (self._reads, self._long_reads, self._hints), (self._writes, self._long_writes, self._syncs)
        for worker in (*reads, *writes):
            await worker.close()
        self._mapping.close()
        os.close(self._fd)


def _open(path: str, sharing: Sharing, *, writable: bool, probe: bool) -> tuple[int, int]:
    """Return (descriptor, size in bytes) of an image that is locked (*blocking*). Raises ImageError."""
    fd = open_image(path, writable=writable)
    try:
        take_locks(fd, sharing, path)
        if probe and os.pread(fd, len(QED_MAGIC), 0) == QED_MAGIC:
            raise ImageError(f"{path} looks like a QED image: say -f qed, or -f raw to export its raw bytes")
        return fd, os.lseek(fd, 0, os.SEEK_END)  # which tells the size of a block device, too
    except OSError as error:
        os.close(fd)
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise


def _warm(fd: int, scratch: memoryview, offset: int, length: int) -> list[Run]:
    """Get what is data into the page cache, and tell it from the holes (*blocking*). EIO behind the file's end."""
    found = list(runs(fd, offset, offset + length))
    for run in found:
        if run.data:
            _read_through(fd, scratch, run.offset, run.end)
    return found


def _read_through(fd: int, scratch: memoryview, offset: int, end: int) -> None:
    """Read a range for the sake of the page cache: what is read is thrown away, so threads may share the scratch."""
    while offset < end:
        count = os.preadv(fd, [scratch[: end - offset]], offset)
        if not count:
            raise OSError(errno.EIO, f"the file ends before {end}")
        offset += count


def _prefetch(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to read what is data (*blocking*, but it does not wait for the disk)."""
    for run in runs(fd, offset, offset + length):
        if run.data:
            for start in range(run.offset, run.end, _HINT_BYTES):
                os.posix_fadvise(fd, start, min(_HINT_BYTES, run.end - start), os.POSIX_FADV_WILLNEED)


def _extents(fd: int, offset: int, length: int) -> list[Extent]:
    found = []
    for run in runs(fd, offset, offset + length):
        flags = ExtentFlags.DATA if run.data else ExtentFlags.HOLE | ExtentFlags.ZERO
        found.append(Extent(run.offset, run.end - run.offset, flags))
        if len(found) == _MOST_EXTENTS:
            break
    return found


def _ignore(_result: None, _error: BaseException | None) -> None:
    """A hint that was not taken does no harm."""
