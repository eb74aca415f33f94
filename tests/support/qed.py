"""QEMU as the oracle for QED images: makes them, writes into them, checks, maps, compares and reads them.

Everything here blocks. Commands that fail raise :class:`subprocess.CalledProcessError` with what they printed, unless
their result is the exit code.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

USABLE_GEOMETRIES = [
    (cluster_size, table_size)
    for cluster_size in (1 << shift for shift in range(12, 27))
    for table_size in (2, 4, 8, 16)
    if 3 * cluster_size.bit_length() + 2 * table_size.bit_length() - 5 < 70  # else QEMU's arithmetic overflows
]
"""Every (cluster_size, table_size) of an image that QEMU can open."""

SMALL_GEOMETRIES = [(4096, 2), (4096, 4), (8192, 2), (16384, 2), (65536, 4)]
"""A few that are quick to test with, of which QEMU's writes can be trusted (qed.md, bug 2b)."""


def qemu_img(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run qemu-img."""
    return _run("qemu-img", *arguments, check=check)


def qemu_io(
    image: str, *commands: str, read_only: bool = False, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run qemu-io's commands on a QED image, in one process. ``image`` is a file, or from :func:`without_backing`."""
    form = [] if image.startswith("json:") else ["-f", "qed"]
    flags = ["-r"] if read_only else []
    return _run(
        "qemu-io", *form, *flags, *(part for command in commands for part in ("-c", command)), image, check=check
    )


def _run(*command: str, check: bool) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and result.returncode:
        print(result.stdout, result.stderr)
        raise subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)
    return result


def without_backing(path: str) -> str:
    """Return a name under which QEMU opens an overlay without its backing file. Only to be read under it."""
    driver = {"driver": "qed", "backing": None, "file": {"driver": "file", "filename": path}}
    return "json:" + json.dumps(driver)


def create(
    path: str,
    size: int,
    *,
    cluster_size: int = 65536,
    table_size: int = 4,
    backing: str | None = None,
    backing_format: str = "raw",
) -> str:
    """Make an empty image of ``size`` bytes with qemu-img; the backing file need not be reachable. Return its path."""
    options = f"cluster_size={cluster_size},table_size={table_size}"
    layer = ["-u", "-b", backing, "-F", backing_format] if backing else []
    qemu_img("create", "-q", "-f", "qed", "-o", options, *layer, path, str(size))
    return path


def qemu_info(path: str) -> dict[str, Any]:
    """Return what ``qemu-img info`` says. It opens no backing file."""
    result: dict[str, Any] = json.loads(qemu_img("info", "--output=json", "-f", "qed", path).stdout)
    return result


class Check(NamedTuple):
    """What ``qemu-img check`` found, less the leaks that it invents."""

    status: int
    """Its exit code, as it would be without the false leaks: 0 clean, 1 not checked, 2 corrupt, 3 leaks."""
    corruptions: int
    leaks: int
    allocated_clusters: int
    total_clusters: int
    check_errors: int = 0


def qemu_check(path: str) -> Check:
    """Check an image with qemu-img, whether or not its backing file can be reached. Nothing is changed."""
    result = qemu_img("check", "--output=json", without_backing(path), check=False)
    if result.returncode == 1:
        return Check(1, 0, 0, 0, 0, check_errors=1)
    report = json.loads(result.stdout)
    leaks = report.get("leaks", 0) - _false_leaks(path)
    corruptions = report.get("corruptions", 0)
    return Check(
        status=2 if corruptions else 3 if leaks else 0,
        corruptions=corruptions,
        leaks=leaks,
        allocated_clusters=report.get("allocated-clusters", 0),
        total_clusters=report["total-clusters"],
        check_errors=report["check-errors"],
    )


def _false_leaks(path: str) -> int:
    """Return how many leaks QEMU reports that are none: it divides by the cluster size less one (qed.md, bug 2a)."""
    cluster_size: int = RawImage(path).cluster_size
    return os.path.getsize(path) // cluster_size // (cluster_size - 1)


class MapEntry(NamedTuple):
    """A run of ``qemu-img map``, without the file offset."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool


def qemu_map(path: str) -> list[MapEntry]:
    """Return ``qemu-img map``, neighbours that differ in the file offset alone joined."""
    runs: list[MapEntry] = []
    for entry in json.loads(qemu_img("map", "--output=json", "-f", "qed", path).stdout):
        run = MapEntry(*(entry[name] for name in MapEntry._fields))
        if runs and runs[-1][2:] == run[2:]:
            run = run._replace(start=runs[-1].start, length=runs[-1].length + run.length)
            runs.pop()
        runs.append(run)
    return runs


def qemu_compare(first: str, second: str, *, first_format: str = "qed", second_format: str = "raw") -> bool:
    """Tell whether ``qemu-img compare`` finds the same content (a shorter one may be followed by zeroes)."""
    result = qemu_img("compare", "-q", "-f", first_format, "-F", second_format, first, second, check=False)
    if result.returncode > 1:
        result.check_returncode()
    return result.returncode == 0


def content(path: str) -> bytes:
    """Return what the disk of an image reads as, to QEMU."""
    with tempfile.NamedTemporaryFile() as raw:
        qemu_img("convert", "-f", "qed", "-O", "raw", path, raw.name)
        return raw.read()


@dataclass(frozen=True)
class Write:
    """A write of a byte, or of zeroes as metadata where ``byte`` is None."""

    offset: int
    length: int
    byte: int | None

    @property
    def command(self) -> str:
        """The qemu-io command that does it."""
        how = "-z" if self.byte is None else f"-P {self.byte}"
        return f"write {how} {self.offset} {self.length}"

    def apply(self, model: bytearray) -> None:
        """Do it to a model of the disk."""
        model[self.offset : self.offset + self.length] = bytes([self.byte or 0]) * self.length


def random_writes(
    rng: random.Random, size: int, cluster_size: int, count: int, *, whole_clusters: bool = False
) -> list[Write]:
    """Return writes anywhere in a disk, from 512 bytes to a few clusters long, about a third of them zeroes.

    Ask for ``whole_clusters`` where QEMU writes into an image with a backing file: its writes into parts of zero
    clusters go wrong then (qed.md, bug 1).
    """
    unit = cluster_size if whole_clusters else 512
    writes = []
    for _ in range(count):
        length = min(size, unit * rng.randint(1, rng.choice([1, 4, max(1, 4 * cluster_size // unit)])))
        offset = rng.randrange(0, size - length + 1, unit)
        writes.append(Write(offset, length, rng.choice([None, rng.randrange(1, 256), rng.randrange(1, 256)])))
    return writes


def write_all(path: str, writes: Iterable[Write], model: bytearray | None = None) -> None:
    """Have qemu-io do writes, and do them to the model as well."""
    writes = list(writes)
    for start in range(0, len(writes), 200):  # a command line has only so much room
        qemu_io(path, *(write.command for write in writes[start : start + 200]))
    for write in writes:
        if model is not None:
            write.apply(model)


class RawImage:
    """The numbers in an image file, read and changed behind everybody's back.

    It shares no code with what it is used to test.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as file:
            fields = struct.unpack("<4sIIIQQQQQII", file.read(64))
        self.cluster_size, self.table_size, self.header_size = fields[1:4]
        self.l1_table_offset = fields[7]

    @property
    def entries(self) -> int:
        """How many entries a table has."""
        size: int = self.cluster_size * self.table_size
        return size // 8

    def get(self, offset: int) -> int:
        """Return the u64 at ``offset`` of the file."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return int.from_bytes(file.read(8), "little")

    def put(self, offset: int, value: int) -> None:
        """Replace the u64 at ``offset`` of the file."""
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(value.to_bytes(8, "little"))

    def l1_offset(self, index: int) -> int:
        """Return where in the file an L1 entry is."""
        offset: int = self.l1_table_offset + 8 * index
        return offset

    def l2_offset(self, cluster: int) -> int:
        """Return where in the file the L2 entry of a cluster is. Its L2 table must exist."""
        table: int = self.get(self.l1_offset(cluster // self.entries))
        assert table
        return table + 8 * (cluster % self.entries)

    def extend(self, size: int) -> None:
        """Make the file ``size`` bytes longer, or shorter if that is negative."""
        os.truncate(self.path, os.path.getsize(self.path) + size)
