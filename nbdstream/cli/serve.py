"""Export an image over NBD, read-only unless --writable is given.

The NBD URI is logged once clients can connect. SIGTERM and SIGINT finish what is in flight, and exit with 0."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from nbdstream.block.chain import open_device
from nbdstream.cli import arguments
from nbdstream.cli.running import stop_signals
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.service import notify
from nbdstream.uri import DEFAULT_PORT

if TYPE_CHECKING:
    import argparse

log = logging.getLogger(__name__)

_MOST_CLIENTS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``serve`` understands."""
    parser.add_argument("image", metavar="IMAGE", help="a raw image, a block device, or with -f qed a QED image")
    arguments.add_format(parser)
    arguments.add_backing_format(parser)
    parser.add_argument("-x", "--export-name", default="", metavar="NAME", help='name of the export (default: "")')
    parser.add_argument("-U", "--unix", "-k", "--socket", metavar="PATH", help="listen on a unix socket")
    parser.add_argument(
        "-b", "--bind", default="127.0.0.1", metavar="ADDR", help="listen on this address (default: 127.0.0.1)"
    )
    parser.add_argument(
        "-p",
        "--port",
        type=arguments.count(0, 65535),
        default=DEFAULT_PORT,
        metavar="PORT",
        help=f"listen on this TCP port (default: {DEFAULT_PORT}; 0: any free one)",
    )
    access = parser.add_mutually_exclusive_group()
    access.add_argument("-r", "--read-only", action="store_true", help="let nobody write (the default)")
    access.add_argument("--writable", action="store_true", help="let clients write")
    parser.add_argument(
        "-e",
        "--shared",
        type=arguments.count(0, _MOST_CLIENTS),
        default=0,
        metavar="N",
        help="let at most N clients connect at a time (default: 0, no limit of its own)",
    )
    arguments.add_socket_access(parser)


async def run(options: argparse.Namespace) -> int:
    """Serve until told to stop."""
    path = options.image
    async with AsyncExitStack() as stack:
        device = await open_device(path, options.format, options.backing_format, writable=options.writable)
        stack.push_async_callback(device.close)
        export = Export(
            options.export_name,
            device,
            writable=options.writable,
            description=path,
            max_connections=options.shared or None,
        )
        server = NbdServer([export])
        stack.push_async_callback(server.close)
        with stop_signals() as stop:
            if options.unix:
                await server.listen_unix(options.unix, mode=options.socket_mode, group=options.socket_group)
            else:
                await server.listen_tcp(options.bind, options.port)
            for uri in server.uris:
                log.info("serving %s at %s", path, uri)
            notify.ready(f"serving {path}")
            await stop.wait()
            notify.stopping()
    return 0
