"""What there is to see of a hand-over on its control sockets, and what its jobs can be told there."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.cli.states import control_sockets
from nbdstream.wire.handover.vocabulary import Fence, Phase
from tests.handover.hosts import SIZE, Hosts
from tests.handover.links import Loopback
from tests.handover.rig import Rig
from tests.support.monitor import RefusedError, ask
from tests.support.processes import nbdstream

if TYPE_CHECKING:
    from pathlib import Path


def seen(*arguments: str, control: str) -> str:
    return nbdstream(*arguments, "--control", control).stdout


def test_state_exposure_and_progress_are_seen_by_top_and_job_status(tmp_path: Path) -> None:
    destination, source = str(tmp_path / "d.ctl"), str(tmp_path / "s.ctl")
    options = {"source": ["--control", source], "destination": ["--control", destination, "--guest-latency", "1s"]}
    with Hosts(tmp_path, Loopback(), options) as hosts:
        hosts.start("source")
        hosts.start("destination")
        hosts.until("source", "PREPARED")
        for told in (seen("top", "--once", control=destination), seen("job", "status", control=destination)):
            assert told.startswith("destination: PREPARED, epoch 1, connected\n")
            assert f"\nonly at the source: {SIZE} bytes (4 MiB)\n" in told
        assert seen("top", "--once", control=source).startswith("source: PREPARED, epoch 1, connected\n")
        assert "No disk is streamed yet" in nbdstream("job", "start", "--control", destination, status=1).stderr

        hosts.link.hold_data()
        hosts.let("fence", "accept")
        hosts.say("source", "fence")
        hosts.until("destination", "HYDRATING")
        hosts.guests["destination"].takes_a_write()
        shown = seen("top", "--once", control=destination)
        assert shown.startswith("destination: HYDRATING, epoch 2, connected\n")
        assert "\nonly at the source: " in shown
        assert "\ndisk:    disk0, " in shown
        assert ask(destination, "query-status")["guest-latency"] == 1
        assert "\njob:     disk0, running, no limit\n" in shown
        assert "W" in shown.splitlines()[-10]
        line = json.loads(seen("top", "--once", "--json", control=destination))
        (disk,) = line["disks"]
        assert line["handover"]["remote"] == disk["amounts"]["remote"] == sum(part["remote"] for part in disk["map"])
        assert 0 < line["handover"]["remote"] <= SIZE - (64 << 10)
        assert seen("job", "pause", control=destination) == "disk0 is paused\n"
        assert "job:     disk0, paused, no limit" in seen("job", "status", control=destination)
        seen("job", "resume", control=destination)

        hosts.link.mend()
        assert seen("job", "wait", control=destination) == "the overlay is independent\n"
        hosts.until("destination", "INDEPENDENT")
        shown = seen("top", "--once", control=destination)
        assert "only at the source" not in shown
        assert "\nlocal:   4 MiB of 4 MiB (100%)" in shown


@pytest.fixture
def socket(tmp_path: Path) -> str:
    return str(tmp_path / "two.ctl")


async def test_each_of_two_disks_has_a_device_and_a_job_of_its_own(tmp_path: Path, socket: str) -> None:
    async def run(command: str, **arguments: object) -> Any:
        return await asyncio.to_thread(ask, socket, command, **arguments)

    rig = Rig(str(tmp_path), disks=2)
    rig.speed = 1
    async with rig, AsyncExitStack() as stack:
        options = Namespace(state=str(tmp_path), control=socket, socket_mode=0o600, socket_group=None)
        await control_sockets(stack, rig.destination, options, asyncio.Event())
        await rig.prepared()
        assert await run("query-block-jobs") == []
        await rig.source.command(Fence())
        await rig.until(lambda: rig.phases() == (Phase.ACCEPTED, Phase.HYDRATING))
        await rig.until(lambda: all(disk.stream and disk.stream.job for disk in rig.destination.disks))
        assert [job["device"] for job in await run("query-block-jobs")] == ["disk0", "disk1"]
        assert (await run("query-status"))["path"] == rig.overlays[0]
        assert (await run("query-status", device="disk1"))["path"] == rig.overlays[1]
        with pytest.raises(RefusedError, match="Cannot find device='disk2'"):
            await run("query-status", device="disk2")

        await run("job-pause", id="disk1")
        assert [job["status"] for job in await run("query-block-jobs")] == ["running", "paused"]
        await run("block-job-cancel", device="disk1", force=True)
        with pytest.raises(RefusedError, match="Job ID 'disk0' already in use"):
            await run("block-stream", device="disk1", job_id="disk0")
        await run("block-stream", device="disk1")
        await run("block-job-set-speed", device="disk0", speed=0)
        await rig.released()
        devices = [disk["device"] for disk in (await run("x-handover-status"))["disks"]]
        assert devices == ["disk0", "disk1"]
