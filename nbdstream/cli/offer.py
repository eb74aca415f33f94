"""Hand the disks of a running machine over to another host.

The first line on standard output is the offer, for 'nbdstream receive' on the other host: whoever has it may become
the destination, once. It is in DIR/offer, too. The guest runs on here until 'nbdstream handover fence --state DIR' (or
x-handover-fence on the control socket). The same command again goes on from where the state directory says that it was.

Without TLS the destination must be on this host. The destination needs two ports: that of --listen, and --nbd-port.

exit codes:
  0  released: the destination is independent
  1  failed
  2  usage
  3  told to stop before it was over; the same command goes on
  4  called off: the guest belongs here"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from nbdstream.block.qed.layout import MAGIC
from nbdstream.cli import arguments
from nbdstream.cli.arguments import UsageError
from nbdstream.cli.control import add_control
from nbdstream.cli.listening import refuse_exposure
from nbdstream.cli.running import either, stop_signals
from nbdstream.cli.states import control_sockets
from nbdstream.errors import ImageError
from nbdstream.handover.journal import Journal
from nbdstream.handover.source import (
    DEFAULT_EXPIRES_SECONDS,
    DEFAULT_FENCE_SECONDS,
    SourceDriver,
    SourceOptions,
    new_offer,
    open_source,
)
from nbdstream.server.tls import TlsPolicy, server_context
from nbdstream.service import notify
from nbdstream.wire.handover.messages import MAXIMUM_DISKS
from nbdstream.wire.handover.vocabulary import Phase

if TYPE_CHECKING:
    from nbdstream.handover.journal import SourceContents

log = logging.getLogger(__name__)

_STOPPED_EARLY = 3
_CALLED_OFF = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``offer`` understands."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="the machine's disks, all of them")
    arguments.add_format(parser)
    parser.add_argument(
        "--listen", type=_address, required=True, metavar="ADDR:PORT", help="for the destination; port 0: any free one"
    )
    parser.add_argument(
        "--nbd-port",
        type=arguments.count(0, 65535),
        default=0,
        metavar="PORT",
        help="for the destination's NBD connections, at the same address (default: any free one)",
    )
    parser.add_argument("--state", required=True, metavar="DIR", help="where the journal is kept")
    parser.add_argument(
        "--tls-certificates", metavar="DIR", help="use TLS: server-cert.pem, server-key.pem and ca-cert.pem"
    )
    hooks = parser.add_argument_group("hooks", "shell commands; what they are told is in docs/operating.md")
    hooks.add_argument("--on-fence", metavar="CMD", help="have the guest pause, flush, and let go of the images")
    hooks.add_argument("--on-resume", metavar="CMD", help="let the guest run here again")
    hooks.add_argument(
        "--on-release",
        default="keep",
        metavar="keep|remove|CMD",
        help="what becomes of the images when the destination is independent (default: keep)",
    )
    parser.add_argument(
        "--fence-timeout",
        type=arguments.seconds,
        default=DEFAULT_FENCE_SECONDS,
        metavar="SECONDS",
        help="let the guest go on if the destination is lost after the fence and does not come back in time "
        f"(default: {DEFAULT_FENCE_SECONDS:g})",
    )
    parser.add_argument(
        "--expires",
        type=arguments.duration,
        default=DEFAULT_EXPIRES_SECONDS,
        metavar="TIME",
        help="how long an offer that nobody uses is good for (default: 24h)",
    )
    add_control(parser)
    arguments.add_socket_access(parser)


async def run(options: argparse.Namespace) -> int:
    """Offer, and do what follows, until it is over or told to stop."""
    if len(options.images) > MAXIMUM_DISKS:
        raise UsageError(f"a machine has at most {MAXIMUM_DISKS} disks")
    host, _ = options.listen
    certificates = options.tls_certificates
    tls = TlsPolicy(server_context(certificates, verify_peer=True), required=True) if certificates else None
    if tls is None:
        await _refuse_exposure(host)
    async with AsyncExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        journal, contents = await asyncio.to_thread(_journal, options, tls=tls is not None)
        settings = SourceOptions(options.on_fence, options.on_resume, options.on_release, options.fence_timeout, tls)
        driver = SourceDriver(journal, contents, settings)
        stack.push_async_callback(driver.close)
        await control_sockets(stack, driver, options, stop)
        await driver.listen()
        await asyncio.to_thread(journal.keep_offer, str(driver.offer))
        sys.stdout.write(f"{driver.offer}\n")
        sys.stdout.flush()
        notify.ready(f"offering {', '.join(options.images)}")
        ended = await either(stop, driver.run())
        notify.stopping()
    if not ended:
        log.warning("stopped while %s: the same command goes on", driver.state.record.phase.upper())
        return _STOPPED_EARLY
    return 0 if driver.state.record.phase is Phase.RELEASED else _CALLED_OFF


def _journal(options: argparse.Namespace, *, tls: bool) -> tuple[Journal, SourceContents]:
    """Return the journal to go on with, of a new offer if there is none."""
    host, port = options.listen
    journal = Journal.open(options.state)
    try:
        found = journal.read_source()
    finally:
        journal.close()
    if found and found.record.phase is not Phase.DECLINED:
        _check_same(options, found, tls=tls)
        return open_source(options.state, None)
    offered = [(os.path.abspath(path), options.format or _probed(path)) for path in options.images]
    renewed = new_offer(offered, host=host, port=port, nbd_port=options.nbd_port, tls=tls, expires=options.expires)
    return open_source(options.state, renewed)


def _check_same(options: argparse.Namespace, found: SourceContents, *, tls: bool) -> None:
    """Raise UsageError if the command line is of another offer than the state directory."""
    setup, (host, port) = found.setup, options.listen
    kept = [image.path for image in setup.images]
    if kept != [os.path.abspath(path) for path in options.images]:
        raise UsageError(f"{options.state} is of an offer of {', '.join(kept)}")
    if setup.host != host or port not in (0, setup.port) or options.nbd_port not in (0, setup.nbd_port):
        raise UsageError(
            f"{options.state} is of an offer at {setup.host} ports {setup.port} and {setup.nbd_port}: it stays there"
        )
    if setup.tls != tls:
        raise UsageError(f"{options.state} is of an offer {'with' if setup.tls else 'without'} TLS")


def _probed(path: str) -> str:
    """Return ``raw``, unless it looks like something else. Raises ImageError."""
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                raise ImageError(f"{path} looks like a QED image: say -f qed, or -f raw to offer its raw bytes")
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    return "raw"


async def _refuse_exposure(host: str) -> None:
    try:
        await refuse_exposure([], (host, 0))
    except UsageError as error:
        raise UsageError(f"{host} is not loopback: a hand-over to another host needs --tls-certificates DIR") from error


def _address(text: str) -> tuple[str, int]:
    """Parse ADDR:PORT, an IPv6 address in brackets."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDR:PORT, such as 192.0.2.1:10808 or [2001:db8::1]:0")
    return host, int(port)
