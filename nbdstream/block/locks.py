"""QEMU's image locks: who may have an image open together with whom.

QEMU guards an image with open-file-description locks on single bytes of it, all of them shared:
byte 100+i says "I use permission i", byte 200+i says "I do not share permission i", and whoever
opens the image looks whether anybody said the opposite (QEMU's block/file-posix.c; the numbers are
those of QAPI's ``BlockPermission``). Taking the same locks makes QEMU refuse what we own, and us refuse
what QEMU owns.

The locks belong to the open file: they are gone when its last descriptor, in whichever process, is
closed. POSIX locks would be lost on any close, and an exclusive lock breaks QEMU's own protocol.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
import time
from enum import Enum
from typing import NamedTuple

from nbdstream.errors import ImageError, ImageLockedError

CONSISTENT_READ = 0
WRITE = 1
RESIZE = 3

_USED = 100
_UNSHARED = 200

_flock = struct.Struct("hhqqi4x")  # struct flock of fcntl(2): l_type, l_whence, l_start, l_len, l_pid

# Two that open an image at the same moment see each other and both give up: try again, out of step.
_ATTEMPTS = 5
_PAUSE_SECONDS = (0.002, 0.02)


class _Permissions(NamedTuple):
    used: tuple[int, ...]
    unshared: tuple[int, ...]

    @property
    def own_bytes(self) -> list[int]:
        return [_USED + i for i in self.used] + [_UNSHARED + i for i in self.unshared]

    @property
    def opposite_bytes(self) -> list[int]:
        """What others say with these contradicts us."""
        return [_UNSHARED + i for i in self.used] + [_USED + i for i in self.unshared]


class Sharing(Enum):
    """What we do with an image, and what others may do with it meanwhile."""

    WRITER = _Permissions(used=(CONSISTENT_READ, WRITE, RESIZE), unshared=(WRITE, RESIZE))
    """We write. Bytes 100, 101, 103, 201 and 203, as QEMU takes them on a QED image that it writes."""
    READER = _Permissions(used=(CONSISTENT_READ,), unshared=(WRITE, RESIZE))
    """We read what nobody writes. Bytes 100, 201 and 203, as QEMU takes them on a QED image that it reads."""
    BYSTANDER = _Permissions(used=(CONSISTENT_READ,), unshared=())
    """We read what somebody else may be writing. Byte 100 alone."""


def take_locks(fd: int, sharing: Sharing, path: str) -> None:
    """Lock the image ``fd``, which must be open for reading; ``path`` is for the error's text.

    May sleep some hundredths of a second. Raises ImageLockedError, with nothing locked, where others
    do what ``sharing`` does not allow; ImageError where the file cannot be locked at all.
    """
    permissions = sharing.value
    try:
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(*_PAUSE_SECONDS))
            if _try_locks(fd, permissions):
                return
    except OSError as error:
        raise ImageError(f"{path} cannot be locked: {error.strerror}") from error
    who = ", ".join(_holders(fd, permissions)) or "another process"
    raise ImageLockedError(f"{path} is in use by {who}")


def _try_locks(fd: int, permissions: _Permissions) -> bool:
    """Take the locks and return True, or take none and return False. Raises OSError."""
    try:
        for byte in permissions.own_bytes:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, byte))
        if not any(_held_by_others(fd, byte) for byte in permissions.opposite_bytes):
            return True
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        # An exclusive lock is in the way: not QEMU's manner, but somebody's.
    for byte in permissions.own_bytes:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, byte))
    return False


def _held_by_others(fd: int, byte: int) -> bool:
    """Whether another open file has any lock there: only a write lock conflicts with their shared ones."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
    kind: int = _flock.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _lock(kind: int, byte: int) -> bytes:
    return _flock.pack(kind, os.SEEK_SET, byte, 1, 0)


def _holders(fd: int, permissions: _Permissions) -> list[str]:
    """Name the processes whose locks contradict us, as far as we may look into them."""
    image = os.fstat(fd)
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            if any(_contradicts(pid, number, image, permissions) for number in os.listdir(f"/proc/{pid}/fd")):
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                    found.append(f"{comm.read().strip()} (process {pid})")
        except OSError:
            continue  # it has ended, or it is not ours to look at
    return found


def _contradicts(pid: int, number: str, image: os.stat_result, permissions: _Permissions) -> bool:
    try:
        status = os.stat(f"/proc/{pid}/fd/{number}")
        if (status.st_dev, status.st_ino) != (image.st_dev, image.st_ino):
            return False
        with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as fdinfo:
            locks = [line.split()[-2:] for line in fdinfo if line.startswith("lock:")]
    except OSError:
        return False  # closed meanwhile
    # Each is like "lock: 1: OFDLCK ADVISORY READ -1 fe:00:7 100 101": the first byte and the last, or EOF.
    return any(
        int(first) <= byte and (last == "EOF" or byte <= int(last))
        for first, last in locks
        for byte in permissions.opposite_bytes
    )
