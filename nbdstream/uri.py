"""NBD URIs: the names of exports on other hosts (NetworkBlockDevice's doc/uri.md).

Two forms of one URI matter here: what the user wrote, with all that is needed to connect, and the
*canonical* form, which names the source and nothing else. Only the second is written into an image.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn
from urllib.parse import quote, unquote_to_bytes

DEFAULT_PORT = 10809
"""IANA's port for NBD."""

MAX_EXPORT_NAME = 4096
"""Bytes of UTF-8 (proto.md, "Values": strings)."""

_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_LOOKS_LIKE = re.compile(r"nbds?(\+[a-z]+)?:", re.IGNORECASE)
_SPLIT = re.compile(r"([^:/?#]+)://([^/?#]*)([^?#]*)(?:\?([^#]*))?")
_AUTHORITY = re.compile(r"(?:([^@]*)@)?(\[[^\]]*\]|[^:\[\]@]*)(?::([0-9]*))?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SAFE = "/:@,+="
"""Left as they are in an export name or a socket path: URI parsers agree on them in both places."""


class UriError(ValueError):
    """Not an NBD URI that we understand. The text is one line that says why."""


TlsType = Literal["anon", "x509", "psk"]


@dataclass(frozen=True, slots=True)
class NbdUri:
    """One export of one NBD server, and how to talk to it."""

    tls: bool = False
    """Encrypted or not at all (``nbds``, ``nbds+unix``): there is no falling back."""
    host: str = "localhost"
    """A name in lower case or an IP address without brackets. Means nothing with ``socket``."""
    port: int = DEFAULT_PORT
    socket: str | None = None
    """Path of a unix socket, as it was given; abstract if it begins with a NUL. None: TCP."""
    export: str = ""
    username: str | None = None
    """Who we are to the server, for TLS with a pre-shared key."""
    tls_type: TlsType | None = None
    tls_hostname: str | None = None
    """The name that the server's certificate must hold, if it is not ``host``."""
    tls_verify_peer: bool = True
    tls_certificates: str | None = None
    """Directory of ca-cert.pem, client-cert.pem and client-key.pem."""
    tls_psk_file: str | None = None

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Return the URI that ``text`` spells; raises :class:`UriError`."""
        if any(ord(character) <= 0x20 or ord(character) == 0x7F for character in text):
            _refuse(text, "spaces and control characters must be percent-encoded")
        if "#" in text:
            _refuse(text, "a '#' must be written as %23")
        if _BAD_ESCAPE.search(text):
            _refuse(text, "a '%' must be followed by two hexadecimal digits (the character itself is %25)")
        match = _SPLIT.fullmatch(text)
        if not match:
            _refuse(text, "it must look like nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH")
        scheme, authority, path, query = match.groups()
        if scheme.lower() not in _SCHEMES:
            _refuse(text, f"the scheme must be one of {', '.join(_SCHEMES)}")
        fields = _query_fields(text, query or "")
        fields.update(_authority_fields(text, authority))
        unix = scheme.lower().endswith("+unix")
        if unix and not fields.get("socket"):
            _refuse(text, "a unix socket needs ?socket=PATH")
        if unix and "host" in fields:
            _refuse(text, "a unix socket has no host: write three slashes, nbd+unix:///EXPORT?socket=PATH")
        if not unix and "socket" in fields:
            _refuse(text, "?socket= needs the scheme nbd+unix or nbds+unix")
        uri = cls(tls=scheme.lower().startswith("nbds"), export=_export_name(text, path), **fields)
        if not uri.tls and (uri.username is not None or any(name.startswith("tls_") for name in fields)):
            _refuse(text, "TLS parameters need the scheme nbds or nbds+unix")
        return uri

    def __str__(self) -> str:
        """Return the URI; :meth:`parse` reads it back to an equal one."""
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket is not None else "")
        user = "" if self.username is None else _quote(self.username, safe="") + "@"
        query = "&".join(f"{name}={_quote(value)}" for name, value in self._parameters())
        return f"{scheme}://{user}{self._address()}/{_quote(self.export)}" + (f"?{query}" if query else "")

    def canonical(self) -> NbdUri:
        """Return what names the source and nothing else: an absolute socket path, and no credentials.

        The user name, the ``tls-`` files and how to authenticate are left out; ``tls-hostname`` says who
        the server is, so it stays. This is the form that is written into an image as its backing file name.
        """
        socket = self.socket
        if socket is not None and not socket.startswith("\0"):
            socket = os.path.abspath(socket)
        return NbdUri(
            tls=self.tls,
            host=self.host,
            port=self.port,
            socket=socket,
            export=self.export,
            tls_hostname=None if self.tls_hostname == self.host else self.tls_hostname,
        )

    def without_credentials(self) -> NbdUri:
        """Return what may be shown to anybody: all but who we are and where our keys lie."""
        return replace(self, username=None, tls_certificates=None, tls_psk_file=None)

    def same_source(self, other: NbdUri) -> bool:
        """Whether both name the same export of the same server, however it is reached."""
        return self.canonical() == other.canonical()

    def _address(self) -> str:
        if self.socket is not None:
            return ""
        host = f"[{_quote(self.host, safe=':')}]" if ":" in self.host else _quote(self.host, safe="")
        return host if self.port == DEFAULT_PORT else f"{host}:{self.port}"

    def _parameters(self) -> list[tuple[str, str]]:
        values = [
            ("socket", self.socket),
            ("tls-type", self.tls_type),
            ("tls-hostname", self.tls_hostname),
            ("tls-verify-peer", None if self.tls_verify_peer else "0"),
            ("tls-certificates", self.tls_certificates),
            ("tls-psk-file", self.tls_psk_file),
        ]
        return [(name, value) for name, value in values if value is not None]


def is_nbd_uri(text: str) -> bool:
    """Whether ``text`` is meant as an NBD URI and not as a path, right or wrong as it may be."""
    return _LOOKS_LIKE.match(text) is not None


def _refuse(text: str, why: str) -> NoReturn:
    # A password that somebody wrote into the authority must not reach a log.
    shown = re.sub(r"//[^/?@]*@", "//...@", text if len(text) <= 200 else text[:200] + "...")
    msg = f"{shown!r} is not an NBD URI: {why}"
    raise UriError(msg)


def _quote(text: str, *, safe: str = _SAFE) -> str:
    return quote(text, safe=safe, errors="surrogateescape")


def _unquote(part: str) -> str:
    """Percent-decode; bytes that are no UTF-8 come out as os.fsdecode makes them, so paths stay whole."""
    return unquote_to_bytes(part).decode(errors="surrogateescape")


def _unquote_text(text: str, part: str, what: str) -> str:
    decoded = _unquote(part)
    if "\0" in decoded:
        _refuse(text, f"{what} cannot hold a NUL")
    if any("\ud800" <= character <= "\udfff" for character in decoded):
        _refuse(text, f"{what} is not UTF-8")
    return decoded


def _export_name(text: str, path: str) -> str:
    export = _unquote_text(text, path[1:], "the export name")
    if len(export.encode()) > MAX_EXPORT_NAME:
        _refuse(text, f"the export name is longer than {MAX_EXPORT_NAME} bytes")
    return export


def _authority_fields(text: str, authority: str) -> dict[str, Any]:
    match = _AUTHORITY.fullmatch(authority)
    if not match:
        _refuse(text, "the host is not understood (an IPv6 address goes into brackets)")
    user, host, port = match.groups()
    fields: dict[str, Any] = {}
    if user is not None:
        if ":" in user:
            _refuse(text, "NBD knows no password")
        fields["username"] = _unquote_text(text, user, "the user name")
    if host or port:
        fields["host"] = _host(text, host) if host else "localhost"
    if port:
        if not 0 < int(port[:6]) < 65536:
            _refuse(text, "the port must be between 1 and 65535")
        fields["port"] = int(port)
    return fields


def _host(text: str, host: str) -> str:
    bracketed = host.startswith("[")
    name = _unquote_text(text, host.strip("[]"), "the host").lower()
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        if bracketed:
            _refuse(text, f"{name!r} is not an IPv6 address")
        return name


def _query_fields(text: str, query: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for parameter in filter(None, query.split("&")):
        name, _, raw = parameter.partition("=")
        field = name.replace("-", "_")
        if name not in _PARAMETERS:
            _refuse(text, f"the parameter {name!r} is not known")
        if field in fields:
            _refuse(text, f"the parameter {name!r} is given twice")
        if name == "socket":
            fields[field] = _socket_path(text, raw)
            continue
        value = _unquote_text(text, raw, f"the parameter {name!r}")
        allowed = _PARAMETERS[name]
        if allowed and value not in allowed:
            _refuse(text, f"the parameter {name!r} must be {' or '.join(allowed)}")
        if not value:
            _refuse(text, f"the parameter {name!r} is empty")
        fields[field] = value == "1" if name == "tls-verify-peer" else value
    return fields


_PARAMETERS: dict[str, tuple[str, ...]] = {
    "socket": (),
    "tls-type": ("anon", "x509", "psk"),
    "tls-hostname": (),
    "tls-verify-peer": ("0", "1"),
    "tls-certificates": (),
    "tls-psk-file": (),
}
"""The query parameters that we know (uri.md, and libnbd's two files), each with its values if those are few."""


def _socket_path(text: str, raw: str) -> str:
    path = _unquote(raw)
    if not path or path == "\0":
        _refuse(text, "the socket's path is empty")
    if "\0" in path[1:]:
        _refuse(text, "a socket's path holds no NUL but the first character of an abstract one")
    return path
