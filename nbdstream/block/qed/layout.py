"""The layout of a QED image file: its header, and what follows from it (qed_spec). Bytes and numbers, no I/O.

A header is believed only after the checks that QEMU makes when it opens an image, and a few more: what cannot work
(no header cluster) is refused here, too, and a file that ends within a sector is not taken to be whole.

Offsets, sizes and lengths are bytes, except where a header field counts clusters.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from nbdstream.block.qed.extension import EXTENSION_BYTES, EXTENSION_OFFSET
from nbdstream.errors import ImageError

MAGIC = b"QED\0"
HEADER_BYTES = 64

FEATURE_BACKING_FILE = 1
"""The image has a backing file."""
FEATURE_NEED_CHECK = 2
"""The tables were being changed when the image was last open."""
FEATURE_BACKING_FORMAT_NO_PROBE = 4
"""The backing file is raw, whatever its contents look like."""
KNOWN_FEATURES = FEATURE_BACKING_FILE | FEATURE_NEED_CHECK | FEATURE_BACKING_FORMAT_NO_PROBE

MIN_CLUSTER_SIZE = 4 << 10
MAX_CLUSTER_SIZE = 64 << 20
DEFAULT_CLUSTER_SIZE = 64 << 10
TABLE_SIZES = (2, 4, 8, 16)
"""Clusters in a table. qed_spec allows 1 as well, but QEMU opens no such image."""
DEFAULT_TABLE_SIZE = 4

MAX_BACKING_NAME_BYTES = 4095
"""The longest name that QEMU reads (PATH_MAX, less the NUL)."""

MAX_HEADER_BYTES = (1 << 32) - 1
"""The header clusters together are no longer than this."""

SECTOR_BYTES = 512
"""Image sizes are multiples of it."""
MAX_DISK_BYTES = (1 << 63) - (1 << 30)
"""The largest disk that QEMU's block layer takes (BDRV_MAX_LENGTH), whatever an image could describe."""

MARKS_OFFSET = EXTENSION_OFFSET + EXTENSION_BYTES
"""Where our marks lie in the file (see :mod:`nbdstream.block.qed.marks`), of images that were made as overlays."""
MARKS_HEADER_BYTES = 4096
"""What lies in front of the marks themselves: a page, since they are mapped."""

_FIELDS = struct.Struct("<4sIIIQQQQQII")


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an image is divided. The arguments are the header fields of these names.

    A *position* is an offset in the disk; an *offset* one in the file.
    """

    cluster_size: int
    table_size: int
    """Clusters in the L1 table, and in each L2 table."""
    header_size: int
    """Clusters in front of everything else."""

    @property
    def header_bytes(self) -> int:
        """Where the header clusters end, in the file."""
        return self.header_size * self.cluster_size

    @property
    def table_bytes(self) -> int:
        """The length of the L1 table, and of each L2 table."""
        return self.table_size * self.cluster_size

    @property
    def entries(self) -> int:
        """How many entries a table has: a power of two."""
        return self.table_bytes // 8

    @property
    def l2_span(self) -> int:
        """How many bytes of the disk one L2 table maps."""
        return self.entries * self.cluster_size

    @property
    def max_image_size(self) -> int:
        """The largest ``image_size``. 0 for the geometries with which QEMU's own arithmetic overflows to 0."""
        return min(self.entries * self.l2_span % (1 << 64), MAX_DISK_BYTES)

    def cluster_index(self, position: int) -> int:
        """Return which cluster of the disk holds a position."""
        return position // self.cluster_size

    def l1_index(self, position: int) -> int:
        """Return which L1 entry leads to a position."""
        return position // self.l2_span

    def l2_index(self, position: int) -> int:
        """Return which entry of its L2 table leads to a position."""
        return position // self.cluster_size % self.entries

    def valid_cluster_offset(self, offset: int, file_size: int) -> bool:
        """Tell whether a whole cluster can be at ``offset`` of a file of ``file_size`` bytes."""
        return self._fits(offset, self.cluster_size, file_size)

    def valid_table_offset(self, offset: int, file_size: int) -> bool:
        """Tell whether a whole table can be at ``offset`` of a file of ``file_size`` bytes."""
        return self._fits(offset, self.table_bytes, file_size)

    def _fits(self, offset: int, length: int, file_size: int) -> bool:
        return offset % self.cluster_size == 0 and self.header_bytes <= offset <= file_size - length


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an image. The fields are qed_spec's."""

    cluster_size: int
    table_size: int
    header_size: int
    features: int
    compat_features: int
    autoclear_features: int
    l1_table_offset: int
    image_size: int
    """The size of the disk; the last cluster may reach beyond it."""
    backing_filename_offset: int = 0
    backing_filename_size: int = 0

    @classmethod
    def new(
        cls,
        size: int,
        *,
        cluster_size: int = DEFAULT_CLUSTER_SIZE,
        table_size: int = DEFAULT_TABLE_SIZE,
        backing_name: str | None = None,
    ) -> Header:
        """Return the header of a new, empty image for a disk of ``size`` bytes, rounded up to 512.

        The file is then ``l1_table_offset`` + ``table_bytes`` long: the header clusters, with room for our extension
        (and, in an overlay, for our marks), and an L1 table of zeroes. Raises ImageError for a geometry, size or name
        that QEMU could not open.
        """
        _check_cluster_size(cluster_size)
        _check_table_size(table_size)
        spare = EXTENSION_OFFSET + EXTENSION_BYTES
        if backing_name is not None:
            spare = MARKS_OFFSET + MARKS_HEADER_BYTES + marks_bytes(-(-size // cluster_size))
        header_size = -(-spare // cluster_size)
        geometry = Geometry(cluster_size, table_size, header_size)
        if geometry.max_image_size == 0:
            msg = f"QEMU opens no image with cluster_size {cluster_size}, table_size {table_size}: take smaller ones"
            raise ImageError(msg)
        header = cls(
            cluster_size=cluster_size,
            table_size=table_size,
            header_size=header_size,
            features=0,
            compat_features=0,
            autoclear_features=0,
            l1_table_offset=geometry.header_bytes,
            image_size=0,
        ).with_size(size)
        return header if backing_name is None else header.with_backing(backing_name)

    @classmethod
    def parse(cls, first_bytes: bytes, file_size: int) -> Header:
        """Return the header that a file of ``file_size`` bytes begins with; 64 bytes of it are enough.

        Raises ImageError for everything that QEMU refuses, and for what is of no use (see the module).
        """
        if first_bytes[: len(MAGIC)] != MAGIC:
            raise ImageError("not a QED image: the file does not begin with QED's magic")
        if len(first_bytes) < HEADER_BYTES:
            msg = f"not a QED image: its header has {HEADER_BYTES} bytes, the file only {len(first_bytes)}"
            raise ImageError(msg)
        header = cls(*_FIELDS.unpack_from(first_bytes)[1:])
        if unknown := header.features & ~KNOWN_FEATURES:
            msg = f"unsupported QED image: unknown features {unknown:#x}, known are {KNOWN_FEATURES:#x}"
            raise ImageError(msg)
        _check_cluster_size(header.cluster_size)
        _check_table_size(header.table_size)
        header._check_header_size()
        header._check_image_size()
        header._check_l1_table(file_size)
        header._check_backing_name()
        return header

    def pack(self) -> bytes:
        """Return the 64 bytes of the header. Where :meth:`with_backing` was used, the name's bytes follow at once."""
        return _FIELDS.pack(
            MAGIC,
            self.cluster_size,
            self.table_size,
            self.header_size,
            self.features,
            self.compat_features,
            self.autoclear_features,
            self.l1_table_offset,
            self.image_size,
            self.backing_filename_offset,
            self.backing_filename_size,
        )

    @property
    def geometry(self) -> Geometry:
        """How the image is divided."""
        return Geometry(self.cluster_size, self.table_size, self.header_size)

    @property
    def needs_check(self) -> bool:
        """Whether whoever wrote the image last did not finish (QEMU sets this only where there is no backing file)."""
        return bool(self.features & FEATURE_NEED_CHECK)

    @property
    def backing_is_raw(self) -> bool:
        """Whether the header says that the backing file is raw. QED stores no other format."""
        wanted = FEATURE_BACKING_FILE | FEATURE_BACKING_FORMAT_NO_PROBE
        return self.features & wanted == wanted

    @property
    def has_backing(self) -> bool:
        """Whether there is a backing file's name to read (which is none, still, if it begins with a NUL)."""
        return bool(self.features & FEATURE_BACKING_FILE) and self.backing_filename_size > 0

    @property
    def has_extension_area(self) -> bool:
        """Whether the header clusters have room for our extension, behind header and backing file name."""
        name_end = self.backing_filename_offset + self.backing_filename_size if self.has_backing else 0
        return self.geometry.header_bytes >= EXTENSION_OFFSET + EXTENSION_BYTES and name_end <= EXTENSION_OFFSET

    def with_size(self, size: int) -> Header:
        """Return the header of the same image with a disk of ``size`` bytes, rounded up to 512.

        Raises ImageError if it would be smaller than before, or is larger than the geometry allows.
        """
        image_size = -(-size // SECTOR_BYTES) * SECTOR_BYTES
        largest = self.geometry.max_image_size
        if not 0 <= image_size <= largest:
            msg = (
                f"a QED image cannot have {size} bytes: with cluster_size {self.cluster_size} and table_size "
                f"{self.table_size} allowed are 0 to {largest}"
            )
            raise ImageError(msg)
        if image_size < self.image_size:
            raise ImageError(f"the disk has {self.image_size} bytes and would lose some: QED images only grow")
        return replace(self, image_size=image_size)

    def with_backing(self, name: str) -> Header:
        """Return the header with a raw backing file, whose name is to be written right behind its 64 bytes.

        An NBD source is raw in this sense, too: a disk that is probed could choose its own format. Raises ImageError
        if the name does not fit, or if the image has compatible features that we do not know (as QEMU does).
        """
        if self.compat_features:
            msg = f"compat_features are {self.compat_features:#x}: only an image with 0 there can get a backing file"
            raise ImageError(msg)
        length = len(encode_backing_name(name))
        most = self.geometry.header_bytes - HEADER_BYTES
        if length > most:
            msg = f"the backing file's name has {length} bytes, the header of this image has room for {most}"
            raise ImageError(msg)
        return replace(
            self,
            features=self.features | FEATURE_BACKING_FILE | FEATURE_BACKING_FORMAT_NO_PROBE,
            backing_filename_offset=HEADER_BYTES,
            backing_filename_size=length,
        )

    def without_backing(self) -> Header:
        """Return the header without a backing file, as ``qemu-img rebase -u -b ''`` leaves it."""
        return replace(
            self,
            features=self.features & ~(FEATURE_BACKING_FILE | FEATURE_BACKING_FORMAT_NO_PROBE),
            backing_filename_offset=HEADER_BYTES,
            backing_filename_size=0,
        )

    def without_autoclear(self) -> Header:
        """Return the header as a writer must leave it: features that it does not keep up are cleared."""
        return replace(self, autoclear_features=0)

    def _check_header_size(self) -> None:
        most = MAX_HEADER_BYTES // self.cluster_size
        if not 1 <= self.header_size <= most:
            msg = f"damaged QED image: header_size is {self.header_size} clusters, allowed are 1 to {most}"
            raise ImageError(msg)

    def _check_image_size(self) -> None:
        largest = self.geometry.max_image_size
        if self.image_size % SECTOR_BYTES or self.image_size > largest:
            msg = (
                f"damaged QED image: image_size is {self.image_size}, allowed are multiples of {SECTOR_BYTES} "
                f"up to {largest} (with cluster_size {self.cluster_size}, table_size {self.table_size})"
            )
            raise ImageError(msg)

    def _check_l1_table(self, file_size: int) -> None:
        geometry = self.geometry
        if not geometry.valid_table_offset(self.l1_table_offset, file_size):
            msg = (
                f"damaged or truncated QED image: l1_table_offset is {self.l1_table_offset}, but the table's "
                f"{geometry.table_bytes} bytes must lie, aligned to {self.cluster_size}, "
                f"between {geometry.header_bytes} (header_size) and the file's end at {file_size}"
            )
            raise ImageError(msg)

    def _check_backing_name(self) -> None:
        if not self.features & FEATURE_BACKING_FILE:
            return
        offset, length = self.backing_filename_offset, self.backing_filename_size
        if offset + length > self.geometry.header_bytes:
            msg = (
                f"damaged QED image: backing_filename_offset {offset} and backing_filename_size {length} lead beyond "
                f"the header clusters, which end at {self.geometry.header_bytes}"
            )
            raise ImageError(msg)
        if length > MAX_BACKING_NAME_BYTES:
            msg = f"damaged QED image: backing_filename_size is {length}, allowed are at most {MAX_BACKING_NAME_BYTES}"
            raise ImageError(msg)


def marks_bytes(clusters: int) -> int:
    """Return how many bytes the marks of a disk take: whole pages, a bit for each cluster."""
    return max(1, -(-clusters // (8 * 4096))) * 4096


def encode_backing_name(name: str) -> bytes:
    """Return a backing file name as an image stores it (any bytes of a path survive); ImageError if it cannot."""
    data = name.encode("utf-8", "surrogateescape")
    if not data or b"\0" in data:
        raise ImageError("the backing file's name is empty, or has a NUL in it")
    if len(data) > MAX_BACKING_NAME_BYTES:
        msg = f"the backing file's name has {len(data)} bytes, allowed are at most {MAX_BACKING_NAME_BYTES}"
        raise ImageError(msg)
    return data


def decode_backing_name(data: bytes) -> str | None:
    """Return the name that the ``backing_filename_size`` bytes mean: it ends at a NUL, as in QEMU; None if empty."""
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape") or None


def _check_cluster_size(cluster_size: int) -> None:
    is_power_of_two = cluster_size.bit_count() == 1
    if not is_power_of_two or not MIN_CLUSTER_SIZE <= cluster_size <= MAX_CLUSTER_SIZE:
        msg = (
            f"QED cannot have cluster_size {cluster_size}: "
            f"allowed are powers of two from {MIN_CLUSTER_SIZE} to {MAX_CLUSTER_SIZE}"
        )
        raise ImageError(msg)


def _check_table_size(table_size: int) -> None:
    if table_size not in TABLE_SIZES:
        msg = f"QED cannot have table_size {table_size}: allowed are 2, 4, 8 and 16 clusters"
        raise ImageError(msg)
