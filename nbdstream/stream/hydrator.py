"""The hydrator: what to ask for next, and how much of it may be undurable.

It goes through the disk from the start to the end, as long as anything is remote, and keeps a fixed number of bytes in
flight. What a guest wants is fetched by whoever wants it, past the hydrator.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdstream.block.overlay import Overlay
    from nbdstream.stream.allocation import Survey
    from nbdstream.stream.fetch import Fetches
    from nbdstream.stream.throttle import Throttle

log = logging.getLogger(__name__)

_REQUEST_BYTES = 1 << 20
"""Long enough that a request's fixed costs vanish."""

_REQUEST_BYTES_BESIDE_GUEST = 256 << 10
"""What is being received or stored is not interrupted for a guest's read, so its length is what the guest waits."""

_BYTES_IN_FLIGHT = 16 << 20
"""What fills a link: 640 MB/s at a round trip of 25 ms."""

_BYTES_IN_FLIGHT_BESIDE_GUEST = 8 << 20
"""What the source works on at the same time as on the guest's read."""

_GUEST_SECONDS = 0.5
"""For so long after a guest had to wait for the source it is assumed to come again."""

_EPOCH_BYTES = 16 << 20
"""After so much an epoch begins: a guest's flush waits for what is undurable."""

_MOST_UNDURABLE = 48 << 20
"""More than that does not wait for a barrier: a slow disk slows the hydrator down, not the guest's flushes."""

_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 1.0
"""Between attempts when the disk is full, or the source answers with errors."""


class Hydrator:
    """Fetches whatever is remote until nothing is."""

    def __init__(self, overlay: Overlay, fetches: Fetches, survey: Survey, throttle: Throttle) -> None:
        self._overlay = overlay
        self._image = overlay.image
        self._fetches = fetches
        self._survey = survey
        self._throttle = throttle
        self._cursor = 0
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._error: OSError | None = None
        fetches.on_finished = self._finished
        survey.on_progress = self._wake.set

    async def run(self) -> None:
        """Return when no cluster is remote any more. Raises OSError if the image has failed."""
        epoch = _EPOCH_BYTES // self._image.cluster_size or 1
        most = _MOST_UNDURABLE // self._image.cluster_size or 1
        while not (self._survey.done and self._overlay.remote_count == 0):
            self._wake.clear()
            if self._image.failed:
                raise self._image.failed
            if self._error is not None:
                await self._wait_after(self._error)
                continue
            delay = self._fetch_more()
            if self._image.backlog >= epoch:
                self._image.nudge()
            if self._image.backlog >= most:
                await self._link()
                continue
            await self._wait(delay)

    async def _link(self) -> None:
        """Wait until what was fetched is linked."""
        try:
            await self._image.linked()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._error = error  # no room for a table

    def _finished(self, error: OSError | None) -> None:
        self._error = error or self._error
        self._wake.set()

    async def _wait(self, delay: float) -> None:
        """Wait until a fetch is finished, more is known of the source, or ``delay`` seconds have gone.

        With a ``delay`` of 0 it is a second: nobody tells when a guest has overwritten the last remote cluster.
        """
        try:
            async with asyncio.timeout(delay or _LOOK_SECONDS):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _wait_after(self, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            log.error("the disk is full: streaming goes on when there is room")
        else:
            log.error("fetching fails (%s): it is tried again", error.strerror or error)
        await asyncio.sleep(_RETRY_SECONDS)
        self._error = None

    def _fetch_more(self) -> float:
        """Begin as many fetches as may be; return for how many seconds the rate limit forbids more, if it does."""
        guest = self._loop.time() - self._fetches.last_wanted < _GUEST_SECONDS
        most = _BYTES_IN_FLIGHT_BESIDE_GUEST if guest else _BYTES_IN_FLIGHT
        count = max(1, (_REQUEST_BYTES_BESIDE_GUEST if guest else _REQUEST_BYTES) // self._image.cluster_size)
        while self._fetches.bytes_in_flight < most:
            if delay := self._throttle.delay():
                return delay
            cluster = self._next()
            if cluster is None:
                break
            fetch = self._fetches.begin(cluster, count)
            self._throttle.spend(fetch.length)
            self._cursor = fetch.behind
        return 0.0

    def _next(self) -> int | None:
        """Return the next cluster that is remote, surveyed, and not in flight; None if there is none now."""
        remote = self._overlay.remote
        if remote is None:
            return None
        behind = len(remote) if self._survey.done else self._survey.position // self._image.cluster_size
        for start, end in ((self._cursor, behind), (0, min(self._cursor, behind))):
            cluster = remote.find(1, start, end) if start < end else -1
            while cluster >= 0 and self._fetches.is_in_flight(cluster):
                cluster = remote.find(1, cluster + 1, end)
            if cluster >= 0:
                return cluster
        return None
