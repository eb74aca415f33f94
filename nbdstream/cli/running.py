"""Running a command: the event loop, signals, logging, and errors as one line each."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvloop

from nbdstream.cli import FAILED, USAGE
from nbdstream.cli.arguments import UsageError
from nbdstream.errors import NbdstreamError
from nbdstream.service.logging import set_up_logging
from nbdstream.text import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Coroutine, Iterator

_SWITCH_SECONDS = 0.0002
"""How long a thread keeps Python to itself while another waits. With the default of 5 ms, that is how long a guest's
request would wait for the thread that fetches."""


def run(options: argparse.Namespace) -> int:
    """Run the chosen command; return its exit code."""
    _fill_standard_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: a file's name may be no text at all
    set_up_logging(debug=options.debug)
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.freeze()  # going through all that was imported takes the collector 10 ms, in which no guest is served
    try:
        code: int = uvloop.run(options.run(options))
        sys.stdout.flush()
    except UsageError as error:
        _fail(str(error))
        return USAGE
    except NbdstreamError as error:
        if options.debug:
            raise
        return _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return FAILED
    except OSError as error:
        if options.debug:
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


def _fill_standard_descriptors() -> None:
    """Open what was closed when we were started: a socket or an image that became "stderr" would be written into."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _fail(message: str) -> int:
    sys.stderr.write(f"nbdstream: {printable(' '.join(message.split()))}\n")
    return FAILED


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """Give an event that SIGTERM and SIGINT set.

    A second SIGINT, from somebody who does not want to wait, ends the process at once; a second SIGTERM, as
    timeout(1) and shutting-down systems send it, does not.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def interrupted() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)


async def either(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Wait for the work or the signal to stop; return whether the work came to its end. Raises what the work raises."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait([working])
        return False
    working.result()
    return True
