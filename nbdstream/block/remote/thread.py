"""The thread of a remote export: its poll loop over all of the export's connections.

Bulk data is received in this thread, written to its file in another (see store), and never crosses the event
loop. What is urgent overtakes it on the way out and on the way back.
"""

from __future__ import annotations

import errno
import logging
import math
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from nbdstream.block.remote.commands import Alignment, BufferPool, Command, Copy, Piece
from nbdstream.block.remote.handle import Handle, HandleError, RemoteInfo, connection_lost
from nbdstream.block.remote.mailbox import Mailbox
from nbdstream.block.remote.store import Store
from nbdstream.block.worker import give_way

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from nbdstream.uri import NbdUri

log = logging.getLogger(__name__)

LONGEST_REQUEST = 32 << 20
"""Bytes: what a client may send to a server that names no limit (proto.md, "Block size constraints")."""

BULK_SHARE = 0.75
"""Of the memory for payload: the rest is for what somebody waits for."""

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


class RemoteThread:
    """Connects to an export and works on commands until it is stopped.

    The public methods belong to the loop's thread, all the rest to its own.
    """

    def __init__(
        self,
        uri: NbdUri,
        *,
        connections: int,
        tls_certificates: str | None,
        timeout: float,
        stall: float,
        memory: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._uri = uri
        self._wanted = connections
        self._tls_certificates = tls_certificates
        self._timeout = timeout
        self._stall = stall
        self._look_at = math.inf
        """When to see whether an answer is overdue (time.monotonic)."""
        self._reopen_at = math.inf
        self._reopen_pause = _REOPEN_SECONDS
        self.connected: asyncio.Future[RemoteInfo] = loop.create_future()
        """Done when the first connection is ready; HandleError if it never will be."""
        self.lost: asyncio.Future[str] = loop.create_future()
        """Done with the reason when the last connection is gone."""

        self._mailbox = Mailbox(loop)
        self._stopping = False
        self._info: RemoteInfo | None = None
        self._alignment = Alignment(0, 1, LONGEST_REQUEST)
        self._pool = BufferPool(memory)
        self._starved = False
        """Whether something waits for memory."""
        self._ready: list[_Handle] = []
        self._connecting: dict[_Handle, float] = {}
        """Handle -> when it must be ready (time.monotonic)."""
        self._watched: dict[_Handle, tuple[int, int]] = {}
        """Handle -> the descriptor and events that the mailbox watches for it."""
        self._by_fd: dict[int, _Handle] = {}
        self._urgent: deque[Piece] = deque()
        self._bulk: deque[Piece] = deque()
        self._store = Store(self._finish_and_tell)
        # A daemon: a host name that is being looked up must not keep the process from its end.
        self._thread = threading.Thread(target=self._main, name="nbd-source", daemon=True)
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Have a command worked on; its ``done`` is called on the loop, and never before this returns."""
        self._mailbox.put(command)

    def stop(self) -> asyncio.Future[None]:
        """Have the thread fail what is left (ECANCELED) and end. The future is done when it has."""
        self._stopping = True
        self._mailbox.wake()
        return self._mailbox.closed

    def _main(self) -> None:
        give_way()
        try:
            # The loop limits the first one's time: it may hang in looking up a name.
            self._open_connection(deadline=float("inf"))
        except HandleError as error:
            self._mailbox.call(_fail, self.connected, error)
            self._stopping = True
        while not self._stopping:
            try:
                self._round()
            except Exception:
                log.exception("a mistake of ours: the connections to the source are given up")
                self._lose("an error in nbdstream, see the log")
        self._let_go()

    def _round(self) -> None:
        self._accept()
        self._send()
        self._mailbox.tell()
        events = self._mailbox.sleep(0 if self._stopping else self._idle_milliseconds())
        first = self._ready[0].fd if self._ready else -1
        for fd, revents in sorted(events, key=lambda event: event[0] != first):
            if handle := self._by_fd.get(fd):
                self._notify(handle, revents)
                self._attend()
        self._expire()
        self._mailbox.tell()

    def _attend(self) -> None:
        """Between one connection's bulk data and the next: receive, pass on and send what is urgent."""
        self._receive_urgent()
        self._mailbox.tell()
        if self._mailbox.waiting:
            self._accept()
            self._send_urgent()

    def _receive_urgent(self) -> None:
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

    # Connecting.

    def _open_connection(self, deadline: float) -> None:
        handle: _Handle = Handle(self._uri, self._tls_certificates)
        handle.connect(self._uri)
        self._connecting[handle] = deadline
        self._settle(handle)

    def _open_others(self) -> None:
        deadline = time.monotonic() + self._timeout
        for _ in range(self._wanted - len(self._ready) - len(self._connecting)):
            try:
                self._open_connection(deadline)
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
        self._ready.append(handle)
        handle.notice_death(self._stall)
        if len(self._ready) == self._wanted:
            self._reopen_pause = _REOPEN_SECONDS
        if self._info is None:
            self._info = info
            self._alignment = _alignment(info)
            self._mailbox.call(_succeed, self.connected, info)
            if info.can_multi_conn:
                self._open_others()

    def _expire(self) -> None:
        """Give up connections on which an answer is overdue, and make those anew that were lost.

        This follows a look at what has arrived, so that an answer is never overdue because we were busy.
        """
        now = time.monotonic()
        if self._connecting:
            for handle in [handle for handle, deadline in self._connecting.items() if deadline <= now]:
                self._drop(handle, f"no answer within {self._timeout:g} seconds")
        if now >= self._look_at:
            busy = [handle for handle in self._ready if handle.in_flight]
            self._look_at = min((handle.active_at for handle in busy), default=math.inf) + self._stall
            for handle in busy:
                if handle.active_at + self._stall <= now:
                    self._drop(handle, f"no answer for {self._stall:g} seconds")
        if now >= self._reopen_at:
            self._reopen_at = math.inf
            if self._ready:
                self._open_others()

    def _idle_milliseconds(self) -> float | None:
        deadline = min(self._look_at, self._reopen_at, *self._connecting.values())
        return None if deadline == math.inf else max(0.0, deadline - time.monotonic()) * 1000 + 1

    # Commands, from the inbox to a connection.

    def _accept(self) -> None:
        """Cut what came in into requests, and queue them."""
        while command := self._mailbox.take():
            if command.taken_up:
                self._hurry(command)
                continue
            command.taken_up = True
            if not self._ready:
                command.error = OSError(errno.ENOTCONN, "the source is not connected")
            elif command.offset < 0 or command.offset + command.length > self._alignment.size:
                command.error = OSError(errno.EINVAL, "the source has no such range")
            elif pieces := command.cut(self._alignment):
                (self._urgent if command.urgent else self._bulk).extend(pieces)
                continue
            self._finish(command)

    def _hurry(self, command: Command) -> None:
        """Let what of a command is not on the line yet overtake all bulk data."""
        mine = [piece for piece in self._bulk if piece.command is command]
        if mine:
            self._urgent.extend(mine)
            self._bulk = deque(piece for piece in self._bulk if piece.command is not command)

    def _send(self) -> None:
        """Spread what is queued over the connections; bulk data only until somebody asks for something."""
        self._starved = False
        self._send_urgent()
        self._spread(self._bulk, self._free_for_bulk, BULK_SHARE)

    def _send_urgent(self) -> None:
        self._spread(self._urgent, self._free_for_urgent, 1.0)

    def _spread(self, queue: deque[Piece], free: Callable[[], _Handle | None], share: float) -> None:
        """Send from a queue as long as there is a connection, and memory within a share of all."""
        used = set()
        while queue and (handle := free()) and self._has_memory(queue[0].command, share):
            self._submit(queue.popleft(), handle)
            used.add(handle)
        for handle in used.intersection(self._ready):
            self._settle(handle)

    def _free_for_urgent(self) -> _Handle | None:
        kept_free = self._kept_free()
        if kept_free and kept_free.bytes_in_flight < _MOST_ON_KEPT_FREE:
            return kept_free
        return _least_loaded(self._ready, IN_FLIGHT_URGENT)

    def _free_for_bulk(self) -> _Handle | None:
        if self._mailbox.waiting:
            return None
        return _least_loaded(self._ready[1:] if self._kept_free() else self._ready, IN_FLIGHT)

    def _kept_free(self) -> _Handle | None:
        """Of several connections one is kept free, so that what is urgent is never stuck behind bulk data."""
        return self._ready[0] if len(self._ready) > 2 else None

    def _has_memory(self, command: Command, share: float) -> bool:
        """Whether a command has memory for its payload, or gets some now."""
        payload = command.payload()
        if command.held or not payload:
            return True
        # Before it is tried: the store's thread may give some back meanwhile.
        starved, self._starved = self._starved, True
        if not self._pool.reserve(payload, share=share):
            return False
        self._starved = starved
        command.held = payload
        return True

    def _submit(self, piece: Piece, handle: _Handle) -> None:
        if not handle.in_flight:
            handle.active_at = time.monotonic()
            self._look_at = min(self._look_at, handle.active_at + self._stall)
        try:
            piece.command.submit(piece, handle, self._pool)
        except OSError as error:
            if handle.refresh():
                self._retire(piece, error)
            else:  # what libnbd says then (EINVAL) is not what is wrong
                self._retire(piece, connection_lost())
                self._settle(handle)
        except MemoryError:
            self._retire(piece, OSError(errno.ENOMEM, "no memory to read from the source"))

    # What happens on a connection.

    def _notify(self, handle: _Handle, revents: int) -> None:
        handle.active_at = time.monotonic()
        self._receive(handle, revents)

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

    def _drop(self, handle: _Handle, reason: str) -> None:
        """A connection is gone: fail what was in flight on it. With the last one the export is lost."""
        self._abandon(handle, connection_lost)
        if self._info is None:
            self._mailbox.call(_fail, self.connected, HandleError(reason))
            self._stopping = True
        elif not self._ready:
            self._lose(reason)
        else:
            log.warning("one connection to the source less, %d are left: %s", len(self._ready), reason)
            self._reopen_later()

    def _lose(self, reason: str) -> None:
        self._abandon_all(connection_lost)
        self._mailbox.call(_succeed, self.lost, reason)

    def _abandon_all(self, error: Callable[[], OSError]) -> None:
        for handle in [*self._ready, *self._connecting]:
            try:
                self._abandon(handle, error)
            except Exception:  # whoever waits for the others must be told all the same
                log.exception("a mistake of ours: a connection to the source is not given up cleanly")
        while self._urgent or self._bulk:
            self._retire((self._urgent or self._bulk).popleft(), error())

    def _abandon(self, handle: _Handle, error: Callable[[], OSError]) -> None:
        if self._connecting.pop(handle, None) is None:
            self._ready.remove(handle)
        for piece in handle.abandon():
            self._retire(piece, error())
        self._unwatch(handle)

    # Commands, from a connection to the loop.

    def _retire(self, piece: Piece, error: OSError | None) -> None:
        command = piece.command
        command.pieces_left -= 1
        command.error = command.error or error
        if command.pieces_left:
            return
        if isinstance(command, Copy) and command.error is None:
            if command.arrived and (data := command.received()):
                self._mailbox.answer(command.arrived, data, None)
            self._store.put(command)
        else:
            self._finish(command)

    def _finish(self, command: Command) -> None:
        result = None
        if command.error is None:
            try:
                result = command.finish(self._pool)
            except OSError as error:
                command.error = error
            except Exception:  # whoever waits must be told, whatever it is
                log.exception("a mistake of ours: a command for the source fails")
                command.error = OSError(errno.EIO, "an error in nbdstream, see the log")
        if command.held:
            self._pool.release(command.held)
            command.held = 0
            if self._starved:
                self._mailbox.wake()
        self._mailbox.answer(command.done, result, command.error)

    def _finish_and_tell(self, copy: Copy) -> None:
        """Write what was received to its file (in the store's thread)."""
        self._finish(copy)
        self._mailbox.tell()

    def _let_go(self) -> None:
        """Close the connections and fail all that is left."""
        self._abandon_all(_cancelled)
        self._store.close()  # what was received is stored
        while command := self._mailbox.take():
            if not command.taken_up:  # else it is one in a hurry, which has been told of
                command.taken_up = True
                command.error = _cancelled()
                self._finish(command)
        self._mailbox.close()


def _alignment(info: RemoteInfo) -> Alignment:
    longest = min(info.maximum_block or LONGEST_REQUEST, LONGEST_REQUEST)
    return Alignment(info.size, info.minimum_block, max(1, longest // info.minimum_block) * info.minimum_block)


def _least_loaded(handles: list[_Handle], limit: int) -> _Handle | None:
    """Return the handle with the fewest bytes in flight that has room for another request."""
    best = None
    for handle in handles:
        if len(handle.in_flight) < limit and (best is None or handle.bytes_in_flight < best.bytes_in_flight):
            best = handle
    return best


def _cancelled() -> OSError:
    return OSError(errno.ECANCELED, "the source was closed")


def _succeed(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
