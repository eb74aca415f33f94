"""An overlay on a file system that has room for half of it: the job says so, and goes on when there is room."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from nbdstream.cli.picture import describe
from nbdstream.stream import hydrator as hydrator_module
from nbdstream.stream.disk import DEVICE
from tests.control.conftest import execute
from tests.stream.peers import CLUSTER
from tests.support.harness import resize_memory, small_memory
from tests.support.processes import nbdstream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qemu.qmp import QMPClient

    from nbdstream.control.server import ControlServer
    from nbdstream.stream.disk import DiskStream
    from tests.control.conftest import Heard
    from tests.stream.peers import SourceDisk


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(hydrator_module, "_RETRY_SECONDS", 0.02)
    with small_memory(str(tmp_path), 24 * CLUSTER) as mount:
        yield f"{mount}/overlay.qed"


async def test_a_full_disk_is_told_and_the_job_goes_on_when_there_is_room(
    qmp: QMPClient, heard: Heard, stream: DiskStream, disk: SourceDisk, control: ControlServer
) -> None:
    await execute(qmp, "block-stream", device=DEVICE)
    full = await heard.until("X_DISK_FULL")
    assert full == {"device": DEVICE, "since": full["since"]}
    reason = "No space left on device"
    failed = {"device": DEVICE, "operation": "write", "action": "stop", "x-reason": reason}
    assert await heard.until("BLOCK_JOB_ERROR") == failed

    status = await execute(qmp, "query-status")
    assert status["full-since"] == full["since"]
    assert (status["job"]["status"], status["job"]["io-status"]) == ("running", "nospace")
    assert 0 < status["position"] < disk.size
    state = next(line for line in describe(status) if line.startswith("state:"))
    assert "its disk is full since" in state
    for command in (["job", "status"], ["top", "--once"]):
        shown = await asyncio.to_thread(nbdstream, *command, "--control", control.path)
        assert state in shown.stdout.splitlines()

    await asyncio.to_thread(resize_memory, os.path.dirname(stream.path), 2 * disk.size)
    assert await heard.until("X_DISK_HAS_ROOM") == {"device": DEVICE}
    assert await heard.names_until("null") == [
        *("waiting", "pending", "BLOCK_JOB_COMPLETED", "X_DISK_INDEPENDENT", "concluded", "null"),
    ]
    assert "full-since" not in await execute(qmp, "query-status")
    assert b"".join(await stream.overlay.read(0, disk.size)) == disk.data
