"""Every command that connects checks whom it connects to: against nbdkit and qemu-nbd with TLS required."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.support.certificates import Authority
from tests.support.processes import Command, Process, nbdstream, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 1 << 20


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def client(tmp_path: Path, authority: Authority) -> str:
    """A client's directory, with the authority that it believes."""
    return authority.client(tmp_path / "client", "alice")


@pytest.fixture
def serve(tmp_path: Path, server: str) -> Iterator[Callable[..., str]]:
    """Start a server with the certificates of a directory, and return the address that its clients see."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"data")
    os.truncate(image, SIZE)
    running: list[Process] = []

    def start(certificates: str, *, verify_peer: bool = False) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        if server == "nbdkit":
            verify = ["--tls-verify-peer"] if verify_peer else []
            command = ["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", port, "--tls=require", *verify]
            command += [f"--tls-certificates={certificates}", "file", str(image)]
        else:
            credentials = f"tls-creds-x509,id=tls,dir={certificates},endpoint=server"
            credentials += f",verify-peer={'on' if verify_peer else 'off'}"
            command = ["qemu-nbd", "-t", "-r", "-f", "raw", "--shared=8", "-b", "127.0.0.1", "-p", port]
            command += ["--object", credentials, "--tls-creds", "tls", str(image)]
        running.append(Process(*command))
        wait_until(lambda: listening(int(port)), server)
        return f"localhost:{port}"

    yield start
    for process in running:
        process.kill()


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def server(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


COMMANDS: dict[str, Callable[[str, str], tuple[str, ...]]] = {
    "info": lambda uri, _: ("info", uri),
    "map": lambda uri, _: ("map", uri),
    "create": lambda uri, overlay: ("create", overlay, "--backing", uri),
    "stream": lambda uri, overlay: ("stream", uri, overlay),
}

every_command = pytest.mark.parametrize("command", COMMANDS)


def connect(command: str, address: str, certificates: str, overlay: str, status: int) -> str:
    """Run a command against a server, and return what it says on stderr."""
    arguments = COMMANDS[command](f"nbds://{address}", overlay)
    return nbdstream(*arguments, "--tls-certificates", certificates, status=status).stderr


@every_command
def test_a_server_of_our_authority_and_the_right_name_is_used(
    tmp_path: Path, authority: Authority, serve: Callable[..., str], client: str, command: str
) -> None:
    address = serve(authority.server(tmp_path / "server"), verify_peer=True)
    connect(command, address, client, f"{tmp_path}/overlay.qed", 0)


@every_command
def test_a_server_of_a_foreign_authority_is_refused(
    tmp_path: Path, serve: Callable[..., str], client: str, command: str
) -> None:
    address = serve(Authority().server(tmp_path / "foreign"))
    (line,) = connect(command, address, client, f"{tmp_path}/overlay.qed", 1).splitlines()
    assert address in line
    assert "certificate" in line
    assert not os.path.exists(f"{tmp_path}/overlay.qed")


@every_command
def test_a_server_of_another_name_is_refused(
    tmp_path: Path, authority: Authority, serve: Callable[..., str], client: str, command: str
) -> None:
    address = serve(authority.server(tmp_path / "other", "other.example"))
    (line,) = connect(command, address, client, f"{tmp_path}/overlay.qed", 1).splitlines()
    assert address in line
    assert "certificate" in line
    assert not os.path.exists(f"{tmp_path}/overlay.qed")


@pytest.mark.parametrize("server", ["nbdkit"], indirect=True)
@every_command
def test_without_an_authority_nobody_is_believed(
    tmp_path: Path, authority: Authority, serve: Callable[..., str], command: str
) -> None:
    address = serve(authority.server(tmp_path / "server"))
    (tmp_path / "empty").mkdir()
    line = connect(command, address, f"{tmp_path}/empty", f"{tmp_path}/overlay.qed", 1)
    assert "cannot be checked without a ca-cert.pem" in line


@every_command
def test_a_server_that_requires_tls_is_not_used_without(
    tmp_path: Path, authority: Authority, serve: Callable[..., str], command: str
) -> None:
    address = serve(authority.server(tmp_path / "server"))
    result = nbdstream(*COMMANDS[command](f"nbd://{address}", f"{tmp_path}/overlay.qed"), status=1)
    assert "the server requires TLS: use nbds://" in result.stderr


@every_command
def test_a_server_without_tls_is_not_used_where_tls_is_wanted(tmp_path: Path, client: str, command: str) -> None:
    # Somebody on the line who takes STARTTLS away looks like this.
    with open(f"{tmp_path}/disk", "wb") as disk:
        disk.truncate(1 << 20)
    with Command("serve", f"{tmp_path}/disk", "-p", "0") as server:
        address = server.wait_until_serving().removeprefix("nbd://").rstrip("/").replace("127.0.0.1", "localhost")
        (line,) = connect(command, address, client, f"{tmp_path}/overlay.qed", 1).splitlines()
    assert address in line
    assert "TLS" in line
    assert not os.path.exists(f"{tmp_path}/overlay.qed")
