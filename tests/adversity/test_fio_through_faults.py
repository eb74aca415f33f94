"""fio, which verifies all that it reads, on a disk whose source is struck by a fault in every phase of its life.

It sees no error and no wrong byte, and the job completes. What is on the line in plain text is corrupted only where the
bytes are framed: a payload that is changed there is changed for everybody. Inside TLS it may be any byte.
"""

from __future__ import annotations

import errno
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.server.tls import TlsPolicy, server_context
from nbdstream.stream import source as source_module
from nbdstream.stream.disk import DiskStream
from nbdstream.stream.events import JobStatus, StatusChanged
from nbdstream.stream.fetch import Fetches
from nbdstream.stream.preparation import create_overlay
from nbdstream.stream.source import SourceOptions
from tests.support import frames
from tests.support.certificates import Authority
from tests.support.fio import BLOCK, Area, Fio, fill, reading, writing
from tests.support.processes import PATIENCE_SECONDS, wait_until
from tests.support.proxy import Proxy
from tests.support.qed import content, qemu_check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nbdstream.stream.events import Event
    from nbdstream.stream.job import StreamJob
    from tests.support.frames import Piece
    from tests.support.harness import LocalPair, Pairs
    from tests.support.proxy import Link

MIB = 1 << 20
CLUSTER = 65536
READ, WRITTEN, REST = Area(0, MIB), Area(MIB, MIB), Area(2 * MIB, 2 * MIB)
"""What the guest reads, what it writes, and what it leaves to the job."""
SIZE = REST.offset + REST.length
STALL_SECONDS = 0.4
"""After so long the streamer gives up a connection that hangs."""

BEFORE_THE_JOB = ["connecting", "greeting", "negotiation", "guest fetch", "comparison"]
OF_THE_JOB = ["allocation map", "hydration", "comparison beside the job", "independence"]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def no_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest whose random reads look like a sequence would have all of so small a disk before the job begins."""
    monkeypatch.setattr(Fetches, "_read_ahead", lambda *_: None)


class Faults:
    """Strikes once in each phase, in one after the other. All but the waiting happens in the proxy's thread."""

    def __init__(self, pair: LocalPair, proxy: Proxy, kind: str, seed: int, *, tls: bool = False) -> None:
        self.struck: list[str] = []
        self._pair = pair
        self._proxy = proxy
        self._tls = tls
        self._strike: Callable[[Link, Piece], None] = getattr(self, f"_{kind}")
        self._chance = random.Random(seed)
        self._options = self._chance.randrange(3)
        """How many options pass before one is struck: each client sends more."""
        self._phases = [*BEFORE_THE_JOB, *OF_THE_JOB]
        if kind == "corrupt":
            self._phases.remove("connecting")  # there is no byte yet
        proxy.watch = self._watch

    def wait_for(self, phase: str) -> None:
        wait_until(lambda: phase in self.struck, f"the fault while {phase}")

    def lose_the_source(self, phase: str) -> None:
        """Cut it off until it has been struck while it was compared, which is what it has to pass when it is back."""
        pause, end = 0.05, time.monotonic() + PATIENCE_SECONDS
        while phase not in self.struck:
            assert time.monotonic() < end, f"{phase} was not to be had"
            self._proxy.cut()
            deadline = time.monotonic() + pause
            while phase not in self.struck and time.monotonic() < deadline:
                time.sleep(0.005)
            pause *= 2

    def happened(self, event: Event) -> None:
        """Strike when nothing is remote any more; a listener of the disk."""
        all_is_local = isinstance(event, StatusChanged) and event.status is JobStatus.WAITING
        if all_is_local and self._phases[:1] == ["independence"]:
            self.struck.append(self._phases.pop(0))
            self._proxy.cut()

    def _watch(self, link: Link, piece: Piece) -> None:
        disk = self._pair.disk
        there = disk is not None and disk._hydration is not None and disk._hydration.source.connected
        if self._phases[:1] == ["negotiation"] and piece.kind in (frames.OPTION, frames.PAYLOAD):
            self._options -= 1
        if self._phases and self._is_now(self._phases[0], piece, there=there):
            self.struck.append(self._phases.pop(0))
            self._strike(link, piece)

    def _is_now(self, phase: str, piece: Piece, *, there: bool) -> bool:
        now, kind = {
            "connecting": (True, frames.CONNECTION),
            "greeting": (True, frames.GREETING),
            "negotiation": (self._options < 0, frames.OPTION),
            "guest fetch": (there, frames.DATA),
            "allocation map": (there, frames.STATUS),
            "hydration": (there, frames.DATA),
            "independence": (False, ""),
        }.get(phase, (not there, frames.DATA))
        # Inside TLS it cannot be seen what a piece is: the phase is right, or one next to it.
        return now and (piece.kind == kind or (self._tls and piece.kind == frames.PAYLOAD))

    # -- what strikes -------------------------------------------------------------------------------------------

    def _delay(self, link: Link, _piece: Piece) -> None:
        link.hold(STALL_SECONDS * self._chance.uniform(0.2, 0.6))

    def _stall(self, link: Link, _piece: Piece) -> None:
        link.flowing.clear()

    def _cut(self, link: Link, _piece: Piece) -> None:
        link.abort(reset=False)

    def _reset(self, _link: Link, _piece: Piece) -> None:
        self._proxy.cut_all()

    def _corrupt(self, _link: Link, piece: Piece) -> None:
        fields = list(frames.fields(piece.kind, piece.data).values()) or [range(len(piece.data))]
        piece.data[self._chance.choice(self._chance.choice(fields))] ^= 0xFF

    def _any(self, link: Link, piece: Piece) -> None:
        kinds = [self._delay, self._stall, self._cut, self._reset, *([self._corrupt] if piece.data else [])]
        self._chance.choice(kinds)(link, piece)


@pytest.fixture
def pair(pairs: Pairs) -> LocalPair:
    """The source is served."""
    pair = pairs.local(direct=True)
    fill(pair.image, SIZE)
    pair.start_source()
    return pair


@pytest.fixture
def proxy(pair: LocalPair) -> Iterator[Proxy]:
    """Before the source, on a TCP port: so that there are resets."""
    with Proxy(pair.source_socket) as proxy:
        yield proxy


def uri_of(proxy: Proxy, scheme: str = "nbd") -> str:
    """By name, as the certificate has it."""
    return f"{scheme}://localhost:{proxy.address[1]}"


def begin(pair: LocalPair, uri: str, **options: Any) -> None:
    """Serve the overlay, which exists; nothing is streamed yet."""
    chosen = SourceOptions(**{"connections": 2, "stall": STALL_SECONDS} | options)
    pair.disk = pair.on_loop(DiskStream.start(uri, pair.overlay, socket=pair.guest_socket, options=chosen, job=False))


def at_work(pair: LocalPair) -> Fio:
    """The guest: for some seconds it reads, it writes parts of remote clusters, and flushes."""
    return Fio(pair.guest_uri, f"{pair.overlay}.fio", reading(READ, "--loops=2"), writing(WRITTEN), rate=200)


async def stream(disk: DiskStream, listener: Callable[[Event], None]) -> StreamJob:
    """Begin slowly: what comes next is to happen beside it."""
    disk.listeners.append(listener)
    return disk.start_job(speed=CLUSTER)


def check_the_end(pair: LocalPair) -> None:
    """All is there, and right, and the guest's where it wrote."""
    with Fio(pair.guest_uri, f"{pair.overlay}.fio", reading(WRITTEN, own=True), reading(REST)) as fio:
        fio.finish()
    assert pair.stop_streamer(), "independent"
    assert qemu_check(pair.overlay).status == 0
    found = content(pair.overlay)
    with open(pair.image, "rb") as file:
        source = file.read()
    for area in (READ, REST):
        part = slice(area.offset, area.offset + area.length)
        assert (found[part] == source[part]) is True


def go_through(
    pair: LocalPair, proxy: Proxy, seed: int, kind: str, *, scheme: str = "nbd", certificates: str | None = None
) -> None:
    """Strike in every phase, beside a guest at work."""
    uri = uri_of(proxy, scheme)
    make = create_overlay(uri, pair.overlay, cluster_size=CLUSTER, table_size=4, tls_certificates=certificates)
    pair.on_loop(make)
    faults = Faults(pair, proxy, kind, seed, tls=certificates is not None)
    begin(pair, uri, tls_certificates=certificates)
    with at_work(pair) as fio:
        faults.wait_for("guest fetch")
        disk = pair.disk
        assert disk
        wait_until(lambda: disk.progress.fetched >= 4 * CLUSTER, "something to compare")
        faults.lose_the_source("comparison")
        job = pair.on_loop(stream(disk, faults.happened))
        faults.wait_for("hydration")
        faults.lose_the_source("comparison beside the job")
        job.speed = 0
        faults.wait_for("independence")
        pair.wait_until_independent()
        fio.finish()
    check_the_end(pair)


@pytest.mark.parametrize("kind", ["delay", "stall", "cut", "reset", "corrupt"])
def test_a_fault_in_every_phase_is_none_for_the_guest(pair: LocalPair, proxy: Proxy, seed: int, kind: str) -> None:
    go_through(pair, proxy, seed, kind)


@pytest.fixture
def certificates(pair: LocalPair, tmp_path: Path) -> str:
    """The source is served inside TLS alone; these are the client's."""
    authority = Authority()
    policy = TlsPolicy(server_context(authority.server(tmp_path / "server"), verify_peer=False), required=True)
    pair.kill_source()
    pair.start_source(tls=policy)
    return authority.client(tmp_path / "client")


def test_inside_tls_any_byte_is_corrupt_in_every_phase(
    pair: LocalPair, proxy: Proxy, certificates: str, seed: int
) -> None:
    go_through(pair, proxy, seed, "corrupt", scheme="nbds", certificates=certificates)


def test_with_eio_the_guest_gets_it_for_remote_clusters_only(pair: LocalPair, proxy: Proxy) -> None:
    report = f"{pair.overlay}.fio"
    pair.on_loop(create_overlay(uri_of(proxy), pair.overlay, cluster_size=CLUSTER, table_size=4))
    begin(pair, uri_of(proxy), hold=0.0)
    disk = pair.disk
    assert disk
    pair.on_loop(disk.step(*READ))
    proxy.refusing = True
    proxy.cut()
    wait_until(lambda: disk.snapshot().since is not None, "the loss")
    with Fio(pair.guest_uri, report, reading(READ), writing(WRITTEN, f"--bs={CLUSTER}")) as fio:
        fio.finish()  # what is local, whole clusters, flushes
    with Fio(pair.guest_uri, report, writing(READ)) as fio:
        fio.finish()
    on_error = "--continue_on_error=all"
    everywhere = Area(0, SIZE)
    with Fio(pair.guest_uri, report, reading(REST, on_error), reading(everywhere, on_error, "--verify=null")) as fio:
        for told in fio.told():
            assert told["error"] == errno.EIO
            assert told["total_err"] == REST.length // BLOCK
    with Fio(pair.guest_uri, report, writing(REST, on_error, "--do_verify=0", "--fsync=0")) as fio:
        (told,) = fio.told()
        assert (told["error"], told["total_err"]) == (errno.EIO, REST.length // BLOCK)
    proxy.refusing = False
    wait_until(lambda: disk.snapshot().since is None, "the source")
    with Fio(
        pair.guest_uri, report, reading(READ, own=True), reading(WRITTEN, f"--bs={CLUSTER}", own=True), reading(REST)
    ) as fio:
        fio.finish()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_hundreds_of_faults_are_none_for_the_guest(pairs: Pairs, seed: int) -> None:
    for number in range(30):
        pair = pairs.local(direct=True)
        fill(pair.image, SIZE)
        pair.start_source()
        with Proxy(pair.source_socket) as proxy:
            go_through(pair, proxy, seed + number, "any")
        pair.kill_source()
