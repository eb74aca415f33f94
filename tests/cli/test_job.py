"""``nbdstream job``, qmp-shell and a script, against streamers that run: what they do, print and return."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import qed
from tests.support.harness import make_image, pairs
from tests.support.processes import Command, nbdstream, run

if TYPE_CHECKING:
    from tests.support.harness import CommandPair, Pairs

__all__ = ["pairs"]

SIZE = 8 << 20
SCRIPTS = Path(__file__).parents[2] / "scripts"


class Controlled:
    """A streamer that streams nothing by itself, with a control socket."""

    def __init__(self, pair: CommandPair, *options: str) -> None:
        self.pair = pair
        self.path = f"{os.path.dirname(pair.overlay)}/control"
        self.streamer = pair.begin_streamer("--control", self.path, *options)
        self.streamer.wait_until_serving()

    def job(self, verb: str, *arguments: str, status: int | None = 0) -> str:
        """Run a verb, and return what it prints."""
        result = nbdstream("job", verb, "--control", self.path, *arguments, status=status)
        assert not result.stderr or status
        return result.stdout.removesuffix("\n")

    def json(self, verb: str, *arguments: str, status: int | None = 0) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.job(verb, "--json", *arguments, status=status))
        return result

    def refusal(self, verb: str, *arguments: str) -> str:
        """Run a verb that must fail, and return the one line that it says."""
        result = nbdstream("job", verb, "--control", self.path, *arguments, status=1)
        (line,) = result.stderr.splitlines()
        assert not result.stdout
        return line.removeprefix("nbdstream: ")


@pytest.fixture
def pair(pairs: Pairs) -> CommandPair:
    """A source that runs, with a disk of 8 MiB."""
    pair = pairs.commands(direct=True)
    make_image(pair.image, SIZE, random.Random(1), [(0, SIZE)])
    pair.start_source()
    return pair


@pytest.fixture
def controlled(pair: CommandPair) -> Controlled:
    return Controlled(pair, "--no-job")


def is_complete(pair: CommandPair) -> bool:
    """Whether the overlay, whose streamer has ended, is an image like the source's."""
    with open(pair.image, "rb") as image:
        return qed.qemu_check(pair.overlay).status == 0 and qed.content(pair.overlay) == image.read()


# The job.


def test_a_job_is_controlled_from_the_command_line(controlled: Controlled, pair: CommandPair) -> None:
    assert controlled.refusal("pause") == f"{controlled.path}: no job streams the disk"
    assert controlled.job("start", "--speed", "1") == "disk0 is being streamed"
    assert controlled.job("speed", "2M") == "disk0 is streamed with at most 2 MiB/s"
    assert controlled.job("speed", "--guest-latency", "4ms") == "4 ms are left to the guest's requests"
    assert controlled.json("status")["guest-latency"] == 0.004
    assert controlled.json("speed", "2M", "--guest-latency", "none") == {
        "id": "disk0", "speed": 2 << 20, "device": "disk0", "guest-latency": 0.0,
    }  # fmt: skip
    assert "guest-latency" not in controlled.json("status")
    assert controlled.job("pause") == "disk0 is paused"
    assert controlled.refusal("pause") == "Job is already paused"
    status = controlled.json("status")
    assert (status["job"]["status"], status["job"]["speed"]) == ("paused", 2 << 20)
    assert "job:     disk0, paused, at most 2 MiB/s" in controlled.job("status").splitlines()
    assert controlled.job("resume") == "disk0 goes on"
    assert "is cancelled" in controlled.job("cancel")
    assert controlled.job("wait", status=3) == "no job streams the disk"
    assert controlled.json("start") == {"id": "disk0"}
    assert controlled.job("wait") == "the overlay is independent"
    assert controlled.json("wait") == {"outcome": "independent"}
    assert pair.stop_streamer()
    assert is_complete(pair)


@pytest.mark.parametrize(
    ("verb", "arguments", "outcome", "status"),
    [("speed", ["0"], "independent", 0), ("cancel", [], "cancelled", 3)],
)
def test_who_waits_is_told_of_the_end(
    controlled: Controlled, verb: str, arguments: list[str], outcome: str, status: int
) -> None:
    controlled.job("start", "--speed", "1")
    with waiter(controlled) as waiting:
        controlled.job(verb, *arguments)
        assert waiting.wait() == status
    assert waiting.progress == [{"outcome": outcome}]


def test_who_waits_is_told_that_the_streamer_stops(controlled: Controlled, pair: CommandPair) -> None:
    controlled.job("start", "--speed", "1")
    with waiter(controlled) as waiting:
        assert not pair.stop_streamer()
        assert waiting.wait() == 3
    assert waiting.progress == [{"outcome": "cancelled"}]


def test_who_waits_notices_that_the_streamer_is_killed(controlled: Controlled, pair: CommandPair) -> None:
    controlled.job("start", "--speed", "1")
    with waiter(controlled) as waiting:
        pair.kill_streamer()
        assert waiting.wait() == 3
    assert waiting.progress == [{"outcome": "stopped"}]


def waiter(controlled: Controlled) -> Command:
    """Return ``job wait`` when it has begun to wait: with --debug, the library shows what it is answered."""
    waiting = Command("--debug", "job", "wait", "--json", "--control", controlled.path)
    waiting.wait_for("fetch-rate")
    return waiting


# Step by step.


def test_steps_lead_to_the_same_image_as_a_full_stream(controlled: Controlled, pair: CommandPair) -> None:
    offset, status = 0, 3
    while status == 3:
        command = ("job", "step", "--json", "--offset", str(offset), "--length", "3M", "--control", controlled.path)
        result = nbdstream(*command, status=None)
        status = result.returncode
        done = json.loads(result.stdout)
        assert done["finished"] == (status == 0)
        assert done["offset"] > offset
        offset = done["offset"]
    assert (offset, status) == (SIZE, 0)
    assert pair.stop_streamer()
    assert is_complete(pair)


def test_steps_need_no_offset(controlled: Controlled) -> None:
    assert controlled.job("step", "--length", "4M", status=3) == "go on at offset 4194304 (4 MiB)"
    assert controlled.job("step", "--length", "4M") == "the overlay is independent"
    assert controlled.json("step") == {"offset": SIZE, "finished": True}


def test_a_step_beside_a_job_is_refused(controlled: Controlled) -> None:
    controlled.job("start", "--speed", "1")
    assert controlled.refusal("step") == "disk0 is being streamed already"


def test_a_step_that_waits_for_the_source_does_not_keep_the_streamer(pairs: Pairs) -> None:
    pair = pairs.commands()
    make_image(pair.image, SIZE, random.Random(1), [(0, SIZE)])
    pair.start_source()
    controlled = Controlled(pair, "--no-job")
    pair.faults.stall()
    with Command("--debug", "job", "step", "--control", controlled.path) as step:
        step.wait_for("x-block-stream-step")
        assert controlled.refusal("start") == "disk0 is being streamed already"
        assert not pair.stop_streamer()
        assert step.wait() == 1
    assert step.lines[-1].endswith("the disk was closed")


def test_a_script_goes_step_by_step_with_nothing_but_the_socket(controlled: Controlled, pair: CommandPair) -> None:
    script = SCRIPTS / "step-by-step"
    assert "nbdstream" not in "".join(line for line in script.read_text().splitlines() if "import" in line.split()[:1])
    result = run("/usr/bin/python3", "-I", str(script), controlled.path, "3145728")
    assert result.stdout.splitlines() == [
        "go on at 3145728 of 8388608 bytes",
        "go on at 6291456 of 8388608 bytes",
        "independent at 8388608 of 8388608 bytes",
    ]
    assert run(str(script), controlled.path).stdout == ""
    assert pair.stop_streamer()
    assert is_complete(pair)


def test_without_a_guest_the_streamer_ends_with_the_last_step(pair: CommandPair, tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with Command("stream", pair.uri, pair.overlay, "--no-job", "--control", path) as streamer:
        streamer.wait_for("control socket")
        assert nbdstream("job", "step", "--control", path).stdout == "the overlay is independent\n"
        assert streamer.wait() == 0
    assert not os.path.exists(path)
    assert is_complete(pair)


# Other clients.


def test_qmp_shell_works_as_it_is(controlled: Controlled, tmp_path: Path) -> None:
    lines = ["block-stream device=disk0 speed=1", "job-pause id=disk0", "query-jobs", "block-job-pause device=x"]
    result = subprocess.run(
        [str(Path(sys.executable).with_name("qmp-shell")), "-p", controlled.path],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert "Connected to QEMU 0.1.0" in result.stdout
    assert '"status": "paused"' in result.stdout
    assert '"class": "DeviceNotActive"' in result.stdout


def test_quit_ends_the_streamer(controlled: Controlled) -> None:
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(controlled.path)
        control.sendall(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        lines = control.makefile("rb").read().splitlines()
    assert lines[2] == b'{"return": {}}'
    assert controlled.streamer.wait() == 3


def test_a_server_has_the_same_socket(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 512)
    path, served = str(tmp_path / "control"), str(tmp_path / "nbd")
    with Command("serve", str(tmp_path / "a"), "-U", served, "--control", path) as server:
        server.wait_for("control socket")
        assert os.stat(path).st_mode & 0o777 == 0o600
        result = subprocess.run(
            [str(Path(sys.executable).with_name("qmp-shell")), path],
            input=f"block-export-add type=nbd id=b node-name={tmp_path / 'b'} name=b\nquery-block-exports\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env=os.environ | {"HOME": str(tmp_path)},
        )
        assert '"id": "b"' in result.stdout
        uris = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={served}").stdout)["exports"]
        assert [export["export-name"] for export in uris] == ["", "b"]
        refused = nbdstream("job", "status", "--control", path, status=1).stderr
        assert "is not the control socket of a streamer" in refused
        assert server.stop() == 0
    assert not os.path.exists(path)


# Errors.


def test_what_is_no_control_socket_is_named(pair: CommandPair, tmp_path: Path) -> None:
    missing, file = str(tmp_path / "none"), tmp_path / "file"
    file.write_text("")
    for path, why in ((missing, "No such file or directory"), (str(file), "Connection refused")):
        for command in (["job", "status"], ["top"]):
            result = nbdstream(*command, "--control", path, status=1)
            assert result.stderr == f"nbdstream: {path}: cannot connect: {why}\n"


def test_a_server_of_another_protocol_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(30)
        with Command("job", "status", "--control", path) as asking:
            connection, _ = listener.accept()
            connection.sendall(b"220 hello\r\n")
            assert asking.wait() == 1
            connection.close()
    assert asking.lines == [f"nbdstream: {path}: this is no control socket"]


def test_a_control_socket_that_is_in_use_is_refused_before_anything_is_done(
    controlled: Controlled, pair: CommandPair
) -> None:
    other = f"{pair.overlay}.other"
    result = nbdstream("stream", pair.uri, other, "--control", controlled.path, status=1)
    assert "another server answers there" in result.stderr
    assert not os.path.exists(other)


@pytest.mark.parametrize(
    "line",
    ["job", "job nothing --control x", "job pause", "job speed --control x", "job speed fast --control x", "top",
     "top --control x --interval 0"],
)  # fmt: skip
def test_wrong_command_lines_are_usage_errors(line: str) -> None:
    nbdstream(*line.split(), status=2)
