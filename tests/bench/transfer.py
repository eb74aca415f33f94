"""A whole disk moved from one server into a local file: ours into a QED overlay, the peers in their own ways.

The clock runs from the start of the command until its end and an fsync of what it made, and what it made is compared
with the source afterwards, for everybody and in every round.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING

from tests.bench.peers import Mover, NbdServer, Transfer
from tests.bench.process import BenchError, on_unix, run, serving
from tests.bench.results import Floor, Section, Workload
from tests.support.harness import socket_uri
from tests.support.wan import long_line

if TYPE_CHECKING:
    from collections.abc import Sequence

MOVE = Workload("until whole and durable", "s")
FAR_FLOORS = (Floor(MOVE.title, "block-stream", 15.0),)
FLOORS = (Floor(MOVE.title, "block-stream", 3.0), Floor(MOVE.title, "qemu-img convert", 1.0))

SETTLE_SECONDS = 5.0
SETTLED_BYTES = 4 << 20
CHECK_LEAKS = 3
"""qemu-img check's exit code for leaked clusters: QEMU sees some where there are none."""


def measure_transfers(
    path: str,
    source: NbdServer,
    movers: Sequence[Mover],
    *,
    rounds: int,
    scratch: str,
    sockets: str,
    round_trip: float = 0.0,
) -> Section:
    """Measure ``movers`` over the file ``path``, which ``source`` serves to all that read from a server.

    With a ``round_trip``, in seconds, a proxy delays whatever they and the server say to each other.
    """
    far = f", {round_trip * 1000:g} ms away and back" if round_trip else ""
    section = Section(
        "wan" if round_trip else "stream",
        f"{os.path.getsize(path) >> 20} MiB into a local file, from {source.label} on a unix socket{far}",
        [*movers],
        [MOVE],
        FAR_FLOORS if round_trip else FLOORS,
    )
    socket_path = f"{sockets}/{section.name}"
    seen_path = f"{sockets}/far" if round_trip else socket_path
    place = on_unix(socket_path)
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(serving(source.argv(path, place.where), place))
            if round_trip:
                stack.enter_context(long_line(socket_path, seen_path, round_trip))
            _warm_up(path, f"{scratch}/destination")
        except BenchError as error:
            for mover in movers:
                section.fail(mover, f"its source: {error}")
        for round_number in range(rounds):
            for competitor in section.turn(round_number):
                mover = next(mover for mover in movers if mover.key == competitor.key)
                print(f"{section.name}, round {round_number + 1}, {mover.label}", file=sys.stderr)
                transfer = Transfer(path, socket_uri(seen_path), f"{scratch}/destination", f"{sockets}/monitor")
                try:
                    section.add(MOVE, mover, _timed(mover, transfer))
                    _verify(mover, transfer)
                    server.check()
                except BenchError as error:
                    section.fail(mover, str(error))
                finally:
                    _remove(transfer.destination, transfer.monitor)
    return section


def _warm_up(path: str, destination: str) -> None:
    """Write as much as everybody is going to, so that nobody pays for what only the first one pays.

    That is: a source that is not in the page cache yet; memory that the hypervisor has not handed out yet.
    """
    run(["cp", path, destination])
    _make_durable(destination)
    _remove(destination)


def _timed(mover: Mover, transfer: Transfer) -> float:
    """Return the seconds until ``mover`` is done and what it made is on disk. Raises BenchError."""
    mover.prepare(transfer)
    _settle()
    start = time.perf_counter()
    mover.move(transfer)
    _make_durable(transfer.destination)
    return time.perf_counter() - start


def _make_durable(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        msg = f"it ended well and made nothing: {error}"
        raise BenchError(msg) from error
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle() -> None:
    """Wait until the disk has nothing left to write for whoever went before."""
    os.sync()
    deadline = time.monotonic() + SETTLE_SECONDS
    while _undurable_bytes() > SETTLED_BYTES and time.monotonic() < deadline:
        time.sleep(0.1)


def _undurable_bytes() -> int:
    with open("/proc/meminfo") as file:
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in file)}
    return (kib["Dirty"] + kib["Writeback"]) * 1024


def _verify(mover: Mover, transfer: Transfer) -> None:
    """Raise BenchError unless the destination equals the source and stands alone."""
    image = ["-f", mover.image_format, transfer.destination]
    if mover.image_format == "qed":
        if "backing-filename" in json.loads(run(["qemu-img", "info", "--output=json", *image])):
            raise BenchError("what it made still has a backing file")
        run(["qemu-img", "check", *image], accepted=(0, CHECK_LEAKS))
    run(["qemu-img", "compare", "-f", "raw", "-F", mover.image_format, transfer.source, transfer.destination])


def _remove(*paths: str) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def server_named(servers: Sequence[NbdServer], key: str) -> NbdServer:
    """The server with that key. Raises BenchError."""
    for server in servers:
        if server.key == key:
            return server
    msg = f"no server is called {key}; there are {', '.join(server.key for server in servers)}"
    raise BenchError(msg)
