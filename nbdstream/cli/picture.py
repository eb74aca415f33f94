"""Disks that are streamed, and handed over, as text: the lines of ``job status``, and the frames of ``top``."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nbdstream.text import printable
from nbdstream.units import format_rate, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_CELLS: Final = 512
"""Of a map; the streamer gives no more."""

_MOST_ROWS: Final = 6


class Cell(NamedTuple):
    """How a part of the disk is drawn."""

    glyph: str
    plain: str
    """Where the terminal has no Unicode."""
    colour: str
    """SGR's parameters."""
    meaning: str


_IN_FLIGHT: Final = Cell("»", ">", "33;1", "in flight")
_REMOTE: Final = Cell("·", ".", "2", "remote")
_PARTLY: Final = Cell("▒", "+", "32;2", "partly remote")
_WRITTEN: Final = Cell("W", "W", "36", "written by the guest")
_LOCAL: Final = Cell("█", "#", "32", "local")
_ZERO: Final = Cell("0", "0", "2", "zero")
_CELLS: Final = (_LOCAL, _WRITTEN, _ZERO, _PARTLY, _IN_FLIGHT, _REMOTE)


class Style(NamedTuple):
    """What the terminal can show."""

    colour: bool
    unicode: bool

    def draw(self, cells: Sequence[Cell]) -> str:
        """Return the cells as text, each run of one colour with one pair of escape sequences."""
        text, before = "", None
        for cell in cells:
            if self.colour and cell is not before:
                text += f"\033[0;{cell.colour}m"
            text += cell.glyph if self.unicode else cell.plain
            before = cell
        return text + "\033[0m" if self.colour and cells else text


def columns_for(width: int, disks: int = 1) -> int:
    """Return into how many parts a disk's map is to be divided that is ``width`` cells wide."""
    rows = min(_MOST_ROWS // max(1, disks), MOST_CELLS // width)
    return width * max(1, rows) if width < MOST_CELLS else MOST_CELLS


def frame(status: dict[str, Any], columns: Sequence[dict[str, int]], width: int, style: Style) -> list[str]:
    """Return what ``top`` shows, in lines of at most ``width`` cells: the map, what it means, and :func:`describe`."""
    cells = [_cell(column) for column in columns]
    lines = [style.draw(cells[at : at + width]) for at in range(0, len(cells), width)]
    legend, used = "", 0
    for cell in _CELLS:
        needed = len(cell.meaning) + 2 + (2 if used else 0)
        if used + needed <= width:
            legend += ("  " if used else "") + f"{style.draw([cell])} {cell.meaning}"
            used += needed
    return [*lines, legend, *(line[:width] for line in describe(status))]


def _cell(amounts: dict[str, int]) -> Cell:
    if amounts["in-flight"]:
        return _IN_FLIGHT
    if amounts["remote"]:
        return _PARTLY if amounts["local"] or amounts["zero"] else _REMOTE
    if amounts["written"]:
        return _WRITTEN
    return _LOCAL if amounts["local"] else _ZERO


def streamed(handover: dict[str, Any]) -> list[str]:
    """Return the devices of the disks that are streamed at this side of a hand-over."""
    return [disk["device"] for disk in handover["disks"] if "device" in disk]


def describe_handover(status: dict[str, Any]) -> list[str]:
    """Return what x-handover-status tells, in lines for people."""
    connected = "connected" if status["connected"] else "not connected"
    lines = [f"{status['role']}: {status['state']}, epoch {status['epoch']}, {connected}", status["advice"]]
    if status["remote"]:
        lines.append(f"only at the source: {status['remote']} bytes ({format_size(status['remote'])})")
    for disk in status["disks"]:
        guard = "; a block device: nothing but its locks keeps others from it" if disk.get("unguarded") else ""
        lines.append(f"disk {disk['uuid']}, {disk['size']} bytes: {printable(disk['path'])}{guard}")
    if status["problem"]:
        lines.append(f"problem: {printable(status['problem'])}")
    return lines + [f"ALARM: {printable(alarm)}" for alarm in status["alarms"]]


def describe(status: dict[str, Any]) -> list[str]:
    """Return what query-status tells, in lines for people."""
    length, position = status["length"], status["position"]
    share = math.floor(100 * position / length) if length else 100
    lines = [
        f"disk:    {status['device']}, {printable(status['path'])}",
        f"state:   {_state(status)}",
        f"local:   {format_size(position)} of {format_size(length)} ({share}%) need the source no more",
    ]
    if "source" in status:
        lines.append(f"source:  {printable(status['source'])}")
    lines.append(f"job:     {_job(status)}")
    lines.append(
        f"fetched: {format_size(status['fetched'])}, now {format_rate(status['fetch-rate'])}"
        + (f", {_time_left(status)} left" if status.get("job", {}).get("status") == "running" else "")
    )
    lines.append(
        f"guest:   reads {format_rate(status['read-rate'])}, writes {format_rate(status['write-rate'])}, "
        f"{status['waiting']} requests wait for the source"
    )
    lines.append(f"latency: {_latency(status['latency'])}; of what is remote {_latency(status['remote-latency'])}")
    return lines


def _state(status: dict[str, Any]) -> str:
    state = str(status["status"])
    if "since" in status:
        state += f" since {_clock(status['since'])}: {printable(status.get('reason', ''))}"
    if "full-since" in status:
        state += f"; its disk is full since {_clock(status['full-since'])}"
    return state


def _job(status: dict[str, Any]) -> str:
    job = status.get("job")
    if not job:
        return "none"
    limit = f"at most {format_rate(job['speed'])}" if job["speed"] else "no limit"
    return f"{job['device']}, {job['status']}, {limit}"


def _time_left(status: dict[str, Any]) -> str:
    if not status["fetch-rate"]:
        return "?"
    seconds = round((status["length"] - status["position"]) / status["fetch-rate"])
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _latency(latency: dict[str, Any]) -> str:
    if not latency["requests"]:
        return "-"
    return f"{1000 * latency['p50']:.2f} ms (99%: {1000 * latency['p99']:.2f} ms)"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
