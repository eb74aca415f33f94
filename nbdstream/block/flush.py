"""One barrier for all who wait: sharing fdatasync, and what follows when it fails."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdstream.block.worker import Worker

log = logging.getLogger(__name__)


class SharedFlush:
    """Makes a file durable. However many wait, at most two syncs are done for them."""

    def __init__(self, fd: int, worker: Worker, path: str) -> None:
        """``worker`` is where the syncs run; nothing else should wait behind them. ``path`` is for the log."""
        self._fd = fd
        self._worker = worker
        self._path = path
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self.failed = False
        """Whether a sync has failed. The kernel may have dropped what it could not write, and it says so only once:
        a later sync would claim success. So nothing may be written any more."""

    def check(self) -> None:
        """Raise OSError (EIO) if a sync has failed."""
        if self.failed:
            raise OSError(errno.EIO, f"{self._path} could not be flushed earlier")

    async def flush(self) -> None:
        """Make durable what was written before this call. Raises OSError."""
        self.check()
        if self._next is None:  # the one that runs may have begun before the last write
            self._next = asyncio.create_task(self._sync(self._running))
        await asyncio.shield(self._next)
        self.check()

    async def _sync(self, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await earlier
        self._running, self._next = self._next, None
        try:
            if not self.failed:
                await self._worker.run(os.fdatasync, self._fd)
        except OSError as error:
            self.failed = True
            log.error(
                "%s could not be flushed (%s): what was written since the last flush may be lost, "
                "and every further write and flush fails",
                self._path,
                error.strerror,
            )
        finally:
            self._running = None
