"""A disk under control: the qemu.qmp library drives its job, step mode, and everything that is refused."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from qemu.qmp import ExecuteError

from nbdstream.control.disk import MOST_COLUMNS
from nbdstream.stream.disk import DEVICE
from tests.control.conftest import execute
from tests.stream.peers import CLUSTER

if TYPE_CHECKING:
    import asyncio

    from qemu.qmp import QMPClient

    from nbdstream.stream.disk import DiskStream
    from tests.control.conftest import Heard
    from tests.stream.peers import SourceDisk, SourceServer

DOCUMENT = (Path(__file__).parents[2] / "docs/control.md").read_text()
BLOCK_JOB = {"device": DEVICE}
JOB = {"id": DEVICE}


async def refusal(qmp: QMPClient, command: str, arguments: dict[str, object]) -> tuple[str, str]:
    with pytest.raises(ExecuteError) as caught:
        await qmp.execute(command, arguments)
    return caught.value.error_class, str(caught.value)


# A job from its start to its end.


async def test_a_job_is_driven_to_completion(
    qmp: QMPClient, heard: Heard, stream: DiskStream, disk: SourceDisk
) -> None:
    assert await execute(qmp, "query-jobs") == []
    assert await execute(qmp, "query-block-jobs") == []
    assert await execute(qmp, "block-stream", device=DEVICE, job_id="s", speed=1) == {}
    assert await heard.names_until("running") == ["created", "running"]

    (job,) = await execute(qmp, "query-jobs")
    assert job == {
        "id": "s",
        "type": "stream",
        "status": "running",
        "current-progress": job["current-progress"],
        "total-progress": disk.size,
    }
    (block_job,) = await execute(qmp, "query-block-jobs")
    assert block_job == {
        "type": "stream",
        "device": "s",
        "len": disk.size,
        "offset": block_job["offset"],
        "speed": 1,
        "status": "running",
        "busy": True,
        "paused": False,
        "ready": False,
        "io-status": "ok",
        "auto-finalize": True,
        "auto-dismiss": True,
    }

    assert await execute(qmp, "block-job-pause", device="s") == {}
    (block_job,) = await execute(qmp, "query-block-jobs")
    assert (block_job["status"], block_job["paused"], block_job["busy"]) == ("paused", True, False)
    assert await execute(qmp, "job-resume", id="s") == {}
    assert await execute(qmp, "job-pause", id="s") == {}
    assert await execute(qmp, "block-job-resume", device="s") == {}
    assert await execute(qmp, "block-job-set-speed", device="s", speed=0) == {}
    assert await heard.names_until("null") == [
        *("paused", "running", "paused", "running", "waiting", "pending"),
        *("BLOCK_JOB_COMPLETED", "X_DISK_INDEPENDENT", "concluded", "null"),
    ]
    assert stream.independent
    assert (await execute(qmp, "query-status"))["status"] == "independent"
    assert b"".join(await stream.overlay.read(0, disk.size)) == disk.data


async def test_the_last_event_says_how_much_was_streamed(qmp: QMPClient, heard: Heard, disk: SourceDisk) -> None:
    await execute(qmp, "block-stream", device=DEVICE)
    assert await heard.until("BLOCK_JOB_COMPLETED") == {
        "type": "stream",
        "device": DEVICE,
        "len": disk.size,
        "offset": disk.size,
        "speed": 0,
    }
    assert await heard.until("X_DISK_INDEPENDENT") == {"device": DEVICE}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("block-job-cancel", BLOCK_JOB), ("block-job-cancel", BLOCK_JOB | {"force": True}), ("job-cancel", JOB)],
)
async def test_a_cancelled_job_can_be_begun_again(
    qmp: QMPClient, heard: Heard, stream: DiskStream, command: str, arguments: dict[str, object]
) -> None:
    await execute(qmp, "block-stream", device=DEVICE, speed=1)
    assert await qmp.execute(command, arguments) == {}
    assert await heard.names_until("null") == [
        *("created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"),
    ]
    assert await execute(qmp, "query-jobs") == []
    assert not stream.independent
    await execute(qmp, "block-stream", device=DEVICE)
    await heard.until("X_DISK_INDEPENDENT")


async def test_a_paused_job_is_cancelled_by_force(qmp: QMPClient, heard: Heard) -> None:
    await execute(qmp, "block-stream", device=DEVICE, speed=1)
    await execute(qmp, "job-pause", id=DEVICE)
    assert await refusal(qmp, "block-job-cancel", {"device": DEVICE}) == (
        "GenericError",
        "The block job for device 'disk0' is currently paused",
    )
    await execute(qmp, "block-job-cancel", device=DEVICE, force=True)
    await heard.until("BLOCK_JOB_CANCELLED")


async def test_a_source_that_goes_is_told_and_the_disk_is_degraded(
    qmp: QMPClient, heard: Heard, server: SourceServer
) -> None:
    await execute(qmp, "block-stream", device=DEVICE, speed=1)
    await server.stop()
    failed = await heard.until("BLOCK_JOB_ERROR")
    lost = await heard.until("X_SOURCE_LOST")
    assert lost == {"device": DEVICE, "reason": failed["x-reason"], "since": lost["since"]}
    assert failed == {"device": DEVICE, "operation": "read", "action": "stop", "x-reason": lost["reason"]}
    status = await execute(qmp, "query-status")
    assert (status["status"], status["since"]) == ("degraded", lost["since"])
    assert status["reason"]
    assert status["job"]["io-status"] == "failed"
    await server.start()
    assert await heard.until("X_SOURCE_BACK") == {"device": DEVICE, "source": server.uri}
    status = await execute(qmp, "query-status")
    assert status["status"] == "running"
    assert "since" not in status


async def test_a_job_that_fails_says_why_and_all_is_served_still(
    qmp: QMPClient, heard: Heard, stream: DiskStream, disk: SourceDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        await execute(qmp, "block-stream", device=DEVICE)
        failed = await heard.until("BLOCK_JOB_ERROR")
        completed = await heard.until("BLOCK_JOB_COMPLETED")
    assert (failed["operation"], failed["action"]) == ("write", "report")
    assert completed["error"] == failed["x-reason"]
    assert (completed["type"], completed["device"], completed["len"]) == ("stream", DEVICE, disk.size)
    assert await heard.names_until("null") == ["concluded", "null"]
    assert await execute(qmp, "query-block-jobs") == []
    status = await execute(qmp, "query-status")
    assert (status["status"], status["running"]) == ("running", True)
    assert b"".join(await stream.overlay.read(0, disk.size)) == disk.data


async def test_all_commands_and_events_in_one_session(
    qmp: QMPClient, heard: Heard, server: SourceServer, stopped: asyncio.Event
) -> None:
    """But for the events of a full disk, which are in test_full_disk."""
    there = {command["name"] for command in await execute(qmp, "query-commands")}
    done = {"qmp_capabilities", "query-commands"}  # the library itself says the first

    async def perform(command: str, **arguments: object) -> None:
        await execute(qmp, command, **arguments)
        done.add(command)

    for command in ("query-version", "query-status", "x-query-map", "query-jobs", "query-block-jobs"):
        await perform(command)
    await perform("x-block-stream-step", device=DEVICE, length=CLUSTER)
    await perform("block-stream", device=DEVICE, speed=1)
    await perform("block-job-pause", device=DEVICE)
    await perform("block-job-resume", device=DEVICE)
    await perform("job-pause", id=DEVICE)
    await perform("job-resume", id=DEVICE)
    await perform("block-job-cancel", device=DEVICE)
    await perform("block-stream", device=DEVICE, speed=1)
    await perform("job-cancel", id=DEVICE)
    await perform("block-stream", device=DEVICE, speed=1)
    await server.stop()
    await heard.until("X_SOURCE_LOST")
    await server.start()
    await heard.until("X_SOURCE_BACK")
    await perform("x-set-guest-latency", device=DEVICE, latency=0.005)
    await perform("block-job-set-speed", device=DEVICE, speed=0)
    await heard.names_until("null")
    await perform("quit")
    assert stopped.is_set()
    refused = {"job-complete", "job-finalize", "job-dismiss"}
    assert there - refused == done
    events = set(re.findall(r"^\| `([A-Z_]+)`", DOCUMENT.replace("`, `X_", "` |\n| `X_"), re.MULTILINE))
    assert heard.names == events - {"X_DISK_FULL", "X_DISK_HAS_ROOM"}


# What is refused.


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("block-stream", {}, "Parameter 'device' is missing"),
        ("block-stream", {"device": 5}, "Invalid parameter type for 'device', expected: string"),
        ("block-stream", {"device": "x"}, "Cannot find device='x' nor node-name='x'"),
        ("block-stream", {"device": DEVICE, "job-id": "1x"}, "Invalid job ID '1x'"),
        ("block-stream", {"device": DEVICE, "speed": -1}, "Parameter 'speed' expects a non-negative value"),
        ("block-stream", {"device": DEVICE, "speed": "1M"}, "Invalid parameter type for 'speed', expected: integer"),
        ("block-stream", {"device": DEVICE, "foo": 1}, "Parameter 'foo' is unexpected"),
        (
            "block-stream",
            {"device": DEVICE, "base": "x"},
            "Parameter 'base' is not supported: all that is below the overlay is streamed",
        ),
        ("job-pause", {"id": "x"}, "Job not found"),
        ("job-pause", {"device": "x"}, "Parameter 'id' is missing"),
        ("x-block-stream-step", {"device": "x"}, "Cannot find device='x' nor node-name='x'"),
        ("x-set-guest-latency", {"device": "x", "latency": 1}, "Cannot find device='x' nor node-name='x'"),
        (
            "x-set-guest-latency",
            {"device": DEVICE, "latency": "4ms"},
            "Invalid parameter type for 'latency', expected: number",
        ),
        (
            "x-set-guest-latency",
            {"device": DEVICE, "latency": -0.1},
            "Parameter 'latency' expects seconds from 1e-05 to 3600, or 0 for none",
        ),
        ("x-query-map", {"columns": 0}, f"Parameter 'columns' expects a value from 1 to {MOST_COLUMNS}"),
        ("x-query-map", {"columns": MOST_COLUMNS + 1}, f"Parameter 'columns' expects a value from 1 to {MOST_COLUMNS}"),
        ("query-status", {"a": 1}, "Parameter 'a' is unexpected"),
    ],
)
async def test_wrong_arguments_are_refused_as_qemu_does(
    qmp: QMPClient, command: str, arguments: dict[str, object], text: str
) -> None:
    assert await refusal(qmp, command, arguments) == ("GenericError", text)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("block-job-pause", {}),
        ("block-job-resume", {}),
        ("block-job-cancel", {}),
        ("block-job-set-speed", {"speed": 1}),
    ],
)
async def test_a_block_job_that_is_not_there_is_not_active(
    qmp: QMPClient, command: str, arguments: dict[str, object]
) -> None:
    assert await refusal(qmp, command, {"device": "x"} | arguments) == ("DeviceNotActive", "Block job 'x' not found")


@pytest.mark.parametrize("verb", ["complete", "finalize", "dismiss"])
async def test_a_job_does_by_itself_what_others_have_to_be_told(qmp: QMPClient, verb: str) -> None:
    await execute(qmp, "block-stream", device=DEVICE, speed=1)
    _, text = await refusal(qmp, f"job-{verb}", {"id": DEVICE})
    assert text == f"Job 'disk0' in state 'running' cannot accept command verb '{verb}'"


async def test_a_verb_that_does_not_fit_is_refused(qmp: QMPClient) -> None:
    await execute(qmp, "block-stream", device=DEVICE, speed=1)
    assert (await refusal(qmp, "job-resume", {"id": DEVICE}))[1] == "Can't resume a job that was not paused"
    await execute(qmp, "job-pause", id=DEVICE)
    assert (await refusal(qmp, "block-job-pause", {"device": DEVICE}))[1] == "Job is already paused"
    text = "Parameter 'speed' expects a non-negative value"
    assert (await refusal(qmp, "block-job-set-speed", {"device": DEVICE, "speed": -1}))[1] == text


async def test_the_objective_of_the_guests_latency_is_changed_while_a_job_runs(
    qmp: QMPClient, heard: Heard, stream: DiskStream
) -> None:
    await execute(qmp, "block-stream", device=DEVICE, speed=1)
    assert "guest-latency" not in await execute(qmp, "query-status")
    await execute(qmp, "x-set-guest-latency", device=DEVICE, latency=0.004)
    assert (await execute(qmp, "query-status"))["guest-latency"] == stream.guest_latency == 0.004
    await execute(qmp, "x-set-guest-latency", device=DEVICE, latency=0)
    assert stream.guest_latency is None
    await execute(qmp, "block-job-set-speed", device=DEVICE, speed=0)
    await heard.names_until("null")


async def test_there_is_one_job(qmp: QMPClient) -> None:
    await execute(qmp, "block-stream", device=DEVICE, speed=1)
    for command in ("block-stream", "x-block-stream-step"):
        assert (await refusal(qmp, command, {"device": DEVICE}))[1] == "disk0 is being streamed already"


async def test_an_independent_disk_has_nothing_to_stream(qmp: QMPClient, heard: Heard) -> None:
    await execute(qmp, "block-stream", device=DEVICE)
    await heard.names_until("null")
    assert "is independent: there is nothing to stream" in (await refusal(qmp, "block-stream", {"device": DEVICE}))[1]


# Step by step.


async def test_steps_lead_to_the_end(qmp: QMPClient, heard: Heard, stream: DiskStream, disk: SourceDisk) -> None:
    offset, finished, steps = 0, False, 0
    while not finished:
        done = await execute(qmp, "x-block-stream-step", device=DEVICE, offset=offset, length=7 * CLUSTER)
        offset, finished = done["offset"], done["finished"]
        steps += 1
    assert (offset, steps) == (disk.size, 6)
    assert await heard.until("X_DISK_INDEPENDENT") == {"device": DEVICE}
    assert await execute(qmp, "x-block-stream-step", device=DEVICE) == {"offset": disk.size, "finished": True}
    assert qmp.events.empty()
    assert stream.independent


async def test_a_step_behind_the_end_is_refused(qmp: QMPClient, disk: SourceDisk) -> None:
    wrong: list[dict[str, object]] = [{"offset": disk.size + 1}, {"offset": -1}, {"length": 0}]
    for arguments in wrong:
        _, text = await refusal(qmp, "x-block-stream-step", {"device": DEVICE} | arguments)
        assert f"the disk has {disk.size} bytes" in text


# What there is to see.


async def test_the_status_tells_what_the_disk_consists_of(
    qmp: QMPClient, stream: DiskStream, disk: SourceDisk, server: SourceServer
) -> None:
    await execute(qmp, "x-block-stream-step", device=DEVICE, length=10 * CLUSTER)
    status = await execute(qmp, "query-status")
    assert status["running"] is True
    assert status["status"] == "running"
    assert status["device"] == DEVICE
    assert status["path"] == stream.path
    assert status["source"] == server.uri
    assert (status["length"], status["position"], status["fetched"]) == (disk.size, 10 * CLUSTER, 10 * CLUSTER)
    assert status["amounts"]["local"] == 10 * CLUSTER
    assert status["amounts"]["remote"] == 30 * CLUSTER
    assert status["waiting"] == 0
    assert "job" not in status
    assert set(status["latency"]) == set(status["remote-latency"]) == {"requests", "p50", "p99"}


async def test_the_map_shows_where_it_is(qmp: QMPClient, disk: SourceDisk) -> None:
    await execute(qmp, "x-block-stream-step", device=DEVICE, offset=10 * CLUSTER, length=10 * CLUSTER)
    found = await execute(qmp, "x-query-map", columns=4)
    assert found["length"] == disk.size
    assert [column["local"] for column in found["columns"]] == [0, 10 * CLUSTER, 0, 0]
    assert [column["remote"] for column in found["columns"]] == [10 * CLUSTER, 0, 10 * CLUSTER, 10 * CLUSTER]
    assert len((await execute(qmp, "x-query-map", columns=MOST_COLUMNS))["columns"]) == 40


async def test_every_command_is_documented(qmp: QMPClient) -> None:
    for command in await execute(qmp, "query-commands"):
        assert f"`{command['name']}`" in DOCUMENT
