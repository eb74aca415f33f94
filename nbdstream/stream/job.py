"""The block job that makes an overlay independent: QAPI's life cycle around a hydrator."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING

from nbdstream.errors import JobError
from nbdstream.stream.events import (
    Cancelled,
    Completed,
    ErrorAction,
    JobStatus,
    Operation,
    OperationFailed,
    Progress,
    StatusChanged,
)
from nbdstream.stream.hydrator import Hydrator
from nbdstream.stream.throttle import Throttle

if TYPE_CHECKING:
    from nbdstream.stream.governor import Governor
    from nbdstream.stream.hydration import Hydration

log = logging.getLogger(__name__)


class StreamJob:
    """Streams one overlay until it is independent. What happens is told to the hydration's listeners."""

    def __init__(self, job_id: str, hydration: Hydration, *, speed: int = 0, governor: Governor | None = None) -> None:
        """``speed`` limits what is fetched in the background, in bytes a second; 0 does not."""
        self.id = job_id
        self.status = JobStatus.CREATED
        self.error = ""
        """Why it failed, for people; empty if it did not."""
        self._hydration = hydration
        self._throttle = Throttle(speed or None)
        self._hydrator = Hydrator(hydration, self._throttle, governor)
        self._running: asyncio.Task[None] | None = None
        self._become(JobStatus.CREATED)

    @property
    def progress(self) -> Progress:
        """How far the stream has come."""
        return self._hydration.progress

    @property
    def speed(self) -> int:
        """Bytes a second that are fetched in the background at most; 0 for no limit. It may be set at any time."""
        return self._throttle.rate or 0

    @speed.setter
    def speed(self, speed: int) -> None:
        self._throttle.rate = speed or None
        self._hydrator.look()

    def look(self) -> None:
        """Look around now: its governor has another objective."""
        self._hydrator.look()

    @property
    def finished(self) -> bool:
        """Whether it has come to an end, one way or the other."""
        return self.status in (JobStatus.CONCLUDED, JobStatus.NULL)

    # -- verbs ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to run."""
        self._expect(JobStatus.CREATED)
        self._become(JobStatus.RUNNING)
        self._running = asyncio.get_running_loop().create_task(self._stream())
        self._running.add_done_callback(self._ended)

    def pause(self) -> None:
        """Fetch nothing more in the background until :meth:`resume`; what is in flight comes to its end."""
        self._expect(JobStatus.RUNNING)
        self._hydrator.pause()
        self._become(JobStatus.PAUSED)

    def resume(self) -> None:
        """Go on after a pause."""
        self._expect(JobStatus.PAUSED)
        self._become(JobStatus.RUNNING)
        self._hydrator.resume()

    async def cancel(self) -> None:
        """End it, and keep all that there is: the disk is served as before, and can be streamed again.

        What is in flight is kept when it arrives.
        """
        self._expect(JobStatus.RUNNING, JobStatus.PAUSED)
        await self.abandon()

    async def abandon(self) -> None:
        """Cancel it whatever it does; nothing if it has come to its end."""
        if self._running:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def wait(self) -> None:
        """Wait until it has come to its end."""
        if self._running:
            await asyncio.wait([self._running])

    def _expect(self, *allowed: JobStatus) -> None:
        if self.status not in allowed:
            raise JobError(f"the job {self.id} is {self.status.value}: that cannot be done now")

    # -- life -------------------------------------------------------------------------------------------------

    async def _stream(self) -> None:
        self._hydrator.on_error = self._retried
        await self._hydrator.run()
        self._become(JobStatus.WAITING)
        self._become(JobStatus.PENDING)
        await self._hydration.complete()

    def _ended(self, task: asyncio.Task[None]) -> None:
        tell = self._hydration.listeners.tell
        if task.cancelled():
            self._become(JobStatus.ABORTING)
            tell(Cancelled(self.id, self.progress, self.speed))
        else:
            if error := task.exception():
                self._failed(error)
                self._become(JobStatus.ABORTING)
            tell(Completed(self.id, self.progress, self.speed, self.error))
        self._become(JobStatus.CONCLUDED)
        self._become(JobStatus.NULL)

    def _become(self, status: JobStatus) -> None:
        self.status = status
        self._hydration.listeners.tell(StatusChanged(self.id, status))

    def _retried(self, error: OSError) -> None:
        full = error.errno == errno.ENOSPC
        self.tell_error(
            Operation.WRITE if full else Operation.READ,
            ErrorAction.STOP if full else ErrorAction.IGNORE,
            error.strerror or str(error),
        )

    def _failed(self, error: BaseException) -> None:
        self.error = reason_of(error)
        self.tell_error(Operation.WRITE, ErrorAction.REPORT, self.error)

    def tell_error(self, operation: Operation, action: ErrorAction, reason: str) -> None:
        """Tell listeners of an error that meets the job."""
        self._hydration.listeners.tell(OperationFailed(self.id, operation, action, reason))


def reason_of(error: BaseException) -> str:
    """Return why streaming failed, for people; a mistake of ours is logged as well."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        return str(error.strerror or error)
    log.error("a mistake of ours ends the stream", exc_info=error)
    return f"internal error: {error!r}"
