"""The options for what clients may cost the server, one for each field of Limits. docs/limits.md has the reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nbdstream.cli import arguments
from nbdstream.server.limits import Limits
from nbdstream.units import format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


class LimitOption(NamedTuple):
    """An option and the field of Limits that it sets."""

    name: str
    field: str
    read: Callable[[str], int | float]
    metavar: str
    meaning: str


LIMIT_OPTIONS = (
    LimitOption(
        "--handshake-timeout",
        "handshake_time",
        arguments.seconds,
        "SECONDS",
        "drop a client that has not opened an export by then, TLS included",
    ),
    LimitOption("--max-connections", "connections", arguments.count(1, 100_000), "N", "connections in all"),
    LimitOption(
        "--max-handshakes",
        "handshakes",
        arguments.count(1, 100_000),
        "N",
        "connections that have not opened an export yet",
    ),
    LimitOption(
        "--max-option-length",
        "option_length",
        arguments.size_from(8 << 10),
        "BYTES",
        "data of one option of a handshake; longer ones are refused",
    ),
    LimitOption("--max-options", "options", arguments.count(16, 100_000), "N", "options in one handshake"),
    LimitOption(
        "--max-requests", "requests_in_flight", arguments.count(1, 65536), "N", "requests in flight per connection"
    ),
    LimitOption(
        "--max-bytes-in-flight",
        "bytes_in_flight",
        arguments.size_from(1 << 20),
        "BYTES",
        "payload of requests in flight per connection",
    ),
    LimitOption(
        "--max-reply-backlog",
        "reply_backlog",
        arguments.size_from(64 << 10),
        "BYTES",
        "replies per connection that its client has not taken yet",
    ),
    LimitOption(
        "--poll-max-ns",
        "poll_max_ns",
        arguments.count(0, 1_000_000),
        "N",
        "for how many nanoseconds to look for the next request of a quick client before going to sleep; 0: not at all",
    ),
    LimitOption(
        "--linger-timeout",
        "linger_time",
        arguments.seconds,
        "SECONDS",
        "at its end, cut off a client that has not taken its last replies by then",
    ),
)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add an option for every limit."""
    group = parser.add_argument_group("limits", "what clients may cost; docs/limits.md has the reasons")
    defaults = Limits()
    for option in LIMIT_OPTIONS:
        default = getattr(defaults, option.field)
        shown = format_size(default) if option.metavar == "BYTES" else f"{default:g}"
        group.add_argument(
            option.name,
            dest=option.field,
            type=option.read,
            default=default,
            metavar=option.metavar,
            help=f"{option.meaning} (default: {shown})",
        )


def limits(options: argparse.Namespace) -> Limits:
    """Return the limits that the command line asks for."""
    return Limits(**{option.field: getattr(options, option.field) for option in LIMIT_OPTIONS})
