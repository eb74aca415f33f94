"""Image files by system calls: opening them, what is allocated in them, making holes and zeroes. All of it blocks."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

# What is answered by file systems, and block devices (alignment), that cannot do it; then there are other ways.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Run(NamedTuple):
    """A run of bytes that are all data, or all hole (which reads as zeroes)."""

    offset: int
    end: int
    data: bool


def open_image(path: str, *, writable: bool) -> int:
    """Open a regular file or a block device and return its descriptor. Raises ImageError."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{path} is a directory, not an image")
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ImageError(f"{path} is neither a regular file nor a block device")
        return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"{path} cannot be opened: {error.strerror}") from error


def runs(fd: int, offset: int, end: int) -> Iterator[Run]:
    """Tell data from holes from ``offset`` to ``end``. Raises OSError.

    What cannot be told is data, and so is what lies behind the end of the file: to read it is an error.
    """
    while offset < end:
        try:
            data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                data = max(offset, min(os.lseek(fd, 0, os.SEEK_END), end))
                if data > offset:
                    yield Run(offset, data, data=False)
            elif error.errno not in _UNSUPPORTED:
                raise
            else:
                data = offset
            if data < end:
                yield Run(data, end, data=True)
            return
        if data > offset:
            yield Run(offset, data, data=False)
        if data < end:
            offset = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            yield Run(data, offset, data=True)
        else:
            offset = end


def zero_range(fd: int, offset: int, length: int, *, may_unmap: bool) -> bool:
    """Make a range read as zeroes: as a hole if that is allowed, else as allocated space. Raises OSError.

    Returns False, and has changed nothing, where zeroes can only be written.
    """
    if may_unmap and _try_fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        return True
    return _try_fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the range's space back, if the file system or the device can do that. Raises OSError."""
    _try_fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def _try_fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Return False where it is not supported. Raises OSError."""
    while _fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
