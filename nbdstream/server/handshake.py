"""A client that has not opened an export yet: the shell around the negotiation core.

When it opens one, a :class:`Connection` takes over its transport. Until then it may cost a deadline's time, an
option's memory, and nothing else: no device hears of it.

On STARTTLS the reader stops before the client is told to begin: what a stranger sends in plain text behind it goes to
the TLS handshake, and ends there.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol, cast

import uvloop

from nbdstream.errors import ProtocolError
from nbdstream.server.connection import Connection
from nbdstream.server.sockets import describe_peer, tune
from nbdstream.server.tls import common_names, fingerprint
from nbdstream.wire.negotiation import Negotiation, Phase, Tls

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from nbdstream.block.joining import KernelJoin
    from nbdstream.server.export import Export
    from nbdstream.server.limits import Limits
    from nbdstream.server.payloads import PayloadMemory
    from nbdstream.server.polling import Polling
    from nbdstream.server.tls import TlsPolicy
    from nbdstream.wire.export import ExportInfo

_log = logging.getLogger(__name__)


class Host(Protocol):
    """What a client's handshake needs of the server."""

    @property
    def exports(self) -> Sequence[Export]:
        """What can be opened."""

    @property
    def default(self) -> str:
        """The name of the export that the empty name stands for."""

    @property
    def limits(self) -> Limits:
        """What clients may cost."""

    @property
    def tls(self) -> TlsPolicy | None:
        """What is done about TLS; None: nothing."""

    @property
    def joiner(self) -> KernelJoin:
        """For the replies that have to be looked at before they are sent."""

    @property
    def memory(self) -> PayloadMemory:
        """Where the payloads of large writes are received."""

    @property
    def polling(self) -> Polling:
        """Whether to sleep between requests."""

    def arrived(self, handshake: Handshake) -> str | None:
        """Count a new client in, or return why it is turned away."""

    def left(self, handshake: Handshake) -> None:
        """Take note that the handshake is over, whatever came of it."""

    def opened(self, connection: Connection) -> None:
        """Take note of a connection in its transmission phase."""

    def closed(self, connection: Connection) -> None:
        """Take note that the connection is closed and nothing of it is in flight."""


class Handshake(asyncio.Protocol):
    """The handshake of one client."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.connection: Connection | None = None
        """What became of it when the client opened an export."""
        self._names: Collection[str] | None = None
        """Inside TLS: what the client's certificate says that it is."""
        self._negotiation = Negotiation(
            [export.info for export in host.exports],
            default=host.default,
            admit=self._admit,
            permit=self._permit,
            tls=_mode(host.tls),
            maximum_option=host.limits.option_length,
            maximum_options=host.limits.options,
        )
        self._securing: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._peer = "?"
        self._write_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client, or turn it away if there are too many."""
        self._transport = cast("asyncio.Transport", transport)
        self._peer = describe_peer(self._transport)
        refusal = self._host.arrived(self)
        if refusal is not None:
            _log.warning("%s: turned away: %s", self._peer, refusal)
            self._transport.abort()
            return
        tune(self._transport)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._host.limits.handshake_time, self._too_slow)
        self._transport.write(self._negotiation.data_to_send())

    def data_received(self, data: bytes) -> None:
        """Take what has arrived."""
        if self._negotiation.phase is Phase.CLOSED:
            return
        try:
            phase = self._negotiation.receive(data)
        except ProtocolError as error:
            _log.info("%s: %s", self._peer, error)
            self._transport.abort()
            return
        if phase is Phase.STARTTLS:
            self._transport.pause_reading()
        self._transport.write(self._negotiation.data_to_send())
        if phase is Phase.CLOSED:
            self._transport.close()
        elif phase is Phase.OPTIONS:
            return
        elif self._write_paused:
            # It goes on without having read the replies to its earlier options, which it must.
            self._transport.abort()
        elif phase is Phase.STARTTLS:
            self._securing = asyncio.get_running_loop().create_task(self._secure())
        elif phase is Phase.TRANSMISSION:
            self._hand_over()

    def pause_writing(self) -> None:
        """Stop reading: replies pile up that the client does not take."""
        self._write_paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        self._write_paused = False
        if not (self._securing or self._transport.is_closing()):
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the client."""
        self._end()

    def abort(self) -> None:
        """Drop the client."""
        self._transport.abort()

    def _admit(self, info: ExportInfo) -> str | None:
        export = self._export(info)
        assert export is not None  # it was permitted in this very turn of the loop
        return export.refusal()

    def _permit(self, info: ExportInfo) -> bool:
        export = self._export(info)
        return export is not None and export.permits(self._names or ())

    async def _secure(self) -> None:
        """Go over to TLS, within the time that the whole handshake has."""
        policy, limits = self._host.tls, self._host.limits
        assert policy is not None
        loop = asyncio.get_running_loop()
        early = _Early()
        try:
            transport = await loop.start_tls(
                self._transport,
                early,
                policy.context,
                server_side=True,
                ssl_handshake_timeout=limits.handshake_time,
                ssl_shutdown_timeout=limits.linger_time,
            )
        except OSError as error:
            _log.warning("%s: TLS failed: %s", self._peer, getattr(error, "verify_message", None) or error)
            self._transport.abort()
            self._end()
            return
        if transport is None or transport.is_closing():
            self._end()
            return
        self._transport = transport
        self._securing = None
        secured = transport.get_extra_info("ssl_object")
        self._names = [name for name in (*common_names(secured), fingerprint(secured)) if name]
        self._negotiation.secure()
        transport.set_protocol(self)
        if early.data:
            self.data_received(bytes(early.data))

    def _export(self, info: ExportInfo) -> Export | None:
        """Return the export; None if it has been removed since the client connected."""
        return next((export for export in self._host.exports if export.info is info), None)

    def _too_slow(self) -> None:
        _log.info("%s: opened no export within %g s", self._peer, self._host.limits.handshake_time)
        self._transport.abort()

    def _hand_over(self) -> None:
        agreement = self._negotiation.agreement
        assert agreement is not None
        host = self._host
        self._end()
        export = self._export(agreement.export)
        assert export is not None  # it was admitted in this very turn of the loop
        # Only uvloop, and without TLS, leaves it to the kernel to look at what is sent.
        bare = self._names is None and isinstance(asyncio.get_running_loop(), uvloop.Loop)
        self.connection = Connection(
            self._transport,
            export,
            agreement,
            host.limits,
            host.memory,
            host.polling,
            join=None if bare else host.joiner.join,
            closed=host.closed,
        )
        host.opened(self.connection)
        self._transport.set_protocol(self.connection)
        self.connection.begin(self._negotiation.rest())

    def _end(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None
            self._host.left(self)


class _Early(asyncio.Protocol):
    """Keeps what arrives inside TLS with the client's last word of the TLS handshake, before ``start_tls`` returns.

    Not the handshake itself: what comes to that one has come in plain text.
    """

    def __init__(self) -> None:
        self.data = bytearray()

    def data_received(self, data: bytes) -> None:
        """Keep it."""
        self.data += data


def _mode(policy: TlsPolicy | None) -> Tls:
    if policy is None:
        return Tls.OFF
    return Tls.REQUIRED if policy.required else Tls.OFFERED
