"""What a server sends, cut into headers and payloads, so that a fault can strike one of a kind.

Only what frames the bytes is understood, and only of a conversation in plain text with structured or extended replies,
in which every read is answered by chunks. From whatever is not understood on, all is payload.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdstream.wire.nbd import Opt, Rep, ReplyType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONNECTION: Final = "connection"
"""No bytes yet: somebody has connected."""
GREETING: Final = "greeting"
OPTION: Final = "reply to an option"
STATUS: Final = "chunk of block status"
DATA: Final = "chunk of data"
OTHER: Final = "other chunk"
PAYLOAD: Final = "payload"

_GREETING_BYTES = 18
_OPTION = struct.Struct(">QIII")  # magic, option, type of reply, length
_OPTION_MAGIC = 0x3E889045565A9
_STRUCTURED = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
_EXTENDED = struct.Struct(">IHHQQQ")  # the same with the offset of the request before the length
_STRUCTURED_MAGIC, _EXTENDED_MAGIC = b"\x66\x8e\x33\xef", b"\x6e\x8a\x27\x8c"
_CHUNKS = {ReplyType.OFFSET_DATA: DATA, ReplyType.BLOCK_STATUS: STATUS, ReplyType.BLOCK_STATUS_EXT: STATUS}


class Piece(NamedTuple):
    """A header, whole, or some of a payload."""

    kind: str
    data: bytearray


class Frames:
    """Cuts the bytes of one connection, in whatever pieces they come, from its first byte on."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._payload = 0
        self._header: Callable[[], Piece | None] = self._greeting

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Return what is complete with ``data``. A header whose end never comes is lost."""
        self._unread += data
        while self._unread and (piece := self._rest() if self._payload else self._header()):
            yield piece

    def _rest(self) -> Piece:
        count = min(self._payload, len(self._unread))
        self._payload -= count
        return self._take(PAYLOAD, count)

    def _take(self, kind: str, count: int) -> Piece:
        taken, self._unread = self._unread[:count], self._unread[count:]
        return Piece(kind, taken)

    def _greeting(self) -> Piece | None:
        if len(self._unread) < _GREETING_BYTES:
            return None
        self._header = self._option
        return self._take(GREETING, _GREETING_BYTES)

    def _option(self) -> Piece | None:
        if len(self._unread) < _OPTION.size:
            return None
        magic, option, reply, length = _OPTION.unpack_from(self._unread)
        if magic != _OPTION_MAGIC:
            return self._give_up()
        if reply == Rep.ACK and option in (Opt.GO, Opt.STARTTLS):
            self._header = self._chunk  # inside TLS no chunk will be found
        self._payload = length
        return self._take(OPTION, _OPTION.size)

    def _chunk(self) -> Piece | None:
        start = bytes(self._unread[:4])
        header = {_STRUCTURED_MAGIC: _STRUCTURED, _EXTENDED_MAGIC: _EXTENDED}.get(start)
        if header is None:
            return self._give_up() if len(start) == 4 else None
        if len(self._unread) < header.size:
            return None
        _, _, kind, *_, length = header.unpack_from(self._unread)
        self._payload = length
        return self._take(_CHUNKS.get(kind, OTHER), header.size)

    def _give_up(self) -> Piece:
        self._payload = 1 << 62
        return self._rest()


def fields(kind: str, header: bytes | bytearray) -> dict[str, range]:
    """Return which bytes of a header a client can find out to be wrong, by what they are.

    Not among them are those that make a sound header of another one: an error reply, another flag that is allowed. Of
    a payload there are none.
    """
    if kind == PAYLOAD:
        return {}
    if kind == GREETING:
        return {"magic": range(16)}
    if kind == OPTION:
        return {"magic": range(8), "option": range(8, 12), "type": range(12, 16), "length": range(16, 20)}
    length = range(16, 20) if len(header) == _STRUCTURED.size else range(24, 32)
    return {"magic": range(4), "flags": range(5, 6), "type": range(7, 8), "cookie": range(8, 16), "length": length}
