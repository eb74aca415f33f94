"""The control socket of a command that runs for long: --control and who may use it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from nbdstream.control.server import ControlServer

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator


def add_control(parser: argparse.ArgumentParser) -> None:
    """Add --control. Who may connect is said by the options for unix sockets."""
    parser.add_argument("--control", metavar="PATH", help="take commands on this unix socket (QMP: docs/control.md)")


@asynccontextmanager
async def control_socket(options: argparse.Namespace) -> AsyncIterator[ControlServer | None]:
    """Give the control socket that the command line asks for, bound, and close it at the end. Raises ListenError."""
    if options.control is None:
        yield None
        return
    async with ControlServer(options.control, mode=options.socket_mode, group=options.socket_group) as control:
        yield control
