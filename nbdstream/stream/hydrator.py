"""The hydrator: what to ask for next, and how much of it may be undurable.

It goes through its range from the start to the end, as long as anything there is remote, and keeps as many
bytes in flight as fill the line. What a guest wants is fetched by whoever wants it, past the hydrator.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.stream.fetch import Fetch
    from nbdstream.stream.governor import Governor
    from nbdstream.stream.hydration import Hydration
    from nbdstream.stream.throttle import Throttle

log = logging.getLogger(__name__)

_REQUEST_BYTES = 1 << 20
"""Long enough that a request's fixed costs vanish."""

_REQUEST_BYTES_BESIDE_GUEST = 512 << 10
"""What is being received or stored is not interrupted for a guest's read, so its length is what the guest waits.
With half of it the guest's 99th percentile is the same, and the stream takes a quarter longer."""

_BYTES_IN_FLIGHT_BESIDE_GUEST = 2 << 20
"""What the source and we work on at the same time as on the guest's read, and what a guest may find in front of a
cluster that is on its way already; beyond what a long line itself holds."""

_ALONG_BYTES = 128 << 10
"""What a guest's read of remote data brings along. A fetch costs as much as 256 KiB of data, so a guest that reads at
random can keep two processors busy with single clusters: with this its disk is whole in three quarters of the time, and
its slowest reads take a quarter longer until then. With 512 KiB it is little more than half of the time, and those take
three quarters longer."""

_ALONG_SECONDS = 0.0005
"""What the line takes longer for than this, or than for a round trip, does not come along."""

_REQUESTS_AT_LEAST = 8
"""On their way: with fewer, the line is idle when they all end together."""

_GUEST_SECONDS = 0.5
"""For so long after a guest had to wait for the source, it is assumed to come again."""

_EPOCH_BYTES = 16 << 20
"""After so much an epoch begins: a guest's flush waits for what is undurable."""

_MOST_UNDURABLE = 48 << 20
"""More than that does not wait for a barrier: a slow disk slows the hydrator down, not the guest's flushes."""

_MOST_UNDURABLE_BESIDE_FLUSHES = 4 << 20
"""The same while the guest flushes. The slowest of its flushes take half as long, and the stream a tenth longer; with
less they gain nothing more."""

_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 1.0
"""Between attempts when the disk is full, or the source answers with errors."""


class Hydrator:
    """Fetches whatever is remote in a range of the disk until nothing is."""

    def __init__(
        self,
        hydration: Hydration,
        throttle: Throttle,
        governor: Governor | None = None,
        *,
        first: int = 0,
        behind: int | None = None,
    ) -> None:
        """Work on clusters ``first .. behind-1``, or up to the end. One hydrator at a time works on an overlay."""
        self._hydration = hydration
        self._overlay = hydration.overlay
        self._image = hydration.overlay.image
        self._fetches = hydration.fetches
        self._survey = hydration.survey
        self._throttle = throttle
        self._governor = governor
        clusters = -(-self._overlay.size // self._image.cluster_size)
        self._first = self._cursor = first
        self._behind = clusters if behind is None else min(behind, clusters)
        self._end = min(self._behind * self._image.cluster_size, self._overlay.size)
        self._whole = (self._first, self._behind) == (0, clusters)
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._paused = False
        self._error: OSError | None = None
        self.on_error: Callable[[OSError], None] = lambda _error: None
        """Called when something failed and is going to be tried again."""
        self._fetches.on_finished = self._finished
        self._survey.on_progress = self._wake.set
        hydration.on_source_change = self._wake.set

    async def run(self) -> None:
        """Return when no cluster of the range is remote any more. Raises OSError if the image has failed."""
        self._fetches.along = self._along if self._whole else None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._survey.run(self._end))
                tasks.create_task(self._hydrate())
        finally:
            self._fetches.along = None

    def pause(self) -> None:
        """Begin nothing more until :meth:`resume`. What is in flight comes to its end."""
        self._paused = True

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self._wake.set()

    def look(self) -> None:
        """Look around now: how fast it may be has changed."""
        self._wake.set()

    @property
    def _is_done(self) -> bool:
        if self._paused or not self._survey.covers(self._end):
            return False
        below = self._overlay.below
        if self._whole:
            return below.remote_count == 0
        return below.remote is None or below.remote.find(1, self._first, self._behind) < 0

    async def _hydrate(self) -> None:
        epoch = _EPOCH_BYTES // self._image.cluster_size or 1
        while not self._is_done:
            self._wake.clear()
            if self._image.failed:
                raise self._image.failed
            if self._error is not None:
                await self._wait_after(self._error)
                continue
            idle = self._paused or not self._hydration.source.connected
            delay = 0.0 if idle else self._fetch_more()
            if self._image.backlog >= epoch:
                self._image.nudge()
            if self._image.backlog >= self._most_undurable():
                await self._link()
                continue
            await self._wait(delay)

    def _most_undurable(self) -> int:
        """Return how many clusters may wait for a barrier."""
        most = _MOST_UNDURABLE_BESIDE_FLUSHES if self._overlay.beside_flushes else _MOST_UNDURABLE
        return most // self._image.cluster_size or 1

    async def _link(self) -> None:
        """Wait until what was fetched is linked."""
        try:
            await self._image.linked()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._error = error  # no room for a table

    def _finished(self, fetch: Fetch, error: OSError | None) -> None:
        if error is None and fetch.stored:
            self._hydration.disk_has_room()
        # With ECONNRESET it was given back when the source was lost; that is somebody else's to tell.
        if error is not None and error.errno != errno.ECONNRESET and self._hydration.source.connected:
            self._error = error
        self._wake.set()

    async def _wait(self, delay: float) -> None:
        """Wait until a fetch is finished, more is known of the source, or ``delay`` seconds have gone.

        A second at most: nobody tells when a guest has overwritten the last remote cluster.
        """
        try:
            async with asyncio.timeout(min(delay or _LOOK_SECONDS, _LOOK_SECONDS)):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _wait_after(self, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            self._hydration.disk_is_full()
        else:
            log.error("fetching fails (%s): it is tried again", error.strerror or error)
        self.on_error(error)
        await asyncio.sleep(_RETRY_SECONDS)
        self._error = None

    def _fetch_more(self) -> float:
        """Begin as many fetches as may be; return for how many seconds the rate limit forbids more, if it does."""
        most, request = self._depth()
        count = max(1, request // self._image.cluster_size)
        while self._fetches.bytes_in_flight < most:
            if delay := self._throttle.delay():
                return delay
            cluster = self._next()
            if cluster is None:
                break
            fetch = self._fetches.begin(cluster, min(count, self._behind - cluster))
            self._throttle.spend(fetch.length)
            self._cursor = fetch.behind
        return 0.0

    def _depth(self) -> tuple[int, int]:
        """Return how many bytes may be on their way, and how many one request asks for."""
        most = min(self._hydration.source.memory_for_bulk, self._fetches.line.bytes_to_fill)
        request = _REQUEST_BYTES
        if self._loop.time() - self._fetches.last_wanted < _GUEST_SECONDS:
            beside_guest = _BYTES_IN_FLIGHT_BESIDE_GUEST + self._fetches.line.bytes_held
            most, request = min(most, beside_guest), _REQUEST_BYTES_BESIDE_GUEST
        if self._governor:
            self._throttle.cap = self._governor.rate
            if depth := self._governor.depth:
                most, request = min(most, depth), _REQUEST_BYTES_BESIDE_GUEST
        return most, min(request, max(_REQUEST_BYTES_BESIDE_GUEST, most // _REQUESTS_AT_LEAST))

    def _along(self) -> int:
        """Return how many bytes a guest's read may bring along: none if the job is to be slower than it could be."""
        if self._paused or self._throttle.limits:
            return 0
        return min(_ALONG_BYTES, self._fetches.line.bytes_within(_ALONG_SECONDS))

    def _next(self) -> int | None:
        """Return the next cluster that is remote, surveyed, and not in flight; None if there is none now."""
        remote = self._overlay.below.remote
        if remote is None:
            return None
        known = self._behind if self._survey.done else self._survey.position // self._image.cluster_size
        behind = min(known, self._behind)
        for start, end in ((self._cursor, behind), (self._first, min(self._cursor, behind))):
            cluster = remote.find(1, start, end) if start < end else -1
            while cluster >= 0 and self._fetches.is_in_flight(cluster):
                cluster = remote.find(1, cluster + 1, end)
            if cluster >= 0:
                return cluster
        return None
