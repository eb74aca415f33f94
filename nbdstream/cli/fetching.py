"""The options for how disks are fetched from their source, and what becomes of the guest meanwhile."""

from __future__ import annotations

import argparse

from nbdstream.block.remote.export import DEFAULT_MEMORY, DEFAULT_STALL_SECONDS
from nbdstream.cli import arguments
from nbdstream.stream.source import SourceOptions
from nbdstream.units import format_size

_LEAST_MEMORY = 1 << 20
"""A fetch asks for so much at most."""


def add_fetching(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options. Returns the group of those for when the source goes away."""
    parser.add_argument(
        "-c",
        "--connections",
        type=arguments.count(1, 64),
        default=4,
        metavar="N",
        help="connections to the source for each disk, if it allows several (default: 4)",
    )
    parser.add_argument(
        "--rate",
        type=arguments.size,
        default=0,
        metavar="BYTES",
        help="fetch at most so much of each disk per second in the background (default: no limit)",
    )
    parser.add_argument(
        "--guest-latency",
        type=arguments.duration,
        metavar="TIME",
        help="fetch so gently that 99%% of the guest's requests that need no source take less: 5ms, 800us",
    )
    parser.add_argument(
        "--memory",
        type=arguments.size_from(_LEAST_MEMORY),
        default=DEFAULT_MEMORY,
        metavar="BYTES",
        help=f"for what of each disk is on its way from the source (default: {format_size(DEFAULT_MEMORY)})",
    )
    arguments.add_tls_certificates(parser)
    lost = parser.add_argument_group("when the source goes away")
    lost.add_argument(
        "--on-source-loss",
        type=_policy,
        metavar="hold[=TIME]|eio",
        help="what becomes of requests for what is not local: they wait until it is back (default), or for so long "
        "and fail then, or fail at once",
    )
    lost.add_argument(
        "--source-timeout",
        type=arguments.seconds,
        default=DEFAULT_STALL_SECONDS,
        metavar="SECONDS",
        help=f"give up a connection on which an answer is overdue for so long (default: {DEFAULT_STALL_SECONDS:g})",
    )
    return lost


def source_options(options: argparse.Namespace) -> SourceOptions:
    """Return what the command line says of the source."""
    return SourceOptions(
        connections=options.connections,
        tls_certificates=options.tls_certificates,
        stall=options.source_timeout,
        memory=options.memory,
        hold=options.on_source_loss,
    )


def _policy(text: str) -> float | None:
    """Return for how many seconds requests are held, None for ever."""
    if text in ("hold", "eio"):
        return None if text == "hold" else 0.0
    name, _, time = text.partition("=")
    if name != "hold":
        raise argparse.ArgumentTypeError(f"{text!r} is not a policy: say hold, hold=TIME or eio")
    return arguments.duration(time)
