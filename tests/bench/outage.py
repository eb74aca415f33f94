"""The source goes away while a disk is streamed, and comes back: how long until the stream is as fast as before.

The source is nbdkit, held to a rate so that there is something left to stream; it is killed, and started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from tests.bench.disk import bring_into_cache, settle
from tests.bench.peers import our_commands
from tests.bench.process import BenchError, on_unix, serving
from tests.bench.results import Section, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.bench.peers import Competitor

AWAY_SECONDS: Final = (0.5, 4.0)
STREAMED_SECONDS: Final = 5.0
"""The rate is such that the whole disk takes so long."""
BEFORE: Final = 0.15
AFTER: Final = 0.7
"""Shares of the disk that are there when the source goes away, and when the measurement ends."""
WINDOW_SECONDS: Final = 0.25
"""The rate filter lets bytes through in bursts of up to so long, and a rate is told over so long."""
FULL: Final = 0.9
"""Of the rate before."""
POLL_SECONDS: Final = 0.005
LONGEST_SECONDS: Final = 60.0


def measure_outages(
    path: str, who: Sequence[Competitor], ours: str, *, rounds: int, scratch: str, sockets: str
) -> Section:
    """Measure how fast nbdstream (the only one who goes on by itself) is back after the source was away."""
    commands = our_commands(ours, None)
    section = Section(
        "outage",
        "From the source's return until the stream is as fast as before",
        [each for each in who if each.key in commands],
        [_workload(away) for away in AWAY_SECONDS],
    )
    for round_number in range(rounds):
        for away in AWAY_SECONDS:
            for competitor in section.turn(round_number):
                print(f"outage, round {round_number + 1}, {away:g} s, {competitor.label}", file=sys.stderr)
                try:
                    seconds = _measure(path, commands[competitor.key][1], away, scratch, sockets)
                except BenchError as error:
                    section.fail(competitor, str(error))
                else:
                    section.add(_workload(away), competitor, seconds)
    return section


def _workload(away: float) -> Workload:
    return Workload(f"away for {away:g} s", "s")


def _measure(path: str, command: str, away: float, scratch: str, sockets: str) -> float:
    bring_into_cache(path)
    settle()
    size = os.path.getsize(path)
    source, overlay, monitor = on_unix(f"{sockets}/outage"), f"{scratch}/outage.qed", f"{sockets}/outage-control"
    bits = int(size / STREAMED_SECONDS) * 8
    nbdkit = ["nbdkit", "-f", "-r", "-U", source.where, "--filter=rate", "file", path, f"rate={bits}",
              f"burstiness={WINDOW_SECONDS}"]  # fmt: skip
    streamer = [command, "stream", source.uri, overlay, "--control", monitor]
    try:
        with contextlib.ExitStack() as second:
            with serving(nbdkit, source) as server:
                status = second.enter_context(_streaming(streamer, monitor))
                _until(status, BEFORE * size)
                server.kill()
            os.unlink(source.where)
            time.sleep(away)
            second.enter_context(serving(nbdkit, source))
            return _until_fast(status, FULL * size / STREAMED_SECONDS, AFTER * size)
    finally:
        for left in (overlay, source.where, monitor):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)


def _until(status: Status, fetched: float) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while status.fetched() < fetched:
        if time.monotonic() > deadline:
            raise BenchError("nothing comes from the source")
        time.sleep(POLL_SECONDS)


def _until_fast(status: Status, rate: float, most: float) -> float:
    """Return the seconds from now until the first moment from which on the rate was reached over a window."""
    began = time.monotonic()
    samples = [(0.0, status.fetched())]
    while samples[-1][1] < most:
        time.sleep(POLL_SECONDS)
        samples.append((time.monotonic() - began, status.fetched()))
        if samples[-1][0] > LONGEST_SECONDS:
            break
        start = next((at for at in samples if at[0] >= samples[-1][0] - WINDOW_SECONDS), samples[0])
        elapsed = samples[-1][0] - start[0]
        if elapsed > WINDOW_SECONDS - 4 * POLL_SECONDS and (samples[-1][1] - start[1]) / elapsed >= rate:
            return max(start[0], POLL_SECONDS)  # nearer than that it was not looked
    raise BenchError("the stream is never again as fast as before")


class Status:
    """What a control socket tells of a stream: as much of a QMP client as that takes."""

    def __init__(self, path: str) -> None:
        """Connect. Raises OSError."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rwb")
        self._lines.readline()  # the greeting
        self._execute("qmp_capabilities")

    def fetched(self) -> int:
        """Return how many bytes came from the source."""
        return int(self._execute("query-status")["fetched"])

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()

    def _execute(self, command: str) -> dict[str, Any]:
        self._lines.write(json.dumps({"execute": command}).encode() + b"\n")
        self._lines.flush()
        while line := self._lines.readline():
            message: dict[str, Any] = json.loads(line)
            if "return" in message:
                result: dict[str, Any] = message["return"]
                return result
        raise BenchError("the control socket was closed")


@contextlib.contextmanager
def _streaming(argv: Sequence[str], monitor: str) -> Iterator[Status]:
    with serving(argv, on_unix(monitor)), contextlib.closing(Status(monitor)) as status:
        yield status
