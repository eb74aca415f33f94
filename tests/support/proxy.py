"""A proxy with faults to switch on, between a client and a server on loopback; every switch works at once.

It runs on an event loop in a thread of its own, so tests that block can use it as well as those that do not.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tests.support.frames import CONNECTION, Frames, Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

Address = str | tuple[str, int]
"""The path of a unix socket, or host and port."""

T = TypeVar("T")

_CHUNK = 256 << 10
_WINDOW = 16 << 20
"""Bytes on the line in one direction at most, so that a long delay costs time and not throughput."""


class Proxy:
    """Forwards every connection to ``target``. Close it, or use it as a context manager."""

    def __init__(self, target: Address, listen: Address = ("127.0.0.1", 0)) -> None:
        self.target = target
        self.delay = 0.0
        """Seconds that everything takes on its way, in each direction."""
        self.trickle = 0.0
        """Seconds between one piece from the server and the next."""
        self.chunk = _CHUNK
        """Bytes of a piece."""
        self.refusing = False
        """Whether new connections are closed at once."""
        self.connections = 0
        """How many were made through it."""
        self.forwarded = 0
        """Bytes that came from the server."""
        self.watch: Callable[[Link, Piece], None] | None = None
        """Called in the proxy's thread for each new connection, and for each piece that comes from the server before it
        goes on. It may do something to the link, and change the bytes of the piece. Set it before anybody connects."""
        self._corrupt_at: int | None = None
        self._cut_at: int | None = None
        self._stall_at: int | None = None
        self._links: list[Link] = []
        self._loop = asyncio.new_event_loop()
        self.flowing = asyncio.Event()
        """Set unless stalled."""
        self.flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._wait(self._listen, listen)
        name = self._server.sockets[0].getsockname()
        self.address: Address = name if isinstance(name, str) else (name[0], name[1])

    async def _listen(self, address: Address) -> asyncio.Server:
        if isinstance(address, str):
            return await asyncio.start_unix_server(self._accept, address)
        return await asyncio.start_server(self._accept, *address)

    def _wait(self, call: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        """Run a coroutine function in the proxy's thread."""
        return asyncio.run_coroutine_threadsafe(call(*arguments), self._loop).result(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- faults -----------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset all connections."""
        self._wait(self._cut)

    def cut_link(self, number: int) -> None:
        """Reset one of the connections, counted from the oldest that there is."""
        self._loop.call_soon_threadsafe(self._links[number].abort)

    def stall_link(self, number: int) -> None:
        """Let nothing through on one of the connections any more."""
        self._loop.call_soon_threadsafe(self._links[number].flowing.clear)

    def cut_after(self, count: int) -> None:
        """Reset all connections once so many more bytes have come from the server."""
        self._cut_at = self.forwarded + count

    def stall_after(self, count: int) -> None:
        """Let nothing more through on the present connections once so many more bytes have come from the server."""
        self._stall_at = self.forwarded + count

    def corrupt_after(self, count: int) -> None:
        """Turn over all bits of the byte that comes from the server after ``count`` more."""
        self._corrupt_at = self.forwarded + count

    def stall(self) -> None:
        """Let nothing through, and hang up on nobody, until :meth:`flow`."""
        self._loop.call_soon_threadsafe(self.flowing.clear)

    def flow(self) -> None:
        """Let everything through again."""
        self._loop.call_soon_threadsafe(self.flowing.set)

    def close(self) -> None:
        """Hang up on everybody and stop listening."""
        self._wait(self._shut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- in the thread of the proxy ---------------------------------------------------------------------------

    def cut_all(self, *, reset: bool = True) -> None:
        """Do what :meth:`cut` does; for :attr:`watch`, which is called in this thread."""
        for link in list(self._links):
            link.abort(reset=reset)

    async def _cut(self) -> None:
        self.cut_all()

    async def _shut(self) -> None:
        self._server.close()
        await self._cut()
        self.flowing.set()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        link = Link(writer, self.connections)
        self._links.append(link)
        if self.watch:
            self.watch(link, Piece(CONNECTION, bytearray()))
        try:
            if not self.refusing:
                from_server, to_server = await self._open_target()
                link.writers.append(to_server)
                async with asyncio.TaskGroup() as tasks:
                    for line in (
                        _Line(self, link, reader, to_server, lambda data: data),
                        _Line(self, link, from_server, writer, partial(self._from_server, link), trickles=True),
                    ):
                        tasks.create_task(line.receive())
                        tasks.create_task(line.send())
        except* OSError:
            pass  # one end is gone: so is the other
        finally:
            self._links.remove(link)
            link.abort()

    async def _open_target(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.target, str):
            return await asyncio.open_unix_connection(self.target)
        return await asyncio.open_connection(*self.target)

    def _from_server(self, link: Link, data: bytes) -> bytes:
        if self.watch:
            pieces = list(link.frames.feed(data))
            for piece in pieces:
                self.watch(link, piece)
            data = b"".join(piece.data for piece in pieces)
        start, self.forwarded = self.forwarded, self.forwarded + len(data)
        if self._corrupt_at is not None and start <= self._corrupt_at < self.forwarded:
            changed = bytearray(data)
            changed[self._corrupt_at - start] ^= 0xFF
            self._corrupt_at, data = None, bytes(changed)
        if self._cut_at is not None and self.forwarded >= self._cut_at:
            self._cut_at = None
            self._loop.call_soon(self.cut_all)
        if self._stall_at is not None and self.forwarded >= self._stall_at:
            self._stall_at = None
            for link in self._links:
                link.flowing.clear()
        return data


class _Line:
    """One direction of a link."""

    def __init__(
        self,
        proxy: Proxy,
        link: Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        change: Callable[[bytes], bytes],
        *,
        trickles: bool = False,
    ) -> None:
        self._proxy = proxy
        self._link = link
        self._trickles = trickles
        self._reader = reader
        self._writer = writer
        self._change = change
        self._on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_WINDOW // _CHUNK)

    async def receive(self) -> None:
        loop = asyncio.get_running_loop()
        data = b"not at its end"
        while data:
            data = await self._reader.read(self._proxy.chunk)
            changed = self._change(data)
            if changed or not data:  # it may be the start of a header, whose rest is waited for
                await self._on_its_way.put((loop.time() + self._proxy.delay, changed))

    async def send(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await self._on_its_way.get()
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            await self._proxy.flowing.wait()
            await self._link.flowing.wait()
            if self._trickles and self._proxy.trickle:
                await asyncio.sleep(self._proxy.trickle)
            if not data:
                self._writer.write_eof()
                return
            self._writer.write(data)
            await self._writer.drain()


class Link:
    """One client and, once it is connected, its server."""

    def __init__(self, writer: asyncio.StreamWriter, number: int) -> None:
        self.number = number
        """Which connection through the proxy it is, from 1 on."""
        self.writers = [writer]
        self.frames = Frames()
        self.flowing = asyncio.Event()
        self.flowing.set()

    def hold(self, seconds: float) -> None:
        """Let nothing through for so long."""
        self.flowing.clear()
        asyncio.get_running_loop().call_later(seconds, self.flowing.set)

    def abort(self, *, reset: bool = True) -> None:
        """Hang up on both sides: with a reset, or, as far as the kernel does it, with the end of a stream."""
        for writer in self.writers:
            sock: socket.socket = writer.get_extra_info("socket")
            if reset and sock.family != socket.AF_UNIX and not writer.transport.is_closing():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # nothing lingers
            writer.transport.abort()
