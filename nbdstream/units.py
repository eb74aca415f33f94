"""Sizes, rates and times as people write and read them. Inside nbdstream everything is plain bytes and seconds."""

from __future__ import annotations

import re

_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"([0-9]+)([kmgt]?)", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(us|ms|s|m|h|)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST = 366 * 86400.0
_LARGEST = (1 << 63) - 1
"""What an off_t holds; NBD and QED know no larger image either."""


class SizeError(ValueError):
    """A size that cannot be read. The text is one line that names it."""


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` stands for: a whole number, with k, M, G or T (powers of 1024) behind it.

    Upper and lower case are the same, as in qemu-img. Raises :class:`SizeError`.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match or not text.isascii():
        msg = f"{text!r} is not a size: write whole bytes, or a number with k, M, G or T behind it"
        raise SizeError(msg)
    digits, suffix = match.groups()
    # More digits than that are too large in any case, and int() refuses them from 4300 on.
    size = int(digits) << 10 * _POWER[suffix.upper()] if len(digits.lstrip("0")) < 20 else _LARGEST + 1
    if size > _LARGEST:
        msg = f"{text[:40]!r} is too large a size: the largest is {_LARGEST} bytes"
        raise SizeError(msg)
    return size


class DurationError(ValueError):
    """A time that cannot be read. The text is one line that names it."""


def parse_duration(text: str) -> float:
    """Return the seconds that ``text`` stands for: a number, with us, ms, s (or nothing), m or h behind it.

    Raises :class:`DurationError`.
    """
    match = _DURATION.fullmatch(text.strip())
    if not match or not text.isascii():
        msg = f"{text!r} is not a time: write a number with us, ms, s, m or h behind it"
        raise DurationError(msg)
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds <= _LONGEST:
        msg = f"{text[:40]!r} is not a time from a microsecond to a year"
        raise DurationError(msg)
    return seconds


def format_size(size: float) -> str:
    """Return ``size`` bytes in the largest unit that leaves at least 1 before the point: ``1.5 GiB``, ``512 bytes``."""
    if size < 1024:
        return "1 byte" if size == 1 else f"{size:.0f} bytes"
    amount = float(size)
    unit = "bytes"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):  # noqa: B007 - the unit it stopped at is used below
        amount /= 1024
        if amount < 1023.95:  # what would be printed as 1024 belongs to the next unit
            break
    return f"{amount:.1f}".removesuffix(".0") + f" {unit}"


def format_rate(bytes_per_second: float) -> str:
    """Return a rate in bytes a second for people: ``812.4 MiB/s``."""
    return f"{format_size(bytes_per_second)}/s"
