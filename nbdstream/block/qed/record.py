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
import fcntl
import logging
import mmap
import os
import stat
import struct
from typing import TYPE_CHECKING

from nbdstream.block.files import punch_hole
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from uuid import UUID

log = logging.getLogger(__name__)

AUTOCLEAR_RECORD = 1 << 40
"""The autoclear feature bit (qed_spec) that says that a record may exist. No QEMU knows it, so every QEMU clears it."""

DIRECTORY = "/dev/shm"
"""A memory file system on every Linux (FHS: /dev/shm; systemd mounts it, and so does every container runtime)."""

READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""How to open what may be anybody's there: no link is followed, and a FIFO keeps nobody waiting."""

_PREFIX = "nbdstream-"
_MAGIC = b"NBDSREC\1"
_HEADER = struct.Struct("<8s16sQQ")  # magic, image UUID, device, inode
_GENERATIONS = (64, 72)
_GENERATION = struct.Struct("<Q")
_ENTRY = struct.Struct("<QQQ")
_HALF_ENTRIES = 1 << 16
"""Links in a half: two seconds of a guest that does nothing but allocate, and 1.5 MiB of memory."""
_HALF_BYTES = _HALF_ENTRIES * _ENTRY.size
_PAGE_BYTES = 4096
_STARTS = (_PAGE_BYTES, _PAGE_BYTES + _HALF_BYTES)
_BYTES = _PAGE_BYTES + 2 * _HALF_BYTES
_MASK = (1 << 64) - 1
_MIX = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: neighbouring generations differ in many bits

Link = tuple[int, int]


class Record:
    """The record of one image that is open for writing. Nothing here waits for anything."""

    def __init__(self, path: str, fd: int, memory: mmap.mmap) -> None:
        """Use :meth:`create`."""
        self._path = path
        self._fd = fd
        self._memory = memory
        self._half = 0
        self._generations = [0, 0]
        self._last_generation = 0
        self._counts = [0, 0]
        self.gone = False
        """Whether somebody removed the record, so that it helps nobody to note anything more."""
        self._open_half()

    @classmethod
    def create(cls, fd: int, uuid: UUID) -> Record | None:
        """Make an empty record for the image open at ``fd``, or return None where there is no room for one."""
        path = record_path(fd, uuid)
        _shrink_left_over()
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            own, memory = _make(path)
        except OSError:
            return None
        _HEADER.pack_into(memory, 0, *_identity(fd, uuid))
        return cls(path, own, memory)

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
        if os.fstat(self._fd).st_nlink == 0 and not self.gone:
            self._restore()
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
        os.close(self._fd)
        if not self.gone:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    def _restore(self) -> None:
        """Make the record anew: somebody removed it (who cleans up, or logind where a user with RemoveIPC= left)."""
        try:
            fd, memory = _make(self._path, self._memory)
        except OSError as error:
            self.gone = True
            log.error("%s was removed and cannot be made again (%s): writes wait for the disk now", self._path, error)
            return
        self._memory.close()
        os.close(self._fd)
        self._fd, self._memory = fd, memory
        log.warning("%s was removed and is made again: until now a kill -9 could have lost a write", self._path)

    def _open_half(self) -> None:
        self._last_generation += 1
        self._counts[self._half] = 0
        self._set_generation(self._half, self._last_generation)

    def _set_generation(self, half: int, generation: int) -> None:
        self._generations[half] = generation
        _GENERATION.pack_into(self._memory, _GENERATIONS[half], generation)


def _make(path: str, content: mmap.mmap | None = None) -> tuple[int, mmap.mmap]:
    """Make a record at ``path``, complete when it appears there. Raises OSError.

    It is locked as long as somebody has it: one that is not is left over.
    """
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        own = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            os.posix_fallocate(own, 0, _BYTES)  # later, a page that cannot be had would be SIGBUS
            if content is not None:
                os.pwrite(own, content, 0)
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            memory = mmap.mmap(own, _BYTES)
            os.link(f"/proc/self/fd/{own}", os.path.basename(path), dst_dir_fd=directory, follow_symlinks=True)
        except OSError:
            os.close(own)
            raise
    finally:
        os.close(directory)
    return own, memory


def _shrink_left_over() -> None:
    """Have the records of killed owners take no more memory than what they note: some pages instead of 3 MiB.

    They stay: whether their images still exist, somewhere, nobody can tell.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(DIRECTORY):
            if name.startswith(_PREFIX):
                with contextlib.suppress(OSError):  # it is somebody else's, or in use, or gone
                    _shrink(f"{DIRECTORY}/{name}")


def _shrink(path: str) -> None:
    own = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        about = os.fstat(own)
        if about.st_uid != os.geteuid() or about.st_size != _BYTES or not stat.S_ISREG(about.st_mode):
            return
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        data = os.pread(own, _BYTES, 0)
        for at, start in zip(_GENERATIONS, _STARTS, strict=True):
            generation = _GENERATION.unpack_from(data, at)[0]
            used = len(_links(data, start, generation)) * _ENTRY.size if generation else 0
            first = start + -(-used // _PAGE_BYTES) * _PAGE_BYTES
            punch_hole(own, first, start + _HALF_BYTES - first)
    finally:
        os.close(own)


def record_path(fd: int, uuid: UUID) -> str:
    """Return where the record is of the image at ``fd``, if there is one."""
    about = os.fstat(fd)
    return f"{DIRECTORY}/{_PREFIX}{uuid}-{about.st_dev:x}-{about.st_ino:x}"


def read_record(fd: int, uuid: UUID) -> list[Link]:
    """Return the links that a killed owner of the image at ``fd`` left behind, in the order to link them.

    Raises ImageError if there is a record that is another user's, or cannot be read.
    """
    path = record_path(fd, uuid)
    try:
        own = os.open(path, READING)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ImageError(f"the record of its last owner, {path}, cannot be read: {error.strerror}") from error
    try:
        about = os.fstat(own)
        if not stat.S_ISREG(about.st_mode):
            raise ImageError(f"the record of its last owner, {path}, is no file: remove it")
        # The directory is everybody's: only who may write the image anyway is believed.
        trusted = about.st_uid in (os.geteuid(), os.fstat(fd).st_uid, 0)
        if not trusted or about.st_mode & 0o077:
            raise ImageError(f"the record of its last owner, {path}, belongs to user {about.st_uid}: become that user")
        data = os.pread(own, _BYTES, 0)
    finally:
        os.close(own)
    if len(data) != _BYTES or _HEADER.unpack_from(data) != _identity(fd, uuid):
        return []
    halves = [(_GENERATION.unpack_from(data, at)[0], start) for at, start in zip(_GENERATIONS, _STARTS, strict=True)]
    return [link for generation, start in sorted(halves) if generation for link in _links(data, start, generation)]


def remove_record(fd: int, uuid: UUID) -> None:
    """Remove the record of the image at ``fd``, if there is one: everything that it notes is in the file."""
    with contextlib.suppress(OSError):
        os.unlink(record_path(fd, uuid))


def _links(data: bytes, start: int, generation: int) -> list[Link]:
    links: list[Link] = []
    for cluster, entry, check in _ENTRY.iter_unpack(data[start : start + _HALF_BYTES]):
        if check != _check(cluster, entry, generation):
            break
        links.append((cluster, entry))
    return links


def _check(cluster: int, entry: int, generation: int) -> int:
    return cluster ^ entry ^ (generation * _MIX & _MASK)


def _identity(fd: int, uuid: UUID) -> tuple[bytes, bytes, int, int]:
    about = os.fstat(fd)
    return _MAGIC, uuid.bytes, about.st_dev, about.st_ino
