"""The record: links that were acknowledged to the guest and that the image file does not hold yet.

A guest's write is answered only when a kill -9 of this process can no longer lose it, but its link may reach the file
only behind a barrier, which takes milliseconds. So the link is noted where it outlives the process: in a memory
file system. There it does not outlive the power, and need not: what was never flushed may be lost then.

The file is bound to the image by device, inode and UUID, and by an autoclear feature bit in the image's header: a
QEMU that opens the image for writing clears the bit, and what the record says is void from then on.

Layout: a header, and two halves. Links of the epoch to come are noted in one half while those in the other are being
linked. An entry is a cluster, its L2 entry, and a check that holds the half's generation: a half is emptied by
changing its generation alone, and an entry that was half written ends it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
from typing import TYPE_CHECKING

from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from uuid import UUID

AUTOCLEAR_RECORD = 1 << 40
"""The autoclear feature bit (qed_spec) that says that a record may exist. No QEMU knows it, so every QEMU clears it."""

DIRECTORY = "/dev/shm"
"""A memory file system on every Linux (FHS: /dev/shm; systemd mounts it, and so does every container runtime)."""

_MAGIC = b"NBDSREC\1"
_HEADER = struct.Struct("<8s16sQQ")  # magic, image UUID, device, inode
_GENERATIONS = (64, 72)
_GENERATION = struct.Struct("<Q")
_ENTRY = struct.Struct("<QQQ")
_HALF_ENTRIES = 1 << 16
"""Links in a half: two seconds of a guest that does nothing but allocate, and 1.5 MiB of memory."""
_HALF_BYTES = _HALF_ENTRIES * _ENTRY.size
_STARTS = (4096, 4096 + _HALF_BYTES)
_BYTES = 4096 + 2 * _HALF_BYTES
_MASK = (1 << 64) - 1
_MIX = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: neighbouring generations differ in many bits

Link = tuple[int, int]


class Record:
    """The record of one image that is open for writing. Nothing here waits for anything."""

    def __init__(self, path: str, memory: mmap.mmap) -> None:
        """Use :meth:`create`."""
        self._path = path
        self._memory = memory
        self._half = 0
        self._generations = [0, 0]
        self._last_generation = 0
        self._counts = [0, 0]
        self._open_half()

    @classmethod
    def create(cls, fd: int, uuid: UUID) -> Record | None:
        """Make an empty record for the image open at ``fd``, or return None where there is no room for one."""
        path = _path(fd, uuid)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            own = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            os.posix_fallocate(own, 0, _BYTES)  # later, a page that cannot be had would be SIGBUS
            memory = mmap.mmap(own, _BYTES)
        except OSError:
            os.unlink(path)
            return None
        finally:
            os.close(own)
        _HEADER.pack_into(memory, 0, *_identity(fd, uuid))
        return cls(path, memory)

    @property
    def full(self) -> bool:
        """Whether nothing can be noted until an epoch has begun."""
        return self._counts[self._half] >= _HALF_ENTRIES

    @property
    def fresh(self) -> bool:
        """Whether links were noted since the last epoch began."""
        return self._counts[self._half] > 0

    @property
    def empty(self) -> bool:
        """Whether every link that was noted is in the file."""
        return not any(self._counts)

    def note(self, cluster: int, entry: int) -> None:
        """Note a link; it is safe from a kill -9 when this returns. The record must not be full."""
        half = self._half
        count = self._counts[half]
        check = _check(cluster, entry, self._generations[half])
        _ENTRY.pack_into(self._memory, _STARTS[half] + count * _ENTRY.size, cluster, entry, check)
        self._counts[half] = count + 1

    def begin_epoch(self) -> int:
        """Note what comes in the other half from now on; return the half to :meth:`clear` when it has been linked.

        The half that the epoch before returned must have been cleared.
        """
        old = self._half
        self._half = 1 - old
        self._open_half()
        return old

    def clear(self, half: int) -> None:
        """Forget what a half notes: it is in the file."""
        self._set_generation(half, 0)
        self._counts[half] = 0

    def close(self) -> None:
        """Remove the record: everything that it notes is in the file."""
        self._memory.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _open_half(self) -> None:
        self._last_generation += 1
        self._counts[self._half] = 0
        self._set_generation(self._half, self._last_generation)

    def _set_generation(self, half: int, generation: int) -> None:
        self._generations[half] = generation
        _GENERATION.pack_into(self._memory, _GENERATIONS[half], generation)


def read_record(fd: int, uuid: UUID) -> list[Link]:
    """Return the links that a killed owner of the image at ``fd`` left behind, in the order to link them.

    Raises ImageError if there is a record that is another user's, or cannot be read.
    """
    path = _path(fd, uuid)
    try:
        own = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ImageError(f"the record of its last owner, {path}, cannot be read: {error.strerror}") from error
    try:
        about = os.fstat(own)
        # The directory is everybody's: only what we made ourselves is believed.
        if about.st_uid not in (os.geteuid(), 0) or not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077:
            raise ImageError(f"the record of its last owner, {path}, belongs to user {about.st_uid}: become that user")
        data = os.pread(own, _BYTES, 0)
    finally:
        os.close(own)
    if len(data) != _BYTES or _HEADER.unpack_from(data) != _identity(fd, uuid):
        return []
    halves = [(_GENERATION.unpack_from(data, at)[0], start) for at, start in zip(_GENERATIONS, _STARTS, strict=True)]
    return [link for generation, start in sorted(halves) if generation for link in _links(data, start, generation)]


def _links(data: bytes, start: int, generation: int) -> list[Link]:
    links: list[Link] = []
    for cluster, entry, check in _ENTRY.iter_unpack(data[start : start + _HALF_BYTES]):
        if check != _check(cluster, entry, generation):
            break
        links.append((cluster, entry))
    return links


def _check(cluster: int, entry: int, generation: int) -> int:
    return cluster ^ entry ^ (generation * _MIX & _MASK)


def _path(fd: int, uuid: UUID) -> str:
    about = os.fstat(fd)
    return f"{DIRECTORY}/nbdstream-{uuid}-{about.st_dev:x}-{about.st_ino:x}"


def _identity(fd: int, uuid: UUID) -> tuple[bytes, bytes, int, int]:
    about = os.fstat(fd)
    return _MAGIC, uuid.bytes, about.st_dev, about.st_ino
