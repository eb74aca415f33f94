"""One connection to an NBD server. The only module that imports libnbd, and the one that knows its pitfalls.

A handle belongs to one thread, which polls it. libnbd closes the descriptor inside any call that ends in
its DEAD state, so what to poll for is asked anew after each round of calls (:meth:`Handle.refresh`).
Completion callbacks are not used: they run under libnbd's lock, and a read that is retired by one misses
the check for a short structured reply, which only ``aio_command_completed`` makes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import nbd

from nbdstream.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdstream.uri import NbdUri

T = TypeVar("T")

_CA_CERTIFICATE = "ca-cert.pem"
_HANG_UP = select.POLLHUP | select.POLLERR | select.POLLNVAL
_READABLE = select.POLLIN | _HANG_UP
_WRITABLE = select.POLLOUT | _HANG_UP


class HandleError(Exception):
    """A connection could not be made, or broke. The text says why, for people, and fits behind a colon."""


@dataclass(frozen=True, slots=True)
class RemoteInfo:
    """What a server says of an export while connecting (proto.md, NBD_INFO_EXPORT, NBD_INFO_BLOCK_SIZE)."""

    size: int
    """Bytes."""
    read_only: bool
    can_multi_conn: bool
    """Several connections see one disk (NBD_FLAG_CAN_MULTI_CONN)."""
    structured_replies: bool
    has_allocation: bool
    """The server answers for the meta context ``base:allocation``."""
    minimum_block: int
    """Requests are aligned to this, bytes; 1 if the server did not say."""
    preferred_block: int
    """Bytes; 4096 if the server did not say."""
    maximum_block: int
    """The longest request that the server takes, bytes; 0 if it did not say."""
    tls: bool


class Handle(Generic[T]):
    """A libnbd handle, and a tag of type T for each of its commands in flight."""

    __slots__ = ("_nbd", "active_at", "bytes_in_flight", "events", "fd", "in_flight", "ready")

    def __init__(self, uri: NbdUri, tls_certificates: str | None) -> None:
        """Make a handle that is not connected yet; raises :class:`HandleError` for TLS that cannot be had."""
        self._nbd = nbd.NBD()
        self._nbd.set_export_name(uri.export)
        self._nbd.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        # Every completion is checked, so nobody looks at a buffer that was not filled.
        self._nbd.set_pread_initialize(False)
        # The end of an export need not be aligned; the rest we align ourselves.
        self._nbd.set_strict_mode(self._nbd.get_strict_mode() & ~nbd.STRICT_ALIGN)
        self._nbd.set_tls(nbd.TLS_REQUIRE if uri.tls else nbd.TLS_DISABLE)
        if uri.tls:
            _set_up_tls(self._nbd, uri, tls_certificates)
        self.in_flight: dict[int, tuple[T, int]] = {}
        """cookie -> (tag, bytes)"""
        self.bytes_in_flight = 0
        self.active_at = 0.0
        """When something last arrived, or the first of what is in flight was sent (time.monotonic)."""
        self.ready = False
        self.fd = -1
        """What to poll; -1 if the connection is gone."""
        self.events = 0
        """What to poll for (select.POLLIN, POLLOUT)."""

    def connect(self, uri: NbdUri) -> None:
        """Begin to connect. Looking up a host name blocks. Raises :class:`HandleError`."""
        try:
            if uri.socket is not None:
                self._nbd.aio_connect_socket(_unix_socket(uri.socket))
            else:
                # By name: libnbd 1.14 checks a certificate only against a name that it looked up itself.
                self._nbd.aio_connect_tcp(uri.host, str(uri.port))
        except nbd.Error as error:
            raise HandleError(_reason(error, uri)) from error
        except OSError as error:
            raise HandleError(_socket_reason(error, uri)) from error
        self.refresh()

    def refresh(self) -> bool:
        """Look anew at what to poll for; return False if the connection is gone."""
        direction = self._nbd.aio_get_direction()
        events = 0
        if direction & nbd.AIO_DIRECTION_READ:
            events |= select.POLLIN
        if direction & nbd.AIO_DIRECTION_WRITE:
            events |= select.POLLOUT
        self.events = events
        if not direction:
            self.fd = -1
        elif not self.ready:
            # While it connects, libnbd goes from address to address and changes the descriptor.
            self.fd = self._nbd.aio_get_fd()
            self.ready = self._nbd.aio_is_ready()
        return direction != 0

    def notify(self, revents: int, uri: NbdUri) -> None:
        """Let libnbd receive or send, after poll said ``revents``; raises :class:`HandleError` if that ends it."""
        try:
            # Never both: the first may change what the second is about.
            if self.events & select.POLLIN and revents & _READABLE:
                self._nbd.aio_notify_read()
            elif self.events & select.POLLOUT and revents & _WRITABLE:
                self._nbd.aio_notify_write()
        except nbd.Error as error:
            raise HandleError(_reason(error, uri)) from error

    def notice_death(self, seconds: float) -> None:
        """Have the kernel notice within about ``seconds`` that a peer is gone that never said so, even if all is idle.

        (What is alive and says nothing is noticed by whoever polls.)
        """
        with socket.socket(fileno=os.dup(self.fd)) as own:
            if own.family == socket.AF_UNIX:
                return
            own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(seconds / 2)))
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(seconds / 6)))
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))

    def info(self) -> RemoteInfo:
        """Return what the server said; raises :class:`HandleError` if that cannot be."""
        try:
            structured = self._nbd.get_structured_replies_negotiated()
            info = RemoteInfo(
                size=self._nbd.get_size(),
                read_only=self._nbd.is_read_only(),
                can_multi_conn=self._nbd.can_multi_conn(),
                structured_replies=structured,
                has_allocation=structured and self._nbd.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION),
                minimum_block=self._nbd.get_block_size(nbd.SIZE_MINIMUM) or 1,
                preferred_block=self._nbd.get_block_size(nbd.SIZE_PREFERRED) or 4096,
                maximum_block=self._nbd.get_block_size(nbd.SIZE_MAXIMUM),
                tls=self._nbd.get_tls_negotiated(),
            )
        except nbd.Error as error:
            raise HandleError(_plain(error)) from error
        if not 0 <= info.size < 1 << 63:
            msg = f"the server says that the export has {info.size} bytes"
            raise HandleError(msg)
        return info

    def read(self, buffer: memoryview, offset: int, tag: T) -> None:
        """Ask for ``len(buffer)`` bytes; ``buffer`` is libnbd's until the tag comes back. Raises OSError."""
        try:
            cookie = self._nbd.aio_pread(buffer, offset)
        except nbd.Error as error:
            raise _request_error(error) from error
        self.in_flight[cookie] = tag, len(buffer)
        self.bytes_in_flight += len(buffer)

    def block_status(self, offset: int, length: int, answer: list[int], tag: T) -> None:
        """Ask for the extents of ``base:allocation``; length and flags by turns go into ``answer``. Raises OSError."""

        def extent(_context: str, _offset: int, entries: list[int], _error: object) -> int:
            answer.extend(entries)
            return 0

        try:
            cookie = self._nbd.aio_block_status(length, offset, extent)
        except nbd.Error as error:
            raise _request_error(error) from error
        self.in_flight[cookie] = tag, 0

    def completed(self) -> Iterator[tuple[T, OSError | None]]:
        """Retire what is complete: each command's tag, and what went wrong with it."""
        while self.in_flight:
            cookie = self._nbd.aio_peek_command_completed()
            if not cookie:
                return
            tag, length = self.in_flight.pop(cookie)
            self.bytes_in_flight -= length
            error = None
            try:
                self._nbd.aio_command_completed(cookie)
            except nbd.Error as failure:
                error = _request_error(failure)
            yield tag, error

    def abandon(self) -> list[T]:
        """Close the connection and return the tags of all that was in flight: libnbd never completes those.

        The handle is of no use afterwards.
        """
        tags = [tag for tag, _ in self.in_flight.values()]
        if self.ready and not tags and self.fd >= 0:
            with contextlib.suppress(nbd.Error):  # the server is gone already
                self._nbd.aio_disconnect()
        self.in_flight.clear()
        self.bytes_in_flight = 0
        self.fd = -1
        self.events = 0
        self.ready = False
        # This closes the descriptor and lets go of the buffers. There is no other way: nbd.NBD has no close().
        del self._nbd
        return tags


def _unix_socket(path: str) -> int:
    """Return a connected descriptor. libnbd itself takes neither abstract names nor names that are no UTF-8."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        connection.connect(os.fsencode(path))
        return connection.detach()


def _set_up_tls(handle: nbd.NBD, uri: NbdUri, tls_certificates: str | None) -> None:
    if not handle.supports_tls():
        raise HandleError("this libnbd was built without TLS")
    if uri.username is not None:
        handle.set_tls_username(uri.username)
    if uri.tls_type == "anon":
        raise HandleError("libnbd knows no anonymous TLS: use a pre-shared key or certificates")
    if uri.tls_psk_file is not None and uri.tls_type != "x509":
        handle.set_tls_psk_file(uri.tls_psk_file)
        return
    if uri.tls_type == "psk":
        raise HandleError("tls-type=psk needs the file of the key: tls-psk-file=FILE")
    if uri.tls_verify_peer:
        _require_verification(uri)
    directory = tls_certificates or uri.tls_certificates or _default_certificates()
    if directory is not None and os.access(os.path.join(directory, _CA_CERTIFICATE), os.R_OK):
        handle.set_tls_certificates(directory)
    elif uri.tls_verify_peer:
        # libnbd would take the system's authorities instead, and before 1.20.2 (CVE-2024-7383) check nothing.
        where = "no directory of certificates was given" if directory is None else f"{directory} has no readable one"
        msg = f"the server's certificate cannot be checked without a {_CA_CERTIFICATE}: {where}"
        raise HandleError(msg)
    handle.set_tls_verify_peer(uri.tls_verify_peer)


def _require_verification(uri: NbdUri) -> None:
    """Refuse what libnbd 1.14 would connect to without checking the certificate against a name."""
    if uri.socket is not None:
        raise HandleError("libnbd cannot check a certificate over a unix socket: use a key (tls-psk-file) or TCP")
    if uri.tls_hostname not in (None, uri.host):
        raise HandleError("libnbd checks a certificate against the host's own name only: tls-hostname must be the host")


def _default_certificates() -> str | None:
    """Return the directory that libnbd would look into (nbd_set_tls_certificates(3)), if it holds an authority."""
    home = os.path.expanduser("~")
    candidates = (
        ["/etc/pki/libnbd"]
        if os.geteuid() == 0
        else [os.path.join(home, ".pki/libnbd"), os.path.join(home, ".config/pki/libnbd")]
    )
    return next((path for path in candidates if os.access(os.path.join(path, _CA_CERTIFICATE), os.R_OK)), None)


def _plain(error: nbd.Error) -> str:
    """Return libnbd's text without the names of its functions, on one line."""
    text = error.string
    while (head := text.partition(": "))[1] and (head[0].startswith("nbd_") or head[0] in _JARGON):
        text = head[2]
    return printable(text)[:300]


_JARGON = {"connect", "recv", "send", "handshake", "read", "block-status", "getaddrinfo"}

_PHRASES = {
    "expected NBD magic": "it is not an NBD server",
    "not either an oldstyle or fixed newstyle": "it is not an NBD server",
    "server disconnected unexpectedly": "the server closed the connection",
    "server requires TLS": "the server requires TLS: use nbds:// or nbds+unix://",
    "server refused TLS": "the server does not offer TLS, which nbds:// requires",
}


def _reason(error: nbd.Error, uri: NbdUri) -> str:
    text = error.string
    if "no export named" in text:
        return f"the server has no export named {uri.export!r}"
    if "getaddrinfo" in text:
        return f"the host name {uri.host!r} cannot be looked up ({text.rpartition(': ')[2]})"
    for phrase, reason in _PHRASES.items():
        if phrase in text:
            return reason
    if error.errnum and (error.errnum in _CONNECTION_ERRORS):
        return os.strerror(error.errnum).lower()
    return _plain(error)


_CONNECTION_ERRORS = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
    errno.EPIPE,
}


def _socket_reason(error: OSError, uri: NbdUri) -> str:
    if error.errno == errno.ENOENT:
        return f"there is no socket {uri.socket!r}"
    if error.errno == errno.EAGAIN:
        return "the server has too many clients waiting"
    return os.strerror(error.errno).lower() if error.errno else str(error)


def _request_error(error: nbd.Error) -> OSError:
    """Return what failed a request: the server's errno, ECONNRESET for a lost connection, EIO for a broken reply."""
    if error.errnum in (errno.ENOTCONN, errno.EPIPE):
        return connection_lost()
    return OSError(error.errnum or errno.EIO, _plain(error))


def connection_lost() -> OSError:
    """Return how a request fails whose connection broke before it was answered: it may be asked again."""
    return OSError(errno.ECONNRESET, "the connection to the source was lost")
