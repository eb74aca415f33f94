"""The command line of ``scripts/bench``."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from typing import TYPE_CHECKING

from nbdstream.units import SizeError, parse_size
from tests.bench import peers
from tests.bench.guest import SLOW_SECONDS, measure_guests, streamers
from tests.bench.outage import measure_outages
from tests.bench.process import BenchError
from tests.bench.qed import measure_qed, qed_servers
from tests.bench.reads import measure_reads
from tests.bench.report import Settings, this_machine, write_report
from tests.bench.tls import make_certificates, measure_tls
from tests.bench.transfer import measure_transfers, server_named

if TYPE_CHECKING:
    from tests.bench.results import Section

CHUNK = 16 << 20
SECTIONS = ("reads", "tls", "stream", "wan", "qed", "guest", "slow-disk", "outage")

FAR_SECONDS = 0.025
"""A round trip between two cities of a continent."""
FAR_SHARE = 4
SLOW_SHARE = 2
"""A part of the disk is enough on a long line, and on a slow disk: the slowest mover has some 20 MB/s there. On the
slow disk it is as much as keeps the fastest one busy for a second or two, or there were nothing to measure."""
FAR_MOVERS = ("nbdstream", "block-stream")
"""Those that make an overlay which a guest can use meanwhile."""


def main() -> int:
    """Measure, print and write the report; 1 if somebody could not be measured or moved the wrong bytes."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception: servers are stopped
    output = os.path.abspath(arguments.output)
    os.makedirs(output, exist_ok=True)
    # The sockets have a directory of their own because a socket's path must be short.
    scratch, sockets = tempfile.mkdtemp(prefix="work-", dir=output), tempfile.mkdtemp(prefix="nbdstream-bench-")
    try:
        machine = this_machine(scratch)
        source = f"{scratch}/source.raw"
        _make_source(source, arguments.size)
        sections = _measure(arguments, source, scratch, sockets)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch)
        shutil.rmtree(sockets)
    settings = Settings(arguments.quick, arguments.rounds, arguments.size, arguments.seconds, arguments.source)
    print()
    print(write_report(output, machine, settings, sections))
    print(f"Written to {output}/bench.md and bench.json.")
    return 1 if any(section.problems for section in sections) else 0


def _measure(arguments: argparse.Namespace, source: str, scratch: str, sockets: str) -> list[Section]:
    systems = [peers.host_system()]
    systems += [peers.chroot_system(name, [scratch, sockets]) for name in arguments.peers]
    servers = peers.nbd_servers(systems, arguments.ours, arguments.against)
    movers = peers.movers(systems, arguments.ours, arguments.against)
    of_qed = qed_servers(systems, arguments.ours, arguments.against)
    guests = streamers(systems, arguments.ours, arguments.against)
    on_slow_disk = streamers(systems, arguments.ours, arguments.against, SLOW_SECONDS)
    if unknown := set(arguments.only) - {competitor.key for competitor in (*servers, *movers, *of_qed)}:
        msg = f"nobody is called {', '.join(sorted(unknown))}"
        raise BenchError(msg)
    sections = []
    if arguments.section in ("reads", "all"):
        sections.append(measure_reads(
            source, peers.selected(servers, arguments.only),
            rounds=arguments.rounds, seconds=arguments.seconds, scratch=scratch, sockets=sockets,
        ))  # fmt: skip
    if arguments.section in ("tls", "all"):
        server_certificates, client_certificates = make_certificates(scratch)
        secured = peers.tls_servers(systems, arguments.ours, server_certificates)
        sections.append(measure_tls(
            source, peers.selected(secured, arguments.only), client_certificates,
            rounds=arguments.rounds, sockets=sockets,
        ))  # fmt: skip
    if arguments.section in ("stream", "all"):
        sections.append(measure_transfers(
            source, server_named(servers, arguments.source),
            peers.selected(movers, arguments.only),
            rounds=arguments.rounds, scratch=scratch, sockets=sockets,
        ))  # fmt: skip
    if arguments.section in ("wan", "all"):
        sections.append(measure_transfers(
            _part(source, FAR_SHARE), server_named(servers, arguments.source),
            [mover for mover in peers.selected(movers, arguments.only) if mover.key.startswith(FAR_MOVERS)],
            rounds=arguments.rounds, scratch=scratch, sockets=sockets, round_trip=FAR_SECONDS,
        ))  # fmt: skip
    if arguments.section in ("qed", "all"):
        sections.append(measure_qed(
            source, peers.selected(of_qed, arguments.only),
            rounds=arguments.rounds, seconds=arguments.seconds, scratch=scratch, sockets=sockets,
        ))  # fmt: skip
    if arguments.section in ("guest", "all"):
        sections.append(measure_guests(
            source, peers.selected(guests, arguments.only),
            rounds=arguments.rounds, scratch=scratch, sockets=sockets,
        ))  # fmt: skip
    if arguments.section in ("slow-disk", "all"):
        sections.append(measure_guests(
            _part(source, SLOW_SHARE), peers.selected(on_slow_disk, arguments.only), slower=SLOW_SECONDS,
            rounds=arguments.rounds, scratch=scratch, sockets=sockets,
        ))  # fmt: skip
    if arguments.section in ("outage", "all"):
        sections.append(measure_outages(
            source, peers.selected(guests, arguments.only), arguments.ours,
            rounds=arguments.rounds, scratch=scratch, sockets=sockets,
        ))  # fmt: skip
    return sections


def _part(source: str, share: int) -> str:
    """Make a source that is a ``share``-th as long as the file ``source``; return its path."""
    part = f"{source}.part"
    _make_source(part, max(os.path.getsize(source) // share, 1 << 20))
    return part


def _make_source(path: str, size: int) -> None:
    """Random data: nothing of it reads as zero, and it compresses nowhere."""
    with open(path, "wb") as file:
        file.writelines(os.urandom(min(CHUNK, size - offset)) for offset in range(0, size, CHUNK))
        file.flush()
        os.fsync(file.fileno())


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except SizeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size < 1 << 20 or size % (1 << 20):
        raise argparse.ArgumentTypeError("whole MiB, please")
    return size


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure nbdstream and its peers side by side, in turns, and write a table and JSON.",
    )
    add = parser.add_argument
    add("section", nargs="?", choices=(*SECTIONS, "all"), default="all")
    add("--rounds", type=_positive, metavar="N", help="how often everybody has a turn (default 5, quick 1)")
    add("--size", type=_size, help="of the disk (default 2G, quick 32M)")
    add("--seconds", type=float, help="of each run of fio (default 2, quick 0.2)")
    add("--quick", action="store_true", help="show that everything works, not how fast it is")
    add("--peers", action="append", default=[], choices=("debian13",), help="newer peers too, from a chroot")
    add("--source", default="nbdkit", help="who serves what is streamed (default nbdkit)")
    add("--only", default="", metavar="NAME,...", help="some of them: nbdstream,nbdkit,qemu-nbd@debian13,...")
    add("--ours", default=f"{peers.ROOT}/.venv/bin/nbdstream", metavar="COMMAND", help="another nbdstream command")
    add("--against", metavar="COMMAND",
        help="an earlier commit's nbdstream, measured in turn with ours (reads and stream)")  # fmt: skip
    add("--output", default=f"{peers.ROOT}/build/bench", metavar="DIR",
        help="where the report goes, and the disks meanwhile: on a disk file system (default build/bench)")  # fmt: skip
    arguments = parser.parse_args()
    rounds, size, seconds = (1, 32 << 20, 0.2) if arguments.quick else (5, 2 << 30, 2.0)
    arguments.rounds = arguments.rounds or rounds
    arguments.size = arguments.size or size
    arguments.seconds = arguments.seconds or seconds
    arguments.only = [name for name in arguments.only.split(",") if name]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
