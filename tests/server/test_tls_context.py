"""The server's side of TLS: from files to a context, and what it lets in."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from nbdstream.server import tls
from nbdstream.server.tls import TlsError, common_names, default_certificates, server_context
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def directory(tmp_path: Path, authority: Authority) -> Path:
    authority.server(tmp_path / "server")
    return tmp_path / "server"


def client_context(directory: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=f"{directory}/ca-cert.pem")
    if os.path.exists(f"{directory}/client-cert.pem"):
        context.load_cert_chain(f"{directory}/client-cert.pem", f"{directory}/client-key.pem")
    return context


def meet(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Let the two shake hands, and return the server's side and the client's; raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
    ]
    waiting = list(ends)
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
    return ends[0], ends[1]


def test_a_client_without_a_certificate_is_let_in_and_has_no_names(
    tmp_path: Path, directory: Path, authority: Authority
) -> None:
    client = client_context(authority.client(tmp_path / "client"))
    ours, _ = meet(server_context(str(directory), verify_peer=False), client)
    assert common_names(ours) == []


def test_only_the_certificate_and_its_key_are_needed_unless_clients_are_checked(directory: Path) -> None:
    (directory / "ca-cert.pem").unlink()
    server_context(str(directory), verify_peer=False)
    with pytest.raises(TlsError, match=r"ca-cert\.pem cannot be read: No such file or directory$"):
        server_context(str(directory), verify_peer=True)


def test_a_client_is_known_by_its_common_name_and_its_alternative_names(
    tmp_path: Path, directory: Path, authority: Authority
) -> None:
    client = client_context(authority.client(tmp_path / "client", "alice", alternative="host1.example"))
    ours, _ = meet(server_context(str(directory), verify_peer=True), client)
    assert common_names(ours) == ["alice", "host1.example"]


def test_the_name_of_a_client_that_is_not_checked_is_not_believed(
    tmp_path: Path, directory: Path, authority: Authority
) -> None:
    client = client_context(authority.client(tmp_path / "client", "alice"))
    ours, _ = meet(server_context(str(directory), verify_peer=False), client)
    assert common_names(ours) == []


def test_a_client_of_another_authority_or_of_none_is_refused(
    tmp_path: Path, directory: Path, authority: Authority
) -> None:
    server = server_context(str(directory), verify_peer=True)
    stranger = client_context(authority.client(tmp_path / "client"))
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        meet(server, stranger)
    foreign = Authority().client(tmp_path / "foreign", "alice")
    stranger.load_cert_chain(f"{foreign}/client-cert.pem", f"{foreign}/client-key.pem")
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        meet(server, stranger)


def test_a_certificate_that_was_withdrawn_is_refused_and_others_are_not(
    tmp_path: Path, directory: Path, authority: Authority
) -> None:
    alice, bob = (authority.client(tmp_path / name, name) for name in ("alice", "bob"))
    authority.revoke(directory, tmp_path / "alice/client-cert.pem")
    server = server_context(str(directory), verify_peer=True)
    with pytest.raises(ssl.SSLError, match="certificate revoked"):
        meet(server, client_context(alice))
    ours, _ = meet(server, client_context(bob))
    assert "bob" in common_names(ours)


def test_nothing_older_than_tls_1_2_is_spoken(tmp_path: Path, directory: Path, authority: Authority) -> None:
    server = server_context(str(directory), verify_peer=False)
    assert server.minimum_version == ssl.TLSVersion.TLSv1_2
    client = client_context(authority.client(tmp_path / "client"))
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert meet(server, client)[1].version() == "TLSv1.2"


def test_no_session_is_resumed(tmp_path: Path, directory: Path, authority: Authority) -> None:
    server = server_context(str(directory), verify_peer=True)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        client = client_context(authority.client(tmp_path / "client", "alice"))
        client.maximum_version = version
        _, theirs = meet(server, client)
        assert theirs.session is None or not theirs.session.has_ticket


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem"])
def test_a_file_that_is_missing_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(TlsError) as raised:
        server_context(str(directory), verify_peer=False)
    assert str(raised.value) == f"{directory}/{name} cannot be read: No such file or directory"


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem", "ca-crl.pem"])
@pytest.mark.parametrize("contents", ["", "-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"])
def test_a_file_that_makes_no_sense_is_named(directory: Path, name: str, contents: str) -> None:
    (directory / name).write_text(contents)
    with pytest.raises(TlsError, match=r"^[^\n]+$") as raised:
        server_context(str(directory), verify_peer=True)
    assert f"{directory}/{name}" in str(raised.value)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path, directory: Path, authority: Authority) -> None:
    authority.server(tmp_path / "other")
    (tmp_path / "other/server-key.pem").rename(directory / "server-key.pem")
    with pytest.raises(TlsError) as raised:
        server_context(str(directory), verify_peer=False)
    assert str(raised.value) == f"{directory}/server-key.pem is not the key of {directory}/server-cert.pem"


def test_nobody_is_asked_for_a_pass_phrase(directory: Path) -> None:
    path = directory / "server-key.pem"
    key = load_pem_private_key(path.read_bytes(), None)
    form = PrivateFormat.TraditionalOpenSSL
    path.write_bytes(key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"secret")))
    with pytest.raises(TlsError) as raised:
        server_context(str(directory), verify_peer=False)
    assert str(raised.value) == f"{path}: it is encrypted"


def test_the_first_default_directory_with_a_certificate_is_taken(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "default_directories", lambda: (f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c"))
    assert default_certificates() is None
    for name in "bc":
        authority.server(tmp_path / name)
    assert default_certificates() == f"{tmp_path}/b"
