"""Take over the disks that another host offers, and run on them at once.

OFFER is what 'nbdstream offer' printed: itself, @FILE that holds it, or - for standard input (it is a secret, and a
command line is none). Each disk has an OVERLAY, which is made, and a socket for the guest, in the same order. Until the
disks are owned here the guest can read, and not write. The same command again goes on from where the state directory
says that it was, and serves the disks for their whole life.

exit codes:
  0  told to stop when the overlays were independent; or called off, and nothing is left
  1  failed
  2  usage
  3  told to stop before; the same command goes on"""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from nbdstream.cli import arguments
from nbdstream.cli.arguments import UsageError
from nbdstream.cli.control import add_control
from nbdstream.cli.fetching import add_fetching, source_options
from nbdstream.cli.listening import is_loopback
from nbdstream.cli.running import either, stop_signals
from nbdstream.cli.states import control_sockets
from nbdstream.handover.destination import DestinationDriver, DestinationOptions, open_destination
from nbdstream.handover.offer import Offer, OfferError
from nbdstream.service import notify
from nbdstream.wire.handover.vocabulary import Phase

if TYPE_CHECKING:
    import argparse

log = logging.getLogger(__name__)

_STOPPED_EARLY = 3
_LONGEST_OFFER = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``receive`` understands."""
    parser.add_argument("offer", metavar="OFFER|@FILE|-", help="what 'nbdstream offer' printed")
    parser.add_argument("overlays", nargs="+", metavar="OVERLAY", help="the local QED images, one for each disk")
    parser.add_argument(
        "-U",
        "--unix",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="the guest's unix sockets, one for each disk",
    )
    parser.add_argument("--state", required=True, metavar="DIR", help="where the journal is kept")
    add_fetching(parser)
    parser.add_argument("--on-accept", metavar="CMD", help="start the guest: the disks are owned here from now on")
    add_control(parser)
    arguments.add_socket_access(parser)


async def run(options: argparse.Namespace) -> int:
    """Receive, and serve until told to stop."""
    if len(options.unix) != len(options.overlays):
        raise UsageError(f"{len(options.overlays)} overlays need as many sockets: say -U PATH for each")
    offer = Offer.parse(_read(options.offer))
    if not offer.tls and not is_loopback(offer.host) and offer.host != "localhost":
        raise UsageError("an offer without TLS is for this host alone")
    async with AsyncExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        journal, contents = await asyncio.to_thread(open_destination, options.state, offer, options.overlays)
        settings = DestinationOptions(
            sockets=options.unix,
            source=source_options(options),
            socket_mode=options.socket_mode,
            socket_group=options.socket_group,
            on_accept=options.on_accept,
            speed=options.rate,
            guest_latency=options.guest_latency,
        )
        driver = DestinationDriver(journal, contents, settings)
        stack.push_async_callback(driver.close)
        await control_sockets(stack, driver, options, stop)
        driver.connect()
        notify.ready(f"receiving {', '.join(options.overlays)}")
        ended = await either(stop, driver.run())
        notify.stopping()
    phase = driver.state.record.phase
    if ended or phase in (Phase.INDEPENDENT, Phase.RELEASED):
        return 0
    log.warning("stopped while %s: the same command goes on", phase.upper())
    return _STOPPED_EARLY


def _read(text: str) -> str:
    """Return the offer that the command line gives, or tells the place of. Raises OfferError."""
    if text == "-":
        return sys.stdin.readline(_LONGEST_OFFER)
    if not text.startswith("@"):
        return text
    try:
        with open(text[1:], encoding="utf-8") as file:
            return file.readline(_LONGEST_OFFER)
    except (OSError, UnicodeError) as error:
        raise OfferError(f"{text[1:]} cannot be read: {getattr(error, 'strerror', error)}") from error
