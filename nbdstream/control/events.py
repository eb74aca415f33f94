"""What happens to a disk, as QMP's events: QAPI's where it has one, and ours with X_ before their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from nbdstream.stream.events import (
    Cancelled,
    Completed,
    DiskFull,
    OperationFailed,
    RoomAgain,
    SourceBack,
    SourceLost,
    StatusChanged,
)

if TYPE_CHECKING:
    from nbdstream.stream.events import Event

X_DISK_INDEPENDENT: Final = "X_DISK_INDEPENDENT"


def described(event: Event, device: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and the data of what an event is to QMP."""
    match event:
        case StatusChanged(job, status):
            return [("JOB_STATUS_CHANGE", {"id": job, "status": status.value})]
        case OperationFailed(job, operation, action, reason):
            data = {"device": job, "operation": operation.value, "action": action.value, "x-reason": reason}
            return [("BLOCK_JOB_ERROR", data)]
        case Completed(error=""):
            return [("BLOCK_JOB_COMPLETED", _finished(event)), (X_DISK_INDEPENDENT, {"device": device})]
        case Completed(error=error):
            return [("BLOCK_JOB_COMPLETED", _finished(event) | {"error": error})]
        case Cancelled():
            return [("BLOCK_JOB_CANCELLED", _finished(event))]
        case SourceLost(reason, since):
            return [("X_SOURCE_LOST", {"device": device, "reason": reason, "since": since})]
        case SourceBack(uri):
            return [("X_SOURCE_BACK", {"device": device, "source": uri})]
        case DiskFull(since):
            return [("X_DISK_FULL", {"device": device, "since": since})]
        case RoomAgain():
            return [("X_DISK_HAS_ROOM", {"device": device})]


def _finished(event: Completed | Cancelled) -> dict[str, Any]:
    return {
        "type": "stream",
        "device": event.job,
        "len": event.progress.length,
        "offset": event.progress.position,
        "speed": event.speed,
    }
