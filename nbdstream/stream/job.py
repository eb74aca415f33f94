"""The block job that makes an overlay independent: the only one that starts, pauses and completes it."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.block.qed.tidy import tidy
from nbdstream.stream.allocation import Survey
from nbdstream.stream.fetch import Fetches
from nbdstream.stream.hydrator import Hydrator
from nbdstream.stream.throttle import Throttle

if TYPE_CHECKING:
    from nbdstream.block.overlay import Overlay
    from nbdstream.stream.source import Source

log = logging.getLogger(__name__)

_RATE_WINDOW_SECONDS = 5.0
_RETRY_SECONDS = 1.0


class JobStatus(Enum):
    """QAPI's JobStatus, as far as this job goes through it."""

    CREATED = "created"
    RUNNING = "running"
    CONCLUDED = "concluded"


class Progress(NamedTuple):
    """How far a stream has come. All in bytes."""

    position: int
    """What of the disk needs the source no more."""
    length: int
    """The size of the disk."""
    rate: float
    """What came over the connection in the last seconds, per second."""
    fetched: int
    """What came over the connection since the job began."""
    allocated: int
    """What the source has that is not zero, as far as it has been surveyed."""


class StreamJob:
    """Streams one overlay from its source until it is independent."""

    def __init__(self, overlay: Overlay, source: Source, *, rate: int | None = None) -> None:
        """Take over the overlay: from here on what a guest reads from the source is kept.

        ``rate`` limits what is fetched in the background, in bytes a second.
        """
        self._overlay = overlay
        self._source = source
        self.throttle = Throttle(rate)
        self.status = JobStatus.CREATED
        overlay.remote = ~overlay.image.allocated
        overlay.remote_count = overlay.remote.count()
        self._fetches = Fetches(overlay, source)
        overlay.keeper = self._fetches
        self._survey = Survey(overlay, source)
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    async def run(self) -> None:
        """Return when the overlay is independent and durable. Raises OSError if the image has failed."""
        self.status = JobStatus.RUNNING
        hydrator = Hydrator(self._overlay, self._fetches, self._survey, self.throttle)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._survey.run())
            tasks.create_task(hydrator.run())
        # Nobody needs the source any more. A fetch that lost its race against the guest may still be in flight: it ends
        # here and gives its clusters back.
        await self._source.close()
        while not await self._let_go():
            # Nobody tells when a disk has room again.
            await asyncio.sleep(_RETRY_SECONDS)
        self._overlay.become_independent()
        self.status = JobStatus.CONCLUDED

    async def _let_go(self) -> bool:
        """Make everything durable and forget the source; return whether there was room for that."""
        try:
            await tidy(self._overlay.image, self._overlay)
            await self._overlay.image.forget_backing()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            log.error("the disk is full: the overlay becomes independent when there is room")
            return False
        return True

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        size, image = self._overlay.size, self._overlay.image
        fetched = self._fetches.bytes_fetched
        remote = min(size, self._overlay.remote_count * image.cluster_size)
        return Progress(size - remote, size, self._rate(fetched), fetched, self._survey.data_bytes)

    def _rate(self, fetched: int) -> float:
        now = time.monotonic()
        samples = self._samples
        if now - samples[-1][0] > 0.1:
            samples.append((now, fetched))
        while len(samples) > 1 and now - samples[0][0] > _RATE_WINDOW_SECONDS:
            samples.popleft()
        since, before = samples[0]
        return (fetched - before) / (now - since) if now > since else 0.0
