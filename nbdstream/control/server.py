"""The control socket: QMP for a few clients at a time, beside the data path and never in its way.

A client's commands are done one after the other, and between any two of them the loop serves whoever else waits. What
has been asked for is done, whether or not the asker stays for the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final, Self

from nbdstream.control.commands import VERSION
from nbdstream.errors import ListenError
from nbdstream.server import sockets
from nbdstream.wire.qmp import QmpError, QmpServer, encode_event

if TYPE_CHECKING:
    from nbdstream.control.commands import Commands
    from nbdstream.wire.qmp import Command

log = logging.getLogger(__name__)

MOST_CLIENTS: Final = 16
"""A manager, a few commands and people who watch. Each may cost a message, what is read at once and MOST_UNSENT."""

MOST_UNSENT: Final = 1 << 20
"""Bytes that a client has not taken: thousands of events. It is cut off then, and so knows that it has missed some."""

_PORTION: Final = 16 << 10
"""Bytes that are read at once."""

_LINGER_SECONDS: Final = 1.0
"""In the end, what a client may take for its last answer and events."""


class ControlServer:
    """Listens on a unix socket. As a context manager it is closed at the end."""

    def __init__(self, path: str, *, mode: int = 0o600, group: str | None = None) -> None:
        """Bind the socket, so that nobody else can; clients can connect from :meth:`begin` on. Raises ListenError."""
        self.path = path
        self._bound = sockets.bind_unix(path, mode=mode, group=group)
        self._made = sockets.identity(path)
        self._server: asyncio.Server | None = None
        self._clients: set[_Client] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def begin(self, commands: Commands) -> None:
        """Let clients connect and run these commands. Raises ListenError."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(_Client(reader, writer, commands))

        try:
            self._server = await asyncio.start_unix_server(serve, sock=self._bound, limit=_PORTION)
        except OSError as error:
            msg = f"cannot listen on {self.path}: {error.strerror or error}"
            raise ListenError(msg) from None
        log.info("control socket: %s", self.path)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Tell every client of an event, which happened now."""
        event = encode_event(name, data, time.time_ns())
        for client in self._clients.copy():
            client.notify(event)

    async def close(self) -> None:
        """Listen no more, give up what is being done for clients, and send them what is left to send."""
        sockets.remove(self.path, made=self._made)
        if self._server is None:
            self._bound.close()
            return
        self._server.close()
        if self._clients:
            ending = [client.end() for client in self._clients]
            _, late = await asyncio.wait(ending, timeout=_LINGER_SECONDS)
            for client in self._clients.copy():
                client.abort()
            if late:
                await asyncio.wait(late, timeout=_LINGER_SECONDS)

    async def _serve(self, client: _Client) -> None:
        if len(self._clients) >= MOST_CLIENTS:
            log.warning("control socket: %d clients are connected already: one more is turned away", MOST_CLIENTS)
            client.abort()
            return
        self._clients.add(client)
        try:
            await client.run()
        finally:
            self._clients.discard(client)


class _Client:
    """One client, in a task of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, commands: Commands) -> None:
        self._reader = reader
        self._writer = writer
        self._commands = commands
        self._qmp = QmpServer(VERSION)
        self._task = asyncio.current_task()

    async def run(self) -> None:
        """Serve it until it goes."""
        try:
            self._send()
            while not self._qmp.finished and (data := await self._reader.read(_PORTION)):
                self._qmp.receive(data)
                while command := self._qmp.next_command():
                    await self._perform(command)
                    self._send()
                    await self._writer.drain()
                    await asyncio.sleep(0)
                self._send()
        except OSError as error:
            log.debug("control socket: a client is gone: %s", error)
        finally:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    def notify(self, event: bytes) -> None:
        """Send an event."""
        self._qmp.notify(event)
        self._send()

    def end(self) -> asyncio.Task[None]:
        """Give up what it waits for; return the task that sends it what is left."""
        assert self._task is not None
        self._task.cancel()
        return self._task

    def abort(self) -> None:
        """Drop it."""
        self._writer.transport.abort()

    def _send(self) -> None:
        data = self._qmp.data_to_send()
        transport = self._writer.transport
        if not data or transport.is_closing():
            return
        self._writer.write(data)
        if transport.get_write_buffer_size() > MOST_UNSENT:
            log.warning("control socket: a client that does not read is cut off")
            transport.abort()

    async def _perform(self, command: Command) -> None:
        if command.refusal:
            self._qmp.fail(command, command.refusal)
            return
        try:
            value = await self._commands.execute(command.name, command.arguments)
        except QmpError as error:
            self._qmp.fail(command, error)
        except Exception:
            log.exception("control socket: %s failed", command.name)
            self._qmp.fail(command, QmpError("Internal error: the log has more"))
        else:
            self._qmp.answer(command, value)
