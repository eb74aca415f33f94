"""Learning what need not be fetched: what the source says reads as zero."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING

from nbdstream.extents import ExtentFlags

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.block.overlay import Overlay
    from nbdstream.stream.source import Source


log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0


class Survey:
    """Walks the source's ``base:allocation`` once, from the start to the end.

    Only what promises zeroes is skipped; a hole that does not is fetched like data.
    """

    def __init__(self, overlay: Overlay, source: Source) -> None:
        self._overlay = overlay
        self._source = source
        self._zero_from: int | None = None
        self.position = 0
        """Up to which byte the source has been asked; clusters that end at or before it are known."""
        self.data_bytes = 0
        """What of that is not zero, in bytes: what the source has allocated."""
        self.done = False
        self.on_progress: Callable[[], None] = lambda: None

    def covers(self, end: int) -> bool:
        """Whether all is known of the source up to a position."""
        return self.done or self.position >= end

    async def run(self, until: int | None = None) -> None:
        """Go on up to a position, or to the end; a source that answers with an error is asked again.

        It may be cancelled and run again. Raises OSError if the source is closed.
        """
        until = self._overlay.size if until is None else until
        while not self.done and self.position <= until:
            if self.position >= self._source.size:
                self._finish()
            elif self.position == until:
                return
            else:
                await self._go_on()

    async def _go_on(self) -> None:
        try:
            extents = await self._source.extents(self.position, self._source.size - self.position)
        except OSError as error:
            if error.errno == errno.ECANCELED:
                raise
            log.error("the source does not say what it has allocated (%s): it is asked again", error.strerror)
            await asyncio.sleep(_RETRY_SECONDS)
            return
        for extent in extents:
            if not extent.flags & ExtentFlags.ZERO:
                self._end_of_zeroes(extent.offset)
                self.data_bytes += extent.length
            elif self._zero_from is None:
                self._zero_from = extent.offset
            self.position = extent.end
        self._zeroes_so_far()
        self.on_progress()
        await asyncio.sleep(0)

    def _finish(self) -> None:
        if self._zero_from is None:
            self._zero_from = self._source.size
        self._end_of_zeroes(self._overlay.size)  # behind the source's end there is nothing but zeroes
        self.position = self._overlay.size
        self.done = True
        self.on_progress()

    def _zeroes_so_far(self) -> None:
        """Note the zeroes seen in full clusters; the run may go on."""
        if self._zero_from is not None:
            self._note(self._zero_from, self.position)

    def _end_of_zeroes(self, offset: int) -> None:
        if self._zero_from is not None:
            self._note(self._zero_from, offset)
            self._zero_from = None

    def _note(self, start: int, end: int) -> None:
        cluster_size = self._overlay.image.cluster_size
        first = -(-start // cluster_size)
        behind = -(-end // cluster_size) if end >= self._overlay.size else end // cluster_size
        if first < behind:
            self._overlay.reads_zero(first, behind)
