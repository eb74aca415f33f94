"""Certificates for tests of TLS: authorities of our own, in the directories that the tools expect."""

from __future__ import annotations

import datetime as dt
import os
from typing import TYPE_CHECKING

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

if TYPE_CHECKING:
    from pathlib import Path


class Authority:
    """An authority that signs what tests need."""

    def __init__(self) -> None:
        self._ca = trustme.CA(key_type=trustme.KeyType.RSA)  # GnuTLS, OpenSSL and everybody else read it

    def server(self, directory: Path, name: str = "localhost") -> str:
        """Make a directory for a server of that name, and return its path."""
        self._write(directory, "server", self._ca.issue_cert(name, common_name=name))
        return str(directory)

    def client(self, directory: Path, name: str | None = None, *, alternative: str = "client.example") -> str:
        """Make a directory for a client, and return its path. Without a name it has no certificate of its own."""
        if name is None:
            directory.mkdir(exist_ok=True)
            self._ca.cert_pem.write_to_path(directory / "ca-cert.pem")
        else:
            self._write(directory, "client", self._ca.issue_cert(alternative, common_name=name))
        return str(directory)

    def revoke(self, directory: Path, certificate: Path) -> None:
        """Write the revocation of a certificate into a server's directory."""
        key = load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(key, RSAPrivateKey)
        issuer = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes()).subject
        revoked = x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number
        now = dt.datetime(2000, 1, 1)  # noqa: DTZ001 - this version of cryptography takes naive times
        entry = x509.RevokedCertificateBuilder().serial_number(revoked).revocation_date(now).build()
        builder = x509.CertificateRevocationListBuilder().issuer_name(issuer).last_update(now)
        builder = builder.next_update(now.replace(year=2100)).add_revoked_certificate(entry)
        crl = builder.sign(key, hashes.SHA256())
        (directory / "ca-crl.pem").write_bytes(crl.public_bytes(Encoding.PEM))

    def _write(self, directory: Path, role: str, leaf: trustme.LeafCert) -> None:
        directory.mkdir(exist_ok=True)
        self._ca.cert_pem.write_to_path(directory / "ca-cert.pem")
        leaf.private_key_pem.write_to_path(directory / f"{role}-key.pem")
        os.chmod(directory / f"{role}-key.pem", 0o600)
        for number, part in enumerate(leaf.cert_chain_pems):
            part.write_to_path(directory / f"{role}-cert.pem", append=number > 0)
