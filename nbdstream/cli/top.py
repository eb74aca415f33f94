"""Watch a disk being streamed, by the control socket of 'nbdstream stream --control PATH'.

On a terminal this is a live picture: a map of the disk, rates, the guest's latency and the time that is left. It ends
on q, on Ctrl-C, and when the streamer goes. Elsewhere, or with --once, it is one picture in plain text."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nbdstream.cli import arguments
from nbdstream.cli.picture import MOST_CELLS, Style, columns_for, frame
from nbdstream.cli.running import stop_signals
from nbdstream.errors import ControlLostError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from nbdstream.cli.monitor import Monitor

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
    """Print query-status and the map, on a line at a time."""
    with stop_signals() as stop:
        try:
            while not stop.is_set():
                status = await monitor.execute("query-status")
                found = await monitor.execute("x-query-map", columns=MOST_CELLS)
                sys.stdout.write(json.dumps(status | {"map": found["columns"]}) + "\n")
                sys.stdout.flush()
                if options.once:
                    break
                await _pause(stop, options.interval)
        except ControlLostError:
            if options.once:
                raise


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
    found = await monitor.execute("x-query-map", columns=columns_for(width))
    status = await monitor.execute("query-status")
    unicode = sys.stdout.encoding.lower().startswith("utf")
    return frame(status, found["columns"], width, Style(colour, unicode))


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
