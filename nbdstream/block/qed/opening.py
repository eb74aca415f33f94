"""Opening and making QED image files: everything that happens before the event loop may use one. All of it blocks."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from bitarray import bitarray
from bitarray.util import zeros

from nbdstream.block.qed.check import MOST_CLUSTERS
from nbdstream.block.qed.extension import EXTENSION_BYTES, EXTENSION_OFFSET, Extension
from nbdstream.block.qed.layout import HEADER_BYTES, Header, decode_backing_name, encode_backing_name
from nbdstream.block.qed.marks import AUTOCLEAR_MARKS, Marks
from nbdstream.block.qed.record import AUTOCLEAR_RECORD, Link, Record, read_record
from nbdstream.block.qed.space import Space
from nbdstream.block.qed.tables import PAGE_ENTRIES, ZERO, Tables
from nbdstream.block.worker import pread_exact, pwrite_all
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
        return _read_header(fd)


@contextmanager
def opened(path: str, *, writable: bool = False) -> Iterator[int]:
    """Open a file for a while; what goes wrong meanwhile becomes an ImageError that names it."""
    fd = -1
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
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
    header, extension, backing_name = _read_header(fd)
    if writable:
        if header.needs_check:
            raise ImageError(f"{path} was not closed by the QEMU that wrote it: run qemu-img check -r all on it first")
        os.fdatasync(fd)  # links that a kill -9 left unsynced would not be covered by our barriers
    tables = Tables.load(fd, header)
    links = _recorded_links(fd, header, extension)
    if not writable:
        if links:
            raise ImageError(f"{path}: its owner was killed; open it for writing first, as 'nbdstream stream' does")
        whole = Space(header.cluster_size, os.fstat(fd).st_size)
        return OpenFile(fd, header, extension, backing_name, tables, whole, bitarray(), bitarray(), None, None)
    if links:
        _replay(fd, header, tables, links)
    used, allocated, zeroes = _scan(fd, header, tables)
    space = Space.of_used(header.cluster_size, used)
    os.ftruncate(fd, space.end)  # the tail that nothing refers to: what a crash left
    record = Record.create(fd, extension.image_uuid) if extension else None
    uuid = extension.image_uuid if extension else None
    marks = Marks.open(fd, header, uuid, allocated) if marked and backing_name is not None else None
    # Whatever other autoclear bits promise, we do not keep it.
    kept = (AUTOCLEAR_RECORD if record else 0) | (AUTOCLEAR_MARKS if marks else 0)
    ours = replace(header, autoclear_features=kept)
    if ours != header:
        write_header(fd, ours)
    return OpenFile(fd, ours, extension, backing_name, tables, space, allocated, zeroes, record, marks)


def _recorded_links(fd: int, header: Header, extension: Extension | None) -> list[Link]:
    """Return what a killed owner acknowledged and did not link, unless somebody else has written to the image since."""
    if extension is None or not header.autoclear_features & AUTOCLEAR_RECORD:
        return []
    return read_record(fd, extension.image_uuid)


def _replay(fd: int, header: Header, tables: Tables, links: list[Link]) -> None:
    """Link what a killed owner acknowledged, as one epoch. The tables are as they were before it."""
    cluster_size = header.cluster_size
    size = os.fstat(fd).st_size
    _check_places([entry for _, entry in links if entry > ZERO], header, size // cluster_size)
    if max(cluster for cluster, _ in links) >= -(-header.image_size // cluster_size):
        raise ImageError("the record of its last owner is damaged")
    missing = sorted({tables.l1_index(cluster) for cluster, _ in links if tables.absent(cluster)})
    end = -(-size // cluster_size) * cluster_size
    new = {index: end + i * header.table_size * cluster_size for i, index in enumerate(missing)}
    tables.write_new_tables(new, links)
    os.fdatasync(fd)
    tables.link(new, links)
    tables.linked(new, links)
    os.fdatasync(fd)


def _read_header(fd: int) -> tuple[Header, Extension | None, str | None]:
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


def _scan(fd: int, header: Header, tables: Tables) -> tuple[bitarray, bitarray, bitarray]:
    """Walk all tables: return which clusters of the file are used, and which of the disk are not unallocated, or ZERO.

    What only entries beyond the image size lead to is used, too. Raises ImageError if an entry leads nowhere, or two
    lead to the same cluster: writing would then destroy data.
    """
    cluster_size = header.cluster_size
    file_clusters = os.fstat(fd).st_size // cluster_size
    disk_clusters = -(-header.image_size // cluster_size)
    if max(file_clusters, disk_clusters) > MOST_CLUSTERS:
        raise ImageError(f"the file or the disk has more than {MOST_CLUSTERS} clusters: it is not opened for writing")
    used = zeros(file_clusters)
    used[: header.header_size] = 1
    count = header.header_size
    for place in [header.l1_table_offset, *(place for place in tables.l1 if place)]:
        first = place // cluster_size
        used[first : first + header.table_size] = 1
        count += header.table_size
    allocated, zeroes = zeros(disk_clusters), zeros(disk_clusters)
    for page in tables.pages():
        entries = tables.load_page(page).tolist()
        places = [entry for entry in entries if entry > ZERO]
        _check_places(places, header, file_clusters)
        used[[place // cluster_size for place in places]] = 1
        count += len(places)
        first = page * PAGE_ENTRIES
        here = slice(first, first + PAGE_ENTRIES)
        allocated[here] = bitarray(map(bool, entries))[: max(0, disk_clusters - first)]
        zeroes[here] = bitarray(map(ZERO.__eq__, entries))[: max(0, disk_clusters - first)]
    if used.count() != count:
        raise ImageError("damaged QED image: clusters are used twice; 'nbdstream check' tells more")
    return used, allocated, zeroes


def _check_places(places: list[int], header: Header, file_clusters: int) -> None:
    if not places:
        return
    low = header.header_size * header.cluster_size
    high = file_clusters * header.cluster_size
    bits = 0
    for place in places:
        bits |= place
    if bits % header.cluster_size or min(places) < low or max(places) >= high:
        raise ImageError("damaged QED image: an L2 entry leads to no cluster; 'nbdstream check' tells more")


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
    try:
        fd, named = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=directory), False
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        # A file system without O_TMPFILE (NFS): a crash in the next milliseconds leaves a file that must be removed.
        fd, named = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory), True
    try:
        write(fd)
        os.fsync(fd)
        if not named:
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)
        os.fsync(directory)
    except OSError:
        if named:
            os.unlink(name, dir_fd=directory)
        raise
    finally:
        os.close(fd)


def _write_new(fd: int, header: Header, extension: Extension, backing_name: str | None) -> None:
    # A full disk is found out now, not later.
    os.posix_fallocate(fd, 0, header.l1_table_offset + header.geometry.table_bytes)
    pwrite_all(fd, extension.pack(), EXTENSION_OFFSET)
    if backing_name:
        pwrite_all(fd, encode_backing_name(backing_name), header.backing_filename_offset)
    pwrite_all(fd, header.pack(), 0)
