"""A client in the transmission phase: the shell between its transport and the sans-I/O core, and the fast path.

What comes in lies in one receive buffer. Every complete request in it is taken at once, and the replies that can be
given at once leave with one ``writelines``: no task, future or coroutine for a request that the device answers
immediately. The others are :class:`InFlight`, and the replies that become ready in one turn of the loop leave together
as well.

Reading stops while the client does not take its replies, and while too much of what it asked for is in flight. What has
arrived by then waits in the buffer: the connection is *stalled*.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from nbdstream.block.device import ZEROES
from nbdstream.errors import ProtocolError
from nbdstream.server.commands import Commands
from nbdstream.server.gathering import Gathering
from nbdstream.server.inflight import InFlight
from nbdstream.server.sockets import describe_peer
from nbdstream.wire.nbd import CmdFlag
from nbdstream.wire.transmission import READ, WRITE, Request, RequestFields, Transmission

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeAlias

    from nbdstream.block.device import Buffer
    from nbdstream.server.export import Export
    from nbdstream.server.limits import Limits
    from nbdstream.server.payloads import PayloadMemory
    from nbdstream.server.polling import Polling
    from nbdstream.wire.export import Agreement

    Join: TypeAlias = Callable[[Sequence[Buffer]], Iterator[bytes]]

_log = logging.getLogger(__name__)

_RECEIVE_BUFFER: Final = 256 << 10
"""Bytes: 9,000 requests, or 60 small writes, or a little more than a socket holds. A small payload has room in it."""

_FUA: Final = int(CmdFlag.FUA)

_REPLY_BATCH: Final = 1 << 20
"""Bytes of replies that are sent before more requests are looked at."""

_REPLY_PARTS: Final = 16
"""The same in buffers: eight reads. A client works on the first ones while we go on with the next; sent by fewer, what
a system call costs is felt."""


class Connection(asyncio.BufferedProtocol):
    """One client with one export open."""

    def __init__(
        self,
        transport: asyncio.Transport,
        export: Export,
        agreement: Agreement,
        limits: Limits,
        memory: PayloadMemory,
        polling: Polling,
        *,
        join: Join | None,
        closed: Callable[[Connection], None],
    ) -> None:
        """Take over ``transport``; ``closed`` is told once, when nothing is in flight any more either.

        ``join`` makes bytes of replies for a transport that looks at what it sends; None for one that does not.
        """
        self._transport = transport
        self._join = join
        self.export = export
        self._limits = limits
        self._memory = memory
        self._polling = polling
        self._gathering = Gathering(transport, polling.longest)
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self._peer = describe_peer(transport)
        self._transmission = Transmission(agreement)
        self._commands = Commands(export, self._transmission.replies, agreement.contexts)
        self._in_flight = InFlight(export, self._commands, limits, memory, self._reply)
        self._view = memoryview(bytearray(_RECEIVE_BUFFER))
        self._start = self._end = 0
        """What has been received and not consumed lies between them."""
        self._incoming: Request | None = None
        """A WRITE whose payload is being received, past the receive buffer, into ``_payload``."""
        self._payload = memoryview(b"")
        self._filled = 0
        self._held: Request | None = None
        """A request for which there was no room in flight; those behind it wait, too."""
        self._stalled = False
        self._write_paused = False
        self._reading = True
        self._replies: list[Buffer] = []
        self._portions: Iterator[bytes] | None = None
        """Of replies that have to be joined: what the client has not had room for yet."""
        self._settling = False
        self._leaving = False
        """Closed as soon as everything is answered."""
        self._end_of_input = False
        self._lost = False
        self._linger: asyncio.TimerHandle | None = None

    def begin(self, received: bytes) -> None:
        """Begin with what the client sent behind its handshake."""
        _log.debug("%s: opened export %r", self._peer, self.export.name)
        self.export.connections += 1
        self._transport.set_write_buffer_limits(high=self._limits.reply_backlog)
        self._view[: len(received)] = received
        self._end = len(received)
        self._take_requests()

    def drain(self) -> None:
        """Finish what is in flight, refuse what else comes, and close."""
        self._transmission.shut_down()
        self._leaving = True
        self._close_if_done()

    def abort(self) -> None:
        """Close at once, and give up what is in flight."""
        self._in_flight.cancel()
        self._transport.abort()

    # -- called by the transport --------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._payload[self._filled :] if self._incoming else self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has arrived."""
        if not self._incoming:
            self._end += nbytes
            self._take_requests()
            return
        self._filled += nbytes
        if self._filled == len(self._payload):
            self._payload_complete()

    def eof_received(self) -> bool:
        """Let the client go: without DISC, the end of its stream is all that tells us that it is gone.

        A request that waits for a lost source must not keep the connection for ever, so nothing in flight is
        waited for. (Behind DISC nothing is read, so this is not called: libnbd closes its sending side there.)
        """
        self._begin_linger()
        return False

    def pause_writing(self) -> None:
        """Stop reading: the client does not take its replies."""
        self._write_paused = True
        self._update_reading()

    def resume_writing(self) -> None:
        """Go on with what waits in the buffer; later, since this is called from within ``writelines``."""
        self._write_paused = False
        self._settle_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the client. What only reads is given up; what changes the device is finished."""
        _log.debug("%s: closed%s", self._peer, f": {exc}" if exc else "")
        self._lost = True
        self.export.connections -= 1
        if self._linger:
            self._linger.cancel()
        self._replies.clear()
        self._portions = None
        self._incoming = self._held = None
        self._in_flight.cancel_reads()
        if not self._in_flight.requests:
            self._closed(self)

    # -- requests -----------------------------------------------------------------------------------------

    def _take_requests(self) -> None:
        """Take every request in the buffer that there is room for, and send what can be answered now."""
        self._stalled = False
        self._polling.requested()
        try:
            requests, read = self._serve_batch()
        except ProtocolError as error:
            _log.info("%s: %s", self._peer, error)
            self._transport.abort()
            return
        self._start = self._transmission.position
        if self._transmission.finished:
            self._leaving = self._end_of_input = True
        elif self._transmission.awaiting and not self._stalled:
            self._receive_payload()
        if not self._stalled:
            self._compact()
        self._settle()
        if not (self._in_flight.requests or self.export.device.hydrating or self._transport.get_write_buffer_size()):
            self._gathering.wait(requests, read)
            self._polling.replied()

    def _serve_batch(self) -> tuple[int, int]:
        """Take requests while any can be taken; return how many, and how many bytes were read at once."""
        device, wire_replies = self.export.device, self._transmission.replies
        read_now, write_at_once = device.read_now, device.write_at_once
        read_header, done = wire_replies.read_header, wire_replies.done
        replies = self._replies
        zeroes = ZEROES.obj if wire_replies.sparse else self  # of which there are no views
        requests = unsent = total = written = 0
        for fields in self._transmission.requests(self._view, self._start, self._end):
            requests += 1
            command, flags, cookie, offset, length, payload, refusal = fields
            buffers = None
            try:
                if command == READ:
                    if length and not refusal:
                        buffers = read_now(offset, length)
                elif payload and command == WRITE and not flags & _FUA and write_at_once(offset, payload):
                    replies.append(done(command, cookie, offset))
                    written += length
                    continue
            except Exception as error:  # noqa: BLE001 - whatever a device does, one request fails
                replies.append(self._commands.failure(Request._make(fields), error))
                continue
            if buffers is None:
                if not self._serve(fields):
                    break
                continue
            if len(buffers) == 1 and len(buffer := buffers[0]) == length and getattr(buffer, "obj", 0) is not zeroes:
                replies.append(read_header(cookie, offset, length))
                replies.append(buffer)
            else:
                replies += self._commands.read_reply(Request._make(fields), buffers)
            total += length
            unsent += length
            if unsent >= _REPLY_BATCH or len(replies) >= _REPLY_PARTS:
                self._send()
                unsent = 0
                if self._write_paused:
                    self._stalled = True
                    break
        self.export.requests += requests
        self.export.bytes_read += total
        self.export.bytes_written += written
        return requests, total

    def _serve(self, fields: RequestFields) -> bool:
        """Refuse a request or begin it; return False if it has to wait, and whatever comes behind it."""
        request = Request._make(fields)
        if request.refusal:
            self._replies.append(self._transmission.replies.error(request.cookie, request.offset, *request.refusal))
            return True
        if request.command == WRITE and request.payload:
            request = request._replace(payload=bytes(request.payload))  # the receive buffer is used again
        if self._in_flight.has_room(request):
            self._in_flight.start(request)
            return True
        self._held = request
        self._stalled = True
        return False

    def _reply(self, reply: Sequence[Buffer]) -> None:
        """Take the reply of a request that was in flight."""
        if not self._lost:
            self._replies += reply
            self._settle_soon()
        elif not self._in_flight.requests:
            self._closed(self)

    # -- payloads that the buffer does not hold -------------------------------------------------------------

    def _receive_payload(self) -> None:
        request = self._transmission.awaiting
        assert request is not None
        if not self._in_flight.has_room(request):
            self._stalled = True
            return
        self._transmission.awaiting = None
        self._incoming = request
        self._payload = self._memory.take(request.length)
        self._filled = self._end - self._start
        self._payload[: self._filled] = self._view[self._start : self._end]
        self._start = self._end

    def _payload_complete(self) -> None:
        request = self._incoming
        assert request is not None
        self._incoming = None
        self.export.requests += 1
        self._in_flight.start(request._replace(payload=self._payload))
        self._payload = memoryview(b"")

    # -- flow -----------------------------------------------------------------------------------------------

    def _compact(self) -> None:
        """Move what is left, less than a header, to the front of the buffer."""
        left = self._end - self._start
        self._view[:left] = self._view[self._start : self._end]
        self._start, self._end = 0, left

    def _send(self) -> None:
        if self._join:
            self._send_joined(self._join)
        elif self._replies:
            self._transport.writelines(self._replies)
            self._replies.clear()

    def _send_joined(self, join: Join) -> None:
        """Send as much as the client has room for: every byte is copied, and is memory until it has left."""
        try:
            while not self._write_paused and (self._portions or self._replies):
                if not self._portions:
                    self._portions = join(self._replies.copy())
                    self._replies.clear()
                data = next(self._portions, None)
                if data is None:
                    self._portions = None
                else:
                    self._transport.write(data)
        except OSError as error:
            # Its header may have left already. Where nobody has to look at it, the send itself fails like this.
            _log.warning("%s: what was read cannot be sent: %s", self._peer, error.strerror)
            self._transport.abort()

    def _settle(self) -> None:
        """Send what is ready, and see whether to read on or to close."""
        self._send()
        self._update_reading()
        if self._leaving:
            self._close_if_done()

    def _settle_soon(self) -> None:
        """Settle after everything that this turn of the loop brings."""
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle_now)

    def _settle_now(self) -> None:
        self._settling = False
        if self._lost:
            return
        self._settle()
        if self._stalled and not self._write_paused:
            self._go_on()

    def _go_on(self) -> None:
        """Take up what waits, if there is room for it now."""
        if self._held:
            if not self._in_flight.has_room(self._held):
                return
            request, self._held = self._held, None
            self._in_flight.start(request)
        if self._transmission.awaiting:
            self._stalled = False
            self._receive_payload()
            if not self._stalled:
                self._compact()
            self._settle()
        else:
            self._take_requests()

    def _update_reading(self) -> None:
        reading = not (self._stalled or self._write_paused or self._end_of_input)
        if reading == self._reading or self._transport.is_closing():
            return
        self._reading = reading
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _close_if_done(self) -> None:
        if self._stalled or self._incoming or self._in_flight.requests or self._lost:
            return
        self._begin_linger()
        if not (self._replies or self._portions):
            self._transport.close()

    def _begin_linger(self) -> None:
        # A closing transport sends what is still queued first, to a client that may never take it.
        if not self._linger:
            self._linger = self._loop.call_later(self._limits.linger_time, self._transport.abort)
