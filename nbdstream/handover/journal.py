"""The journal of one side of a hand-over: a directory that one process at a time uses, and that outlives them all.

``journal`` has a line for each thing that must not be forgotten: a checksum, and JSON. The first says what the
hand-over is about, each other one a record of where this side stands, when that was written, and a note for people; the
last one counts. A line is durable when :meth:`Journal.append` returns. One that a crash cut short is at the end, and
was never acted on: it is dropped. Anything else that is wrong is an error: nobody guesses who owns a disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import zlib
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct

from nbdstream.errors import NbdstreamError
from nbdstream.wire.handover.messages import Count, Disk, Secret
from nbdstream.wire.handover.vocabulary import DestinationRecord, SourceRecord

if TYPE_CHECKING:
    from typing import Self

_VERSION: Final = 1
_MOST_BYTES: Final = 16 << 20
"""A hand-over has some ten records of a few hundred bytes; one that is fenced again and again for years has this."""

Port = Annotated[int, Meta(ge=0, le=65535)]


class JournalError(NbdstreamError):
    """The state directory cannot be used."""


class OfferedImage(Struct, frozen=True, forbid_unknown_fields=True):
    """One image of an offer."""

    path: str
    format: str
    device: Count
    """``st_dev`` of the file, with ``inode`` what tells it from another under its name. Of a block device: 0."""
    inode: Count
    disk: Disk


class SourceSetup(Struct, frozen=True, forbid_unknown_fields=True, tag="source"):
    """What an offer is about."""

    version: int
    group: Secret
    token: Secret
    images: tuple[OfferedImage, ...]
    host: str
    """Where to listen; a name or an address."""
    port: Port
    """Of the hand-over."""
    nbd_port: Port
    tls: bool
    expires: Count
    """Unix time, seconds: from then on the token is worth nothing, unless it had served somebody."""

    @property
    def disks(self) -> tuple[Disk, ...]:
        """What the protocol calls them."""
        return tuple(image.disk for image in self.images)


class DestinationSetup(Struct, frozen=True, forbid_unknown_fields=True, tag="destination"):
    """Which offer was joined, and where its disks go."""

    version: int
    offer: str
    """The URI."""
    destination: Secret
    overlays: tuple[str, ...]
    """Absolute paths."""


_S = TypeVar("_S", SourceSetup, DestinationSetup)
_R = TypeVar("_R", SourceRecord, DestinationRecord)


class Entry(Struct, Generic[_R], frozen=True, forbid_unknown_fields=True):
    """A record, and when and why it was written."""

    time: float
    record: _R
    note: str = ""


class Contents(NamedTuple, Generic[_S, _R]):
    """What a journal says."""

    setup: _S
    entries: list[Entry[_R]]

    @property
    def record(self) -> _R:
        """The last one."""
        return self.entries[-1].record


SourceContents = Contents[SourceSetup, SourceRecord]
DestinationContents = Contents[DestinationSetup, DestinationRecord]


class Journal:
    """A state directory, in use. Use :meth:`open`; everything blocks."""

    def __init__(self, directory: str, lock: int) -> None:
        self.directory = directory
        self._path = os.path.join(directory, "journal")
        self._lock = lock
        self._fd = -1
        # Who gives up waiting for a thread that appends may close this meanwhile: it must not write into another file.
        self._appending = threading.Lock()

    @classmethod
    def open(cls, directory: str) -> Self:
        """Make the directory if there is none, and lock it. Raises JournalError if another process has it."""
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            sync_directory(os.path.dirname(os.path.abspath(directory)))
            lock = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"{directory} cannot be used as a state directory: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise JournalError(f"{directory} is in use by another process: one hand-over has one") from error
        return cls(directory, lock)

    def read_source(self) -> SourceContents | None:
        """Return what it says; None if it is new. Raises JournalError."""
        return _read(self._path, SourceSetup, Entry[SourceRecord])

    def read_destination(self) -> DestinationContents | None:
        """Return what it says; None if it is new. Raises JournalError."""
        return _read(self._path, DestinationSetup, Entry[DestinationRecord])

    def begin(self, contents: Contents[_S, _R]) -> None:
        """Write all of it anew, durably, and go on behind that.

        What was read is written too: nobody knows whether a process that crashed had made it durable.
        Raises JournalError: nothing has changed then.
        """
        temporary = f"{self._path}.new"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_APPEND, 0o600)
            _write(fd, b"".join(map(_line, (contents.setup, *contents.entries))))
            os.fsync(fd)
            os.rename(temporary, self._path)
            sync_directory(self.directory)
        except OSError as error:
            raise JournalError(f"{self._path} cannot be written: {error.strerror}") from error
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def keep_offer(self, text: str) -> None:
        """Leave what a destination has to be told beside it, for whoever cannot see what is printed.

        Raises JournalError.
        """
        path = os.path.join(self.directory, "offer")
        try:
            fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                _write(fd, f"{text}\n".encode())
            finally:
                os.close(fd)
            os.rename(f"{path}.new", path)
        except OSError as error:
            raise JournalError(f"{path} cannot be written: {error.strerror}") from error

    def append(self, record: SourceRecord | DestinationRecord, note: str) -> None:
        """Add a record; it is durable when this returns. Raises JournalError: nothing may be done after that."""
        entry: Any = Entry(time.time(), record, note)
        try:
            with self._appending:
                _write(self._fd, _line(entry))
                os.fdatasync(self._fd)
        except OSError as error:
            raise JournalError(f"{self._path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Let another process have it, when what is being appended is durable."""
        with self._appending:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
        os.close(self._lock)


def read_journal(directory: str) -> SourceContents | DestinationContents:
    """Return what the journal says of a side that may be running. Raises JournalError."""
    path = os.path.join(directory, "journal")
    try:
        contents: SourceContents | DestinationContents | None = _read(path, SourceSetup, Entry[SourceRecord])
    except _OtherSideError:
        contents = _read(path, DestinationSetup, Entry[DestinationRecord])
    if contents is None:
        raise JournalError(f"{directory} holds no hand-over")
    return contents


class _OtherSideError(JournalError):
    """The journal is of the other side."""


def _line(value: Struct) -> bytes:
    text = msgspec.json.encode(value)
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _write(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read(path: str, setup: type[_S], entry: type[Entry[_R]]) -> Contents[_S, _R] | None:
    """Return what is in a journal; None if there is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror}") from error
    *lines, rest = data.split(b"\n")
    if len(data) > _MOST_BYTES or not lines:
        raise JournalError(f"{path} is no journal of a hand-over")
    texts = [_text(line) for line in lines]
    if not rest and texts[-1] is None and len(texts) > 1:
        del texts[-1]  # a crash may have left blocks of a line, its end among them
    try:
        first, *others = texts
        found = msgspec.json.decode(first or b"", type=SourceSetup | DestinationSetup)
        if not isinstance(found, setup):
            raise _OtherSideError(f"{path} is the journal of the other side of a hand-over")
        if found.version != _VERSION:
            raise JournalError(f"{path} was written by another version of nbdstream")
        entries = [msgspec.json.decode(text or b"", type=entry) for text in others]
    except msgspec.DecodeError as error:
        raise JournalError(f"{path} is damaged: {error}") from error
    if not entries:
        raise JournalError(f"{path} is damaged: it has no record")
    return Contents(found, entries)


def _text(line: bytes) -> bytes | None:
    """Return the JSON of a line whose checksum is right."""
    checksum, _, text = line.partition(b" ")
    return text if checksum == b"%08x" % zlib.crc32(text) else None


def sync_directory(path: str) -> None:
    """Make durable what names there are in a directory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
