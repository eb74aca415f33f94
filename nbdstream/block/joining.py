"""Joining buffers that only the kernel may touch.

A device's buffers can be views of a mapped file, and a page that cannot be had (the disk fails, somebody cut the file
off) is SIGBUS to whoever loads from it: the end of the process. Where replies have to be looked at before they are
sent, as TLS does, the kernel copies them first, and answers EFAULT.
"""

from __future__ import annotations

import errno
import itertools
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nbdstream.block.device import Buffer

_AT_ONCE: Final = 1024
"""Buffers that one system call takes (UIO_MAXIOV)."""

_LONGEST: Final = 256 << 10
"""Bytes that are copied at a time: what the memory of the copy comes to."""


class KernelJoin:
    """Makes one run of bytes of many buffers, in a file in memory."""

    def __init__(self) -> None:
        self._file = os.memfd_create("nbdstream-replies", os.MFD_CLOEXEC)

    def close(self) -> None:
        """Give the memory back. Twice does no harm."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def join(self, buffers: Sequence[Buffer]) -> Iterator[bytes]:
        """Yield all bytes of ``buffers``, in a few portions. Raises OSError (EFAULT) if some cannot be had."""
        for portion in _portions(buffers):
            length = os.pwritev(self._file, portion, 0)
            if length != sum(map(len, portion)):
                # It stops at the first page that is not there, and says so only if that is the very first.
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            yield os.pread(self._file, length, 0)


def _portions(buffers: Sequence[Buffer]) -> Iterator[list[Buffer]]:
    """Split into what can be copied at a time."""
    portion: list[Buffer] = []
    length = 0
    for buffer in itertools.chain.from_iterable(map(_pieces, buffers)):
        if length + len(buffer) > _LONGEST or len(portion) == _AT_ONCE:
            yield portion
            portion, length = [], 0
        portion.append(buffer)
        length += len(buffer)
    if portion:
        yield portion


def _pieces(buffer: Buffer) -> Sequence[Buffer]:
    if len(buffer) <= _LONGEST:
        return (buffer,)
    view = memoryview(buffer)
    return [view[start : start + _LONGEST] for start in range(0, len(view), _LONGEST)]
