"""Reads served from a raw file in the page cache, over a unix socket: fio's NBD engine and nbdcopy are the clients.

The clients are this machine's own for everybody. All servers are up all the time; who is not read from is idle.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.bench.disk import bring_into_cache
from tests.bench.fio import fio, latencies
from tests.bench.peers import AGAINST
from tests.bench.process import BenchError, Server, on_unix, run, serving
from tests.bench.results import Floor, Section, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from tests.bench.peers import NbdServer

KIB = 1024


@dataclass(frozen=True)
class FioWorkload(Workload):
    """Reads of one size, at random or in sequence, with so many in flight on one connection."""

    pattern: str
    block_size: int
    depth: int

    def measure(self, uri: str, seconds: float, scratch: str) -> tuple[float, dict[str, float]]:
        """Return the speed in the workload's unit, and latencies in microseconds. Raises BenchError."""
        job = fio(uri, [
            f"--rw={self.pattern}", f"--bs={self.block_size}", f"--iodepth={self.depth}",
            "--time_based", f"--runtime={seconds * 1000:.0f}ms",
        ], scratch)  # fmt: skip
        reads = job["read"]
        return float(reads["iops"] if self.unit == "reads/s" else reads["bw_bytes"]), latencies(reads)


NBDCOPY = Workload("nbdcopy to null:", "s")
FIO_WORKLOADS = (
    FioWorkload("4 KiB random, depth 1", "reads/s", "randread", 4 * KIB, 1),
    FioWorkload("4 KiB random, depth 32", "reads/s", "randread", 4 * KIB, 32),
    FioWorkload("64 KiB random, depth 16", "reads/s", "randread", 64 * KIB, 16),
    FioWorkload("256 KiB sequential, depth 16", "bytes/s", "read", 256 * KIB, 16),
    FioWorkload("1 MiB sequential, depth 16", "bytes/s", "read", 1024 * KIB, 16),
)
FLOORS = (
    Floor("4 KiB random, depth 32", "nbdkit", 1.3),
    Floor("256 KiB sequential, depth 16", "nbdkit", 1.3),
)


NO_SLOWER = 0.95
"""How fast we may be, in parts of the nbdstream that we are held against: what is less than this is no noise."""


def measure_reads(
    path: str, servers: Sequence[NbdServer], *, rounds: int, seconds: float, scratch: str, sockets: str
) -> Section:
    """Measure ``servers`` over the file ``path``, ``seconds`` for each run of fio."""
    workloads: list[Workload] = [*FIO_WORKLOADS, NBDCOPY]
    floors: tuple[Floor, ...] = FLOORS
    if any(server.key == AGAINST for server in servers):
        floors += tuple(Floor(workload.title, AGAINST, NO_SLOWER) for workload in workloads)
    section = Section(
        "reads",
        f"Reads served from a raw file of {os.path.getsize(path) >> 20} MiB in the page cache, over a unix socket",
        [*servers],
        workloads,
        floors,
    )

    @contextlib.contextmanager
    def begin(server: NbdServer) -> Iterator[Server]:
        place = on_unix(f"{sockets}/reads-{server.key}")
        with serving(server.argv(path, place.where), place) as running:
            # Everybody serves the right bytes, and all of them are in the page cache afterwards.
            run(["qemu-img", "compare", "-f", "raw", "-F", "raw", path, running.uri])
            yield running

    def measure(workload: Workload, server: Server) -> tuple[float, dict[str, float]]:
        bring_into_cache(path)
        if isinstance(workload, FioWorkload):
            return workload.measure(server.uri, seconds, scratch)
        return nbdcopy(server.uri), {}

    in_turns(section, servers, rounds, begin, measure)
    return section


def nbdcopy(uri: str) -> float:
    """Return the seconds that nbdcopy takes to read everything. Raises BenchError."""
    start = time.perf_counter()
    run(["nbdcopy", uri, "null:"])
    return time.perf_counter() - start


def in_turns(
    section: Section,
    servers: Sequence[NbdServer],
    rounds: int,
    begin: Callable[[NbdServer], AbstractContextManager[Server]],
    measure: Callable[[Workload, Server], tuple[float, dict[str, float]]],
) -> None:
    """Keep all servers running, and measure each in each round."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Server] = {}
        for server in servers:
            try:
                running[server.key] = stack.enter_context(begin(server))
            except BenchError as error:
                section.fail(server, str(error))
        for round_number in range(rounds):
            for workload in section.workloads:
                for competitor in section.turn(round_number):
                    print(
                        f"{section.name}, round {round_number + 1}, {workload.title}, {competitor.label}",
                        file=sys.stderr,
                    )
                    try:
                        value, details = measure(workload, running[competitor.key])
                        running[competitor.key].check()
                    except BenchError as error:
                        section.fail(competitor, str(error))
                    else:
                        section.add(workload, competitor, value, **details)
