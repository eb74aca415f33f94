"""A guest beside the stream: how long its requests take while the disk becomes local, and how long that takes.

The guest is fio's NBD engine with 4 requests of 4 KiB in flight, at random over the whole disk, from the moment the
stream begins until the overlay is independent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.bench.disk import bring_in_memory, bring_into_cache, settle
from tests.bench.fio import fio_argv, latencies, read_report
from tests.bench.peers import Competitor, our_commands, versions
from tests.bench.process import BenchError, on_unix, run, serving
from tests.bench.qmp import NODE, StorageDaemon
from tests.bench.results import Floor, Section, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from tests.bench.peers import System

LONGEST_SECONDS: Final = 600
SHORTEST_SECONDS: Final = 0.7
"""For so long the guest goes on at least: a small disk (--quick) is there before fio has begun."""
POLL_SECONDS: Final = 0.01

ATTEMPTS_OF_QEMU: Final = 20
"""QEMU 7.2 ends in every third turn or so (``qed_aio_write_alloc: Assertion `s->allocating_acb == NULL' failed``), and
in most of those that are long since the disk is slow. What it does in the others is what can be compared; the JSON
tells how many attempts each took."""


@dataclass(frozen=True)
class Streamer(Competitor):
    """Somebody who streams while a guest uses the disk."""

    begin: Callable[[Disk], AbstractContextManager[str]]
    """Makes the overlay, serves it and begins to stream; gives the guest's URI. At its end all has been closed."""
    attempts: int = 1
    """How often it may fail in a turn before it is left out."""


@dataclass(frozen=True)
class Disk:
    """One disk to be streamed."""

    source: str
    """The URI of the source."""
    overlay: str
    guest: str
    """A path for the guest's socket."""
    monitor: str
    """A path for a QMP socket."""


@dataclass(frozen=True)
class Load:
    """What the guest does."""

    title: str
    options: tuple[str, ...]
    side: str
    """Where fio tells of it."""


_LOCAL: Final = "--size=3%"
"""Of the disk, at its begin: both streamers have it there at once, so this guest needs no source."""
OBJECTIVE: Final = "2ms"
WITH_OBJECTIVE: Final = "nbdstream-objective"

WHOLE_DISK = (
    Load("reads", ("--rw=randread",), "read"),
    Load("writes", ("--rw=randwrite",), "write"),
    Load("flushes, one after 16 writes", ("--rw=randwrite", "--fsync=16"), "sync"),
)
LOADS = (
    *WHOLE_DISK,
    Load("reads of what is local", ("--rw=randread", _LOCAL), "read"),
    Load("writes to what is local", ("--rw=randwrite", _LOCAL), "write"),
)
FIFTH: Final = 5.0
SOONER: Final = 4.0

SLOW_SECONDS: Final = 0.003
"""What a barrier takes longer on a slow disk. The disks that virtual machines are rented with, and SSDs that cannot
lose their cache's power, take a few milliseconds for one; some others a twentieth of that."""


PERCENTILES: Final = ("p50", "p99", "p99.9")
"""The last one shows what stops single requests for long, and few of them."""


def workload(load: Load, figure: str) -> Workload:
    """One line of the table: ``figure`` is until, or one of PERCENTILES."""
    if figure == "until":
        return Workload(f"until independent, beside {load.title}", "s")
    return Workload(f"{load.title}, {figure}", "ms")


def streamers(systems: Sequence[System], ours: str, against: str | None, slower: float = 0.0) -> list[Streamer]:
    """nbdstream, the same with an objective, then the storage daemon of each system.

    Each barrier of theirs takes ``slower`` seconds longer.
    """
    disk = [sys.executable, "-m", "tests.support.slow_disk", str(slower)] if slower else []
    objective = ["--guest-latency", OBJECTIVE]
    return [
        *[_nbdstream(key, label, [*disk, command]) for key, (label, command) in our_commands(ours, against).items()],
        _nbdstream(WITH_OBJECTIVE, f"nbdstream {' '.join(objective)}", [*disk, ours], *objective),
        *[_block_stream(system, disk) for system in systems],
    ]


def _nbdstream(key: str, label: str, command: Sequence[str], *options: str) -> Streamer:
    @contextlib.contextmanager
    def stream(disk: Disk) -> Iterator[str]:
        place = on_unix(disk.guest)
        with serving([*command, "stream", disk.source, disk.overlay, "-U", disk.guest, *options], place):
            yield place.uri

    return Streamer(key, label, stream)


def _block_stream(system: System, slow_disk: Sequence[str]) -> Streamer:
    @contextlib.contextmanager
    def stream(disk: Disk) -> Iterator[str]:
        run(system.command("qemu-img", "create", "-q", "-f", "qed", "-b", disk.source, "-F", "raw", disk.overlay))
        daemon = StorageDaemon(
            [*slow_disk, *system.command("qemu-storage-daemon")], disk.overlay, disk.monitor,
            "--nbd-server", f"addr.type=unix,addr.path={disk.guest}",
            "--export", f"type=nbd,id=guest,node-name={NODE},name=,writable=on",
        )  # fmt: skip
        try:
            daemon.begin_stream()
            yield on_unix(disk.guest).uri
        finally:
            daemon.close()

    label = system.label("block-stream", versions(system).qemu)
    return Streamer(system.key("block-stream"), label, stream, ATTEMPTS_OF_QEMU)


def measure_guests(
    path: str, who: Sequence[Streamer], *, slower: float = 0.0, rounds: int, scratch: str, sockets: str
) -> Section:
    """Measure ``who`` over the raw file ``path``, which nbdkit serves.

    Where their barriers take ``slower`` seconds longer (see :func:`streamers`), only with guests that use the whole
    disk: one that keeps to what is local waits for no barrier.
    """
    loads = WHOLE_DISK if slower else LOADS
    section = _section(path, who, loads, slower)
    for round_number in range(rounds):
        for load in loads:
            for competitor in section.turn(round_number):
                streamer = next(each for each in who if each.key == competitor.key)
                print(f"{section.name}, round {round_number + 1}, {load.title}, {streamer.label}", file=sys.stderr)
                try:
                    figures, details = _attempt(path, streamer, load, scratch, sockets)
                except BenchError as error:
                    section.fail(streamer, str(error))
                else:
                    for figure, value in figures.items():
                        section.add(workload(load, figure), streamer, value, **details)
    return section


def _section(path: str, who: Sequence[Streamer], loads: Sequence[Load], slower: float) -> Section:
    title = f"A guest with 4 requests of 4 KiB in flight, while {os.path.getsize(path) >> 20} MiB are streamed"
    title += f" to a disk whose barriers take {slower * 1000:g} ms longer" if slower else " from nbdkit"
    oldest = next((each.key for each in who if each.key.startswith("block-stream")), "block-stream")
    floors = [Floor(workload(load, "p99").title, oldest, FIFTH) for load in WHOLE_DISK[:2]]
    floors += [Floor(workload(load, "until").title, oldest, SOONER) for load in WHOLE_DISK]
    figures = [workload(load, figure) for load in loads for figure in (*PERCENTILES, "until")]
    return Section("slow-disk" if slower else "guest", title, [*who], figures, tuple(floors))


def _attempt(
    path: str, streamer: Streamer, load: Load, scratch: str, sockets: str
) -> tuple[dict[str, float], dict[str, float]]:
    for attempt in range(1, streamer.attempts):
        try:
            figures, details = _measure(path, streamer, load, scratch, sockets)
        except BenchError as error:
            print(f"{streamer.label}, attempt {attempt}: {error}", file=sys.stderr)
        else:
            return figures, details | {"attempts": attempt}
    return _measure(path, streamer, load, scratch, sockets)


def _measure(
    path: str, streamer: Streamer, load: Load, scratch: str, sockets: str
) -> tuple[dict[str, float], dict[str, float]]:
    bring_into_cache(path)
    settle()
    bring_in_memory(os.path.getsize(path), scratch)
    statistics, overlay = f"{scratch}/nbdkit.stats", f"{scratch}/guest.qed"
    source = on_unix(f"{sockets}/guest-source")
    disk = Disk(source.uri, overlay, f"{sockets}/guest", f"{sockets}/guest-monitor")
    nbdkit = ["nbdkit", "-f", "-r", "-U", source.where, "--filter=stats", "file", path,
              f"statsfile={statistics}"]  # fmt: skip
    try:
        with serving(nbdkit, source), streamer.begin(disk) as uri:
            job, seconds = _guest(uri, load, overlay, scratch)
        found = latencies(job[load.side], "lat_ns" if load.side == "sync" else "clat_ns")
        figures = {name: found[f"{name}_us"] / 1e6 for name in PERCENTILES}
        return figures | {"until": seconds}, {"fetched_by_allocated": _bytes_read(statistics) / os.path.getsize(path)}
    finally:
        for left in (overlay, statistics, source.where, disk.guest, disk.monitor):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)


def _guest(uri: str, load: Load, overlay: str, scratch: str) -> tuple[dict[str, Any], float]:
    """Run the guest until ``overlay`` has no backing file; return what fio tells, and the seconds until then."""
    report = f"{scratch}/guest.json"
    options = [*load.options, "--bs=4k", "--iodepth=4", "--time_based", f"--runtime={LONGEST_SECONDS}"]
    start = time.monotonic()
    with subprocess.Popen(fio_argv(uri, options, report), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as guest:
        try:
            while _has_backing(overlay):
                if guest.poll() is not None or time.monotonic() - start > LONGEST_SECONDS:
                    raise BenchError("the guest ended before the overlay was independent")
                time.sleep(POLL_SECONDS)
            seconds = time.monotonic() - start
            time.sleep(max(0.0, SHORTEST_SECONDS - seconds))
            guest.send_signal(signal.SIGINT)  # it writes its report
            guest.wait()
        except BaseException:
            guest.kill()
            raise
    return read_report(report, uri), seconds


def _has_backing(overlay: str) -> bool:
    """Whether the image says that it has a backing file (qed_spec: bit 0 of the features, at offset 16)."""
    with open(overlay, "rb") as file:
        return bool(file.read(17)[16] & 1)


def _bytes_read(statistics: str) -> int:
    """Return how many bytes nbdkit's stats filter saw being read."""
    with open(statistics) as file:
        for line in file:
            if line.startswith("read:"):
                # "read: 2049 ops, 0.123 s, 2.00 GiB, ..."
                words = line.replace(",", "").split()
                for number, unit in itertools.pairwise(words):
                    if unit in _UNITS:
                        return int(float(number) * _UNITS[unit])
    raise BenchError(f"{statistics} does not say how much was read")


_UNITS: Final = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
