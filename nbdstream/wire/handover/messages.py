"""What the two ends of a hand-over say to each other: one JSON object a line, in ASCII or UTF-8, ended by LF.

The destination connects and says *hello*; from then on each side states where it stands, whenever that changes, when
it is connected anew, and every few seconds. Every message is a statement that may be repeated: it names the group (the
disks of one machine), the destination that it is from or for, and the epoch; and it bears its number on this
connection, so that nothing can be taken out or put in twice unnoticed.

Nothing is taken that is not described here: an unknown message or field, a value out of bounds, a longer line.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from nbdstream.errors import ProtocolError

VERSION: Final = 1

MAXIMUM_LINE: Final = 64 << 10
"""Bytes. The longest message has the manifests of MAXIMUM_DISKS disks, which are some 20 KiB."""

MAXIMUM_DISKS: Final = 64
"""Disks in a group. QEMU's machines have fewer slots than that for disks."""

MAXIMUM_REASON: Final = 1000
"""Characters. It is for people."""

_UUID: Final = r"\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z"
_COUNT: Final = Meta(ge=0, le=(1 << 63) - 1)

Secret: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
"""128 random bits: who does not know it does not guess it."""
Uuid: TypeAlias = Annotated[str, Meta(pattern=_UUID)]
Count: TypeAlias = Annotated[int, _COUNT]
Reason: TypeAlias = Annotated[str, Meta(max_length=MAXIMUM_REASON)]


class UnknownVersionError(ProtocolError):
    """The peer speaks a version of the protocol that is not known here."""


class Disk(Struct, frozen=True, forbid_unknown_fields=True):
    """One disk of the group."""

    uuid: Uuid
    """Of the disk, wherever it lies: the overlay that becomes independent inherits it."""
    size: Count
    """Bytes."""
    export: Annotated[str, Meta(min_length=1, max_length=256)]
    """Its name on the source's NBD server."""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What the destination says of a disk that needs its source no more.

    The counts are clusters, and add up to all of them.
    """

    uuid: Uuid
    epoch: Count
    size: Count
    """Bytes."""
    cluster_size: Annotated[int, Meta(ge=512, le=1 << 30)]
    """Bytes."""
    data: Count
    zero: Count
    unallocated: Count
    """Never allocated: the source said that they read as zero."""
    accepted: Count
    """Unix time, seconds."""
    independent: Count
    """Unix time, seconds."""


Disks: TypeAlias = Annotated[tuple[Disk, ...], Meta(min_length=1, max_length=MAXIMUM_DISKS)]
Manifests: TypeAlias = Annotated[tuple[Manifest, ...], Meta(min_length=1, max_length=MAXIMUM_DISKS)]


class Message(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="message", tag=str.lower):
    """What every message but a refusal has."""

    group: Secret
    """Which hand-over this is."""
    destination: Secret
    """Which destination it is from or for: an id that the destination made, and keeps in its journal."""
    epoch: Count
    """Counts the changes of owner of these disks."""
    seq: Count = 0
    """Counts the messages of one side on one connection, from 0 on. The channel fills it in."""


class Hello(Message, frozen=True):
    """The destination's first word. Its epoch is 0 as long as it knows none."""

    version: Count
    token: Secret
    """From the offer."""


class Prepared(Message, frozen=True):
    """The destination is ready for these disks, which the source owns at this epoch."""

    disks: Disks


class Accepted(Message, frozen=True):
    """The destination owns the disks at this epoch, and never gives them back."""

    remote: Count = 0
    """Bytes that are only at the source still."""


class Declined(Message, frozen=True):
    """The destination does not want the disks, and will not accept them whatever is granted."""


class Independent(Message, frozen=True):
    """Nothing of the disks is only at the source any more."""

    manifests: Manifests


class Offer(Message, frozen=True):
    """The source owns these disks at this epoch, and may grant them."""

    disks: Disks
    port: Annotated[int, Meta(ge=1, le=65535)]
    """Of the NBD server, at the address of this connection."""


class Grant(Message, frozen=True):
    """The destination may accept the disks at this epoch. The source will not use them unless it declines."""


class Over(Message, frozen=True):
    """The source keeps the disks, and grants nothing any more."""


class Released(Message, frozen=True):
    """The source has checked the manifests and let go of the disks."""


class Refused(Struct, frozen=True, forbid_unknown_fields=True, tag_field="message", tag="refused"):
    """The source does not talk to this peer; nothing has changed by what it said. The connection ends."""

    reason: Reason
    version: Count = VERSION
    """The one that the source speaks."""


FromDestination: TypeAlias = Hello | Prepared | Accepted | Declined | Independent
FromSource: TypeAlias = Offer | Grant | Over | Released | Refused

FROM_DESTINATION: Final = msgspec.json.Decoder(FromDestination)
FROM_SOURCE: Final = msgspec.json.Decoder(FromSource)

_M = TypeVar("_M")


class _Versioned(Struct):
    """Any JSON object, of which only this is looked at."""

    version: int = VERSION


_VERSIONED: Final = msgspec.json.Decoder(_Versioned)
_ENCODER: Final = msgspec.json.Encoder()

# A hello of another version may be anything else, but it has to say so.
_BROKEN: Final = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class Channel(Generic[_M]):
    """One connection's messages: bytes in and messages out, and the other way."""

    def __init__(self, decoder: msgspec.json.Decoder[_M]) -> None:
        """Take what ``decoder`` takes: FROM_DESTINATION at the source, FROM_SOURCE at the destination."""
        self._decoder = decoder
        self._input = bytearray()
        self._due = 0
        self._sent = 0

    def receive(self, data: bytes) -> list[_M]:
        """Return the messages that are complete now.

        Raises ProtocolError, whose text may be told to the peer: the connection has to be closed then.
        """
        complete, newline, rest = data.rpartition(b"\n")
        lines: list[bytes] = []
        if newline:
            lines = (bytes(self._input) + complete).split(b"\n")
            self._input.clear()
        self._input += rest
        messages = [self._take(line) for line in lines]
        _check_length(len(self._input))
        return messages

    def _take(self, line: bytes) -> _M:
        _check_length(len(line))
        message = _decode(self._decoder, line)
        seq = getattr(message, "seq", self._due)
        if seq != self._due:
            raise ProtocolError(f"message {seq} came where {self._due} was due")
        self._due += 1
        return message

    def send(self, message: Message | Refused) -> bytes:
        """Return the bytes that say it."""
        if isinstance(message, Message):
            message = msgspec.structs.replace(message, seq=self._sent)
        self._sent += 1
        return _ENCODER.encode(message) + b"\n"


def _check_length(length: int) -> None:
    if length > MAXIMUM_LINE:
        raise ProtocolError(f"a message is longer than {MAXIMUM_LINE} bytes")


def _decode(decoder: msgspec.json.Decoder[_M], line: bytes) -> _M:
    try:
        return decoder.decode(line)
    except _BROKEN as error:
        refusal = f"a message that is none of version {VERSION}: {plain(str(error))}"
    try:
        version = _VERSIONED.decode(line).version
    except _BROKEN:
        version = VERSION
    if version != VERSION:
        raise UnknownVersionError(f"version {version} is not known here: this is version {VERSION}")
    raise ProtocolError(refusal)


def plain(text: str) -> str:
    """Return text from a stranger as one line that a terminal may be given."""
    return re.sub(r"[^ -~]+", " ", text)[:MAXIMUM_REASON]


def manifest_problem(disks: Disks, epoch: int, manifests: Manifests) -> str | None:
    """Return why these manifests do not show that all of the disks are independent at ``epoch``; None if they do."""
    if [each.uuid for each in manifests] != [disk.uuid for disk in disks]:
        return "they are of other disks"
    for disk, manifest in zip(disks, manifests, strict=True):
        counted = manifest.data + manifest.zero + manifest.unallocated
        if manifest.epoch != epoch:
            return f"disk {disk.uuid}: epoch {manifest.epoch}, not {epoch}"
        if manifest.size != disk.size:
            return f"disk {disk.uuid}: {manifest.size} bytes, not {disk.size}"
        if counted != -(-disk.size // manifest.cluster_size):
            return f"disk {disk.uuid}: {counted} clusters of {manifest.cluster_size} bytes are not {disk.size} bytes"
    return None
