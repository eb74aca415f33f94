"""``nbdstream top``: one plain frame, lines of JSON, and a picture on a terminal that leaves it as it was."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import select
import signal
import struct
import subprocess
import termios
import time
from fcntl import ioctl
from typing import TYPE_CHECKING

import pytest

from tests.support.harness import make_image, pairs
from tests.support.processes import NBDSTREAM, PATIENCE_SECONDS, Command, nbdstream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.harness import CommandPair, Pairs

__all__ = ["pairs"]

SIZE = 8 << 20


@pytest.fixture
def pair(pairs: Pairs) -> CommandPair:
    """A streamer of 8 MiB that has streamed the first half and goes no further."""
    pair = pairs.commands(direct=True)
    make_image(pair.image, SIZE, random.Random(1), [(0, SIZE)])
    pair.start_source()
    pair.begin_streamer("--control", control(pair), "--no-job").wait_until_serving()
    nbdstream("job", "step", "--length", "4M", "--control", control(pair), status=3)
    return pair


def control(pair: CommandPair) -> str:
    return f"{os.path.dirname(pair.overlay)}/control"


class Terminal:
    """``top`` on a terminal of 80 by 24."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self.shown = ""
        self._theirs = theirs
        self.process = subprocess.Popen(
            [NBDSTREAM, "top", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"LC_ALL": "C.UTF-8", "TERM": "xterm"},
            preexec_fn=os.setsid,  # noqa: PLW1509 - there are no threads here
        )

    def wait_for(self, text: str) -> None:
        """Read until it has shown a text."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was not shown: {self.shown!r}"
            self._read()

    def _read(self) -> None:
        if select.select([self._ours], [], [], 0.1)[0]:
            self.shown += os.read(self._ours, 65536).decode()

    def press(self, key: str) -> None:
        os.write(self._ours, key.encode())

    def wait(self) -> int:
        """Return the status with which it ends; the terminal must be as it was."""
        while self.process.poll() is None:
            self._read()
        self._read()
        assert termios.tcgetattr(self._theirs) == self.before
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    shown = Terminal(*arguments)
    try:
        yield shown
    finally:
        shown.close()


@pytest.mark.parametrize("options", [[], ["--once"]])
def test_elsewhere_than_on_a_terminal_it_is_one_plain_frame(pair: CommandPair, options: list[str]) -> None:
    shown = nbdstream("top", "--control", control(pair), *options).stdout
    assert "\033" not in shown
    assert shown.isprintable() or "\n" in shown
    lines = shown.splitlines()
    assert lines[0] == "█" * 64 + "·" * 16 or lines[0].startswith("█")
    assert any(line.startswith("local:   4 MiB of 8 MiB (50%)") for line in lines)


def test_json_is_a_status_with_a_map_on_each_line(pair: CommandPair) -> None:
    (line,) = nbdstream("top", "--control", control(pair), "--once", "--json").stdout.splitlines()
    status = json.loads(line)
    assert (status["position"], status["length"]) == (SIZE // 2, SIZE)
    assert sum(part["local"] for part in status["map"]) == SIZE // 2
    with Command("top", "--control", control(pair), "--json", "--interval", "0.1") as lines:
        lines.wait_for_progress("position", SIZE // 2)
        nbdstream("job", "step", "--control", control(pair))
        lines.wait_for_progress("position", SIZE)
        assert lines.stop(signal.SIGINT) == 0


def test_on_a_terminal_it_is_a_picture_until_q(pair: CommandPair) -> None:
    with terminal("--control", control(pair), "--interval", "0.1") as shown:
        shown.wait_for("(50%)")
        nbdstream("job", "step", "--control", control(pair))
        shown.wait_for("state:   independent")
        shown.press("q")
        assert shown.wait() == 0
        assert shown.shown.startswith("\033[?1049h")
        left = shown.shown.rpartition("\033[?1049l")[2]
        assert "state:   independent" in left


def test_it_ends_on_ctrl_c(pair: CommandPair) -> None:
    with terminal("--control", control(pair)) as shown:
        shown.wait_for("(50%)")
        shown.process.send_signal(signal.SIGINT)
        assert shown.wait() == 0
        assert "Traceback" not in shown.shown


def test_it_ends_when_the_streamer_goes(pair: CommandPair) -> None:
    with terminal("--control", control(pair), "--interval", "0.1") as shown:
        shown.wait_for("(50%)")
        pair.kill_streamer()
        assert shown.wait() == 0
        assert "nobody answers any more" in shown.shown.rpartition("\033[?1049l")[2]
