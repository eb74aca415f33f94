"""The NBD server: listens, lets clients in, and sees them out."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING

from nbdstream.block.joining import KernelJoin
from nbdstream.errors import ListenError
from nbdstream.server import sockets
from nbdstream.server.handshake import Handshake
from nbdstream.server.limits import Limits
from nbdstream.server.payloads import PayloadMemory
from nbdstream.server.polling import Polling
from nbdstream.uri import NbdUri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdstream.server.connection import Connection
    from nbdstream.server.export import Export
    from nbdstream.server.tls import TlsPolicy

_log = logging.getLogger(__name__)


class NbdServer:
    """Serves exports to any number of clients on any number of sockets."""

    def __init__(
        self,
        exports: Sequence[Export],
        *,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
        tls: TlsPolicy | None = None,
    ) -> None:
        """Serve ``exports``; the first is the default (the empty name), if it is listed.

        Raises ValueError if two have one name, or if one is for certain clients only and there is no ``tls`` to tell
        them by.
        """
        self.default = exports[0].name if exports and exports[0].info.listed else ""
        """The name that the empty name stands for, also while there is no such export: a client that comes back for
        the default never gets another one."""
        self.exports: list[Export] = []
        self.limits = limits
        self.tls = tls
        self.memory = PayloadMemory()
        self.polling = Polling(limits.poll_max_ns)
        self.joiner = KernelJoin()
        self._servers: list[asyncio.Server] = []
        self._files: list[tuple[str, tuple[int, int]]] = []
        self._handshakes: set[Handshake] = set()
        self._connections: set[Connection] = set()
        self._closing = False
        self._changed = asyncio.Event()
        for export in exports:
            self.add_export(export)

    @property
    def uris(self) -> list[str]:
        """An NBD URI for every export on every socket that is listened on."""
        listening = [sock for server in self._servers for sock in server.sockets]
        return [str(self._uri(sock, export)) for sock in listening for export in self.exports]

    @property
    def connection_count(self) -> int:
        """Clients that have opened an export, those whose last requests are being finished included."""
        return len(self._connections)

    @property
    def handshake_count(self) -> int:
        """Clients that have not opened an export yet."""
        return len(self._handshakes)

    def add_export(self, export: Export) -> None:
        """Offer one more export, to clients that connect from now on. Raises ValueError, see ``__init__``."""
        if any(other.name == export.name for other in self.exports):
            raise ValueError(f"two exports have one name: {export.name!r}")
        if self.tls is None and export.allow is not None:
            raise ValueError("without TLS nobody can be told by a certificate")
        self.exports.append(export)

    async def remove_export(self, export: Export) -> None:
        """Offer an export no more, and cut its clients off; return when nothing of theirs is in flight."""
        self.exports.remove(export)
        for connection in list(self._connections):
            if connection.export is export:
                connection.abort()
        while any(connection.export is export for connection in self._connections):
            self._changed.clear()
            await self._changed.wait()

    async def listen_unix(self, path: str, *, mode: int = 0o600, group: str | None = None) -> None:
        """Listen on a unix socket of that file mode and group.

        The socket file of a server that is gone is replaced. Raises ListenError if another server is there.
        """
        await self.listen_socket(sockets.bind_unix(path, mode=mode, group=group), unlink=True)

    async def listen_tcp(self, host: str, port: int) -> None:
        """Listen on every address of ``host``, on ``port`` (0: any free one). Raises ListenError."""
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(lambda: Handshake(self), host, port, backlog=sockets.BACKLOG)
        except (OSError, UnicodeError) as error:
            # uvloop repeats the address; the resolver has numbers of its own.
            known = isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno
            reason = os.strerror(known) if known else getattr(error, "strerror", None) or error
            msg = f"cannot listen on {host} port {port}: {reason}"
            raise ListenError(msg) from None
        self._servers.append(server)

    async def listen_socket(self, sock: socket.socket, *, unlink: bool = False) -> None:
        """Listen on a stream socket that is bound already, and own it from now on. Raises ListenError.

        ``unlink`` is for a unix socket: remove its file in the end.
        """
        if unlink:
            path = sock.getsockname()
            self._files.append((path, sockets.identity(path)))
        await self._listen(sock)

    async def serve_client(self, sock: socket.socket) -> None:
        """Serve the client at the other end of a connected stream socket, until it has gone. Raises OSError."""
        sock.setblocking(False)
        handshake = Handshake(self)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: handshake, sock)
        while handshake in self._handshakes or handshake.connection in self._connections:
            self._changed.clear()
            await self._changed.wait()

    async def close(self, deadline: float = 10.0) -> None:
        """Stop listening, finish what is in flight, close every connection; all within ``deadline`` seconds.

        What comes in meanwhile is answered ESHUTDOWN, and clients that have not opened an export are dropped. What
        is still in flight after ``deadline`` is given up.
        """
        self._closing = True
        for server in self._servers:
            server.close()
        for path, made in self._files:
            sockets.remove(path, made=made)
        for handshake in list(self._handshakes):
            handshake.abort()
        for connection in list(self._connections):
            connection.drain()
        if not await self._all_gone(deadline):
            _log.warning("%d connections did not finish within %g s", self.connection_count, deadline)
            for connection in list(self._connections):
                connection.abort()
            # What was cancelled gets a few turns of the loop to end; a device that does not let go is not waited for.
            await self._all_gone(1.0)
        self._servers.clear()
        self._files.clear()
        self.joiner.close()

    # -- called by the clients' protocols ------------------------------------------------------------------

    def arrived(self, handshake: Handshake) -> str | None:
        """Count a new client in, or return why it is turned away."""
        limits = self.limits
        if self._closing:
            return "the server is shutting down"
        if len(self._handshakes) >= limits.handshakes:
            return f"{limits.handshakes} clients are in negotiation already"
        if len(self._handshakes) + len(self._connections) >= limits.connections:
            return f"{limits.connections} clients are connected already"
        self._handshakes.add(handshake)
        return None

    def left(self, handshake: Handshake) -> None:
        """Take note that a handshake is over."""
        self._handshakes.discard(handshake)
        self._changed.set()

    def opened(self, connection: Connection) -> None:
        """Take note of a connection in its transmission phase."""
        self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        """Take note that the connection is closed and nothing of it is in flight."""
        self._connections.discard(connection)
        self._changed.set()

    # -------------------------------------------------------------------------------------------------------

    async def _listen(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        make = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
        try:
            self._servers.append(await make(lambda: Handshake(self), sock=sock, backlog=sockets.BACKLOG))
        except OSError as error:
            msg = f"cannot listen on {sock.getsockname()}: {error.strerror or error}"
            raise ListenError(msg) from None

    def _uri(self, sock: socket.socket, export: Export) -> NbdUri:
        tls = export.allow is not None or (self.tls is not None and self.tls.required)
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            return NbdUri(tls=tls, socket=os.fsdecode(name), export=export.name)
        return NbdUri(tls=tls, host=name[0], port=name[1], export=export.name)

    async def _all_gone(self, timeout: float) -> bool:  # noqa: ASYNC109 - a bound on the whole of several waits
        try:
            async with asyncio.timeout(timeout):
                while self._handshakes or self._connections:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True
