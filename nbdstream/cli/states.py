"""What a side of a hand-over has in its state directory besides the journal: the socket for 'nbdstream handover'."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from nbdstream.cli.control import control_socket
from nbdstream.control.commands import Commands
from nbdstream.control.disk import DiskCommands
from nbdstream.control.handover import HandoverCommands
from nbdstream.control.server import ControlServer
from nbdstream.handover.destination import DestinationDriver

if TYPE_CHECKING:
    import argparse
    import asyncio
    from contextlib import AsyncExitStack

    from nbdstream.handover.source import SourceDriver


def control_path(state: str) -> str:
    """Return where the control socket of a state directory is."""
    return os.path.join(state, "control")


async def control_sockets(
    stack: AsyncExitStack, driver: SourceDriver | DestinationDriver, options: argparse.Namespace, stop: asyncio.Event
) -> None:
    """Take commands in the state directory, and where --control says. Raises ListenError."""
    servers = [await stack.enter_async_context(ControlServer(control_path(options.state)))]
    if control := await stack.enter_async_context(control_socket(options)):
        servers.append(control)

    def emit(name: str, data: dict[str, Any]) -> None:
        for server in servers:
            server.emit(name, data)

    commands = Commands(stop.set)
    HandoverCommands(driver, emit).add_to(commands)
    if isinstance(driver, DestinationDriver):
        disks = DiskCommands(emit)
        disks.add_to(commands)
        driver.streaming.append(disks.add)
    for server in servers:
        await server.begin(commands)
