"""What a stream tells whoever listens, as it happens: a control socket, a log, a test.

Events of a job are QAPI's, with its names for what they carry; those of the disk are our own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, TypeAlias

log = logging.getLogger(__name__)


class JobStatus(Enum):
    """QAPI's JobStatus, as far as a stream goes through it.

    created → running ⇄ paused, then waiting → pending → concluded → null; or, cancelled or failed: aborting →
    concluded → null. A stream has no phase in which it is ``ready`` and waits for somebody to complete it.
    """

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    WAITING = "waiting"
    """Nothing is remote any more."""
    PENDING = "pending"
    """All is being made durable, and the backing file's name removed: this cannot be called off."""
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"
    """The job is gone: its disk has none any more."""


class Operation(Enum):
    """QAPI's IoOperationType."""

    READ = "read"
    """From the source."""
    WRITE = "write"
    """To the overlay."""


class ErrorAction(Enum):
    """QAPI's BlockErrorAction."""

    IGNORE = "ignore"
    """What failed is tried again; the rest goes on."""
    REPORT = "report"
    """The job ends with the error."""
    STOP = "stop"
    """The job stands still, and goes on by itself when the reason is gone."""


class Progress(NamedTuple):
    """How far a stream has come. All in bytes."""

    position: int
    """What of the disk needs the source no more."""
    length: int
    """The size of the disk."""
    rate: float
    """What came over the connection in the last seconds, per second."""
    fetched: int
    """What came over the connection since the disk was opened."""
    allocated: int
    """What the source has that is not zero, as far as it has been surveyed."""


class StatusChanged(NamedTuple):
    """JOB_STATUS_CHANGE."""

    job: str
    status: JobStatus


class OperationFailed(NamedTuple):
    """BLOCK_JOB_ERROR."""

    job: str
    operation: Operation
    action: ErrorAction
    reason: str
    """One line for people."""


class Completed(NamedTuple):
    """BLOCK_JOB_COMPLETED: the overlay is independent, or, with an ``error``, will not be."""

    job: str
    progress: Progress
    speed: int
    error: str = ""


class Cancelled(NamedTuple):
    """BLOCK_JOB_CANCELLED: the overlay is what it was, and can be streamed again."""

    job: str
    progress: Progress
    speed: int


class SourceLost(NamedTuple):
    """The disk is degraded: what is remote has to wait."""

    reason: str
    since: float
    """``time.time()``."""


class SourceBack(NamedTuple):
    """The disk is degraded no more."""

    uri: str
    """Without credentials."""


class DiskFull(NamedTuple):
    """What is fetched cannot be kept; the guest's writes may get ENOSPC."""

    since: float
    """``time.time()``."""


class RoomAgain(NamedTuple):
    """What is fetched can be kept again."""


Event: TypeAlias = (
    StatusChanged | OperationFailed | Completed | Cancelled | SourceLost | SourceBack | DiskFull | RoomAgain
)

Listener: TypeAlias = Callable[[Event], None]
"""Called on the loop, in the order in which things happen; it must not wait."""


class Listeners(list[Listener]):
    """Who is told. Anybody may be added or removed at any time."""

    def tell(self, event: Event) -> None:
        """Tell everybody; a listener that fails is logged and harms nobody else."""
        for listener in self.copy():
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed")
