"""Replies of the transmission phase: simple ones, structured ones, or extended ones, as was negotiated.

A READ's payload never comes here: what is returned goes before the buffers, or between them, as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdstream.wire.nbd import (
    CHUNK,
    DESCRIPTOR,
    DESCRIPTOR_EXT,
    ERROR_PAYLOAD,
    EXTENDED_CHUNK,
    EXTENDED_OFFSET_DATA_CHUNK,
    EXTENDED_REPLY_MAGIC,
    HOLE,
    MAX_STRING,
    OFFSET_DATA_CHUNK,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATUS_HEADER,
    STATUS_HEADER_EXT,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    Err,
    ReplyFlag,
    ReplyType,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Descriptors: TypeAlias = Sequence[tuple[int, int]]
    """Extents, one behind the other: (length, status flags)."""

_DONE: Final = int(ReplyFlag.DONE)
_OFFSET_DATA: Final = int(ReplyType.OFFSET_DATA)
_SIMPLE: Final = SIMPLE_REPLY.pack
_DATA: Final = OFFSET_DATA_CHUNK.pack
_DATA_EXTENDED: Final = EXTENDED_OFFSET_DATA_CHUNK.pack
_READ: Final = int(Cmd.READ)


class Replies(ABC):
    """How one connection is answered. ``offset`` is the request's, unless something else is said."""

    sparse: bool
    """Whether a READ may be answered in several chunks, some of which stand for zeroes."""

    @abstractmethod
    def read_header(self, cookie: int, offset: int, length: int) -> bytes:
        """Return what precedes the ``length`` bytes (at least one) that a READ asked for."""

    @abstractmethod
    def read_chunk(self, cookie: int, offset: int, at: int, length: int, *, hole: bool, last: bool) -> bytes:
        """Return what precedes some of the bytes that a READ asked for, or, with ``hole``, stands for zeroes.

        They begin ``at`` that offset of the export. Only where ``sparse`` is set.
        """

    @abstractmethod
    def done(self, command: int, cookie: int, offset: int) -> bytes:
        """Return the success of a command that has no payload to give."""

    @abstractmethod
    def error(self, cookie: int, offset: int, error: Err, text: str) -> bytes:
        """Return the failure of any command."""

    @abstractmethod
    def block_status(self, cookie: int, offset: int, status: Mapping[int, Descriptors]) -> bytes:
        """Return the extents of every context id that was asked for (at least one)."""


class SimpleReplies(Replies):
    """Simple replies only."""

    sparse = False

    def read_header(self, cookie: int, offset: int, length: int) -> bytes:  # noqa: D102
        return _SIMPLE(SIMPLE_REPLY_MAGIC, 0, cookie)

    def read_chunk(self, cookie: int, offset: int, at: int, length: int, *, hole: bool, last: bool) -> bytes:  # noqa: D102
        raise NotImplementedError("a simple reply has no chunks")

    def done(self, command: int, cookie: int, offset: int) -> bytes:  # noqa: D102
        return _SIMPLE(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, error: Err, text: str) -> bytes:  # noqa: D102
        return _SIMPLE(SIMPLE_REPLY_MAGIC, error, cookie)

    def block_status(self, cookie: int, offset: int, status: Mapping[int, Descriptors]) -> bytes:  # noqa: D102
        raise NotImplementedError("no context can be selected without chunks")


class ChunkReplies(Replies):
    """What structured and extended replies have in common: all but the header of a chunk and the form of an extent."""

    sparse = True

    @abstractmethod
    def _chunk(self, flags: int, kind: ReplyType, cookie: int, offset: int, length: int) -> bytes:
        """Return the header of a chunk with ``length`` bytes of payload."""

    @abstractmethod
    def _status(self, context: int, descriptors: Descriptors) -> bytes:
        """Return the payload that tells the extents in one context."""

    def read_chunk(self, cookie: int, offset: int, at: int, length: int, *, hole: bool, last: bool) -> bytes:  # noqa: D102
        flags = _DONE if last else 0
        if hole:
            payload = HOLE.pack(at, length)
            return self._chunk(flags, ReplyType.OFFSET_HOLE, cookie, offset, len(payload)) + payload
        return self._chunk(flags, ReplyType.OFFSET_DATA, cookie, offset, 8 + length) + at.to_bytes(8, "big")

    def done(self, command: int, cookie: int, offset: int) -> bytes:  # noqa: D102
        return self._chunk(_DONE, ReplyType.NONE, cookie, offset, 0)

    def error(self, cookie: int, offset: int, error: Err, text: str) -> bytes:  # noqa: D102
        message = text.encode(errors="replace")[:MAX_STRING].decode(errors="ignore").encode()
        payload = ERROR_PAYLOAD.pack(error, len(message)) + message
        return self._chunk(_DONE, ReplyType.ERROR, cookie, offset, len(payload)) + payload

    def block_status(self, cookie: int, offset: int, status: Mapping[int, Descriptors]) -> bytes:  # noqa: D102
        last = list(status)[-1]
        reply = bytearray()
        for number, descriptors in status.items():
            payload = self._status(number, descriptors)
            flags = _DONE if number == last else 0
            reply += self._chunk(flags, self._status_type, cookie, offset, len(payload))
            reply += payload
        return bytes(reply)

    _status_type: ReplyType


class StructuredReplies(ChunkReplies):
    """Structured replies; the plain success of anything but a READ is a simple one, which is shorter."""

    _status_type = ReplyType.BLOCK_STATUS

    def read_header(self, cookie: int, offset: int, length: int) -> bytes:
        """Return the header of one OFFSET_DATA chunk that is the whole reply.

        One chunk suits DF as well. It may carry DONE because nothing can go wrong behind it but the sending
        itself, and that ends the connection.
        """
        return _DATA(STRUCTURED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset)

    def done(self, command: int, cookie: int, offset: int) -> bytes:  # noqa: D102
        if command == _READ:
            return super().done(command, cookie, offset)
        return _SIMPLE(SIMPLE_REPLY_MAGIC, 0, cookie)

    def _chunk(self, flags: int, kind: ReplyType, cookie: int, offset: int, length: int) -> bytes:
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)

    def _status(self, context: int, descriptors: Descriptors) -> bytes:
        return STATUS_HEADER.pack(context) + b"".join(DESCRIPTOR.pack(*each) for each in descriptors)


class ExtendedReplies(ChunkReplies):
    """Extended headers: every reply repeats the request's offset, whatever the payload is about."""

    _status_type = ReplyType.BLOCK_STATUS_EXT

    def read_header(self, cookie: int, offset: int, length: int) -> bytes:
        """Return the header of one OFFSET_DATA chunk that is the whole reply."""
        return _DATA_EXTENDED(EXTENDED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, offset, length + 8, offset)

    def _chunk(self, flags: int, kind: ReplyType, cookie: int, offset: int, length: int) -> bytes:
        return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)

    def _status(self, context: int, descriptors: Descriptors) -> bytes:
        extents = b"".join(DESCRIPTOR_EXT.pack(*each) for each in descriptors)
        return STATUS_HEADER_EXT.pack(context, len(descriptors)) + extents
