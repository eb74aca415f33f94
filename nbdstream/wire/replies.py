"""Replies of the transmission phase: simple ones, and structured ones where they were negotiated.

A READ's payload never comes here: the caller sends :meth:`Replies.read_header` and then the buffers as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from nbdstream.wire.nbd import (
    CHUNK,
    DESCRIPTOR,
    ERROR_PAYLOAD,
    MAX_STRING,
    OFFSET_DATA_CHUNK,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    Err,
    ReplyFlag,
    ReplyType,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DONE: Final = int(ReplyFlag.DONE)
_OFFSET_DATA: Final = int(ReplyType.OFFSET_DATA)
_SIMPLE: Final = SIMPLE_REPLY.pack
_DATA: Final = OFFSET_DATA_CHUNK.pack
_READ: Final = int(Cmd.READ)


class Replies(ABC):
    """How one connection is answered."""

    @abstractmethod
    def read_header(self, cookie: int, offset: int, length: int) -> bytes:
        """Return what precedes the ``length`` bytes (at least one) that a READ asked for."""

    @abstractmethod
    def done(self, command: int, cookie: int) -> bytes:
        """Return the success of a command that has no payload to give."""

    @abstractmethod
    def error(self, cookie: int, error: Err, text: str) -> bytes:
        """Return the failure of any command."""

    @abstractmethod
    def block_status(self, cookie: int, status: Mapping[int, Sequence[tuple[int, int]]]) -> bytes:
        """Return the extents, as (length, status flags), of every selected context id (at least one)."""


class SimpleReplies(Replies):
    """Simple replies only."""

    def read_header(self, cookie: int, offset: int, length: int) -> bytes:  # noqa: D102
        return _SIMPLE(SIMPLE_REPLY_MAGIC, 0, cookie)

    def done(self, command: int, cookie: int) -> bytes:  # noqa: D102
        return _SIMPLE(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, error: Err, text: str) -> bytes:  # noqa: D102
        return _SIMPLE(SIMPLE_REPLY_MAGIC, error, cookie)

    def block_status(self, cookie: int, status: Mapping[int, Sequence[tuple[int, int]]]) -> bytes:  # noqa: D102
        raise NotImplementedError("no context can be selected without structured replies")


class StructuredReplies(Replies):
    """Structured replies; the plain success of anything but a READ is a simple one, which is shorter."""

    def read_header(self, cookie: int, offset: int, length: int) -> bytes:
        """Return the header of one OFFSET_DATA chunk that is the whole reply.

        One chunk suits DF as well. It may carry DONE because nothing can go wrong behind it but the sending
        itself, and that ends the connection.
        """
        return _DATA(STRUCTURED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset)

    def done(self, command: int, cookie: int) -> bytes:  # noqa: D102
        if command == _READ:
            return CHUNK.pack(STRUCTURED_REPLY_MAGIC, ReplyFlag.DONE, ReplyType.NONE, cookie, 0)
        return _SIMPLE(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, error: Err, text: str) -> bytes:  # noqa: D102
        message = text.encode(errors="replace")[:MAX_STRING].decode(errors="ignore").encode()
        payload = ERROR_PAYLOAD.pack(error, len(message)) + message
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, ReplyFlag.DONE, ReplyType.ERROR, cookie, len(payload)) + payload

    def block_status(self, cookie: int, status: Mapping[int, Sequence[tuple[int, int]]]) -> bytes:  # noqa: D102
        last = list(status)[-1]
        reply = bytearray()
        for number, descriptors in status.items():
            flags = ReplyFlag.DONE if number == last else 0
            length = 4 + DESCRIPTOR.size * len(descriptors)
            reply += CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, ReplyType.BLOCK_STATUS, cookie, length)
            reply += number.to_bytes(4, "big")
            reply += b"".join(DESCRIPTOR.pack(*descriptor) for descriptor in descriptors)
        return bytes(reply)
