"""A client that says what it is told to, right or wrong, byte by byte if need be."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdstream.wire.nbd import (
    CHUNK,
    EXTENDED_CHUNK,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    Opt,
    Rep,
    ReplyType,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine, Sequence


def counted(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("!I", len(data)) + data


def info_data(name: str = "", items: Sequence[int] = ()) -> bytes:
    return counted(name) + struct.pack("!H", len(items)) + b"".join(struct.pack("!H", item) for item in items)


def meta_data(name: str, *queries: str) -> bytes:
    return counted(name) + struct.pack("!I", len(queries)) + b"".join(counted(query) for query in queries)


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION.pack(IHAVEOPT, number, len(data)) + data


def request(
    command: int, cookie: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b""
) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def extended_request(
    command: int, cookie: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b""
) -> bytes:
    if payload:
        flags |= CmdFlag.PAYLOAD_LEN
        length = len(payload)
    return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def write_request(cookie: int, offset: int, payload: bytes, *, flags: int = 0) -> bytes:
    return request(Cmd.WRITE, cookie, offset, len(payload), flags=flags, payload=payload)


@dataclass
class Chunk:
    """One reply, or one chunk of it; a simple reply has the type None."""

    cookie: int
    type: int | None
    flags: int
    error: int
    payload: bytes
    offset: int | None = None
    """The request's, which only an extended reply repeats."""


class RawClient:
    """One connection to a server on a unix socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.size = 0
        self.flags = 0
        self.extended = False

    @classmethod
    async def connect(cls, path: str) -> RawClient:
        return cls(*await asyncio.open_unix_connection(path))

    @classmethod
    def pair(cls) -> tuple[Coroutine[None, None, RawClient], socket.socket]:
        """Return a client, to be awaited, and the socket that its server is to have."""
        ours, theirs = socket.socketpair()

        async def client() -> RawClient:
            return cls(*await asyncio.open_unix_connection(sock=ours))

        return client(), theirs

    @classmethod
    async def open(
        cls, path: str, name: str = "", *, structured: bool = False, contexts: Sequence[str] = ()
    ) -> RawClient:
        """Connect and enter the transmission phase."""
        client = await cls.connect(path)
        await client.greet()
        await client.go(name, structured=structured, contexts=contexts)
        return client

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Upgrade the connection. Raises ssl.SSLError or ConnectionError if the server does not let us in."""
        assert await self.opt(Opt.STARTTLS) == [(Rep.ACK, b"")]
        await self.writer.start_tls(context, server_hostname="localhost")

    async def go(
        self, name: str = "", *, structured: bool = False, extended: bool = False, contexts: Sequence[str] = ()
    ) -> None:
        """Enter the transmission phase."""
        if structured:
            assert (await self.opt(Opt.STRUCTURED_REPLY))[-1][0] == Rep.ACK
        if extended:
            assert (await self.opt(Opt.EXTENDED_HEADERS))[-1][0] == Rep.ACK
            self.extended = True
        if contexts:
            assert (await self.opt(Opt.SET_META_CONTEXT, meta_data(name, *contexts)))[-1][0] == Rep.ACK
        replies = await self.opt(Opt.GO, info_data(name))
        assert replies[-1][0] == Rep.ACK, replies
        _, self.size, self.flags = struct.unpack("!HQH", next(data for _, data in replies if data[:2] == bytes(2)))

    async def greet(self, flags: int = 3) -> None:
        magic, ihaveopt, _ = struct.unpack("!QQH", await self.reader.readexactly(18))
        assert (magic, ihaveopt) == (NBDMAGIC, IHAVEOPT)
        self.send(struct.pack("!I", flags))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def opt(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option and return its replies, (type, data) each, up to the final one."""
        self.send(option(number, data))
        replies = []
        while True:
            magic, echoed, kind, length = OPTION_REPLY.unpack(await self.reader.readexactly(OPTION_REPLY.size))
            assert magic == REP_MAGIC
            assert echoed == number
            replies.append((kind, await self.reader.readexactly(length)))
            if kind == Rep.ACK or kind >> 31:
                return replies

    async def reply(self, read_length: int = 0) -> Chunk:
        """Return the next reply; ``read_length`` is what a successful simple reply is followed by."""
        (magic,) = struct.unpack("!I", head := await self.reader.readexactly(4))
        if self.extended:
            assert magic == EXTENDED_REPLY_MAGIC, hex(magic)
            rest = await self.reader.readexactly(EXTENDED_CHUNK.size - 4)
            _, flags, kind, cookie, offset, length = EXTENDED_CHUNK.unpack(head + rest)
            payload = await self.reader.readexactly(length)
            error = struct.unpack_from("!I", payload)[0] if kind == ReplyType.ERROR else 0
            return Chunk(cookie, kind, flags, error, payload, offset)
        if magic == SIMPLE_REPLY_MAGIC:
            rest = await self.reader.readexactly(SIMPLE_REPLY.size - 4)
            _, error, cookie = SIMPLE_REPLY.unpack(head + rest)
            return Chunk(cookie, None, 1, error, await self.reader.readexactly(0 if error else read_length))
        assert magic == STRUCTURED_REPLY_MAGIC, hex(magic)
        rest = await self.reader.readexactly(CHUNK.size - 4)
        _, flags, kind, cookie, length = CHUNK.unpack(head + rest)
        payload = await self.reader.readexactly(length)
        error = struct.unpack_from("!I", payload)[0] if kind == ReplyType.ERROR else 0
        return Chunk(cookie, kind, flags, error, payload)

    async def ask(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"", cookie: int = 7
    ) -> Chunk:
        """Send a request, return its reply, or the first chunk of it."""
        if self.extended:
            self.send(extended_request(command, cookie, offset, length, flags=flags, payload=payload))
        else:
            self.send(request(command, cookie, offset, length, flags=flags, payload=payload))
        chunk = await self.reply(length if command == Cmd.READ else 0)
        assert chunk.cookie == cookie
        assert chunk.offset in (None, offset)
        return chunk

    async def read(self, offset: int, length: int) -> bytes:
        chunk = await self.ask(Cmd.READ, offset, length)
        assert chunk.error == 0, chunk
        return chunk.payload if chunk.type is None else chunk.payload[8:]

    async def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        return (await self.ask(Cmd.WRITE, offset, len(data), flags=flags, payload=data)).error

    async def closed(self) -> bool:
        """Wait for the end of the connection; whatever still comes is dropped."""
        try:
            while await self.reader.read(1 << 20):
                pass
        except ConnectionError:
            pass
        return True

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
