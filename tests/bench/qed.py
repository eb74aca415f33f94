"""Reads from QED images and writes into them, over a unix socket: fio's NBD engine is the client of everybody.

One server is up at a time, since a server that may write locks the image. What each one wrote is on the disk before the
next has its turn.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from tests.bench.disk import bring_in_memory, bring_into_cache, settle
from tests.bench.fio import fio, latencies
from tests.bench.peers import OURS, Competitor, our_commands, versions
from tests.bench.process import BenchError, Server, on_unix, run, serving
from tests.bench.results import Floor, Section, Workload
from tests.bench.transfer import CHECK_LEAKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.bench.peers import System

OUR_RAW: Final = "nbdstream, raw"
VERIFIED_BYTES: Final = 4 << 20
"""What everybody writes for others to read back before it is measured: more than a thousand clusters."""

Image = Literal["allocated", "converted", "empty", "overlay"]


@dataclass(frozen=True)
class QedServer(Competitor):
    """Somebody who serves QED images. Both take the image and the path of a unix socket."""

    writable: Callable[[str, str], list[str]] | None
    """Serves an image without a backing file, for writing. None: it has no part in that."""
    overlay: Callable[[str, str], list[str]]
    """Serves an overlay of a raw file, for reading."""


@dataclass(frozen=True)
class QedWorkload(Workload):
    """Requests of one size, with so many in flight on one connection, to an image in a certain state."""

    image: Image
    options: tuple[str, ...]
    share: float = 0
    """How much is written, as a share of the disk; 0: for as long as every run of fio is."""


_READ = ("--rw=randread", "--bs=4k", "--iodepth=32")
_WRITE = ("--rw=randwrite", "--bs=4k", "--iodepth=32")

READS = QedWorkload("4 KiB random reads of an allocated image in single pages", "reads/s", "allocated", _READ)
WRITES = QedWorkload("4 KiB random writes to an allocated image in single pages", "writes/s", "allocated", _WRITE)
CONVERTED_READS = QedWorkload("4 KiB random reads of an image just converted", "reads/s", "converted", _READ)
CONVERTED_WRITES = QedWorkload("4 KiB random writes to an image just converted", "writes/s", "converted", _WRITE)
NEW_WRITES = QedWorkload("4 KiB random writes to an empty image", "writes/s", "empty", _WRITE, 1 / 32)
NEW_SEQUENCE = QedWorkload(
    "1 MiB sequential writes to an empty image",
    "bytes/s",
    "empty",
    ("--rw=write", "--bs=1m", "--iodepth=16"),
    1 / 2,
)
LOCAL_READS = QedWorkload("4 KiB random reads of an overlay, all local", "reads/s", "overlay", _READ)
WORKLOADS = (CONVERTED_READS, CONVERTED_WRITES, READS, WRITES, NEW_WRITES, NEW_SEQUENCE, LOCAL_READS)


def qed_servers(systems: Sequence[System], ours: str, against: str | None) -> list[QedServer]:
    """nbdstream, nbdstream over the raw file itself, then qemu-nbd of each system."""
    servers = []
    for key, (label, command) in our_commands(ours, against).items():

        def writable(path: str, sock: str, command: str = command) -> list[str]:
            return [command, "serve", "-f", "qed", "--writable", path, "-U", sock]

        def overlay(path: str, sock: str, command: str = command) -> list[str]:
            return [command, "serve", "-f", "qed", "--backing-format", "raw", path, "-U", sock]

        servers.append(QedServer(key, label, writable, overlay))

    def raw(path: str, sock: str) -> list[str]:
        return [ours, "serve", f"{os.path.dirname(path)}/source.raw", "-U", sock]

    servers.append(QedServer(OUR_RAW, f"{OURS}, the raw file", None, raw))
    for system in systems:

        def qemu_writable(path: str, sock: str, system: System = system) -> list[str]:
            return system.command("qemu-nbd", "-t", "-f", "qed", "-k", sock, path)

        def qemu_overlay(path: str, sock: str, system: System = system) -> list[str]:
            return system.command("qemu-nbd", "-t", "-r", "-f", "qed", "-k", sock, path)

        label = system.label("qemu-nbd", versions(system).qemu)
        servers.append(QedServer(system.key("qemu-nbd"), label, qemu_writable, qemu_overlay))
    return servers


def floors(servers: Sequence[QedServer]) -> tuple[Floor, ...]:
    """What we promise, against the newest qemu-nbd among ``servers``, which is the last one."""
    newest = next((server.key for server in reversed(servers) if server.key.startswith("qemu-nbd")), "qemu-nbd")
    return (
        Floor(CONVERTED_READS.title, newest, 3.0),
        Floor(CONVERTED_WRITES.title, newest, 3.0),
        Floor(READS.title, newest, 3.0),
        Floor(WRITES.title, newest, 3.0),
        Floor(NEW_WRITES.title, newest, 4.0),
        Floor(NEW_SEQUENCE.title, newest, 2.0),
        Floor(LOCAL_READS.title, OUR_RAW, 0.8),
    )


def measure_qed(
    path: str, servers: Sequence[QedServer], *, rounds: int, seconds: float, scratch: str, sockets: str
) -> Section:
    """Measure ``servers`` over images of the size, and with the contents, of the raw file ``path``."""
    section = Section(
        "qed",
        f"QED images of {os.path.getsize(path) >> 20} MiB on a disk, over a unix socket",
        [*servers],
        [*WORKLOADS],
        floors(servers),
    )
    bench = _Bench(path, seconds, scratch, f"{sockets}/qed")
    bench.make_images()
    for server in servers:
        try:
            bench.verify(server)
        except BenchError as error:
            section.fail(server, str(error))
    for round_number in range(rounds):
        for workload in WORKLOADS:
            for competitor in section.turn(round_number):
                server = next(server for server in servers if server.key == competitor.key)
                if workload.image != "overlay" and server.writable is None:
                    continue
                print(f"qed, round {round_number + 1}, {workload.title}, {server.label}", file=sys.stderr)
                try:
                    value, details = bench.measure(workload, server)
                except BenchError as error:
                    section.fail(server, str(error))
                else:
                    section.add(workload, server, value, **details)
    return section


class _Bench:
    """The images of one section."""

    def __init__(self, source: str, seconds: float, scratch: str, socket: str) -> None:
        self._source = source
        self._size = os.path.getsize(source)
        self._seconds = seconds
        self._scratch = scratch
        self._socket = socket

    def make_images(self) -> None:
        """Make the images that are not made anew for each turn. Raises BenchError."""
        for name in ("allocated", "overlay"):
            self._convert(name)
        # The backing file comes in when all is local: none of it is read.
        run(["qemu-img", "rebase", "-u", "-f", "qed", "-b", self._source, "-F", "raw", self._path("overlay")])
        for path in (self._source, self._path("allocated"), self._path("overlay")):
            bring_into_cache(path, afresh=True)

    def verify(self, server: QedServer) -> None:
        """Have ``server`` write to an empty image, and the host's qemu-nbd read that back. Raises BenchError."""
        if server.writable is None:
            return
        pattern = [
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_state_save=0",
            f"--io_size={self._verified}",
        ]
        path = self._new_image()
        try:
            with self._serving(server.writable, path) as running:
                fio(running.uri, [*pattern, "--do_verify=0"], self._scratch)
            self._check(path)
            with self._serving(_reader, path) as running:
                fio(running.uri, [*pattern, "--verify_only"], self._scratch)
        finally:
            os.unlink(path)

    def measure(self, workload: QedWorkload, server: QedServer) -> tuple[float, dict[str, float]]:
        """Return the speed in the workload's unit, and what else fio tells of itself. Raises BenchError."""
        made_anew = workload.image in ("converted", "empty")
        if workload.image == "empty":
            path = self._new_image()
        elif workload.image == "converted":
            path = self._convert(workload.image)
        else:
            path = self._path(workload.image)
            bring_into_cache(self._source if server.key == OUR_RAW else path)
        settle()
        duration = ["--time_based", f"--runtime={self._seconds * 1000:.0f}ms"]
        if workload.share:
            written = int(self._size * workload.share)
            duration = [f"--io_size={written}", "--randrepeat=0"]
            bring_in_memory(written, self._scratch)
        try:
            argv = server.overlay if workload.image == "overlay" else server.writable
            assert argv is not None
            with self._serving(argv, path) as running:
                job = fio(running.uri, [*workload.options, *duration], self._scratch)
                running.check()
            if workload.unit != "reads/s":
                self._check(path)
        finally:
            if made_anew:
                os.unlink(path)
        side = job["read" if workload.unit == "reads/s" else "write"]
        details = latencies(side) | {"client_processors": (job["usr_cpu"] + job["sys_cpu"]) / 100}
        return float(side["bw_bytes"] if workload.unit == "bytes/s" else side["iops"]), details

    @property
    def _verified(self) -> int:
        return min(VERIFIED_BYTES, self._size // 4)

    def _path(self, name: str) -> str:
        return f"{self._scratch}/{name}.qed"

    def _convert(self, name: str) -> str:
        """Make an image of all the source, as large folios of the page cache have it then."""
        path = self._path(name)
        run(["qemu-img", "convert", "-f", "raw", "-O", "qed", self._source, path])
        return path

    def _new_image(self) -> str:
        """Make an empty image, the same for everybody."""
        path = self._path("empty")
        run(["qemu-img", "create", "-q", "-f", "qed", path, str(self._size)])
        return path

    def _check(self, path: str) -> None:
        run(["qemu-img", "check", "-q", "-f", "qed", path], accepted=(0, CHECK_LEAKS))

    @contextlib.contextmanager
    def _serving(self, argv: Callable[[str, str], list[str]], path: str) -> Iterator[Server]:
        try:
            with serving(argv(path, self._socket), on_unix(self._socket)) as running:
                yield running
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._socket)


def _reader(path: str, sock: str) -> list[str]:
    return ["qemu-nbd", "-t", "-r", "-f", "qed", "-k", sock, path]
