"""Make a remote disk local while it is used.

OVERLAY is made if it does not exist, else resumed; once it is independent of SOURCE it is served without it, so one
command line serves a disk for its whole life. With -U the guest's disk is there before anything has been fetched.

exit codes:
  0  the overlay is independent (with -U: and the command was told to stop)
  1  failed
  2  usage
  3  stopped before the overlay was independent; the same command resumes it"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from nbdstream.cli import arguments
from nbdstream.cli.control import add_control, control_socket
from nbdstream.cli.fetching import add_fetching, source_options
from nbdstream.cli.progress import Reporter, bar, json_lines
from nbdstream.cli.running import either, stop_signals
from nbdstream.control.commands import Commands
from nbdstream.control.disk import DiskCommands
from nbdstream.service import notify
from nbdstream.stream.disk import DiskStream
from nbdstream.units import format_size

if TYPE_CHECKING:
    import argparse

log = logging.getLogger(__name__)

_STOPPED_EARLY = 3
_REPORTS: dict[str, Reporter] = {"bar": bar, "json": json_lines}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``stream`` understands."""
    parser.add_argument("source", metavar="SOURCE", help="NBD URI (nbd://, nbds://, nbd+unix://) of the disk")
    parser.add_argument("overlay", metavar="OVERLAY", help="the local QED image")
    parser.add_argument("-U", "--unix", metavar="PATH", help="serve the disk to a guest on this unix socket")
    parser.add_argument(
        "--no-job", dest="job", action="store_false", help="serve, but stream nothing before somebody asks for it"
    )
    lost = add_fetching(parser)
    lost.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="SOURCE",
        help="another server of the same disk, to be used while SOURCE is not to be had; may be given several times",
    )
    lost.add_argument(
        "--rebase",
        action="store_true",
        help="OVERLAY is one of another source, which has moved for good: take over SOURCE in its place",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("-p", dest="progress", action="store_const", const="bar", help="the same as --progress bar")
    shown.add_argument("--progress", choices=sorted(_REPORTS), help="show a bar, or a line of JSON a second")
    add_control(parser)
    arguments.add_socket_access(parser)


async def run(options: argparse.Namespace) -> int:
    """Stream, and serve until told to stop."""
    async with AsyncExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        control = await stack.enter_async_context(control_socket(options))
        disk = await DiskStream.start(
            options.source,
            options.overlay,
            socket=options.unix,
            socket_mode=options.socket_mode,
            socket_group=options.socket_group,
            also=options.also,
            options=source_options(options),
            moved=options.rebase,
            job=options.job,
            speed=options.rate,
            guest_latency=options.guest_latency,
        )
        await stack.enter_async_context(disk)
        if control:
            commands = Commands(stop.set)
            DiskCommands(control.emit, disk).add_to(commands)
            await control.begin(commands)
        for uri in disk.uris:
            log.info("serving %s at %s", options.overlay, uri)
        notify.ready(f"streaming {options.overlay}")
        finished = await _stream(disk, stop, options.progress)
        if finished and options.unix:
            notify.status(f"{options.overlay} is independent")
            await stop.wait()
        notify.stopping()
    if not finished:
        log.warning("stopped before %s was independent: the same command resumes it", options.overlay)
    return 0 if finished else _STOPPED_EARLY


async def _stream(disk: DiskStream, stop: asyncio.Event, report: str | None) -> bool:
    """Wait for independence, showing the progress; return whether it was reached."""
    if disk.independent:
        log.info("%s is independent: the source is not needed", disk.path)
        return True
    loop = asyncio.get_running_loop()
    began = loop.time()
    reporting = asyncio.ensure_future(_REPORTS[report](lambda: disk.progress)) if report else None
    try:
        finished = await either(stop, disk.wait())
    finally:
        if reporting:
            reporting.cancel()
            await asyncio.wait([reporting])
    if finished:
        progress = disk.progress
        log.info(
            "%s is independent: fetched %d bytes (%s) of %d allocated in %.1f s",
            disk.path,
            progress.fetched,
            format_size(progress.fetched),
            progress.allocated,
            loop.time() - began,
        )
    return finished
