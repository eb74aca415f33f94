"""Opening and making QED image files: everything that happens before the event loop may use one. All of it blocks."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from bitarray import bitarray
from bitarray.util import zeros

from nbdstream.block.files import open_image
from nbdstream.block.qed.extension import EXTENSION_BYTES, EXTENSION_OFFSET, Extension
from nbdstream.block.qed.layout import (
    FEATURE_NEED_CHECK,
    HEADER_BYTES,
    Header,
    decode_backing_name,
    encode_backing_name,
)
from nbdstream.block.qed.marks import AUTOCLEAR_MARKS, Marks
from nbdstream.block.qed.mend import drop_bad_entries, find_shared, measure_doubles
from nbdstream.block.qed.record import AUTOCLEAR_RECORD, Link, Record
from nbdstream.block.qed.replay import links_to_replay, recorded_links, replay
from nbdstream.block.qed.space import Space
from nbdstream.block.qed.tables import ZERO, Tables
from nbdstream.block.qed.walk import MOST_CLUSTERS, Walk
from nbdstream.block.worker import pread_exact, pwrite_all
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

_NO_PLACE = "where none can be; 'nbdstream check -r all' repairs it"
_USED_TWICE = "damaged QED image: clusters are used twice; 'nbdstream check -r all' repairs it"

_SHOWN_RANGES = 10


class OpenFile(NamedTuple):
    """An image file that is open, locked and found to be sound."""

    fd: int
    header: Header
    extension: Extension | None
    backing_name: str | None
    tables: Tables
    space: Space
    allocated: bitarray
    zeroes: bitarray
    record: Record | None
    links: list[Link]
    """Opened for reading: what the tables do not hold yet, and count as if they did."""
    marks: Marks | None


def open_file(path: str, lock: Callable[[int], None], *, writable: bool, marked: bool = False) -> OpenFile:
    """Open an image file and look through it. ``lock`` takes the locks, before anything is read.

    Whoever writes and keeps no marks (``marked``) voids those that there are.

    Raises ImageError: it cannot be opened, is no QED image, or is damaged.
    """
    with opened(path, writable=writable) as original:
        # The copy refers to the same open file: the locks, which belong to that, stay when the original is closed.
        fd = os.dup(original)
        try:
            lock(fd)
            return _look_through(fd, path, writable=writable, marked=marked)
        except BaseException:
            os.close(fd)
            raise


def read_header(path: str) -> tuple[Header, Extension | None, str | None]:
    """Return what an image says of itself: header, our extension, backing file name. Takes no locks.

    Raises ImageError.
    """
    with opened(path) as fd:
        return read_header_of(fd)


@contextmanager
def opened(path: str, *, writable: bool = False) -> Iterator[int]:
    """Open a file for a while; what goes wrong meanwhile becomes an ImageError that names it."""
    fd = -1
    try:
        fd = open_image(path, writable=writable)
        yield fd
    except ImageError as error:
        if path in str(error):
            raise
        raise ImageError(f"{path}: {error}") from error
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error
    finally:
        if fd >= 0:
            os.close(fd)


def _look_through(fd: int, path: str, *, writable: bool, marked: bool) -> OpenFile:
    header, extension, backing_name = read_header_of(fd)
    if not writable:
        # What is damaged is EIO when it is asked for; all else can be read.
        tables = Tables.load(fd, header, strict=False)
        links = recorded_links(fd, header, extension)
        whole = Space(header.cluster_size, os.fstat(fd).st_size // header.cluster_size * header.cluster_size)
        return OpenFile(fd, header, extension, backing_name, tables, whole, bitarray(), bitarray(), None, links, None)
    os.fdatasync(fd)  # links that a kill -9 left unsynced would not be covered by our barriers
    links = links_to_replay(fd, header, extension)
    if header.needs_check:
        _drop_what_was_not_finished(fd, path, header)
    tables = Tables.load(fd, header)
    if links:
        replay(fd, header, tables, links)
    scan = _Scan(fd, header)
    scan.run()
    space = Space.of_used(header.cluster_size, scan.used)
    os.ftruncate(fd, space.end)  # the tail that nothing refers to: what a crash left
    extension = extension or _introduce(fd, header, backing_name)
    uuid = extension.image_uuid if extension else None
    record = Record.create(fd, uuid) if uuid else None
    marks = Marks.open(fd, header, uuid, scan.allocated) if marked and backing_name is not None else None
    ours = replace(
        header,
        features=header.features & ~FEATURE_NEED_CHECK,
        # Whatever other autoclear bits promise, we do not keep it.
        autoclear_features=(AUTOCLEAR_RECORD if record else 0) | (AUTOCLEAR_MARKS if marks else 0),
    )
    if ours != header:
        write_header(fd, ours)
    return OpenFile(fd, ours, extension, backing_name, tables, space, scan.allocated, scan.zeroes, record, [], marks)


def _introduce(fd: int, header: Header, backing_name: str | None) -> Extension | None:
    """Give an image that another program made an identity, which its record and its marks are bound to.

    Only where its header has room that nobody uses. It becomes durable with the header.
    """
    if not header.has_extension_area or any(pread_exact(fd, EXTENSION_BYTES, EXTENSION_OFFSET)):
        return None
    extension = Extension.new(backing_name or "")
    pwrite_all(fd, extension.pack(), EXTENSION_OFFSET)
    return extension


def _drop_what_was_not_finished(fd: int, path: str, header: Header) -> None:
    """Do what NEED_CHECK asks for: entries whose clusters a crash kept from the file are made UNALLOCATED."""
    shared = find_shared(fd, header)
    if measure_doubles(fd, header, shared):
        raise ImageError(_USED_TWICE)  # no crash of QEMU's does that
    lost = drop_bad_entries(fd, header, shared)
    if lost.bytes:
        where = ", ".join(f"{part.offset}+{part.length}" for part in lost.kept[:_SHOWN_RANGES])
        more = ", ..." if len(lost.kept) > _SHOWN_RANGES else ""
        log.warning(
            "%s was not closed by the QEMU that wrote it: %d bytes of the disk were never stored (at %s%s)",
            path,
            lost.bytes,
            where,
            more,
        )


def read_header_of(fd: int) -> tuple[Header, Extension | None, str | None]:
    """Return what an open image file says of itself, as :func:`read_header` does."""
    header = Header.parse(os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size)
    name = extension = None
    if header.has_backing:
        name = decode_backing_name(pread_exact(fd, header.backing_filename_size, header.backing_filename_offset))
    if header.has_extension_area:
        extension = Extension.parse(os.pread(fd, EXTENSION_BYTES, EXTENSION_OFFSET))
    return header, extension, name


def write_header(fd: int, header: Header) -> None:
    """Replace the header, and make that durable (*blocking*)."""
    pwrite_all(fd, header.pack(), 0)
    os.fdatasync(fd)


class _Scan(Walk):
    """Finds which clusters of the file are used, and which of the disk are not unallocated, or ZERO.

    Raises ImageError if an entry leads nowhere, or two lead to the same cluster: writing would then destroy data.
    """

    def __init__(self, fd: int, header: Header) -> None:
        super().__init__(fd, header)
        clusters = -(-header.image_size // header.cluster_size)
        if clusters > MOST_CLUSTERS:
            raise ImageError(f"the disk has more than {MOST_CLUSTERS} clusters: it is not opened for writing")
        self.allocated, self.zeroes = zeros(clusters), zeros(clusters)

    def entries_found(self, cluster: int, entries: array[int], places: list[int]) -> None:
        behind = min(cluster + len(entries), len(self.allocated))
        if cluster < behind:
            here = entries[: behind - cluster]
            self.allocated[cluster:behind] = bitarray(map(bool, here))
            self.zeroes[cluster:behind] = bitarray(map(ZERO.__eq__, here))

    def bad_table(self, index: int, entry_offset: int, entry: int) -> None:
        raise ImageError(f"damaged QED image: L1 entry {index} leads to {entry:#x}, {_NO_PLACE}")

    def taken_table(self, index: int, entry_offset: int, entry: int, overlap: int) -> None:
        raise ImageError(_USED_TWICE)

    def bad_entry(self, cluster: int, entry_offset: int, entry: int) -> None:
        raise ImageError(f"damaged QED image: an L2 entry leads to {entry:#x}, {_NO_PLACE}")

    def taken_entry(self, cluster: int, entry_offset: int, entry: int) -> None:
        raise ImageError(_USED_TWICE)


def create_file(
    path: str, size: int, *, cluster_size: int, table_size: int, backing_name: str | None, origin_size: int = 0
) -> None:
    """Make a new image file; it and its directory entry are durable when this returns.

    With a backing file name, the image remembers in its extension where it came from. Raises ImageError: the geometry
    or size is not possible, or the file exists or cannot be made; nothing is left behind then.
    """
    header = Header.new(size, cluster_size=cluster_size, table_size=table_size, backing_name=backing_name)
    extension = Extension.new(backing_name or "", origin_size)
    try:
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _make(directory, os.path.basename(path), lambda fd: _write_new(fd, header, extension, backing_name))
        finally:
            os.close(directory)
    except OSError as error:
        raise ImageError(f"{path}: cannot be made: {error.strerror}") from error


def _make(directory: int, name: str, write: Callable[[int], None]) -> None:
    """Make a file that has its name only when it is complete and durable: a crash leaves it whole, or not at all."""
    flags = os.O_RDWR | os.O_CLOEXEC
    unfinished = None
    try:
        fd = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        # A file system without O_TMPFILE (NFS): a crash leaves a file that says by its name what it is.
        unfinished = f".{name[:200]}.{os.getpid()}.unfinished"
        fd = os.open(unfinished, flags | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=directory)
    try:
        write(fd)
        os.fsync(fd)
        if unfinished:
            os.link(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
        else:
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)
        os.fsync(directory)
    finally:
        os.close(fd)
        if unfinished:
            os.unlink(unfinished, dir_fd=directory)


def _write_new(fd: int, header: Header, extension: Extension, backing_name: str | None) -> None:
    # A full disk is found out now, not later.
    os.posix_fallocate(fd, 0, header.l1_table_offset + header.geometry.table_bytes)
    pwrite_all(fd, extension.pack(), EXTENSION_OFFSET)
    if backing_name:
        pwrite_all(fd, encode_backing_name(backing_name), header.backing_filename_offset)
    pwrite_all(fd, header.pack(), 0)
