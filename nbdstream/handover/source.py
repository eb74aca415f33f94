"""The source's side of a hand-over, on a real host: images, the NBD server, the listener, hooks."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nbdstream.errors import ListenError, ProtocolError
from nbdstream.handover.driver import Driver
from nbdstream.handover.images import SourceImage, examine, refuse_careless_writers
from nbdstream.handover.journal import Contents, Entry, Journal, JournalError, SourceSetup
from nbdstream.handover.link import HANDSHAKE_SECONDS, Link
from nbdstream.handover.offer import Offer
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.wire.handover.messages import FROM_DESTINATION, Accepted, Hello, Independent, Refused, Released
from nbdstream.wire.handover.source import Source, SourceFacts, SourceState
from nbdstream.wire.handover.vocabulary import (
    CloseExport,
    CommandRefusedError,
    Connected,
    Decline,
    FenceTimeout,
    OpenExport,
    Operation,
    Override,
    Phase,
    Received,
    Release,
    ReleaseFence,
    SourceRecord,
    StartFenceTimer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nbdstream.handover.journal import SourceContents
    from nbdstream.server.tls import TlsPolicy
    from nbdstream.wire.handover.messages import Message
    from nbdstream.wire.handover.vocabulary import Command, Effect, Event

log = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 16
"""One destination has one, and one that has lost its link may have a second. The rest are strangers, who wait for
HANDSHAKE_SECONDS at the most; one more makes the one that has waited longest go."""

DEFAULT_FENCE_SECONDS: Final = 30.0
"""A guest stands still while its fence waits for a destination that is gone."""

DEFAULT_EXPIRES_SECONDS: Final = 24 * 3600.0

_LINGER_SECONDS: Final = 10.0
"""At the end the destination is told that it is over, if it comes within this time."""


class SourceOptions(NamedTuple):
    """How a source behaves."""

    on_fence: str | None = None
    on_resume: str | None = None
    on_release: str = "keep"
    """``keep``, ``remove``, or a command."""
    fence_seconds: float = DEFAULT_FENCE_SECONDS
    tls: TlsPolicy | None = None


def new_offer(
    images: Sequence[tuple[str, str]], *, host: str, port: int, nbd_port: int, tls: bool, expires: float
) -> SourceContents:
    """Return the journal of a new offer of images, each a path and a format (*blocking*).

    Ports that are 0 are free ones. Raises NbdstreamError if an image cannot be offered.
    """
    examined = [
        examine(path, image_format, f"{number}-{secrets.token_hex(16)}")
        for number, (path, image_format) in enumerate(images)
    ]
    setup = SourceSetup(
        version=1,
        group=secrets.token_hex(16),
        token=secrets.token_hex(16),
        images=tuple(image for image, _ in examined),
        host=host,
        port=port or _free_port(host),
        nbd_port=nbd_port or _free_port(host),
        tls=tls,
        expires=int(time.time() + expires),
    )
    epoch = max(epoch for _, epoch in examined)
    return Contents(setup, [Entry(time.time(), SourceRecord(Phase.OFFERED, epoch), "offered")])


def _free_port(host: str) -> int:
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
            port: int = probe.getsockname()[1]
            return port
    except OSError as error:
        raise ListenError(f"cannot listen on {host}: {error.strerror or error}") from error


def open_source(directory: str, renew: SourceContents | None) -> tuple[Journal, SourceContents]:
    """Return the journal in a directory, and what it says (*blocking*).

    Where there is none, or it is of a hand-over that was called off, it begins with ``renew``; a granted epoch is not
    used again then. Raises JournalError.
    """
    journal = Journal.open(directory)
    try:
        found = journal.read_source()
        if found is None or found.record.phase is Phase.DECLINED:
            if renew is None:
                raise JournalError(f"{directory} holds no hand-over")
            if found is not None:
                record = renew.record
                epoch = max(record.epoch, found.record.epoch)
                renew = Contents(renew.setup, [Entry(time.time(), SourceRecord(record.phase, epoch), "offered again")])
            found = renew
        journal.begin(found)
    except BaseException:
        journal.close()
        raise
    return journal, found


class SourceDriver(Driver[Source, SourceState]):
    """Runs the source's side."""

    def __init__(self, journal: Journal, contents: SourceContents, options: SourceOptions) -> None:
        setup = contents.setup
        machine = Source(SourceFacts(setup.group, setup.token, setup.disks, setup.nbd_port))
        super().__init__(machine, *machine.restart(contents.record), journal)
        self.setup = setup
        self.images = [SourceImage(image, setup.group) for image in setup.images]
        self.remote: int | None = None
        """Bytes that are only here still, as the destination said last."""
        self._options = options
        self._exports = [
            Export(image.about.disk.export, image.device, writable=False, listed=False, allow=() if setup.tls else None)
            for image in self.images
        ]
        self._nbd: NbdServer | None = None
        self._listener: asyncio.Server | None = None
        self._strangers: dict[Link[Any], None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._over: float | None = None
        self._told_release: Link[Any] | None = None
        self._said_goodbye = False
        """Whether nobody has to be told any more."""

    @property
    def offer(self) -> Offer:
        """What a destination has to be told."""
        setup = self.setup
        return Offer(setup.host, setup.port, setup.tls, setup.group, setup.token)

    async def listen(self) -> None:
        """Let destinations connect. Raises ListenError, ImageError."""
        if self.state.record.phase is Phase.OFFERED:
            for image in self.images:
                await asyncio.to_thread(refuse_careless_writers, image.path)
        setup, tls = self.setup, self._options.tls
        try:
            self._listener = await asyncio.start_server(
                self._serve, setup.host, setup.port, ssl=tls.context if tls else None, **_tls_limits(tls)
            )
        except OSError as error:
            raise ListenError(f"cannot listen on {setup.host} port {setup.port}: {error.strerror or error}") from None
        expires = setup.expires - time.time()
        self.spawn(self._expire(max(0.0, expires)))

    async def close(self) -> None:
        """Let go of everything: the guest's locks are free for others then, whatever the journal says."""
        if self._timer:
            self._timer.cancel()
        if self._listener:
            self._listener.close()
        for link in [*self._strangers, *([self.peer] if self.peer else [])]:
            link.close()
        await self._close_export()
        for image in self.images:
            await image.release()
        self._journal.close()

    # -- clients ------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(reader, writer, FROM_DESTINATION)
        if len(self._strangers) >= MOST_CONNECTIONS:
            oldest = next(iter(self._strangers))
            log.warning("%s: turned away: others wait to say who they are", oldest.name)
            oldest.abort()
            self._strangers.pop(oldest, None)
        self._strangers[link] = None
        try:
            await self._converse(link)
        except ProtocolError as error:
            log.warning("%s: refused: %s", link.name, error)
            link.send(Refused(str(error)))
            self.lost(link, str(error))
        except (EOFError, OSError) as error:
            self.lost(link, str(error) or "it is silent")
        finally:
            self._strangers.pop(link, None)
            self.lost(link, "the connection was closed")
            link.close()

    async def _converse(self, link: Link[Any]) -> None:
        hello = await link.receive(HANDSHAKE_SECONDS)
        if not isinstance(hello, Hello):
            raise ProtocolError("the first message must be hello")
        refusal = self._machine.refusal(self.state, hello, link.fingerprint)
        if refusal is not None:
            raise ProtocolError(refusal)
        before, self.peer = self.peer, link
        self._strangers.pop(link, None)
        if before:
            before.abort()
        log.info("%s: the destination is connected", link.name)
        self._allow(link.fingerprint)
        self.happened(Connected(hello.destination, link.fingerprint))
        while True:
            message = await link.receive()
            if isinstance(message, Hello):
                raise ProtocolError("hello is the first message, and no other")
            if self.peer is not link:
                return
            if isinstance(message, Accepted | Independent):
                self.remote = getattr(message, "remote", 0)
            self.happened(Received(message))

    def _allow(self, fingerprint: str) -> None:
        if self.setup.tls:
            for export in self._exports:
                export.allow = frozenset({fingerprint} - {""})

    async def _expire(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if not self.state.record.destination:
            log.warning("nobody has used the offer in time")
            try:
                self.happened(Decline())
            except CommandRefusedError:
                return

    async def command(self, command: Command) -> None:
        """Do what the operator says; who overrides, or brings manifests, does so because nobody comes to be told."""
        await super().command(command)
        self._said_goodbye = isinstance(command, Override | Release)

    def lost(self, link: Link[Any], reason: str) -> None:
        """A destination that has heard of its release goes, and nothing is left to be said to it."""
        if self._told_release is link:
            self._said_goodbye = True
            self._more.set()
        super().lost(link, reason)

    def _complete(self, message: Message) -> Message:
        if isinstance(message, Released) and self.peer and not self.peer.closing:
            self._told_release = self.peer
        return message

    # -- what the machine wants ---------------------------------------------------------------------------------

    def about(self) -> Mapping[str, str]:
        """Return what hooks are told of."""
        return {
            "role": "source",
            "group": self.setup.group,
            "images": "\n".join(image.about.path for image in self.images),
        }

    def finished(self) -> bool:
        """Whether it is over, and the destination knows, or does not come to hear of it."""
        if self._todo or self.state.record.phase not in (Phase.DECLINED, Phase.RELEASED):
            return False
        loop = asyncio.get_running_loop()
        if self._over is None:
            self._over = loop.time()
            loop.call_later(_LINGER_SECONDS, self._more.set)
        told = self.state.told or not self.state.record.destination or self._said_goodbye
        return told or loop.time() >= self._over + _LINGER_SECONDS

    async def operate(self, operation: Operation) -> Event | None:
        """Do an operation. Raises NbdstreamError, OSError."""
        options = self._options
        if operation is Operation.HOOK_FENCE:
            await self.hook("on-fence hook", options.on_fence)
        elif operation is Operation.TAKE_FENCE:
            await asyncio.gather(*(image.fence() for image in self.images))
        elif operation is Operation.HIDE:
            await self._each(SourceImage.hide)
        elif operation is Operation.SHOW:
            await self._each(SourceImage.show)
        elif operation is Operation.HOOK_RESUME:
            await self.hook("on-resume hook", options.on_resume)
        elif operation is Operation.DISPOSE:
            await self._dispose()
        return None

    async def _each(self, work: Callable[[SourceImage], None]) -> None:
        """Do something that blocks with every image."""
        for image in self.images:
            await asyncio.to_thread(work, image)

    async def _dispose(self) -> None:
        action = self._options.on_release
        if action == "remove":
            await self._each(SourceImage.remove)
        elif action != "keep":
            await self.hook("on-release action", action, kept="\n".join(image.path for image in self.images))

    async def act(self, effect: Effect) -> None:
        """Do what cannot fail, or ends this process if it does."""
        if isinstance(effect, OpenExport):
            await self._open_export()
        elif isinstance(effect, CloseExport):
            await self._close_export()
        elif isinstance(effect, ReleaseFence):
            for image in self.images:
                await image.release()
        elif isinstance(effect, StartFenceTimer):
            if self._timer:
                self._timer.cancel()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._options.fence_seconds, lambda: self.happened(FenceTimeout()))

    async def _open_export(self) -> None:
        if self._nbd is None:
            self._allow(self.state.record.fingerprint)
            server = NbdServer(self._exports, tls=self._options.tls)
            await server.listen_tcp(self.setup.host, self.setup.nbd_port)
            self._nbd = server

    async def _close_export(self) -> None:
        server, self._nbd = self._nbd, None
        if server:
            await server.close(1.0)


def _tls_limits(tls: TlsPolicy | None) -> dict[str, Any]:
    return {"ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": 1.0} if tls else {}
