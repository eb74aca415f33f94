"""Export images over NBD, read-only unless --writable is given.

A single IMAGE is the export "" (or -x NAME). Several are named by their files, or NAME=IMAGE each, and the first is
the default export, too. What begins with / or ./ or ../, or has no =, is a path as it stands. Else it is
NAME=IMAGE[,format=raw|qed][,writable=on|off][,allow=CN:CN...][,backing-format=FORMAT:FORMAT...][,description=TEXT],
with a comma in a name, a path or a text written twice. allow= has the certificate names of the clients that may open
the export (it needs --tls-verify-peer).

The NBD URIs are logged once clients can connect. SIGTERM and SIGINT finish what is in flight, and exit with 0."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from itertools import cycle
from typing import TYPE_CHECKING

from nbdstream.cli import arguments, exports
from nbdstream.cli.control import add_control, control_socket
from nbdstream.cli.exports import ExportSpec
from nbdstream.cli.limits import add_limits, limits
from nbdstream.cli.listening import Listening, add_listening, refuse_exposure
from nbdstream.cli.running import either, stop_signals
from nbdstream.cli.stdio import Stdio
from nbdstream.cli.tls import add_tls, tls_policy
from nbdstream.control.commands import Commands
from nbdstream.control.exports import ExportCommands, Exports
from nbdstream.server.server import NbdServer
from nbdstream.service import notify
from nbdstream.service.activation import activated_sockets

if TYPE_CHECKING:
    import argparse

    from nbdstream.server.export import Export

log = logging.getLogger(__name__)

_MOST_CLIENTS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``serve`` understands."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a raw image, a block device, or with -f qed a QED image; or NAME=IMAGE[,KEY=VALUE...]",
    )
    arguments.add_format(parser)
    arguments.add_backing_format(parser)
    parser.add_argument("-x", "--export-name", metavar="NAME", help='name of a single export (default: "")')
    access = parser.add_mutually_exclusive_group()
    access.add_argument("-r", "--read-only", action="store_true", help="let nobody write (the default)")
    access.add_argument("--writable", action="store_true", help="let clients write")
    parser.add_argument(
        "-e",
        "--shared",
        type=arguments.count(0, _MOST_CLIENTS),
        default=0,
        metavar="N",
        help="let at most N clients have an export open at a time (default: 0, no limit of its own)",
    )
    add_listening(parser)
    add_control(parser)
    add_tls(parser)
    add_limits(parser)


async def run(options: argparse.Namespace) -> int:
    """Serve until told to stop, or with --stdio until the client has gone."""
    specs = _specs(options)
    policy = tls_policy(options, specs)
    where = Listening.choose(options, activated_sockets())
    stdio = Stdio() if options.stdio else None
    if not (options.insecure or (policy and policy.required)):
        await refuse_exposure([*where.activated, stdio.socket] if stdio else where.activated, where.tcp)
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(control_socket(options))
        images = Exports(shared=options.shared or None)
        stack.push_async_callback(images.close)
        opened = [await _open(f"export{number}", spec, images) for number, spec in enumerate(specs)]
        server = NbdServer(opened, limits=limits(options), tls=policy)
        stack.push_async_callback(server.close)
        with stop_signals() as stop:
            await where.begin(server, options)
            if control:
                commands = Commands(stop.set)
                exported = ExportCommands(images, server, control.emit)
                stack.push_async_callback(exported.close)
                exported.add_to(commands)
                await control.begin(commands)
            for uri, spec in zip(server.uris, cycle(specs), strict=False):
                log.info("serving %s at %s", spec.path, uri)
            notify.ready(f"serving {specs[0].path if len(specs) == 1 else f'{len(specs)} exports'}")
            if stdio:
                log.info("serving %s on standard input and output", ", ".join(spec.path for spec in specs))
                await either(stop, server.serve_client(stdio.socket))
            else:
                await stop.wait()
            notify.stopping()
    if stdio:
        stdio.finish()
    return 0


def _specs(options: argparse.Namespace) -> list[ExportSpec]:
    exports.check_ambiguity(options.images)
    return exports.complete(
        [ExportSpec.parse(text) for text in options.images],
        name=options.export_name,
        image_format=options.format,
        writable=options.writable,
        backing_formats=options.backing_format,
    )


async def _open(export_id: str, spec: ExportSpec, images: Exports) -> Export:
    try:
        return await images.open(
            export_id,
            spec.path,
            spec.name or "",
            image_format=spec.image_format,
            backing_formats=spec.backing_formats or (),
            writable=bool(spec.writable),
            description=spec.description,
            allow=spec.allow,
        )
    except ValueError as error:
        raise arguments.UsageError(f"{spec.path}: {error}") from None
