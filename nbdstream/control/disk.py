"""The commands of disks that are streamed: their jobs in QAPI's terms, steps, and what there is to see of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from msgspec import UNSET, UnsetType

from nbdstream.control.arguments import Arguments, Int, check_id
from nbdstream.control.events import X_DISK_INDEPENDENT, described
from nbdstream.stream.disk import DEFAULT_STEP_BYTES
from nbdstream.stream.events import JobStatus
from nbdstream.stream.snapshot import DiskState
from nbdstream.wire.qmp import ErrorClass, QmpError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.control.commands import Commands
    from nbdstream.stream.disk import DiskStream
    from nbdstream.stream.events import Event
    from nbdstream.stream.job import StreamJob
    from nbdstream.stream.snapshot import Amounts, Latency

MOST_COLUMNS: Final = 512
"""Parts of a map. It is counted on the loop, and takes a millisecond with so many; terminals are narrower."""

_SHORTEST_LATENCY: Final = 1e-5
_LONGEST_LATENCY: Final = 3600.0
"""Seconds. Nobody keeps what is shorter, and nobody waits for what is longer."""

_STATES: Final = {
    "pause": (JobStatus.RUNNING,),
    "resume": (JobStatus.PAUSED,),
    "cancel": (JobStatus.RUNNING, JobStatus.PAUSED),
    "set-speed": (JobStatus.RUNNING, JobStatus.PAUSED),
    "complete": (),
    "finalize": (),
    "dismiss": (),
}
"""In which a job takes a verb. It completes, is finalized and dismissed by itself and by nobody else."""


class JobArguments(Arguments):
    """Of the job- commands."""

    id: str


class BlockJobArguments(Arguments):
    """Of the block-job- commands: what QAPI calls a device there is the job's id."""

    device: str


class CancelArguments(BlockJobArguments):
    """Of block-job-cancel."""

    force: bool = False


class SpeedArguments(BlockJobArguments):
    """Of block-job-set-speed."""

    speed: Int


class StreamArguments(Arguments):
    """Of block-stream."""

    REFUSED: ClassVar[dict[str, str]] = {
        "base": "all that is below the overlay is streamed",
        "base-node": "all that is below the overlay is streamed",
        "bottom": "all that is below the overlay is streamed",
        "backing-file": "an overlay that was streamed has none",
        "backing-mask-protocol": "an overlay that was streamed has no backing file",
        "on-error": "what fails is tried again, and the disk is degraded meanwhile",
        "filter-node-name": "there are no nodes to name",
        "auto-finalize": "a job is finalized by itself",
        "auto-dismiss": "a job is dismissed by itself",
    }

    device: str
    job_id: str | UnsetType = UNSET
    speed: Int = 0


class StepArguments(Arguments):
    """Of x-block-stream-step."""

    device: str
    offset: Int | UnsetType = UNSET
    length: Int = DEFAULT_STEP_BYTES


class LatencyArguments(Arguments):
    """Of x-set-guest-latency."""

    device: str
    latency: float


class StatusArguments(Arguments):
    """Of query-status."""

    device: str | UnsetType = UNSET


class MapArguments(StatusArguments):
    """Of x-query-map."""

    columns: Int = 64


class DiskCommands:
    """The commands of disks, and their events. Where no device is named, the first one is meant."""

    def __init__(self, emit: Callable[[str, dict[str, Any]], None], *disks: DiskStream) -> None:
        """``emit`` is told of events, by name and with their data."""
        self._emit = emit
        self._disks: dict[str, DiskStream] = {}
        for disk in disks:
            self.add(disk)

    def add(self, disk: DiskStream) -> None:
        """Have one more disk, whose device no other has."""
        self._disks[disk.device] = disk
        disk.listeners.append(partial(self._happened, disk.device))

    def add_to(self, commands: Commands) -> None:
        """Have them."""
        commands.add("query-status", StatusArguments, self._status)
        commands.add("x-query-map", MapArguments, self._map)
        commands.add("query-jobs", Arguments, self._jobs)
        commands.add("query-block-jobs", Arguments, self._block_jobs)
        commands.add("block-stream", StreamArguments, self._stream)
        commands.add("x-block-stream-step", StepArguments, self._step)
        commands.add("block-job-set-speed", SpeedArguments, self._set_speed)
        commands.add("x-set-guest-latency", LatencyArguments, self._set_guest_latency)
        commands.add("block-job-cancel", CancelArguments, self._block_job_cancel)
        for verb in ("pause", "resume"):
            commands.add(f"block-job-{verb}", BlockJobArguments, partial(self._block_job, verb))
        for verb in ("pause", "resume", "cancel", "complete", "finalize", "dismiss"):
            commands.add(f"job-{verb}", JobArguments, partial(self._job, verb))

    def _happened(self, device: str, event: Event) -> None:
        for name, data in described(event, device):
            self._emit(name, data)

    # -- to see ---------------------------------------------------------------------------------------------------

    async def _status(self, arguments: StatusArguments) -> object:
        disk = self._find(arguments.device)
        seen, progress = disk.snapshot(), disk.progress
        status: dict[str, Any] = {
            "running": True,  # QEMU's word for a guest that is served
            "status": seen.state.value,
            "device": seen.device,
            "path": seen.path,
            "length": progress.length,
            "position": progress.position,
            "fetched": progress.fetched,
            "allocated": progress.allocated,
            "fetch-rate": round(seen.fetch_rate),
            "read-rate": round(seen.read_rate),
            "write-rate": round(seen.write_rate),
            "waiting": seen.waiting,
            "latency": _latency(seen.latency),
            "remote-latency": _latency(seen.remote_latency),
            "amounts": _amounts(seen.amounts),
        }
        optional = {
            "reason": seen.reason,
            "since": seen.since,
            "full-since": seen.full_since,
            "source": seen.source,
            "guest-latency": disk.guest_latency,
            "job": disk.job and _described(disk, disk.job),
        }
        return status | {name: value for name, value in optional.items() if value}

    async def _map(self, arguments: MapArguments) -> object:
        if not 1 <= arguments.columns <= MOST_COLUMNS:
            raise QmpError(f"Parameter 'columns' expects a value from 1 to {MOST_COLUMNS}")
        disk = self._find(arguments.device)
        return {"length": disk.size, "columns": [_amounts(part) for part in disk.map(arguments.columns)]}

    async def _jobs(self, _arguments: Arguments) -> object:
        return [
            {
                "id": job.id,
                "type": "stream",
                "status": job.status.value,
                "current-progress": job.progress.position,
                "total-progress": job.progress.length,
            }
            for _, job in self._jobs_of_all()
        ]

    async def _block_jobs(self, _arguments: Arguments) -> object:
        return [_described(disk, job) for disk, job in self._jobs_of_all()]

    def _jobs_of_all(self) -> list[tuple[DiskStream, StreamJob]]:
        return [(disk, disk.job) for disk in self._disks.values() if disk.job]

    # -- to do ----------------------------------------------------------------------------------------------------

    async def _stream(self, arguments: StreamArguments) -> object:
        disk = self._find(arguments.device)
        job_id = disk.device if arguments.job_id is UNSET else arguments.job_id
        check_id(job_id, f"Invalid job ID '{job_id}'")
        if any(other is not disk and job.id == job_id for other, job in self._jobs_of_all()):
            raise QmpError(f"Job ID '{job_id}' already in use")
        disk.start_job(job_id=job_id, speed=_not_negative("speed", arguments.speed))
        return {}

    async def _step(self, arguments: StepArguments) -> object:
        disk = self._find(arguments.device)
        was_independent = disk.independent
        offset = disk.next_remote(0) if arguments.offset is UNSET else arguments.offset
        try:
            done = await disk.step(offset, arguments.length)
        except ValueError as error:
            raise QmpError(str(error)) from error
        if done.finished and not was_independent:
            self._emit(X_DISK_INDEPENDENT, {"device": disk.device})
        return {"offset": done.next_offset, "finished": done.finished}

    async def _set_speed(self, arguments: SpeedArguments) -> object:
        job = self._find_block_job(arguments.device)
        _expect(job, "set-speed")
        job.speed = _not_negative("speed", arguments.speed)
        return {}

    async def _set_guest_latency(self, arguments: LatencyArguments) -> object:
        disk = self._find(arguments.device)
        if not (arguments.latency == 0 or _SHORTEST_LATENCY <= arguments.latency <= _LONGEST_LATENCY):
            raise QmpError(
                f"Parameter 'latency' expects seconds from {_SHORTEST_LATENCY:g} to {_LONGEST_LATENCY:g}, or 0 for none"
            )
        disk.guest_latency = arguments.latency or None
        return {}

    async def _block_job(self, verb: str, arguments: BlockJobArguments) -> object:
        return await _perform(self._find_block_job(arguments.device), verb)

    async def _block_job_cancel(self, arguments: CancelArguments) -> object:
        job = self._find_block_job(arguments.device)
        if job.status is JobStatus.PAUSED and not arguments.force:
            raise QmpError(f"The block job for device '{job.id}' is currently paused")
        return await _perform(job, "cancel")

    async def _job(self, verb: str, arguments: JobArguments) -> object:
        job = self._find_job(arguments.id)
        if job is None:
            raise QmpError("Job not found")
        return await _perform(job, verb)

    def _find_block_job(self, device: str) -> StreamJob:
        job = self._find_job(device)
        if job is None:
            raise QmpError(f"Block job '{device}' not found", ErrorClass.DEVICE_NOT_ACTIVE)
        return job

    def _find_job(self, job_id: str) -> StreamJob | None:
        return next((job for _, job in self._jobs_of_all() if job.id == job_id), None)

    def _find(self, device: str | UnsetType) -> DiskStream:
        if device is UNSET:
            if not self._disks:
                raise QmpError("No disk is streamed yet")
            return next(iter(self._disks.values()))
        if device not in self._disks:
            raise QmpError(f"Cannot find device='{device}' nor node-name='{device}'")
        return self._disks[device]


def _described(disk: DiskStream, job: StreamJob) -> dict[str, Any]:
    """Return QAPI's BlockJobInfo."""
    seen = disk.snapshot()
    io_status = "failed" if seen.state is DiskState.DEGRADED else "nospace" if seen.full_since else "ok"
    return {
        "type": "stream",
        "device": job.id,
        "len": job.progress.length,
        "offset": job.progress.position,
        "speed": job.speed,
        "status": job.status.value,
        "busy": job.status is JobStatus.RUNNING,
        "paused": job.status is JobStatus.PAUSED,
        "ready": False,
        "io-status": io_status,
        "auto-finalize": True,
        "auto-dismiss": True,
    }


def _expect(job: StreamJob, verb: str) -> None:
    """Raise QmpError if the job does not take the verb now."""
    if verb == "pause" and job.status is JobStatus.PAUSED:
        raise QmpError("Job is already paused")
    if verb == "resume" and job.status is not JobStatus.PAUSED:
        raise QmpError("Can't resume a job that was not paused")
    if job.status not in _STATES[verb]:
        raise QmpError(f"Job '{job.id}' in state '{job.status.value}' cannot accept command verb '{verb}'")


async def _perform(job: StreamJob, verb: str) -> object:
    _expect(job, verb)
    match verb:
        case "pause":
            job.pause()
        case "resume":
            job.resume()
        case "cancel":
            await job.cancel()
    return {}


def _not_negative(member: str, value: int) -> int:
    if value < 0:
        raise QmpError(f"Parameter '{member}' expects a non-negative value")
    return value


def _latency(latency: Latency) -> dict[str, Any]:
    return {"requests": latency.requests, "p50": latency.p50, "p99": latency.p99}


def _amounts(amounts: Amounts) -> dict[str, int]:
    return {name.replace("_", "-"): value for name, value in amounts._asdict().items()}
