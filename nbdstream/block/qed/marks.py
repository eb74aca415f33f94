"""Marks: which clusters of an overlay the guest wrote. What is local and not marked is what its source has.

The tables do not tell the two apart, and whoever takes another server for the source has to: only what came from the
source can be compared with it. So a mark may be missing never, and may be there in vain: what is marked is not
compared, and that is all.

While an image is open its marks lie in a memory file system, as the record (:mod:`nbdstream.block.qed.record`) does,
bound to the image by device, inode and UUID. A mark is set before its write is begun, and a kill -9 does not lose it.
It needs no barrier: of a power cut nothing but the file remains; that then says, by the marks' header, that it was
open, and every local cluster counts as the guest's. When the image is closed the marks are written into spare header
clusters (qed_spec, ``header_size``), durably, and only then does their header say that they hold.

Marks hold only under an autoclear feature bit: whoever else opens the image for writing, QEMU or a command of ours that
keeps none, clears it, and from then on everything that is local counts as the guest's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
import zlib
from typing import TYPE_CHECKING

from bitarray import bitarray

from nbdstream.block.qed import record
from nbdstream.block.qed.layout import MARKS_HEADER_BYTES, MARKS_OFFSET, marks_bytes
from nbdstream.block.worker import pwrite_all

if TYPE_CHECKING:
    from uuid import UUID

    from nbdstream.block.qed.layout import Header

AUTOCLEAR_MARKS = 1 << 41
"""The autoclear feature bit (qed_spec) that says that marks are kept. No QEMU knows it, so every QEMU clears it."""

_MAGIC = b"NBDMARK\1"
_HEADER = struct.Struct("<8sQI")  # magic, bytes of marks, their crc32; all zero while the image is open
_IDENTITY = struct.Struct("<8s16sQQ")  # magic, image UUID, device, inode: the header of the file in memory
_PREFIX = "nbdmarks-"


class Marks:
    """The marks of an image that is open for writing. All but the bits themselves blocks."""

    def __init__(self, bits: bitarray, fd: int, memory_path: str | None, *, has_room: bool) -> None:
        """Use :meth:`open`."""
        self.bits = bits
        """A bit for each cluster of the disk, and some more."""
        self._fd = fd
        self._memory_path = memory_path
        self._has_room = has_room

    @classmethod
    def open(cls, fd: int, header: Header, uuid: UUID | None, allocated: bitarray) -> Marks:
        """Find the marks of the image at ``fd``, or mark all that is ``allocated``; from here on the image is open.

        ``header`` is that in the file: the caller sets its autoclear bit durably, after this.
        """
        length = marks_bytes(len(allocated))
        room = header.geometry.header_bytes - MARKS_OFFSET - MARKS_HEADER_BYTES
        has_room = uuid is not None and length <= room
        path = _path(fd, uuid) if uuid else None
        found = None
        if header.autoclear_features & AUTOCLEAR_MARKS:
            found = (_read_memory(path, _identity(fd, uuid), length) if path and uuid else None) or (
                _read_file(fd, length) if has_room else None
            )
        if found is None:
            found = allocated.tobytes().ljust(length, b"\0")
        if has_room:
            pwrite_all(fd, bytes(_HEADER.size), MARKS_OFFSET)
            os.fdatasync(fd)
        bits = _make_memory(path, _identity(fd, uuid), found) if path and uuid else None
        if bits is None:  # no room in memory: a kill -9 loses the marks, and then everything counts as the guest's
            path, bits = None, bitarray(buffer=bytearray(found))
        return cls(bits, fd, path, has_room=has_room)

    def save(self) -> None:
        """Write the marks into the file, for the next time. Raises OSError."""
        if self._has_room:
            data = self.bits.tobytes()
            pwrite_all(self._fd, data, MARKS_OFFSET + MARKS_HEADER_BYTES)
            os.fdatasync(self._fd)
            pwrite_all(self._fd, _HEADER.pack(_MAGIC, len(data), zlib.crc32(data)), MARKS_OFFSET)
            os.fdatasync(self._fd)
        self.forget()

    def forget(self) -> None:
        """Let go of the memory. Nobody needs the marks any more, or they are saved."""
        if self._memory_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._memory_path)
            self._memory_path = None


def _read_file(fd: int, length: int) -> bytes | None:
    """Return the marks of an image that was closed, None of one that was open when the power went."""
    head = os.pread(fd, _HEADER.size, MARKS_OFFSET)
    if len(head) < _HEADER.size:
        return None
    magic, stored, checksum = _HEADER.unpack(head)
    if magic != _MAGIC or stored != length:
        return None
    data = os.pread(fd, length, MARKS_OFFSET + MARKS_HEADER_BYTES)
    return data if zlib.crc32(data) == checksum else None


def _read_memory(path: str, identity: bytes, length: int) -> bytes | None:
    """Return the marks that a killed owner left in memory."""
    try:
        own = os.open(path, record.READING)
    except OSError:
        return None
    try:
        about = os.fstat(own)
        # The directory is everybody's: only what we made ourselves is believed.
        if about.st_uid not in (os.geteuid(), 0) or not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077:
            return None
        data = os.pread(own, MARKS_HEADER_BYTES + length, 0)
    finally:
        os.close(own)
    if len(data) != MARKS_HEADER_BYTES + length or data[: len(identity)] != identity:
        return None
    return data[MARKS_HEADER_BYTES:]


def _make_memory(path: str, identity: bytes, content: bytes) -> bitarray | None:
    """Return bits in a file in memory that outlives the process; None where there is no room for one."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        own = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(
            own, 0, MARKS_HEADER_BYTES + len(content)
        )  # later, a page that cannot be had would be SIGBUS
        memory = mmap.mmap(own, MARKS_HEADER_BYTES + len(content))
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(own)
    memory[MARKS_HEADER_BYTES:] = content
    memory[: len(identity)] = identity  # last: until then the file says nothing
    return bitarray(buffer=memoryview(memory)[MARKS_HEADER_BYTES:])


def _path(fd: int, uuid: UUID) -> str:
    about = os.fstat(fd)
    return f"{record.DIRECTORY}/{_PREFIX}{uuid}-{about.st_dev:x}-{about.st_ino:x}"


def _identity(fd: int, uuid: UUID | None) -> bytes:
    about = os.fstat(fd)
    return _IDENTITY.pack(_MAGIC, uuid.bytes if uuid else bytes(16), about.st_dev, about.st_ino)
