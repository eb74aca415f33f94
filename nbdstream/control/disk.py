"""The commands of a disk that is streamed: its job in QAPI's terms, steps, and what there is to see of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from msgspec import UNSET, UnsetType

from nbdstream.control.arguments import Arguments, Int, check_id
from nbdstream.control.events import X_DISK_INDEPENDENT, described
from nbdstream.stream.disk import DEFAULT_STEP_BYTES, DEVICE
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
    job_id: str = DEVICE
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


class MapArguments(Arguments):
    """Of x-query-map."""

    columns: Int = 64


class DiskCommands:
    """The commands of one disk, and its events."""

    def __init__(self, disk: DiskStream, emit: Callable[[str, dict[str, Any]], None]) -> None:
        """``emit`` is told of events, by name and with their data."""
        self._disk = disk
        self._emit = emit
        disk.listeners.append(self._happened)

    def add_to(self, commands: Commands) -> None:
        """Have them."""
        commands.add("query-status", Arguments, self._status)
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

    def _happened(self, event: Event) -> None:
        for name, data in described(event, self._disk.device):
            self._emit(name, data)

    # -- to see ---------------------------------------------------------------------------------------------------

    async def _status(self, _arguments: Arguments) -> object:
        seen, progress = self._disk.snapshot(), self._disk.progress
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
            "guest-latency": self._disk.guest_latency,
            "job": self._disk.job and self._described(self._disk.job),
        }
        return status | {name: value for name, value in optional.items() if value}

    async def _map(self, arguments: MapArguments) -> object:
        if not 1 <= arguments.columns <= MOST_COLUMNS:
            raise QmpError(f"Parameter 'columns' expects a value from 1 to {MOST_COLUMNS}")
        return {
            "length": self._disk.progress.length,
            "columns": [_amounts(part) for part in self._disk.map(arguments.columns)],
        }

    async def _jobs(self, _arguments: Arguments) -> object:
        return [
            {
                "id": job.id,
                "type": "stream",
                "status": job.status.value,
                "current-progress": job.progress.position,
                "total-progress": job.progress.length,
            }
            for job in self._all()
        ]

    async def _block_jobs(self, _arguments: Arguments) -> object:
        return [self._described(job) for job in self._all()]

    def _described(self, job: StreamJob) -> dict[str, Any]:
        """Return QAPI's BlockJobInfo."""
        seen = self._disk.snapshot()
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

    def _all(self) -> list[StreamJob]:
        return [self._disk.job] if self._disk.job else []

    # -- to do ----------------------------------------------------------------------------------------------------

    async def _stream(self, arguments: StreamArguments) -> object:
        self._check_device(arguments.device)
        check_id(arguments.job_id, f"Invalid job ID '{arguments.job_id}'")
        self._disk.start_job(job_id=arguments.job_id, speed=_not_negative("speed", arguments.speed))
        return {}

    async def _step(self, arguments: StepArguments) -> object:
        self._check_device(arguments.device)
        was_independent = self._disk.independent
        offset = self._disk.next_remote(0) if arguments.offset is UNSET else arguments.offset
        try:
            done = await self._disk.step(offset, arguments.length)
        except ValueError as error:
            raise QmpError(str(error)) from error
        if done.finished and not was_independent:
            self._emit(X_DISK_INDEPENDENT, {"device": self._disk.device})
        return {"offset": done.next_offset, "finished": done.finished}

    async def _set_speed(self, arguments: SpeedArguments) -> object:
        job = self._find_block_job(arguments.device)
        _expect(job, "set-speed")
        job.speed = _not_negative("speed", arguments.speed)
        return {}

    async def _set_guest_latency(self, arguments: LatencyArguments) -> object:
        self._check_device(arguments.device)
        if not (arguments.latency == 0 or _SHORTEST_LATENCY <= arguments.latency <= _LONGEST_LATENCY):
            raise QmpError(
                f"Parameter 'latency' expects seconds from {_SHORTEST_LATENCY:g} to {_LONGEST_LATENCY:g}, or 0 for none"
            )
        self._disk.guest_latency = arguments.latency or None
        return {}

    async def _block_job(self, verb: str, arguments: BlockJobArguments) -> object:
        return await _perform(self._find_block_job(arguments.device), verb)

    async def _block_job_cancel(self, arguments: CancelArguments) -> object:
        job = self._find_block_job(arguments.device)
        if job.status is JobStatus.PAUSED and not arguments.force:
            raise QmpError(f"The block job for device '{job.id}' is currently paused")
        return await _perform(job, "cancel")

    async def _job(self, verb: str, arguments: JobArguments) -> object:
        job = self._disk.job
        if job is None or job.id != arguments.id:
            raise QmpError("Job not found")
        return await _perform(job, verb)

    def _find_block_job(self, device: str) -> StreamJob:
        job = self._disk.job
        if job is None or job.id != device:
            raise QmpError(f"Block job '{device}' not found", ErrorClass.DEVICE_NOT_ACTIVE)
        return job

    def _check_device(self, device: str) -> None:
        if device != self._disk.device:
            raise QmpError(f"Cannot find device='{device}' nor node-name='{device}'")


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
