"""Where log messages go: text on stderr, with priorities where the journal reads it (sd-daemon(3))."""

from __future__ import annotations

import logging
import os
import sys

_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)
"""syslog's, for levels from there on."""


class _PlainFormatter(logging.Formatter):
    """``nbdstream: message``, with the level where it is worth a word."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"nbdstream: {level}{super().format(record)}"


class _JournalFormatter(logging.Formatter):
    """A priority in front of every line, since each is an entry of its own. The journal adds time and name."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def set_up_logging(*, debug: bool = False) -> None:
    """Log to stderr, unless the program logs somewhere already. ``debug`` says more, and where it comes from."""
    journal = _is_journal(sys.stderr.fileno())
    form = "%(name)s: %(message)s" if debug else "%(message)s"
    if debug and not journal:
        form = "%(asctime)s.%(msecs)03d " + form
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((_JournalFormatter if journal else _PlainFormatter)(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])


def _is_journal(fd: int) -> bool:
    """Whether the descriptor is the one that systemd connected to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
