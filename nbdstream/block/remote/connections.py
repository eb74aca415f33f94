"""The connections of a remote export: made, watched, given up when they are silent, and made again.

They belong to the export's thread, which polls them with its mailbox. Of several connections one is kept free of bulk
data, so that what is urgent is never stuck behind it.
"""

from __future__ import annotations

import errno
import logging
import math
import select
import time
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from nbdstream.block.remote.commands import BufferPool, Piece
from nbdstream.block.remote.handle import Handle, HandleError, RemoteInfo, connection_lost

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.block.remote.mailbox import Mailbox
    from nbdstream.uri import NbdUri

log = logging.getLogger(__name__)

IN_FLIGHT = 16
"""Requests a connection: what qemu-nbd and nbdkit work on at a time. More would only keep urgent ones waiting."""

IN_FLIGHT_URGENT = 64
"""The same for urgent requests: libnbd's advice (libnbd(3), "Issuing multiple in-flight requests")."""

_MOST_ON_KEPT_FREE = 512 << 10
"""Bytes in flight on the connection that is kept free with which it is still the best one for what is urgent: what a
guest reads at random. Of more than that, other connections take their part."""

_REOPEN_SECONDS = 5.0
_LONGEST_REOPEN_SECONDS = 60.0
"""A connection that broke while others live is made again after so long; then after twice as long, and so on: looking
up the server's name may keep the thread, and with it the other connections, for seconds."""

_CLOSED = "the server closed the connection"

_Handle: TypeAlias = Handle[Piece]


class ConnectionOptions(NamedTuple):
    """How an export is connected to."""

    connections: int
    """If the server says that several see one disk."""
    tls_certificates: str | None
    """The directory of ca-cert.pem, client-cert.pem and client-key.pem."""
    timeout: float
    """Seconds in which a further connection must be ready."""
    stall: float
    """Seconds after which a connection is given up on which nothing arrives while something was asked for."""


class Connections:
    """All connections to one export."""

    def __init__(
        self,
        uri: NbdUri,
        options: ConnectionOptions,
        mailbox: Mailbox,
        *,
        retire: Callable[[Piece, OSError | None], None],
        opened: Callable[[RemoteInfo], None],
        lost: Callable[[str], None],
    ) -> None:
        """``retire`` is told of the end of each request, and of what went wrong with it.

        ``opened`` is called when the first connection is ready, ``lost`` with the reason when there is none any more,
        or never will be one.
        """
        self._uri = uri
        self._options = options
        self._mailbox = mailbox
        self._retire = retire
        self._opened = opened
        self._lost = lost
        self._info: RemoteInfo | None = None
        self.ready: list[_Handle] = []
        """Those that requests can be sent on."""
        self._connecting: dict[_Handle, float] = {}
        """Handle -> when it must be ready (time.monotonic)."""
        self._watched: dict[_Handle, tuple[int, int]] = {}
        """Handle -> the descriptor and events that the mailbox watches for it."""
        self._by_fd: dict[int, _Handle] = {}
        self._look_at = math.inf
        """When to see whether an answer is overdue (time.monotonic)."""
        self._reopen_at = math.inf
        self._reopen_pause = _REOPEN_SECONDS

    # Connecting.

    def open(self, deadline: float = math.inf) -> None:
        """Begin to connect once more, until ``deadline`` (time.monotonic). Looking up a host name blocks.

        Raises HandleError.
        """
        handle: _Handle = Handle(self._uri, self._options.tls_certificates)
        handle.connect(self._uri)
        self._connecting[handle] = deadline
        self._settle(handle)

    def _open_others(self) -> None:
        deadline = time.monotonic() + self._options.timeout
        for _ in range(self._options.connections - len(self.ready) - len(self._connecting)):
            try:
                self.open(deadline)
            except HandleError as error:
                log.warning("no further connection to the source: %s", error)
                self._reopen_later()
                return

    def _reopen_later(self) -> None:
        self._reopen_at = min(self._reopen_at, time.monotonic() + self._reopen_pause)
        self._reopen_pause = min(self._reopen_pause * 2, _LONGEST_REOPEN_SECONDS)

    def _became_ready(self, handle: _Handle) -> None:
        try:
            info = handle.info()
        except HandleError as error:
            self._drop(handle, str(error))
            return
        if self._info not in (None, info):
            self._drop(handle, "it shows another export than the first one")
            return
        del self._connecting[handle]
        self.ready.append(handle)
        handle.notice_death(self._options.stall)
        if len(self.ready) == self._options.connections:
            self._reopen_pause = _REOPEN_SECONDS
        if self._info is None:
            self._info = info
            self._opened(info)
            if info.can_multi_conn:
                self._open_others()

    def expire(self) -> None:
        """Give up connections on which an answer is overdue, and make those anew that were lost.

        This follows a look at what has arrived, so that an answer is never overdue because we were busy.
        """
        now = time.monotonic()
        if self._connecting:
            for handle in [handle for handle, deadline in self._connecting.items() if deadline <= now]:
                self._drop(handle, f"no answer within {self._options.timeout:g} seconds")
        if now >= self._look_at:
            stall = self._options.stall
            busy = [handle for handle in self.ready if handle.in_flight]
            self._look_at = min((handle.active_at for handle in busy), default=math.inf) + stall
            for handle in busy:
                if handle.active_at + stall <= now:
                    self._drop(handle, f"no answer for {stall:g} seconds")
        if now >= self._reopen_at:
            self._reopen_at = math.inf
            if self.ready:
                self._open_others()

    def idle_milliseconds(self) -> float | None:
        """Return how long there is nothing to :meth:`expire`, None if for ever."""
        deadline = min(self._look_at, self._reopen_at, *self._connecting.values())
        return None if deadline == math.inf else max(0.0, deadline - time.monotonic()) * 1000 + 1

    # Sending.

    def free_for_urgent(self) -> _Handle | None:
        """Return the connection that something urgent is answered on soonest, None if there is no room on any."""
        kept_free = self._kept_free()
        if kept_free and kept_free.bytes_in_flight < _MOST_ON_KEPT_FREE:
            return kept_free
        return _least_loaded(self.ready, IN_FLIGHT_URGENT)

    def free_for_bulk(self) -> _Handle | None:
        """Return the connection for the next bulk data, None if there is no room for it."""
        return _least_loaded(self.ready[1:] if self._kept_free() else self.ready, IN_FLIGHT)

    def _kept_free(self) -> _Handle | None:
        return self.ready[0] if len(self.ready) > 2 else None

    def submit(self, piece: Piece, handle: _Handle, pool: BufferPool) -> None:
        """Have a request sent; :meth:`sent` follows when there are no more for the same connection."""
        if not handle.in_flight:
            handle.active_at = time.monotonic()
            self._look_at = min(self._look_at, handle.active_at + self._options.stall)
        try:
            piece.command.submit(piece, handle, pool)
        except OSError as error:
            if handle.refresh():
                self._retire(piece, error)
            else:  # what libnbd says then (EINVAL) is not what is wrong
                self._retire(piece, connection_lost())
                self._settle(handle)
        except MemoryError:
            self._retire(piece, OSError(errno.ENOMEM, "no memory to read from the source"))

    def sent(self, handles: set[_Handle]) -> None:
        """See how connections are on which something was sent."""
        for handle in handles.intersection(self.ready):
            self._settle(handle)

    # What happens on a connection.

    def urgent_first(self, events: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Sort what poll said: first the connection that is kept free."""
        first = self.ready[0].fd if self.ready else -1
        return sorted(events, key=lambda event: event[0] != first)

    def notify(self, fd: int, revents: int) -> bool:
        """Receive or send as poll said; return whether the descriptor is one of ours, still."""
        handle = self._by_fd.get(fd)
        if handle:
            handle.active_at = time.monotonic()
            self._receive(handle, revents)
        return handle is not None

    def receive_urgent(self) -> None:
        """Take every reply that has arrived on the connection that is kept free.

        libnbd takes one a call. Were the next one left until the connections are polled again, it would wait for the
        bulk data of all others: four reads of a guest, for which there is a reply at the same time, half a millisecond
        each.
        """
        handle = self._kept_free()
        while handle and (waiting := len(handle.in_flight)):
            self._receive(handle, select.POLLIN)
            if len(handle.in_flight) == waiting:
                return
            handle.active_at = time.monotonic()

    def _receive(self, handle: _Handle, revents: int) -> None:
        reason = _CLOSED
        try:
            handle.notify(revents, self._uri)
        except HandleError as error:
            reason = str(error)
        self._settle(handle, reason, received=True)

    def _settle(self, handle: _Handle, reason: str = _CLOSED, *, received: bool = False) -> None:
        """After calls on a handle: retire what is complete, and see what to poll for, or that it is gone."""
        waiting = len(handle.in_flight)
        for piece, error in handle.completed():
            self._retire(piece, error)
        if received and waiting and waiting == len(handle.in_flight):
            # A part of a reply: had the connection broken, what is in flight had completed. Each call on a handle
            # lets go of the interpreter's lock, which a busy loop does not soon give back, so this one is saved.
            return
        if not handle.refresh():
            self._drop(handle, reason)
            return
        watched = handle.fd, handle.events
        if self._watched.get(handle) != watched:
            self._unwatch(handle)
            self._watched[handle] = watched
            self._by_fd[handle.fd] = handle
            self._mailbox.watch(*watched)
        if handle.ready and handle in self._connecting:
            self._became_ready(handle)

    def _unwatch(self, handle: _Handle) -> None:
        fd, _ = self._watched.pop(handle, (-1, 0))
        if fd >= 0:
            del self._by_fd[fd]
            self._mailbox.unwatch(fd)

    # What ends.

    def _drop(self, handle: _Handle, reason: str) -> None:
        """A connection is gone: fail what was in flight on it. With the last one the export is lost."""
        self._abandon(handle, connection_lost)
        if not self.ready:
            self._lost(reason)
        else:
            log.warning("one connection to the source less, %d are left: %s", len(self.ready), reason)
            self._reopen_later()

    def abandon(self, error: Callable[[], OSError]) -> None:
        """Close all of them, and fail what is in flight with ``error``."""
        for handle in [*self.ready, *self._connecting]:
            try:
                self._abandon(handle, error)
            except Exception:  # whoever waits for the others must be told all the same
                log.exception("a mistake of ours: a connection to the source is not given up cleanly")

    def _abandon(self, handle: _Handle, error: Callable[[], OSError]) -> None:
        if self._connecting.pop(handle, None) is None:
            self.ready.remove(handle)
        for piece in handle.abandon():
            self._retire(piece, error())
        self._unwatch(handle)


def _least_loaded(handles: list[_Handle], limit: int) -> _Handle | None:
    """Return the handle with the fewest bytes in flight that has room for another request."""
    best = None
    for handle in handles:
        if len(handle.in_flight) < limit and (best is None or handle.bytes_in_flight < best.bytes_in_flight):
            best = handle
    return best
