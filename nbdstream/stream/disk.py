"""A disk that is run while it is streamed: the overlay, its source, the guest's socket and the job, put together.

One command line serves a disk for its whole life: the first time it makes the overlay, later it resumes it, and once
the overlay is independent it serves it without the source.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NamedTuple, Self

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.errors import JobError, NbdstreamError
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.server.sockets import bind_unix, discard
from nbdstream.stream.events import (
    Completed,
    ErrorAction,
    Event,
    JobStatus,
    Listeners,
    Operation,
    Progress,
    SourceLost,
    StatusChanged,
)
from nbdstream.stream.governor import Governor
from nbdstream.stream.hydration import Hydration
from nbdstream.stream.hydrator import Hydrator
from nbdstream.stream.job import StreamJob, reason_of
from nbdstream.stream.latency import LOOK_SECONDS, GuestLatency
from nbdstream.stream.preparation import parse_source, prepare, verify
from nbdstream.stream.rate import RateMeter
from nbdstream.stream.snapshot import Amounts, DiskState, Latency, Snapshot, disk_map
from nbdstream.stream.source import Source, SourceOptions
from nbdstream.stream.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

DEVICE = "disk0"
"""What a disk is called where QMP wants a device: there is one, unless somebody has more and names them."""

DEFAULT_STEP_BYTES = 16 << 20
"""Of an increment: what the hydrator has in flight, so that a line is filled for most of the time; and less than a
second's work on any line that can carry a guest's disk, so that whoever goes step by step stays in control."""

_CLOSED = "the disk was closed"

_DRAIN_SECONDS = 10.0
_DRAIN_SECONDS_WITHOUT_SOURCE = 1.0
"""What waits for a lost source will not be answered in this process; what is local is answered at once."""


class StepResult(NamedTuple):
    """What one increment of a stream came to."""

    next_offset: int
    """Where to go on: the next remote cluster behind the increment, or else the first one of the disk. In bytes."""
    finished: bool
    """Whether that was the last one: the overlay is independent, and ``next_offset`` is the disk's size."""


class DiskStream:
    """One overlay, being served and streamed. Use :meth:`start`."""

    def __init__(
        self,
        path: str,
        overlay: Overlay,
        server: NbdServer | None,
        hydration: Hydration | None,
        listeners: Listeners,
        guest_latency: float | None = None,
        device: str = DEVICE,
    ) -> None:
        self.path = path
        self.device = device
        """What it is called where QMP wants a device."""
        self.overlay = overlay
        self.listeners = listeners
        """Who is told of events."""
        self.job: StreamJob | None = None
        """The job that streams it, if one does."""
        self._server = server
        self._hydration = hydration
        self._stepping: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        """Set when it is independent, or never will be."""
        self._error = ""
        self._read_rate = RateMeter()
        self._write_rate = RateMeter()
        self._governor = Governor(guest_latency)
        self._fetched = 0
        exports, waited = server.exports if server else [], hydration.fetches.waited if hydration else ()
        self._latency = GuestLatency(exports, waited.__contains__)
        self._latency.start(self._looked)
        self.listeners.append(self._happened)
        if self.independent:
            self._ended.set()

    @classmethod
    async def start(
        cls,
        source: str,
        path: str,
        *,
        socket: str | None = None,
        socket_mode: int = 0o600,
        socket_group: str | None = None,
        also: Sequence[str] = (),
        options: SourceOptions | None = None,
        moved: bool = False,
        job: bool = True,
        speed: int = 0,
        guest_latency: float | None = None,
    ) -> DiskStream:
        """Make or open the overlay, serve it on the unix socket (if given) and, unless ``job`` is false, stream it.

        ``also`` names further sources of the same disk, which are tried in turn where ``source`` is not to be had. With
        ``moved``, an overlay of another source belongs to this one from now on, if that has what the overlay has.
        ``speed`` limits the job, in bytes a second; 0 does not. ``guest_latency`` has it yield, so that 99 % of the
        guest's requests that need no source take less than so many seconds.
        Raises :class:`NbdstreamError`: nothing is served then, and nothing has changed on disk.
        """
        uri = parse_source(source)
        remote = Source(uri, *map(parse_source, also), options=options)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(remote.close)
            bound = None
            if socket:
                bound = bind_unix(socket, mode=socket_mode, group=socket_group)
                undo.callback(discard, bound)
            # Whatever can be refused is refused before the image is opened: opening an image repairs it.
            made = await prepare(path, uri, remote, undo, wait=socket is not None and not moved, moved=moved)
            image = await QedImage.open(path, writable=True, marked=True)
            undo.push_async_callback(image.close)
            below = None if image.backing_name is None else remote
            overlay = Overlay(image, below)
            listeners = Listeners()
            hydration = Hydration(overlay, below, listeners) if below else None
            if below and below.connected and not made:
                await verify(below, wait=socket is not None and not moved)
            if moved:
                await image.change_backing(str(uri.canonical()), remote.size)
                log.info("%s belongs to %s from now on", path, uri.without_credentials())
            server = None
            if bound:
                server = NbdServer([Export("", overlay, writable=True)])
                await server.listen_socket(bound, unlink=True)
            undo.pop_all()
        disk = cls(path, overlay, server, hydration, listeners, guest_latency)
        if job and below:
            disk.start_job(speed=speed)
        return disk

    @property
    def independent(self) -> bool:
        """Whether the overlay needs no source any more."""
        return self.overlay.image.backing_name is None

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.overlay.size

    @property
    def progress(self) -> Progress:
        """How far the stream has come."""
        if self._hydration:
            return self._hydration.progress
        return Progress(self.overlay.size, self.overlay.size, 0.0, 0, 0)

    @property
    def uris(self) -> list[str]:
        """Where the guest finds its disk."""
        return self._server.uris if self._server else []

    # -- streaming ----------------------------------------------------------------------------------------------

    def start_job(self, *, job_id: str | None = None, speed: int = 0) -> StreamJob:
        """Begin to stream all of the disk, or what is left of it; the job's id is the device unless it is given.

        Raises JobError if something streams it already.
        """
        self.job = StreamJob(job_id or self.device, self._free_hydration(), speed=speed, governor=self._governor)
        self.job.start()
        return self.job

    async def step(self, offset: int = 0, length: int = DEFAULT_STEP_BYTES) -> StepResult:
        """Make the clusters local that lie in a range (those that are in it only in part, too), and say where to go on.

        The last increment makes the overlay independent, wherever the first one began. Raises JobError if something
        streams the disk already, or if it fails; ValueError for a range that is not one of the disk.
        """
        self._check_open()
        size = self.overlay.size
        if not (0 <= offset <= size and length > 0):
            raise ValueError(
                f"offset {offset}, length {length}: the disk has {size} bytes, and an increment is at least 1 byte"
            )
        if self.independent:
            return StepResult(size, True)
        hydration = self._free_hydration()
        hydrating = self._hydrate(hydration, offset, min(offset + length, size))
        self._stepping = asyncio.get_running_loop().create_task(hydrating)
        try:
            await self._stepping
        except asyncio.CancelledError:
            if not self._closing:
                raise
            raise JobError(f"{self.path}: {_CLOSED}") from None
        except Exception as error:
            raise JobError(f"{self.path}: streaming failed: {reason_of(error)}") from error
        finally:
            self._stepping = None
        return StepResult(self.next_remote(offset + length), self.independent)

    async def _hydrate(self, hydration: Hydration, offset: int, end: int) -> None:
        cluster_size = self.overlay.image.cluster_size
        await Hydrator(hydration, Throttle(), first=offset // cluster_size, behind=-(-end // cluster_size)).run()
        await self.overlay.image.linked()
        if hydration.hydrated:
            await hydration.complete()
            self._ended.set()

    def next_remote(self, offset: int) -> int:
        """Return where the first remote cluster at or behind ``offset`` begins, or else the first one of the disk.

        It is the disk's size if it is independent.
        """
        remote = self.overlay.below.remote
        if remote is None:
            return self.overlay.size
        cluster_size = self.overlay.image.cluster_size
        cluster = remote.find(1, min(-(-offset // cluster_size), len(remote)))
        return max(cluster, remote.find(1), 0) * cluster_size

    def _check_open(self) -> None:
        if self._closing:
            raise JobError(f"{self.path}: {_CLOSED}")

    def _free_hydration(self) -> Hydration:
        self._check_open()
        if self._hydration is None or self.independent:
            raise JobError(f"{self.path} is independent: there is nothing to stream")
        if self.job or self._stepping:
            raise JobError(f"{self.device} is being streamed already")
        return self._hydration

    async def wait(self) -> None:
        """Wait until the overlay is independent and durable. Raises NbdstreamError if that cannot be.

        It cannot if the stream has failed, or the disk was closed before.
        """
        await self._ended.wait()
        if self._error:
            raise NbdstreamError(f"{self.path}: streaming failed: {self._error}")

    # -- beside the guest ---------------------------------------------------------------------------------------

    @property
    def guest_latency(self) -> float | None:
        """What 99 % of the guest's requests that need no source shall take at most, in seconds; None: no objective.

        It may be set at any time, and holds for the job that runs and for later ones.
        """
        return self._governor.objective

    @guest_latency.setter
    def guest_latency(self, seconds: float | None) -> None:
        self._governor.objective = seconds
        if self.job:
            self.job.look()

    def _looked(self, latency: Latency) -> None:
        """Have the job follow what the guest's requests took, while it runs."""
        before, self._fetched = self._fetched, self.progress.fetched
        if self.job and self.job.status is JobStatus.RUNNING:
            self._governor.look(latency.requests, latency.p99, (self._fetched - before) / LOOK_SECONDS)

    # -- telling ----------------------------------------------------------------------------------------------

    def _happened(self, event: Event) -> None:
        """Follow the job."""
        if isinstance(event, Completed):
            self._error = event.error
            self._ended.set()
        elif isinstance(event, StatusChanged) and event.status is JobStatus.NULL:
            self.job = None
        elif isinstance(event, SourceLost) and self.job:
            self.job.tell_error(Operation.READ, ErrorAction.STOP, event.reason)

    def snapshot(self) -> Snapshot:
        """Return what there is to see of the disk now."""
        source = None if self.independent or not self._hydration else self._hydration.source
        exports = self._server.exports if self._server else []
        latency, remote_latency = self._latency.shown
        return Snapshot(
            device=self.device,
            path=self.path,
            state=self._state(source),
            reason=source.lost_because if source and source.lost_since else "",
            since=source.lost_since if source else None,
            full_since=self._hydration.full_since if self._hydration else None,
            source=str(source.uri.without_credentials()) if source else "",
            waiting=self._hydration.fetches.waiting if self._hydration else 0,
            fetch_rate=self.progress.rate,
            read_rate=self._read_rate.of(sum(export.bytes_read for export in exports)),
            write_rate=self._write_rate.of(sum(export.bytes_written for export in exports)),
            latency=latency,
            remote_latency=remote_latency,
            amounts=self.map(1)[0],
        )

    def _state(self, source: Source | None) -> DiskState:
        if source is None:
            return DiskState.INDEPENDENT
        return DiskState.RUNNING if source.lost_since is None else DiskState.DEGRADED

    def map(self, columns: int) -> list[Amounts]:
        """Return what the disk consists of, from its start to its end, in at most so many parts of the same length."""
        in_flight = self._hydration.fetches.in_flight_clusters if self._hydration else []
        return disk_map(self.overlay, in_flight, columns)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop serving and streaming. What was written is durable; the overlay can be resumed.

        Requests that wait for a lost source are never answered: their connections are closed. Closing twice does no
        harm, and whoever waits is not left waiting.
        """
        if not self._closing:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        source = self._hydration.source if self._hydration else None
        self._latency.stop()
        if self._server:
            lost = source is not None and not self.independent and not source.connected
            await self._server.close(_DRAIN_SECONDS_WITHOUT_SOURCE if lost else _DRAIN_SECONDS)
        if self.job:
            await self.job.abandon()
        if self._stepping:
            self._stepping.cancel()
            await asyncio.wait([self._stepping])
        if source:
            await source.close()
        await self.overlay.close()
        if not self._ended.is_set():
            self._error = _CLOSED
            self._ended.set()
