"""Who the server is, and whom it believes: TLS by X.509 certificates, in the files that QEMU and libnbd have.

A directory holds ``server-cert.pem`` (with the authorities between, if there are any), ``server-key.pem``, and for
checking clients ``ca-cert.pem`` and, if certificates were withdrawn, ``ca-crl.pem`` (QEMU, docs/system/tls.rst;
nbdkit-tls(1)). All of them are read once.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdstream.errors import NbdstreamError

if TYPE_CHECKING:
    from typing import Any, NoReturn

CA_CERTIFICATE: Final = "ca-cert.pem"
REVOCATIONS: Final = "ca-crl.pem"
SERVER_CERTIFICATE: Final = "server-cert.pem"
SERVER_KEY: Final = "server-key.pem"

_SYSTEM_DIRECTORIES: Final = ("/etc/pki/nbdstream", "/etc/pki/nbdkit", "/etc/pki/qemu")
_USER_DIRECTORIES: Final = ("~/.pki/nbdstream", "~/.config/pki/nbdstream", "~/.pki/nbdkit", "~/.config/pki/nbdkit")


class TlsError(NbdstreamError):
    """The server's certificates cannot be used."""


@dataclass(frozen=True, slots=True)
class TlsPolicy:
    """What a server does about TLS; without one, it knows none (proto.md, "TLS support": NOTLS)."""

    context: ssl.SSLContext
    """From :func:`server_context`."""
    required: bool
    """True is proto.md's FORCEDTLS. False is SELECTIVETLS: an export that names its clients needs TLS, others may."""


def default_directories() -> tuple[str, ...]:
    """Return where the server's certificates are looked for if nobody says."""
    if os.geteuid() == 0:
        return _SYSTEM_DIRECTORIES
    return tuple(os.path.expanduser(path) for path in _USER_DIRECTORIES)


def default_certificates() -> str | None:
    """Return the first of the default directories that holds a server's certificate."""
    return next((path for path in default_directories() if os.path.exists(f"{path}/{SERVER_CERTIFICATE}")), None)


def server_context(certificates: str, *, verify_peer: bool) -> ssl.SSLContext:
    """Return what a server needs for TLS, from the files in the directory ``certificates``.

    ``verify_peer`` lets only clients in whose certificate the authority in ``ca-cert.pem`` has signed. Raises TlsError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client is asked who it is on every connection. Nothing resumes, so there is nothing to keep or to withdraw.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    _load_identity(context, certificates)
    if verify_peer:
        _load_authority(context, certificates)
    return context


def common_names(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> list[str]:
    """Return the names in the client's certificate: its CN, and its subject alternative names of the kind DNS.

    Empty where the client's certificate was not checked, or it has none.
    """
    # typeshed leaves it open; the ssl module has pairs of names and values, one level deeper for the subject.
    certificate: dict[str, Any] = dict(ssl_object.getpeercert() or {})
    found = [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]
    found += [entry[1] for entry in certificate.get("subjectAltName", ()) if entry[0] == "DNS"]
    return list(dict.fromkeys(found))


def fingerprint(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> str:
    """Return ``sha256:`` and the digest of the client's certificate; empty where it was not checked, or has none."""
    # The other form of the certificate is there only if it was checked.
    certificate = ssl_object.getpeercert(binary_form=True) if ssl_object.getpeercert() else None
    return f"sha256:{hashlib.sha256(certificate).hexdigest()}" if certificate else ""


def _load_identity(context: ssl.SSLContext, directory: str) -> None:
    certificate, key = _readable(directory, SERVER_CERTIFICATE), _readable(directory, SERVER_KEY)
    try:
        context.load_cert_chain(certificate, key, password=lambda: _refuse(f"{key}: it is encrypted"))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            _refuse(f"{key} is not the key of {certificate}")
        _refuse(f"{certificate} and {key} cannot be used: {_reason(error)}")


def _load_authority(context: ssl.SSLContext, directory: str) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    authority = _readable(directory, CA_CERTIFICATE)
    _load(context, authority)
    revocations = f"{directory}/{REVOCATIONS}"
    if os.path.lexists(revocations):
        _load(context, _readable(directory, REVOCATIONS))
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def _load(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        _refuse(f"{path} cannot be used: {_reason(error)}")


def _readable(directory: str, name: str) -> str:
    """Return the path of a file; ssl itself does not say which one it could not open."""
    path = os.path.join(directory, name)
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        _refuse(f"{path} cannot be read: {error.strerror}")
    return path


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "there is no certificate or key in it").lower().replace("_", " ")


def _refuse(why: str) -> NoReturn:
    raise TlsError(why)
