"""Arguments that several commands have in common, and what they are turned into."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nbdstream.errors import NbdstreamError
from nbdstream.units import DurationError, SizeError, parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = ("raw", "qed")


class UsageError(NbdstreamError):
    """The command line asks for what cannot be, in a way that its grammar does not tell: exit code 2."""


def size(text: str) -> int:
    """Parse a size argument: bytes, or with k, M, G or T."""
    try:
        return parse_size(text)
    except SizeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size_from(least: int) -> Callable[[str], int]:
    """Return a parser for sizes of at least so many bytes."""

    def parse(text: str) -> int:
        value = size(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is less than {least} bytes")
        return value

    return parse


def seconds(text: str) -> float:
    """Parse a time from a tenth of a second to a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86400:  # also False for a NaN
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return value


def duration(text: str) -> float:
    """Parse a time with its unit: us, ms, s, m or h; seconds without one. Return seconds."""
    try:
        return parse_duration(text)
    except DurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(least: int, most: int) -> Callable[[str], int]:
    """Return a parser for whole numbers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() else -1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return number

    return parse


def formats(text: str) -> list[str]:
    """Parse a list of formats, one for each layer of a backing chain."""
    names = text.split(",")
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"{name!r} is not a format: say {' or '.join(FORMATS)}")
    return names


def file_mode(text: str) -> int:
    """Parse an octal file mode."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file mode such as 0660")
    return mode


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add -f."""
    parser.add_argument("-f", "--format", choices=FORMATS, help="the image's format (default: raw)")


def add_backing_format(parser: argparse.ArgumentParser) -> None:
    """Add --backing-format."""
    parser.add_argument(
        "--backing-format",
        type=formats,
        default=[],
        metavar="FORMAT[,FORMAT...]",
        help="follow the backing file names in QED images; a format for each layer, since the images name none",
    )


def add_socket_access(parser: argparse._ActionsContainer) -> None:
    """Add who may use a unix socket."""
    parser.add_argument(
        "--socket-mode",
        type=file_mode,
        default=0o600,
        metavar="MODE",
        help="file mode of the unix socket (default: 0600)",
    )
    parser.add_argument("--socket-group", metavar="GROUP", help="group of the unix socket")


def add_tls_certificates(parser: argparse.ArgumentParser) -> None:
    """Add --tls-certificates, of a client."""
    parser.add_argument("--tls-certificates", metavar="DIR", help="ca-cert.pem, client-cert.pem and client-key.pem")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON")
