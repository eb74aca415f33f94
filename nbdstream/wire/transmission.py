"""The transmission phase, server side: requests parsed in batches, validated, and kept in step.

The caller owns the receive buffer and gives all of it to :meth:`Transmission.requests`. What comes out are plain
tuples, because at 150,000 requests a second an object for each would be the largest cost of all. A request that must be
refused comes out with its :class:`Refusal`, one with a payload only when that has been consumed, so that the next
request still parses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from nbdstream.errors import ProtocolError
from nbdstream.wire.nbd import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    STATUS_PAYLOAD,
    Cmd,
    CmdFlag,
    Err,
    TransmissionFlag,
)
from nbdstream.wire.replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdstream.wire.export import Agreement

Buffer: TypeAlias = bytes | bytearray | memoryview


class Refusal(NamedTuple):
    """Why a request is answered with an error, whatever the device would say."""

    error: Err
    text: str


class Request(NamedTuple):
    """A request as a client sent it."""

    command: int
    flags: int
    cookie: int
    """Opaque: it goes back as it came."""
    offset: int
    length: int
    payload: Buffer | None
    """What WRITE brought, as a view of the buffer that it came in, or the ids of the contexts that BLOCK_STATUS is
    limited to (:func:`context_ids`); None for everything else, and for whatever is refused."""
    refusal: Refusal | None


RequestFields: TypeAlias = tuple[int, int, int, int, int, Buffer | None, Refusal | None]
"""A :class:`Request` before ``Request._make``."""

READ: Final = int(Cmd.READ)
WRITE: Final = int(Cmd.WRITE)
SMALL_PAYLOAD: Final = 64 << 10
"""Bytes. A payload up to here is given when all of it is there; the caller's buffer has room for it and its header."""

_DISC: Final = int(Cmd.DISC)
_BLOCK_STATUS: Final = int(Cmd.BLOCK_STATUS)
_PAYLOAD_LEN: Final = int(CmdFlag.PAYLOAD_LEN)

_SHUTDOWN: Final = Refusal(Err.ESHUTDOWN, "the server is shutting down")
_UNKNOWN: Final = Refusal(Err.EINVAL, "the command is not known")
_BAD_FLAGS: Final = Refusal(Err.EINVAL, "a command flag does not belong to this command or was not negotiated")
_READ_ONLY: Final = Refusal(Err.EPERM, "the export is read-only")
_PAST_END: Final = Refusal(Err.EINVAL, "the request reaches past the end of the export")
_NO_SPACE: Final = Refusal(Err.ENOSPC, "the request reaches past the end of the export")
_UNALIGNED: Final = Refusal(Err.EINVAL, "the request is not aligned to the minimum block size")
_TOO_LONG: Final = Refusal(Err.EINVAL, "the payload is longer than the maximum payload size")
_READ_TOO_LONG: Final = Refusal(Err.EOVERFLOW, "the read is longer than the maximum payload size")
_NOT_ZERO: Final = Refusal(Err.EINVAL, "a flush has no offset and no length")
_NO_CONTEXT: Final = Refusal(Err.EINVAL, "no meta context was negotiated for this export")
_BAD_FILTER: Final = Refusal(Err.EINVAL, "the payload is not a length and some of the negotiated context ids")
_NO_LENGTH: Final = Refusal(Err.EINVAL, "a block status needs a length")

_WRITES: Final = frozenset({Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES})


class Transmission:
    """The transmission phase of one connection."""

    def __init__(self, agreement: Agreement) -> None:
        self.replies = _replies(agreement)
        self.position = 0
        """Where in the buffer the first byte lies that :meth:`requests` has not consumed."""
        self.awaiting: Request | None = None
        """A WRITE whose payload is long and not all there: its first bytes lie at ``position``. The caller collects
        the payload where it likes, sets this to None, and goes on with what follows the payload."""
        self.finished = False
        """The client sent DISC: nothing that it sends is looked at any more."""
        self._agreement = agreement
        self._size = agreement.export.size
        self._maximum = agreement.export.maximum_payload
        self._mask = agreement.export.minimum_block - 1
        self._flags = _flags_of_commands(agreement)
        self._read_only = bool(agreement.flags & TransmissionFlag.READ_ONLY)
        self._shutting_down = False
        self._skip = 0
        self._skipped: RequestFields | None = None

    def shut_down(self) -> None:
        """Refuse every further request with ESHUTDOWN."""
        self._shutting_down = True
        self._maximum = 0

    def requests(self, data: memoryview, start: int, end: int) -> Iterator[RequestFields]:
        """Yield the complete requests in ``data[start:end]``; ``position`` tells how far they reach.

        Raises ProtocolError when the stream cannot be followed any further. The iteration may be broken off after
        any request and taken up again from ``position``.
        """
        size, maximum, mask, extended = self._size, self._maximum, self._mask, self._agreement.extended
        layout = EXTENDED_REQUEST if extended else REQUEST
        unpack, header = layout.unpack_from, layout.size
        right_magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        # A flag of extended headers says that a payload follows; a WRITE is plain with or without it.
        plain = (0, _PAYLOAD_LEN) if extended else (0,)
        writable = not self._read_only
        position = self.position = start
        while not self.finished:
            if self._skipped:
                skipped = min(self._skip, end - position)
                position += skipped
                self._skip -= skipped
                self.position = position
                if self._skip:
                    return
                refused, self._skipped = self._skipped, None
                yield refused
            if end - position < header:
                return
            magic, flags, command, cookie, offset, length = unpack(data, position)
            if magic != right_magic:
                msg = f"a request without its magic number ({magic:#010x})"
                raise ProtocolError(msg)
            position += header
            # The fast path: a plain READ or WRITE that nothing is wrong with, and that is all there.
            if length <= maximum and offset + length <= size and not (mask and (offset | length) & mask):
                if not (command or flags):
                    self.position = position
                    yield 0, 0, cookie, offset, length, None, None
                    continue
                behind = position + length
                if command == WRITE and flags in plain and writable and length and behind <= end:
                    self.position = behind
                    yield command, flags, cookie, offset, length, data[position:behind], None
                    position = behind
                    continue
            if command == _DISC:
                self.position = position
                self.finished = True
                return
            # With extended headers a flag says so; but QEMU (10.0) leaves it out with WRITE, whose payload is there.
            carries = command == WRITE or (extended and flags & _PAYLOAD_LEN)
            if carries and extended:
                refusal = self._refuse_payload(command, flags, offset, length)
            else:
                refusal = self._refuse(command, flags, offset, length)
            if not carries:
                self.position = position
                yield command, flags, cookie, offset, length, None, refusal
            elif refusal:
                self._skip, self._skipped = length, (command, flags, cookie, offset, length, None, refusal)
            elif command == _BLOCK_STATUS:
                if end - position < length:
                    return  # a few bytes: they are given once more, with the header, when they are all there
                payload = bytes(data[position : position + length])
                self.position = position = position + length
                yield self._filtered(flags, cookie, offset, payload)
            elif end - position < length:
                if length > SMALL_PAYLOAD:
                    self.position = position
                    self.awaiting = Request(command, flags, cookie, offset, length, None, None)
                return
            else:
                self.position = position = position + length
                yield command, flags, cookie, offset, length, data[position - length : position], None

    def _refuse_payload(self, command: int, flags: int, offset: int, length: int) -> Refusal | None:
        """Refuse what has an extended header and a payload. Raises ProtocolError for a payload that is an attack."""
        if length > self._agreement.export.maximum_payload:
            msg = f"a payload of {length} bytes"
            raise ProtocolError(msg)
        if command != _BLOCK_STATUS or self._shutting_down or flags & ~self._flags[command]:
            return self._refuse(command, flags, offset, length)
        # A longer list names some context twice, or one that does not exist.
        most = STATUS_PAYLOAD.size + 4 * len(self._agreement.contexts)
        return None if STATUS_PAYLOAD.size < length <= most and length % 4 == 0 else _BAD_FILTER

    def _filtered(self, flags: int, cookie: int, offset: int, payload: bytes) -> RequestFields:
        """Return the BLOCK_STATUS that has this payload."""
        (length,) = STATUS_PAYLOAD.unpack_from(payload)
        ids = payload[STATUS_PAYLOAD.size :]
        numbers = context_ids(ids)
        flags &= ~_PAYLOAD_LEN
        refusal = self._refuse(_BLOCK_STATUS, flags, offset, length)
        if len(set(numbers)) < len(numbers) or not self._agreement.contexts.keys() >= set(numbers):
            refusal = _BAD_FILTER
        return _BLOCK_STATUS, flags, cookie, offset, length, None if refusal else ids, refusal

    def _refuse(self, command: int, flags: int, offset: int, length: int) -> Refusal | None:
        if self._shutting_down:
            return _SHUTDOWN
        allowed = self._flags.get(command)
        if allowed is None:
            return _UNKNOWN
        if flags & ~allowed:
            return _BAD_FLAGS
        if command == Cmd.FLUSH:
            return _NOT_ZERO if offset or length else None
        if command in _WRITES and self._read_only:
            return _READ_ONLY
        if offset + length > self._size:
            return _NO_SPACE if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else _PAST_END
        if (offset | length) & self._mask:
            return _UNALIGNED
        return self._refuse_length(command, length)

    def _refuse_length(self, command: int, length: int) -> Refusal | None:
        if length > self._maximum:
            if command == Cmd.WRITE:
                return _TOO_LONG
            if command == Cmd.READ:
                # With simple replies the maximum is a rule for the client; with chunks it is our choice.
                return _READ_TOO_LONG if self.replies.sparse else _TOO_LONG
        if command == Cmd.BLOCK_STATUS:
            if not self._agreement.contexts:
                return _NO_CONTEXT
            # A reply holds at least one extent, and no extent is empty.
            return None if length else _NO_LENGTH
        return None


def context_ids(payload: Buffer) -> tuple[int, ...]:
    """Return the ids that a BLOCK_STATUS is limited to."""
    return tuple(int.from_bytes(payload[at : at + 4], "big") for at in range(0, len(payload), 4))


def _replies(agreement: Agreement) -> Replies:
    if agreement.extended:
        return ExtendedReplies()
    return StructuredReplies() if agreement.structured else SimpleReplies()


def _flags_of_commands(agreement: Agreement) -> dict[int, int]:
    """Return which flags each command takes, given what was advertised; a command that is missing is unknown."""
    advertised = agreement.flags
    flags = {
        Cmd.READ: CmdFlag.DF if advertised & TransmissionFlag.SEND_DF else CmdFlag(0),
        Cmd.WRITE: CmdFlag(0),
        Cmd.FLUSH: CmdFlag(0),
        Cmd.TRIM: CmdFlag(0),
        Cmd.CACHE: CmdFlag(0),
        Cmd.WRITE_ZEROES: CmdFlag.NO_HOLE,
        Cmd.BLOCK_STATUS: CmdFlag.REQ_ONE,
    }
    if advertised & TransmissionFlag.SEND_FAST_ZERO:
        flags[Cmd.WRITE_ZEROES] |= CmdFlag.FAST_ZERO
    if agreement.extended:
        flags[Cmd.WRITE] |= CmdFlag.PAYLOAD_LEN
    if advertised & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
        flags[Cmd.BLOCK_STATUS] |= CmdFlag.PAYLOAD_LEN
    # "If advertised, the server MUST accept all commands with this bit set": some clients send it with READ.
    fua = CmdFlag.FUA if advertised & TransmissionFlag.SEND_FUA else CmdFlag(0)
    return {int(command): int(allowed | fua) for command, allowed in flags.items()}
