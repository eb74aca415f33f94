"""What is asked of a remote export: a read, a copy into a file, a block status.

A command is made on the loop, runs in the export's thread, and is told of on the loop again. It is cut
into *pieces*, each one NBD request: a server may limit their length and want them aligned.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from nbdstream.block.worker import pwrite_all
from nbdstream.extents import Extent, ExtentFlags, merge

if TYPE_CHECKING:
    from nbdstream.block.remote.handle import Handle

Done: TypeAlias = Callable[[Any, OSError | None], None]

_SMALLEST_BUFFER = 64 << 10
_SHORT_WRITE = 64 << 10
"""Bytes. As long as a write takes, the file system lets nobody else write to that file: with half a megabyte at once, a
guest's flushes, for which links have to be written, take half as long again at their 99th percentile. But after each
write this thread has to wait for Python's lock: beside a guest that reads all the time, short ones take the stream half
as long again."""

_LONGEST_STATUS = 1 << 30
_STATUS_FLAGS = int(ExtentFlags.HOLE | ExtentFlags.ZERO)


class Alignment(NamedTuple):
    """How requests must be cut for a server."""

    size: int
    """Of the export: nothing is asked behind it."""
    minimum: int
    """Offset and length are multiples of this."""
    maximum: int
    """The longest request; a multiple of ``minimum``."""


class Piece(NamedTuple):
    """One NBD request: a part of a command."""

    command: Command
    offset: int
    length: int


class Command(ABC):
    """Something asked of a remote export, from the loop to the thread and back."""

    __slots__ = ("done", "end", "error", "held", "length", "offset", "pieces_left", "start", "taken_up", "urgent")

    def __init__(self, offset: int, length: int, done: Done, *, urgent: bool) -> None:
        self.offset = offset
        self.length = length
        self.start = offset
        """Where the first piece begins: ``offset``, rounded down to the server's alignment."""
        self.end = offset + length
        """Where the last one ends."""
        self.done = done
        self.urgent = urgent
        self.pieces_left = 0
        self.taken_up = False
        """Whether the thread has it already: what comes again then is in a hurry."""
        self.held = 0
        """Bytes of the memory for payload that are reserved for it."""
        self.error: OSError | None = None

    def cut(self, alignment: Alignment) -> list[Piece]:
        """Return the requests that it takes."""
        step = alignment.minimum
        self.start = self.offset // step * step
        self.end = min(-(-self.end // step) * step, alignment.size)
        pieces = [
            Piece(self, offset, min(alignment.maximum, self.end - offset))
            for offset in range(self.start, self.end, alignment.maximum)
        ]
        self.pieces_left = len(pieces)
        return pieces

    def payload(self) -> int:
        """Return how many bytes of payload it has to hold, as its buffer counts."""
        return 0

    @abstractmethod
    def submit(self, piece: Piece, handle: Handle[Piece], pool: BufferPool) -> None:
        """Send a piece; raises OSError."""

    @abstractmethod
    def finish(self, pool: BufferPool) -> object:
        """Return the result, when every piece is there; raises OSError."""


class _Transfer(Command):
    """A command that reads, into one buffer."""

    __slots__ = ("_buffer",)

    def __init__(self, offset: int, length: int, done: Done, *, urgent: bool) -> None:
        super().__init__(offset, length, done, urgent=urgent)
        self._buffer = bytearray()

    def payload(self) -> int:
        """Return how many bytes of payload it has to hold, as its buffer counts."""
        return buffer_size(self.end - self.start)

    def submit(self, piece: Piece, handle: Handle[Piece], pool: BufferPool) -> None:
        """Send a piece; raises OSError."""
        if not self._buffer:  # not before it is sent: what waits in a queue takes no memory
            self._buffer = self.allocate(self.end - self.start, pool)
        at = piece.offset - self.start
        handle.read(memoryview(self._buffer)[at : at + piece.length], piece.offset, piece)

    @abstractmethod
    def allocate(self, length: int, pool: BufferPool) -> bytearray:
        """Return a buffer of at least ``length`` bytes."""


class Read(_Transfer):
    """Read into memory. The result is a bytearray, or a memoryview where more had to be read than was asked for."""

    __slots__ = ()

    def allocate(self, length: int, pool: BufferPool) -> bytearray:
        """Return a fresh one, zeroed: it goes to the caller, and holds nothing of ours whatever the server sent."""
        return bytearray(length)

    def finish(self, pool: BufferPool) -> bytearray | memoryview:
        """Return the bytes."""
        if len(self._buffer) == self.length:
            return self._buffer
        at = self.offset - self.start
        return memoryview(self._buffer)[at : at + self.length]


class Copy(_Transfer):
    """Read, and write to a file. The result is the mask of the zero units, which were not written."""

    __slots__ = ("_claimed", "_lock", "arrived", "fd", "file_offset", "short_writes", "write_back", "zero_unit")

    fd: int
    file_offset: int
    zero_unit: int
    """Bytes; 0 writes everything."""
    short_writes: bool
    """Let others write to the file in between."""
    write_back: bool
    """Begin to write to the disk what was written to the file."""
    arrived: Callable[[memoryview, OSError | None], None] | None
    """Told on the loop of the bytes, which are not written yet, if it is urgent by then."""

    def __init__(self, offset: int, length: int, done: Done, *, urgent: bool) -> None:
        super().__init__(offset, length, done, urgent=urgent)
        self._lock = threading.Lock()
        self._claimed = False

    def allocate(self, length: int, pool: BufferPool) -> bytearray:
        """Return one from the pool."""
        return pool.take(length)

    def lend(self) -> memoryview | None:
        """Return the bytes for good, so that the buffer is not the pool's again; None if it is already, or was lent."""
        if not self._claim():
            return None
        at = self.offset - self.start
        return memoryview(self._buffer)[at : at + self.length].toreadonly()

    def _claim(self) -> bool:
        """Decide whose the buffer is when it has been written: true for the first who asks, in whatever thread."""
        with self._lock:
            first, self._claimed = not self._claimed, True
        return first

    def finish(self, pool: BufferPool) -> int:
        """Write to the file, and return the mask."""
        at = self.offset - self.start
        mask = zero_mask(self._buffer, at, self.length, self.zero_unit) if self.zero_unit else 0
        step = _SHORT_WRITE if self.short_writes else max(1, self.length)
        with memoryview(self._buffer)[at : at + self.length] as data:
            runs = data_runs(mask, self.length, self.zero_unit)
            for begin, end in runs:
                for start in range(begin, end, step):
                    pwrite_all(self.fd, data[start : min(start + step, end)], self.file_offset + start)
        if self.write_back and runs:
            start_write_back(self.fd, self.file_offset + runs[0][0], runs[-1][1] - runs[0][0])
        if self._claim():
            pool.give(self._buffer)
        return mask


class Status(Command):
    """Ask for the extents of ``base:allocation``. The result is a list of at least one, from the offset on."""

    __slots__ = ("_answer",)

    def __init__(self, offset: int, length: int, done: Done) -> None:
        super().__init__(offset, min(length, _LONGEST_STATUS), done, urgent=True)
        self._answer: list[int] = []

    def cut(self, alignment: Alignment) -> list[Piece]:
        """Return one request: without a payload, the longest one does not matter (proto.md, "Block sizes")."""
        return super().cut(alignment._replace(maximum=2 * _LONGEST_STATUS))

    def submit(self, piece: Piece, handle: Handle[Piece], pool: BufferPool) -> None:
        """Send the piece; raises OSError."""
        handle.block_status(piece.offset, piece.length, self._answer, piece)

    def finish(self, pool: BufferPool) -> list[Extent]:
        """Return the extents."""
        return extents_of(self._answer, self.start, self.offset, self.length)


def buffer_size(length: int) -> int:
    """Return how long a buffer is that is used again and holds ``length`` bytes."""
    return max(_SMALLEST_BUFFER, 1 << (length - 1).bit_length())


class BufferPool:
    """Buffers that are used again: a fresh one of a megabyte costs as much to fault in as to fill.

    All of them together, those that wait to be used again included, take no more than ``memory`` bytes, but for one
    that is longer. Only for data of one source: what a buffer held before is still in it. Any thread may call.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._free: dict[int, list[bytearray]] = {}
        self._free_bytes = 0
        self._reserved = 0

    def reserve(self, length: int, *, share: float = 1.0) -> bool:
        """Set memory aside, if that leaves what is reserved within a share of all; a lone one always may."""
        with self._lock:
            if self._reserved and self._reserved + length > self._memory * share:
                return False
            self._reserved += length
            return True

    def release(self, length: int) -> None:
        """Give back what was reserved."""
        with self._lock:
            self._reserved -= length

    def take(self, length: int) -> bytearray:
        """Return a buffer of at least ``length`` bytes, for which memory is reserved."""
        size = buffer_size(length)
        with self._lock:
            if free := self._free.get(size):
                self._free_bytes -= size
                return free.pop()
            while self._free_bytes and self._reserved + self._free_bytes > self._memory:
                other = max(size for size, buffers in self._free.items() if buffers)
                self._free[other].pop()
                self._free_bytes -= other
        return bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """Take a buffer back that nothing refers to any more; its reservation still stands."""
        size = len(buffer)
        with self._lock:
            if self._reserved + self._free_bytes <= self._memory:
                self._free_bytes += size
                self._free.setdefault(size, []).append(buffer)


_zeroes: dict[int, bytes] = {}


def zero_mask(buffer: bytearray, start: int, length: int, unit: int) -> int:
    """Return the units of ``unit`` bytes, counted from ``start``, that are all zero: bit i for unit i.

    The last one may be shorter. Looks at one byte where that is not zero, and compares with memcmp else.
    """
    zeroes = _zeroes.get(unit)
    if zeroes is None:
        _zeroes.clear()  # in practice there is one unit: the cluster
        zeroes = _zeroes[unit] = bytes(unit)
    mask = 0
    end = start + length
    for index, position in enumerate(range(start, end, unit)):
        if buffer[position]:
            continue
        compared = zeroes if position + unit <= end else zeroes[: end - position]
        if buffer.startswith(compared, position):
            mask |= 1 << index
    return mask


def data_runs(mask: int, length: int, unit: int) -> list[tuple[int, int]]:
    """Return (begin, end) of what is not zero, in bytes, joined where it touches."""
    if not mask:
        return [(0, length)]
    runs: list[tuple[int, int]] = []
    for index, begin in enumerate(range(0, length, unit)):
        if mask >> index & 1:
            continue
        end = min(begin + unit, length)
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return runs


def extents_of(answer: list[int], start: int, offset: int, length: int) -> list[Extent]:
    """Return the extents in a server's ``answer`` (length and flags by turns, from ``start`` on) within the range.

    A server may describe less than it was asked for, or more. Raises OSError (EIO) where it describes nothing.
    """
    end = offset + length
    extents: list[Extent] = []
    position = start
    for run, flags in zip(answer[::2], answer[1::2], strict=False):
        if not run:
            raise OSError(errno.EIO, "the source describes an extent of no bytes")
        begin, position = max(position, offset), position + run
        if min(position, end) > begin:
            extents.append(Extent(begin, min(position, end) - begin, ExtentFlags(flags & _STATUS_FLAGS)))
        if position >= end:
            break
    if not extents:
        raise OSError(errno.EIO, "the source describes no extent where it was asked to")
    return list(merge(extents))


_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def start_write_back(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write a range to the disk, so that the next fdatasync has less to wait for.

    A hint, with no promise: errors show in that fdatasync.
    """
    _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)
