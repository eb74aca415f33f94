"""BlockDevice: the one interface behind which blocks live.

It has two tempos. The *immediate* calls (``read_now``, ``write_at_once``, ``write_now``) run on the event loop without
blocking it and may say "not now"; the *awaitable* ones always answer. A server tries the first
and falls back to the second, so that what is local costs no task and no future.

All offsets and lengths are bytes. The caller keeps requests inside ``0 .. size``. A request that fails
raises :class:`OSError` with the errno that the client is to be told.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdstream.extents import merge

if TYPE_CHECKING:
    from nbdstream.extents import Extent

Buffer: TypeAlias = bytes | bytearray | memoryview
"""A contiguous run of bytes (memoryviews: format B)."""

ZEROES: Final = memoryview(bytes(1 << 20))
"""A MiB of zeroes to send or write from. It is never written to, so the kernel's one zero page stands for all of it.

What a device knows to be zero it gives as views of this, so that a server need not send it (:func:`is_zeroes`)."""

WriteDone: TypeAlias = Callable[[OSError | None], None]
"""Called on the event loop when a write is complete, with what went wrong."""


class BlockDevice(ABC):
    """What holds blocks: an image, a device layered on another, a remote export."""

    size: int
    """Bytes. Does not change while the device is open, but for a QED image that grows (block/growth.py)."""
    read_only: bool
    minimum_block: int = 1
    """Requests must be aligned to this (NBD_INFO_BLOCK_SIZE's minimum), bytes."""
    preferred_block: int = 4096
    """Requests aligned to this are served best (NBD_INFO_BLOCK_SIZE's preferred), bytes."""
    layered: bool = False
    """Whether its extents lie in different layers, or may be remote: there is more to tell than holes and data."""

    @property
    def hydrating(self) -> bool:
        """Whether threads of its own are at work to make it independent of a source: they need the processor."""
        return False

    def read_now(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """Return buffers that together hold the range, or None if that would block.

        The buffers stay valid, and unchanged but for guest writes to the same range, as long as they
        are referenced. Touch them only by sending them: a mapped page may be gone
        (the kernel answers EFAULT to a send, but SIGBUS to a load). What is known to be zero are views of
        :data:`ZEROES`.
        """
        return None

    @abstractmethod
    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Return buffers that together hold the range, as :meth:`read_now` does."""

    def write_at_once(self, offset: int, data: Buffer) -> bool:
        """Write before this returns, so that a kill -9 of this process no longer loses it; or return False.

        False means that it might have to wait: the other ways to write are open. ``data`` is not referred to any
        more when this returns.
        """
        return False

    def write_now(self, offset: int, data: Buffer, done: WriteDone) -> bool:
        """Take the write and return True, or return False if it needs :meth:`write`.

        ``data`` must stay unchanged until ``done`` is called, which never happens before this returns.
        """
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        """Write; when this returns, a kill -9 of this process no longer loses it."""
        raise read_only_error()

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast_only: bool = False) -> None:
        """Make the range read as zeroes.

        ``may_unmap`` allows a hole (NBD_CMD_FLAG_NO_HOLE not set). ``fast_only`` refuses with ENOTSUP, data
        untouched, where this would be no faster than writing (NBD_CMD_FLAG_FAST_ZERO).
        """
        raise read_only_error()

    async def discard(self, offset: int, length: int) -> None:
        """Forget the range (NBD_CMD_TRIM): a hint, which may be rounded inwards or ignored."""
        raise read_only_error()

    async def flush(self) -> None:  # noqa: B027 - nothing to do where nothing is written
        """Make every write that was answered before this call durable."""

    @abstractmethod
    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Describe the range from ``offset`` on: at least one extent, contiguous, none beyond the range.

        It may end before the range does, so that one call is bounded work: ask again from there.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything. What was flushed is durable; calling it twice does no harm."""


async def all_extents(device: BlockDevice, offset: int, length: int) -> AsyncIterator[Extent]:
    """Describe a whole range, however many calls that takes; neighbours in the same state are joined."""
    end = offset + length
    last: Extent | None = None
    while offset < end:
        *whole, open_end = merge(([last] if last else []) + await device.extents(offset, end - offset))
        for extent in whole:
            yield extent
        last, offset = open_end, open_end.end
    if last:
        yield last


def zero_buffers(length: int) -> list[Buffer]:
    """Return buffers that together hold ``length`` zero bytes."""
    whole, rest = divmod(length, len(ZEROES))
    return [*[ZEROES] * whole, ZEROES[:rest]] if rest else [ZEROES] * whole


def is_zeroes(buffer: Buffer) -> bool:
    """Whether this is a view of :data:`ZEROES`."""
    return isinstance(buffer, memoryview) and buffer.obj is ZEROES.obj


def read_only_error() -> OSError:
    """Return the answer to a write on a read-only device."""
    return OSError(errno.EPERM, "the device is read-only")
