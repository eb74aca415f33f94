"""What a server answers to one request, whatever kind of replies it uses: collected, and checked for form."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.wire.nbd import Cmd, ReplyFlag, ReplyType
from tests.server.raw_client import request

if TYPE_CHECKING:
    from tests.server.raw_client import RawClient

_ERROR_CHUNK = 1 << 15


class Asked(NamedTuple):
    """A request, right or wrong."""

    command: int
    offset: int
    length: int
    flags: int = 0
    payload: bytes = b""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length

    def __str__(self) -> str:
        name = Cmd(self.command).name if self.command in list(Cmd) else f"command {self.command}"
        return f"{name} offset {self.offset} length {self.length} flags {self.flags:#x}"


@dataclass
class Answer:
    """What came back."""

    error: int = 0
    """NBD's error number, 0 for success."""
    closed: bool = False
    """The server closed the connection instead, or afterwards."""
    data: bytes = b""
    """What a READ read."""
    extents: list[tuple[int, int]] = field(default_factory=list)
    """Length and status flags: the answer of a single meta context."""


async def ask(client: RawClient, asked: Asked, cookie: int) -> Answer:
    """Send a request and collect its answer. AssertionError where its form breaks proto.md's rules."""
    answer = Answer()
    try:
        client.send(
            request(asked.command, cookie, asked.offset, asked.length, flags=asked.flags, payload=asked.payload)
        )
        await _collect(client, asked, cookie, answer)
    except (ConnectionError, asyncio.IncompleteReadError):
        answer.closed = True
    return answer


async def _collect(client: RawClient, asked: Asked, cookie: int, answer: Answer) -> None:
    reads = asked.command == Cmd.READ
    data = bytearray()
    covered = 0
    while True:
        chunk = await client.reply(asked.length if reads else 0)
        assert chunk.cookie == cookie
        payload = chunk.payload
        if chunk.type is None:
            answer.error = answer.error or chunk.error
            data, covered = bytearray(payload), len(payload)
            break
        if chunk.type & _ERROR_CHUNK:
            (answer.error,) = struct.unpack_from("!I", payload)
            assert answer.error, "an error chunk without an error"
        elif chunk.type == ReplyType.BLOCK_STATUS:
            assert not answer.extents, "two answers for one context"
            answer.extents = list(struct.iter_unpack("!II", payload[4:]))
        elif chunk.type in (ReplyType.OFFSET_DATA, ReplyType.OFFSET_HOLE):
            assert reads
            (at,) = struct.unpack_from("!Q", payload)
            content = (
                payload[8:] if chunk.type == ReplyType.OFFSET_DATA else bytes(*struct.unpack_from("!I", payload, 8))
            )
            assert content
            assert asked.offset <= at <= at + len(content) <= asked.end
            data = data or bytearray(asked.length)
            data[at - asked.offset : at - asked.offset + len(content)] = content
            covered += len(content)
        else:
            assert chunk.type == ReplyType.NONE
        if chunk.flags & ReplyFlag.DONE:
            break
    if reads and not answer.error:
        assert covered == asked.length, f"{covered} bytes of {asked.length}"
        answer.data = bytes(data)
