"""The hop between the event loop and a remote export's thread, in both directions.

Either side is woken only if it may be asleep, so that under load one wake-up carries many commands or
many results.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from nbdstream.block.remote.commands import Command, Done


class Mailbox:
    """Commands on their way to the thread, and results on their way to the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._inbox: deque[Command] = deque()
        self._results: deque[tuple[Done, Any, OSError | None]] = deque()
        self._telling = False
        self._asleep = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self.closed: asyncio.Future[None] = loop.create_future()
        """Done when the thread has ended, and its last result was told."""

    # The loop's side.

    def put(self, command: Command) -> None:
        """Send a command to the thread."""
        self._inbox.append(command)
        if self._asleep:
            self.wake()

    def wake(self) -> None:
        """Have the thread look around, even if it sleeps."""
        self._asleep = False
        if not self.closed.done():
            os.eventfd_write(self._wake, 1)

    def _deliver(self) -> None:
        self._telling = False
        while self._results:
            done, result, error = self._results.popleft()
            try:
                done(result, error)
            except Exception as failure:  # noqa: BLE001 - the others must be told all the same
                context = {"message": "a callback of a remote export failed", "exception": failure}
                self._loop.call_exception_handler(context)

    def _close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
        # Here and not in the thread: whoever wakes it must not write to a descriptor that is another's by now.
        os.close(self._wake)

    # The thread's side.

    def take(self) -> Command | None:
        """Return the next command."""
        return self._inbox.popleft() if self._inbox else None

    @property
    def waiting(self) -> bool:
        """Whether there is another command."""
        return bool(self._inbox)

    def sleep(self, milliseconds: float | None) -> list[tuple[int, int]]:
        """Poll the watched descriptors, no longer than until the next command or wake-up; return their events."""
        self._asleep = True
        # Whoever sends a command from here on wakes us; what came before is in the inbox already.
        events = self._poll.poll(0 if self._inbox else milliseconds)
        self._asleep = False
        if (self._wake, select.POLLIN) in events:
            os.eventfd_read(self._wake)
        return events

    def watch(self, fd: int, events: int) -> None:
        """Have :meth:`sleep` end for ``events`` of a descriptor (select.POLLIN, POLLOUT)."""
        self._poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor. It may be closed already."""
        self._poll.unregister(fd)

    def answer(self, done: Done, result: object, error: OSError | None) -> None:
        """Put a result into the batch that the next :meth:`tell` sends."""
        self._results.append((done, result, error))

    def tell(self) -> None:
        """Have the loop call back for all results, unless it is about to."""
        if self._results and not self._telling:
            self._telling = True
            self.call(self._deliver)

    def call(self, callback: Callable[..., None], *args: object) -> None:
        """Have the loop call something."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
            self._loop.call_soon_threadsafe(callback, *args)

    def close(self) -> None:
        """Tell all that is left, and that this was all."""
        self.tell()
        self.call(self._close)
