"""The source of a stream: a remote export that may go away and come back.

Nobody else connects, reconnects, or asks whether a source is the one it was. Whoever reads from here never sees
a lost connection: requests are held until the source is back.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.block.device import BlockDevice, Buffer
from nbdstream.block.remote.export import CopyDone, RemoteExport
from nbdstream.block.worker import settling
from nbdstream.errors import SourceError, WrongSourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdstream.extents import Extent
    from nbdstream.uri import NbdUri

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
"""A source host that reboots takes minutes: asking it every few seconds costs nothing and wastes little."""

_LOST = frozenset({errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECANCELED})
"""What a request fails with when the connection is gone, or is closed since it is gone, or the server is going."""


class _Request(NamedTuple):
    """Something that is asked of the source, however often it takes."""

    ask: Callable[[RemoteExport, _Request], None]
    fail: Callable[[OSError], None]


class Source(BlockDevice):
    """A remote export that is connected to again and again."""

    read_only = True

    def __init__(self, uri: NbdUri, *, connections: int = 4, tls_certificates: str | None = None) -> None:
        self.uri = uri
        self._connections = connections
        self._tls_certificates = tls_certificates
        self._export: RemoteExport | None = None
        self._expects_size = False
        self._held: list[_Request] = []
        self._reconnecting: asyncio.Task[None] | None = None
        self._closed = False
        self.lost_since: float | None = None
        """When the source went away (``time.time()``), None while it is there."""
        self.lost_because = ""
        self.on_change: Callable[[], None] = lambda: None
        """Called when the source is lost and when it is back."""

    async def connect(self) -> None:
        """Connect now. Raises SourceError, saying why not; then :meth:`connect_later` goes on trying."""
        self._arrived(await self._open())

    def expect(self, size: int) -> None:
        """Say what size, in bytes, the source must have, as QEMU compares: rounded up to 512."""
        self.size = size
        self._expects_size = True

    def connect_later(self, reason: str) -> None:
        """Hold all requests, and go on trying to connect."""
        self._lose(reason)

    @property
    def connected(self) -> bool:
        """Whether the source is there."""
        return self._export is not None

    @property
    def export(self) -> RemoteExport:
        """The connected export. Raises SourceError while there is none."""
        if self._export is None:
            raise SourceError(f"{self.uri}: {self.lost_because or 'not connected'}")
        return self._export

    async def _open(self) -> RemoteExport:
        export = await RemoteExport.connect(
            str(self.uri), connections=self._connections, tls_certificates=self._tls_certificates
        )
        if self._expects_size and round_up(export.size) != round_up(self.size):
            await export.close()
            raise WrongSourceError(f"{self.uri} has {export.size} bytes, the overlay {self.size}: it is another disk")
        return export

    def _arrived(self, export: RemoteExport) -> None:
        self._export = export
        self.expect(export.size)
        self.lost_since = None
        export.lost.add_done_callback(lambda lost: self._lose(lost.result()) if self._export is export else None)
        self._retry_held()
        self.on_change()

    def _lose(self, reason: str) -> None:
        if self._closed or self._reconnecting:
            return
        if self._export:
            log.warning("the source is lost (%s): what is not local waits until it is back", reason)
        gone, self._export = self._export, None
        self.lost_since = time.time()
        self.lost_because = reason
        self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect(gone))
        self.on_change()

    async def _reconnect(self, gone: RemoteExport | None) -> None:
        if gone:
            await gone.close()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            try:
                export = await self._open()
            except SourceError as error:
                if str(error) != self.lost_because:
                    log.warning("the source is not back: %s", error)
                self.lost_because = str(error)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            else:
                break
        self._reconnecting = None
        log.info("the source is back: %s", self.uri)
        self._arrived(export)

    # -- requests ---------------------------------------------------------------------------------------------

    def _submit(self, request: _Request) -> None:
        if self._closed:
            request.fail(OSError(errno.ECANCELED, "the source is closed"))
        elif self._export is None:
            self._held.append(request)
        else:
            request.ask(self._export, request)

    def _is_lost(self, error: OSError | None, request: _Request) -> bool:
        """Whether a request failed only because a connection did; it is made again then."""
        if error is None or error.errno not in _LOST or self._closed:
            return False
        self._held.append(request)
        asyncio.get_running_loop().call_soon(self._retry_held)
        return True

    def _retry_held(self) -> None:
        """Make held requests again on the connections that are left, if any are."""
        if self._export is not None and not self._export.lost.done():
            held, self._held = self._held, []
            for request in held:
                request.ask(self._export, request)

    def copy_soon(
        self, offset: int, length: int, fd: int, place: int, done: CopyDone, *, zero_unit: int, urgent: bool
    ) -> None:
        """Copy a range into a file; ``done(zero, error)`` when it is there.

        Bit i of ``zero`` says that the i-th unit of ``zero_unit`` bytes is all zero: it was not written.
        """

        def ask(export: RemoteExport, request: _Request) -> None:
            def finished(zero: int | None, error: OSError | None) -> None:
                if not self._is_lost(error, request):
                    done(zero, error)

            export.copy_soon(offset, length, fd, place, finished, zero_unit=zero_unit, urgent=urgent)

        self._submit(_Request(ask, lambda error: done(None, error)))

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Read from the source, keeping nothing."""
        answer: asyncio.Future[Buffer] = asyncio.get_running_loop().create_future()
        settle = settling(answer)

        def ask(export: RemoteExport, request: _Request) -> None:
            def finished(data: Buffer | None, error: OSError | None) -> None:
                if not answer.done() and not self._is_lost(error, request):
                    settle(data, error)

            export.read_soon(offset, length, finished)

        self._submit(_Request(ask, lambda error: settle(None, error)))
        return [await answer]

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Return what the source says of a range."""
        while True:
            export = await self.present()
            try:
                return await export.extents(offset, length)
            except OSError as error:
                if error.errno not in _LOST or self._closed:
                    raise
                await asyncio.sleep(_FIRST_PAUSE_SECONDS)

    async def present(self) -> RemoteExport:
        """Wait until the source is there. Raises OSError (ECANCELED) if it is closed before."""
        arrived: asyncio.Future[RemoteExport] = asyncio.get_running_loop().create_future()

        settle = settling(arrived)
        self._submit(_Request(lambda export, _: settle(export, None), lambda error: settle(None, error)))
        return await arrived

    async def close(self) -> None:
        """Let go of the source. What is in flight or held fails with ECANCELED."""
        self._closed = True
        if self._reconnecting:
            self._reconnecting.cancel()
        held, self._held = self._held, []
        for request in held:
            request.fail(OSError(errno.ECANCELED, "the source is closed"))
        if self._export:
            export, self._export = self._export, None
            await export.close()


def round_up(size: int) -> int:
    """Return a size rounded up to 512 bytes, as QEMU and the QED format have it."""
    return -(-size // 512) * 512
