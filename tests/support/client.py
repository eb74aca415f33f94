"""A guest's NBD client: blocking, pipelined, and as simple as the protocol allows (proto.md, simple replies).

It shares no code with what it is used to test.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
from typing import NamedTuple, Self

MOST_IN_FLIGHT = 16
"""As QEMU's client has them."""

READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE = 1, 2

_OPT_GO, _REP_ACK, _REP_INFO = 7, 1, 3
_NO_ZEROES = 3  # NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES


class LostError(ConnectionError):
    """The connection is gone, as a guest sees it: what was not answered may or may not have been done."""


class Reply(NamedTuple):
    """What a request was answered."""

    cookie: int
    error: int
    """NBD's error number, 0 if it was done."""
    data: bytes = b""


class NbdClient:
    """A connection to the default export of a server on a unix socket."""

    def __init__(self, path: str, *, timeout: float = 60.0) -> None:
        """Connect. Raises LostError; ``timeout`` is for every answer that is waited for, in seconds."""
        self.size = 0
        self.flags = 0
        """proto.md's transmission flags."""
        self._cookies = itertools.count(1)
        self._lengths: dict[int, int] = {}
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
            self._negotiate()
        except OSError as error:
            self._socket.close()
            if isinstance(error, TimeoutError):
                raise
            raise LostError(str(error)) from error

    def _negotiate(self) -> None:
        if self._receive(16) != b"NBDMAGICIHAVEOPT":
            raise LostError("no NBD server")
        self._receive(2)
        go = struct.pack(">8sIIIH", b"IHAVEOPT", _OPT_GO, 6, 0, 0)  # the empty name, no information requests
        self._send(struct.pack(">I", _NO_ZEROES) + go)
        while True:
            _, _, reply, length = struct.unpack(">QIII", self._receive(20))
            payload = self._receive(length)
            if reply == _REP_ACK:
                return
            if reply != _REP_INFO:
                raise LostError(f"the server answers NBD_OPT_GO with {reply:#x} {payload!r}")
            if payload[:2] == b"\0\0":  # NBD_INFO_EXPORT
                self.size, self.flags = struct.unpack(">QH", payload[2:12])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def in_flight(self) -> int:
        """How many requests were not answered yet."""
        return len(self._lengths)

    def submit(self, command: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> int:
        """Send a request, and return its cookie. Raises LostError."""
        cookie = next(self._cookies)
        self._lengths[cookie] = length if command == READ else 0
        self._send(struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + data)
        return cookie

    def receive(self) -> Reply:
        """Wait for an answer, to whichever request. Raises LostError, or TimeoutError."""
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        if magic != 0x67446698:
            raise LostError(f"the server answers {magic:#x}")
        length = self._lengths.pop(cookie)
        return Reply(cookie, error, b"" if error else self._receive(length))

    def read(self, offset: int, length: int) -> bytes:
        """Read. Like all that wait here: nothing else may be in flight; raises OSError with NBD's error."""
        return self._do(READ, offset, length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write."""
        self._do(WRITE, offset, len(data), data, FUA if fua else 0)

    def zero(self, offset: int, length: int, *, no_hole: bool = False) -> None:
        """Write zeroes."""
        self._do(WRITE_ZEROES, offset, length, flags=NO_HOLE if no_hole else 0)

    def trim(self, offset: int, length: int) -> None:
        """Discard."""
        self._do(TRIM, offset, length)

    def flush(self) -> None:
        """Make durable what was answered."""
        self._do(FLUSH, 0, 0)

    def _do(self, command: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> bytes:
        cookie = self.submit(command, offset, length, data, flags)
        reply = self.receive()
        assert reply.cookie == cookie
        if reply.error:
            raise OSError(reply.error, os.strerror(reply.error))
        return reply.data

    def close(self) -> None:
        """Say goodbye, if anybody hears it, and hang up."""
        with contextlib.suppress(LostError):
            self._send(struct.pack(">IHHQQI", 0x25609513, 0, DISC, 0, 0, 0))
        self._socket.close()

    def _send(self, data: bytes) -> None:
        """Send, and take what arrives meanwhile: a server need not read on while nobody takes its replies."""
        rest = memoryview(data)
        while rest:
            readable, writable, _ = select.select([self._socket], [self._socket], [], self._socket.gettimeout())
            if not readable and not writable:
                raise TimeoutError("the server takes no more requests")
            if readable:
                self._take_more()
            if writable:
                try:
                    rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise LostError(str(error)) from error

    def _receive(self, length: int) -> bytes:
        while len(self._received) < length:
            self._take_more()
        data = bytes(self._received[:length])
        del self._received[:length]
        return data

    def _take_more(self) -> None:
        try:
            data = self._socket.recv(1 << 20)
        except TimeoutError:
            raise
        except OSError as error:
            raise LostError(str(error)) from error
        if not data:
            raise LostError("the server hung up")
        self._received += data
