"""One overlay on its way to independence, whoever takes it there: a job, somebody who goes step by step, or the guest.

What a guest reads from the source is kept from the moment on that this exists, with a job or without.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from typing import TYPE_CHECKING

from nbdstream.block.qed.tidy import tidy
from nbdstream.stream.allocation import Survey
from nbdstream.stream.events import DiskFull, Progress, RoomAgain, SourceBack, SourceLost
from nbdstream.stream.fetch import Fetches
from nbdstream.stream.identity import compare
from nbdstream.stream.rate import RateMeter

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.block.overlay import Overlay
    from nbdstream.block.remote.export import RemoteExport
    from nbdstream.stream.events import Listeners
    from nbdstream.stream.source import Source

log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
"""Nobody tells when a disk has room again."""


class Hydration:
    """An overlay, its source, what is in flight between them, and what is known of the source."""

    def __init__(self, overlay: Overlay, source: Source, listeners: Listeners) -> None:
        """Take over the overlay: from here on what a guest reads from the source is kept."""
        self.overlay = overlay
        self.source = source
        self.fetches = Fetches(overlay, source)
        overlay.begin_streaming(self.fetches)
        self.survey = Survey(overlay, source)
        self.listeners = listeners
        self.full_since: float | None = None
        """Since when the disk has no room for what is fetched (``time.time()``), None if it has."""
        self.on_source_change: Callable[[], None] = lambda: None
        """Called when the source is lost, and when it is back."""
        self._rate = RateMeter()
        source.on_change = self._source_changed
        source.check = self._check

    @property
    def hydrated(self) -> bool:
        """Whether no cluster is remote any more, whatever of the source has been asked for."""
        below = self.overlay.below
        return below.remote is None or below.remote_count == 0

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        size = self.overlay.size
        fetched = self.fetches.bytes_fetched
        remote = min(size, self.overlay.below.remote_count * self.overlay.image.cluster_size)
        return Progress(size - remote, size, self._rate.of(fetched), fetched, self.survey.data_bytes)

    async def _check(self, export: RemoteExport) -> None:
        """Raise WrongSourceError, or OSError, unless what is local could have come from there."""
        name = export.uri.without_credentials()
        if compared := await compare(self.overlay, export):
            log.info("%s has what the overlay has: %d clusters were compared", name, compared)
        else:
            log.warning("%s is taken for the source by its size: there is nothing yet that could be compared", name)

    def _source_changed(self) -> None:
        source = self.source
        self.fetches.line.reset()
        if source.lost_since is None:
            self.listeners.tell(SourceBack(str(source.uri.without_credentials())))
        else:
            self.listeners.tell(SourceLost(source.lost_because, source.lost_since))
        self.on_source_change()

    def disk_is_full(self) -> None:
        """Note that there was no room for something."""
        if self.full_since is None:
            self.full_since = time.time()
            log.error("the disk is full: streaming goes on when there is room")
            self.listeners.tell(DiskFull(self.full_since))

    def disk_has_room(self) -> None:
        """Note that there was room for something."""
        if self.full_since is not None:
            self.full_since = None
            log.info("the disk has room again")
            self.listeners.tell(RoomAgain())

    async def complete(self) -> None:
        """Make a hydrated overlay independent and durable. Raises OSError if the image has failed."""
        # Nobody needs the source any more. A fetch that lost its race against the guest may still be in flight: it ends
        # here and gives its clusters back.
        await self.source.close()
        while not await self._let_go():
            await asyncio.sleep(_RETRY_SECONDS)
        self.overlay.become_independent()
        self.disk_has_room()

    async def _let_go(self) -> bool:
        """Make everything durable and forget the source; return whether there was room for that."""
        try:
            await tidy(self.overlay.image, self.overlay)
            await self.overlay.image.forget_backing()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.disk_is_full()
            return False
        return True
