"""The thread of a remote export: it works on commands, over all of the export's connections.

Bulk data is received in this thread, written to its file in another (see store), and never crosses the event
loop. What is urgent overtakes it on the way out and on the way back.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from nbdstream.block.remote.commands import Alignment, BufferPool, Command, Copy, Piece
from nbdstream.block.remote.connections import ConnectionOptions, Connections
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


class RemoteThread:
    """Connects to an export and works on commands until it is stopped.

    The public methods belong to the loop's thread, all the rest to its own.
    """

    def __init__(
        self,
        uri: NbdUri,
        options: ConnectionOptions,
        *,
        memory: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.connected: asyncio.Future[RemoteInfo] = loop.create_future()
        """Done when the first connection is ready; HandleError if it never will be."""
        self.lost: asyncio.Future[str] = loop.create_future()
        """Done with the reason when the last connection is gone."""

        self._mailbox = Mailbox(loop)
        self._stopping = False
        self._connections = Connections(
            uri, options, self._mailbox, retire=self._retire, opened=self._opened, lost=self._lose
        )
        self._was_connected = False
        self._alignment = Alignment(0, 1, LONGEST_REQUEST)
        self._pool = BufferPool(memory)
        self._starved = False
        """Whether something waits for memory."""
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
            self._connections.open()  # the loop limits its time: it may hang in looking up a name
        except HandleError as error:
            self._lose(str(error))
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
        connections = self._connections
        events = self._mailbox.sleep(0 if self._stopping else connections.idle_milliseconds())
        for fd, revents in connections.urgent_first(events):
            if connections.notify(fd, revents):
                self._attend()
        connections.expire()
        self._mailbox.tell()

    def _attend(self) -> None:
        """Between one connection's bulk data and the next: receive, pass on and send what is urgent."""
        self._connections.receive_urgent()
        self._mailbox.tell()
        if self._mailbox.waiting:
            self._accept()
            self._send_urgent()

    def _opened(self, info: RemoteInfo) -> None:
        self._was_connected = True
        self._alignment = _alignment(info)
        self._mailbox.call(_succeed, self.connected, info)

    def _lose(self, reason: str) -> None:
        """There is no connection any more, or never will be: fail everything, and tell."""
        self._fail_all(connection_lost)
        if self._was_connected:
            self._mailbox.call(_succeed, self.lost, reason)
        else:
            self._mailbox.call(_fail, self.connected, HandleError(reason))
            self._stopping = True

    def _fail_all(self, error: Callable[[], OSError]) -> None:
        self._connections.abandon(error)
        while self._urgent or self._bulk:
            self._retire((self._urgent or self._bulk).popleft(), error())

    # Commands, from the inbox to a connection.

    def _accept(self) -> None:
        """Cut what came in into requests, and queue them."""
        while command := self._mailbox.take():
            if command.taken_up:
                self._hurry(command)
                continue
            command.taken_up = True
            if not self._connections.ready:
                command.error = OSError(errno.ENOTCONN, "the source is not connected")
            elif command.offset < 0 or command.offset + command.length > self._alignment.size:
                command.error = OSError(errno.EINVAL, "the source has no such range")
            elif pieces := command.cut(self._alignment):
                (self._urgent if command.urgent else self._bulk).extend(pieces)
                continue
            self._finish(command)

    def _hurry(self, command: Command) -> None:
        """Let what of a command is not on the line yet overtake all bulk data; tell of what has arrived already."""
        if isinstance(command, Copy) and not (command.pieces_left or command.error):
            self._show(command)
            return
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
        self._spread(self._urgent, self._connections.free_for_urgent, 1.0)

    def _free_for_bulk(self) -> Handle[Piece] | None:
        return None if self._mailbox.waiting else self._connections.free_for_bulk()

    def _spread(self, queue: deque[Piece], free: Callable[[], Handle[Piece] | None], share: float) -> None:
        """Send from a queue as long as there is a connection, and memory within a share of all."""
        used = set()
        while queue and (handle := free()) and self._has_memory(queue[0].command, share):
            self._connections.submit(queue.popleft(), handle, self._pool)
            used.add(handle)
        self._connections.sent(used)

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

    # Commands, from a connection to the loop.

    def _retire(self, piece: Piece, error: OSError | None) -> None:
        command = piece.command
        command.pieces_left -= 1
        command.error = command.error or error
        if command.pieces_left:
            return
        if isinstance(command, Copy) and command.error is None:
            self._show(command)
            self._store.put(command)
        else:
            self._finish(command)

    def _show(self, copy: Copy) -> None:
        """Tell whoever waits for a copy of its bytes: it may be a while until they are written."""
        if copy.urgent and copy.arrived and (data := copy.lend()):
            self._mailbox.answer(copy.arrived, data, None)

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
        self._fail_all(_cancelled)
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


def _cancelled() -> OSError:
    return OSError(errno.ECANCELED, "the source was closed")


def _succeed(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
