"""Watch disks being streamed, by the control socket of 'nbdstream stream', 'receive' or 'offer' (--control PATH).

On a terminal this is a live picture: a map of the disk, rates, the guest's latency and the time that is left. It ends
on q, on Ctrl-C, and when the streamer goes. Elsewhere, or with --once, it is one picture in plain text."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import termios
import textwrap
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from nbdstream.cli import arguments
from nbdstream.cli.picture import MOST_CELLS, Style, columns_for, describe_handover, frame, streamed
from nbdstream.cli.running import stop_signals
from nbdstream.errors import ControlLostError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from nbdstream.cli.monitor import Monitor

_Seen: TypeAlias = tuple[dict[str, Any], list[dict[str, int]]]
"""Of a disk: query-status, and the columns of its map."""

_ENTER = "\033[?1049h\033[?25l"  # the alternate screen, without a cursor
_LEAVE = "\033[?25h\033[?1049l"
_KEYBOARD = 0
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\033[H", "\033[K", "\033[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``top`` understands."""
    parser.add_argument("--control", required=True, metavar="PATH", help="the streamer's control socket")
    parser.add_argument("--once", action="store_true", help="show one picture and end")
    parser.add_argument(
        "--interval", type=arguments.seconds, default=0.5, metavar="SECONDS", help="between two pictures (default: 0.5)"
    )
    arguments.add_json(parser)


async def run(options: argparse.Namespace) -> int:
    """Show what there is to see until somebody has seen enough."""
    from nbdstream.cli.monitor import connected  # noqa: PLC0415 - see there

    async with connected(options.control, debug=options.debug) as monitor:
        if options.json:
            await _print_json(monitor, options)
        elif options.once or not sys.stdout.isatty():
            sys.stdout.write("\n".join(await _look(monitor, colour=False)) + "\n")
        else:
            await _show(monitor, options.interval)
    return 0


async def _print_json(monitor: Monitor, options: argparse.Namespace) -> None:
    """Print query-status and the map, on a line at a time; of a hand-over, these of each disk, and where it stands."""
    with stop_signals() as stop:
        try:
            while not stop.is_set():
                handover, disks = await _ask(monitor, MOST_CELLS)
                found = [status | {"map": columns} for status, columns in disks]
                line = found[0] if handover is None else {"handover": handover, "disks": found}
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()
                if options.once:
                    break
                await _pause(stop, options.interval)
        except ControlLostError:
            if options.once:
                raise


async def _ask(monitor: Monitor, width: int) -> tuple[dict[str, Any] | None, list[_Seen]]:
    """Return where a hand-over stands, if there is one, and what there is to see of the disks that are streamed."""
    handover = await monitor.handover()
    if handover is None:
        return None, [await _ask_disk(monitor, columns_for(width))]
    devices = streamed(handover)
    columns = columns_for(width, len(devices))
    return handover, [await _ask_disk(monitor, columns, device=device) for device in devices]


async def _ask_disk(monitor: Monitor, columns: int, **chosen: str) -> _Seen:
    found = await monitor.execute("x-query-map", columns=columns, **chosen)
    return await monitor.execute("query-status", **chosen), found["columns"]


async def _show(monitor: Monitor, interval: float) -> None:
    """Draw one frame over the other; leave the last one behind."""
    lines: list[str] = []
    end = ""
    with stop_signals() as stop, _screen(stop):
        try:
            while not stop.is_set():
                lines = await _look(monitor, colour=True)
                # The last line of the terminal stays empty, or it would scroll.
                shown = lines[: shutil.get_terminal_size().lines - 1]
                sys.stdout.write(_HOME + "".join(f"{_CLEAR_LINE}{line}\n" for line in shown) + _CLEAR_BELOW)
                sys.stdout.flush()
                await _pause(stop, interval)
        except ControlLostError as gone:
            end = f"{gone}\n"
    sys.stdout.write("".join(f"{line}\n" for line in lines) + end)


async def _look(monitor: Monitor, *, colour: bool) -> list[str]:
    width = shutil.get_terminal_size().columns
    style = Style(colour, sys.stdout.encoding.lower().startswith("utf"))
    handover, disks = await _ask(monitor, width)
    frames = [frame(status, columns, width, style) for status, columns in disks]
    if handover is None:
        return frames[0]
    said = [part for line in describe_handover(handover) for part in textwrap.wrap(line, width)]
    return [*said, *(line for each in frames for line in ("", *each))]


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass


@contextmanager
def _screen(stop: asyncio.Event) -> Iterator[None]:
    """Have the terminal to ourselves; ``q`` sets ``stop``."""
    loop = asyncio.get_running_loop()
    before = termios.tcgetattr(_KEYBOARD) if os.isatty(_KEYBOARD) else None

    def pressed() -> None:
        keys = os.read(_KEYBOARD, 64)
        if not keys or b"q" in keys:
            stop.set()

    if before is not None:
        tty.setcbreak(_KEYBOARD)
        loop.add_reader(_KEYBOARD, pressed)
    sys.stdout.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        if before is not None:
            loop.remove_reader(_KEYBOARD)
            termios.tcsetattr(_KEYBOARD, termios.TCSADRAIN, before)
