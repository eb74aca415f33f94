"""The source of a stream: a remote export that may go away and come back, or come back as another server.

Nobody else connects, reconnects, or asks whether a source is the one it was. Whoever reads from here never sees
a lost connection: requests are held until a source is there again, or until the operator's patience ends.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.block.device import BlockDevice, Buffer
from nbdstream.block.remote.export import DEFAULT_MEMORY, DEFAULT_STALL_SECONDS, CopyArrived, CopyDone, RemoteExport
from nbdstream.block.remote.thread import BULK_SHARE
from nbdstream.block.worker import settling
from nbdstream.errors import SourceError, WrongSourceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from nbdstream.block.remote.commands import Copy
    from nbdstream.extents import Extent
    from nbdstream.uri import NbdUri

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
"""A source host that reboots takes minutes: asking it every few seconds costs nothing and wastes little."""

_CONNECT_SECONDS = 10.0
"""What a server may take until a connection can be used: a few round trips, and TLS."""

_CHECK_SECONDS = 30.0
"""What a source may take to show that it is the right one."""

_LOST = frozenset({errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECANCELED})
"""What a request fails with when the connection is gone, or is closed since it is gone, or the server is going."""


class SourceOptions(NamedTuple):
    """How a source is used. Times are in seconds, sizes in bytes."""

    connections: int = 4
    """To each server, if it allows several."""
    tls_certificates: str | None = None
    """The directory of ca-cert.pem, client-cert.pem and client-key.pem."""
    stall: float = DEFAULT_STALL_SECONDS
    """A connection on which an answer is overdue for so long is given up."""
    memory: int = DEFAULT_MEMORY
    """What of the source is on its way takes no more of it."""
    hold: float | None = None
    """For so long after a loss requests are held; from then on they get EIO until it is back. None: for ever."""


class Request:
    """Something that is asked of the source, however often it takes."""

    __slots__ = ("ask", "command", "fail", "patient", "urgent", "wanted")

    def __init__(
        self,
        ask: Callable[[RemoteExport, Request], Copy | None],
        fail: Callable[[OSError], None],
        *,
        urgent: bool = True,
        patient: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.ask = ask
        self.fail = fail
        self.urgent = urgent
        self.patient = patient
        """Held for ever, whatever the policy for the guest's requests is."""
        self.wanted = wanted
        """Whether somebody waits for it. What nobody waits for is not held, but fails with ECONNRESET."""
        self.command: Copy | None = None


class Source(BlockDevice):
    """A remote export that is connected to again and again."""

    read_only = True

    def __init__(self, uri: NbdUri, *others: NbdUri, options: SourceOptions | None = None) -> None:
        """``others`` name the same disk at other servers, which are tried in turn where ``uri`` is not to be had."""
        self.uri = uri
        """Where it is, or was last."""
        self.check: Callable[[RemoteExport], Awaitable[None]] | None = None
        """Raises WrongSourceError, or OSError, if what has the right size is not the right disk."""
        self._uris = [uri, *others]
        self._options = options or SourceOptions()
        self._export: RemoteExport | None = None
        self._expects_size = False
        self._held: list[Request] = []
        self._reconnecting: asyncio.Task[None] | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._given_up = False
        self._closed = False
        self.lost_since: float | None = None
        """When the source went away (``time.time()``), None while it is there."""
        self.lost_because = ""
        self.on_change: Callable[[], None] = lambda: None
        """Called when the source is lost, when it is away for another reason, and when it is back."""

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
    def memory_for_bulk(self) -> int:
        """How many bytes may be on their way that nobody waits for."""
        return int(self._options.memory * BULK_SHARE)

    @property
    def connected(self) -> bool:
        """Whether the source is there."""
        return self._export is not None

    @property
    def export(self) -> RemoteExport:
        """The connected export. Raises SourceError while there is none."""
        if self._export is None:
            raise SourceError(f"{self.uri.without_credentials()}: {self.lost_because or 'not connected'}")
        return self._export

    async def _open(self) -> RemoteExport:
        """Connect to the first server that has the right disk. Raises SourceError that says why none has."""
        errors: list[SourceError] = []
        for uri in self._uris:
            try:
                export = await self._open_one(uri)
            except SourceError as error:
                errors.append(error)
            else:
                self.uri = uri
                return export
        # One that is there and wrong is what an operator must hear of first.
        errors.sort(key=lambda error: not isinstance(error, WrongSourceError))
        raise type(errors[0])("; ".join(map(str, errors)))

    async def _open_one(self, uri: NbdUri) -> RemoteExport:
        options = self._options
        export = await RemoteExport.connect(
            str(uri),
            connections=options.connections,
            tls_certificates=options.tls_certificates,
            timeout=min(_CONNECT_SECONDS, options.stall),
            stall=options.stall,
            memory=options.memory,
        )
        try:
            await self._verify(export)
        except BaseException:
            await export.close()
            raise
        return export

    async def verify(self) -> None:
        """Check the source that is connected. Raises WrongSourceError.

        Raises SourceError if it cannot be checked: it is left then, and connected to anew.
        """
        try:
            await self._verify(self.export)
        except WrongSourceError:
            raise
        except SourceError as error:
            self._lose(str(error))
            raise

    async def _verify(self, export: RemoteExport) -> None:
        name = export.uri.without_credentials()
        if self._expects_size and round_up(export.size) != round_up(self.size):
            raise WrongSourceError(f"{name} has {export.size} bytes, the overlay {self.size}: it is another disk")
        if self.check:
            try:
                async with asyncio.timeout(_CHECK_SECONDS):
                    await self.check(export)
            except OSError as error:  # a TimeoutError is one, too
                raise SourceError(f"{name} cannot be compared: {error.strerror or 'no answer'}") from error

    def _arrived(self, export: RemoteExport) -> None:
        self._export = export
        self.expect(export.size)
        self.lost_since = None
        self.lost_because = ""
        self._given_up = False
        if self._patience:
            self._patience.cancel()
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
        loop = asyncio.get_running_loop()
        self._reconnecting = loop.create_task(self._reconnect(gone))
        if self._options.hold is not None:
            self._patience = loop.call_later(self._options.hold, self._give_up)
        self.on_change()

    def _give_up(self) -> None:
        """Fail what waits, and what comes until the source is back."""
        log.error("the source is away for %g s: what is not local fails until it is back", self._options.hold)
        self._given_up = True
        held, self._held = self._held, []
        for request in held:
            self._submit(request)

    async def _reconnect(self, gone: RemoteExport | None) -> None:
        if gone:
            await gone.close()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            try:
                export = await self._open()
            except SourceError as error:
                self._still_away(str(error))
            except Exception as error:
                log.exception("a mistake of ours: it is tried again")
                self._still_away(f"internal error: {error!r}")
            else:
                break
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
        self._reconnecting = None
        log.info("the source is back: %s", self.uri.without_credentials())
        self._arrived(export)

    def _still_away(self, reason: str) -> None:
        if reason != self.lost_because:
            log.warning("the source is not back: %s", reason)
            self.lost_because = reason
            self.on_change()

    # -- requests ---------------------------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        if self._closed:
            self._fail(request, errno.ECANCELED, "the source is closed")
        elif self._export is not None:
            request.command = request.ask(self._export, request)
        elif not request.wanted():
            self._fail(request, errno.ECONNRESET, "the source is away")
        elif self._given_up and not request.patient:
            self._fail(request, errno.EIO, "the source is away for too long")
        else:
            self._held.append(request)

    def _fail(self, request: Request, code: int, reason: str) -> None:
        # Never before whoever asked has gone on: it may not know yet what it asked.
        asyncio.get_running_loop().call_soon(request.fail, OSError(code, reason))

    def _is_lost(self, error: OSError | None, request: Request) -> bool:
        """Whether a request failed only because a connection did; it is made again then, if somebody waits for it."""
        if error is None or error.errno not in _LOST or self._closed or not request.wanted():
            return False
        self._held.append(request)
        asyncio.get_running_loop().call_soon(self._retry_held)
        return True

    def _retry_held(self) -> None:
        """Make held requests again on the connections that are left, if any are."""
        if (self._export is not None and not self._export.lost.done()) or self._given_up:
            held, self._held = self._held, []
            for request in held:
                self._submit(request)

    def copy_soon(
        self,
        offset: int,
        length: int,
        fd: int,
        place: int,
        done: CopyDone,
        *,
        zero_unit: int,
        short_writes: bool = False,
        urgent: bool,
        wanted: Callable[[], bool],
        arrived: CopyArrived | None = None,
    ) -> Request:
        """Copy a range into a file; ``done(zero, error)`` when it is there, never before this returns.

        Bit i of ``zero`` says that the i-th unit of ``zero_unit`` bytes is all zero: it was not written. ``wanted``
        tells whether somebody waits for it: if not, it fails with ECONNRESET when its connection does. ``arrived`` is
        called with the bytes of an urgent one before they are in the file.
        """

        def ask(export: RemoteExport, request: Request) -> Copy:
            def finished(zero: int | None, error: OSError | None) -> None:
                request.command = None  # it refers to us: with its buffer it would wait for the garbage collector
                if self._is_lost(error, request):
                    return
                if error and error.errno in _LOST and not self._closed:
                    error = OSError(errno.ECONNRESET, error.strerror)
                done(zero, error)

            return export.copy_soon(
                offset, length, fd, place, finished,
                zero_unit=zero_unit, short_writes=short_writes, urgent=request.urgent, arrived=arrived,
            )  # fmt: skip

        request = Request(ask, lambda error: done(None, error), urgent=urgent, wanted=wanted)
        self._submit(request)
        return request

    def hurry(self, request: Request) -> None:
        """Let a copy that was not urgent be so from now on."""
        request.urgent = True
        if request.command and self._export:
            self._export.hurry(request.command)

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Read from the source, keeping nothing."""
        answer: asyncio.Future[Buffer] = asyncio.get_running_loop().create_future()
        settle = settling(answer)

        def ask(export: RemoteExport, request: Request) -> None:
            def finished(data: Buffer | None, error: OSError | None) -> None:
                if not answer.done() and not self._is_lost(error, request):
                    settle(data, error)

            export.read_soon(offset, length, finished)

        self._submit(Request(ask, lambda error: settle(None, error)))
        return [await answer]

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Return what the source says of a range. It is waited for however long it is away."""
        while True:
            export = await self.present()
            try:
                return await export.extents(offset, length)
            except OSError as error:
                if error.errno not in _LOST or self._closed:
                    raise
                await asyncio.sleep(_FIRST_PAUSE_SECONDS)

    async def present(self) -> RemoteExport:
        """Wait until the source is there, however long. Raises OSError (ECANCELED) if it is closed before."""
        arrived: asyncio.Future[RemoteExport] = asyncio.get_running_loop().create_future()
        settle = settling(arrived)
        self._submit(Request(lambda export, _: settle(export, None), lambda error: settle(None, error), patient=True))
        return await arrived

    async def close(self) -> None:
        """Let go of the source. What is in flight or held fails with ECANCELED."""
        self._closed = True
        if self._reconnecting:
            self._reconnecting.cancel()
        if self._patience:
            self._patience.cancel()
        held, self._held = self._held, []
        for request in held:
            self._submit(request)
        if self._export:
            export, self._export = self._export, None
            await export.close()


def round_up(size: int) -> int:
    """Return a size rounded up to 512 bytes, as QEMU and the QED format have it."""
    return -(-size // 512) * 512
