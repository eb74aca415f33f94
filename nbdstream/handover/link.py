"""A connection between the two sides, and the TLS around it: what goes over the wire, with deadlines and bounds."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from nbdstream.server.tls import CA_CERTIFICATE, TlsError, common_names, fingerprint
from nbdstream.wire.handover.messages import Channel

if TYPE_CHECKING:
    import msgspec

    from nbdstream.wire.handover.messages import Message, Refused

HANDSHAKE_SECONDS: Final = 10.0
"""What connecting, TLS and the first message may take."""

SILENCE_SECONDS: Final = 20.0
"""A side that has said nothing for so long is gone: it speaks every TICK_SECONDS."""

TICK_SECONDS: Final = 5.0

_PORTION: Final = 16 << 10
_MOST_UNSENT: Final = 256 << 10
"""Bytes that the peer has not taken. A few messages wait at the most: more is a peer that does not listen."""

_M = TypeVar("_M")


class Link(Generic[_M]):
    """One connection, from which messages are taken one at a time."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: msgspec.json.Decoder[_M]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._channel = Channel(decoder)
        self._arrived: list[_M] = []
        self.fingerprint = ""
        """Of the peer's certificate (:func:`nbdstream.server.tls.fingerprint`). Empty without TLS."""
        tls: ssl.SSLObject | None = writer.get_extra_info("ssl_object")
        if tls is not None:
            self.fingerprint = fingerprint(tls)
        self.name = _peer_name(writer, tls)
        tune(writer.get_extra_info("socket"))

    async def receive(self, patience: float = SILENCE_SECONDS) -> _M:
        """Return the next message.

        Raises ProtocolError, EOFError when the peer has gone, OSError (TimeoutError when it is silent).
        """
        async with asyncio.timeout(patience):
            while not self._arrived:
                data = await self._reader.read(_PORTION)
                if not data:
                    raise EOFError("the connection was closed")
                self._arrived = self._channel.receive(data)
        return self._arrived.pop(0)

    def send(self, message: Message | Refused) -> None:
        """Send a message; it is not waited for."""
        if self.closing:
            return
        if self._writer.transport.get_write_buffer_size() > _MOST_UNSENT:
            self._writer.transport.abort()
            return
        self._writer.write(self._channel.send(message))

    @property
    def closing(self) -> bool:
        """Whether nothing is sent any more."""
        return self._writer.is_closing()

    def close(self) -> None:
        """Close the connection, behind what was sent."""
        self._writer.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()


def _peer_name(writer: asyncio.StreamWriter, tls: ssl.SSLObject | None) -> str:
    """Return the peer's address and, if it is known, the names in its certificate: for people."""
    address = writer.get_extra_info("peername")
    where = f"{address[0]} port {address[1]}" if isinstance(address, tuple) else "?"
    names = common_names(tls) if tls is not None else []
    return f"{where} ({', '.join(names)})" if names else where


def tune(sock: Any) -> None:
    """Have a connection notice within seconds that its peer's host is gone."""
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_SECONDS * 1000))


def client_context(certificates: str) -> ssl.SSLContext:
    """Return what a destination needs for TLS: it knows its source, and is known. Raises TlsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(f"{certificates}/{CA_CERTIFICATE}")
        context.load_cert_chain(
            f"{certificates}/client-cert.pem", f"{certificates}/client-key.pem", password=_encrypted
        )
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise TlsError(f"the certificates in {certificates} cannot be used: {reason}") from error
    return context


def _encrypted() -> str:
    raise TlsError("the client's key is encrypted")
