"""Who cannot be connected to is named with the reason, in one line; TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.block.remote.export import RemoteExport
from nbdstream.errors import SourceError
from tests.block.remote.peers import Proxy, connected, free_port, pattern, read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.block.remote.peers import Servers

MIB = 1 << 20


# Not being able to connect.


async def refusal(uri: str, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        await RemoteExport.connect(uri, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "nbd_" not in text.replace(uri, "")
    return text


async def test_nobody_listens_on_the_port() -> None:
    port = free_port()
    uri = f"nbd://127.0.0.1:{port}/"
    assert await refusal(uri) == f"cannot connect to {uri}: connection refused"


async def test_there_is_no_such_socket() -> None:
    uri = "nbd+unix:///?socket=/nonexistent/s"
    assert await refusal(uri) == f"cannot connect to {uri}: there is no socket '/nonexistent/s'"


async def test_nobody_listens_on_the_socket(servers: Servers) -> None:
    path = servers.path("sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        uri = f"nbd+unix:///?socket={path}"
        assert await refusal(uri) == f"cannot connect to {uri}: connection refused"


async def test_the_path_of_a_socket_is_too_long() -> None:
    assert "path too long" in await refusal(f"nbd+unix:///?socket=/{'x' * 200}")


async def test_the_host_is_not_known() -> None:
    text = await refusal("nbd://no-such-host.invalid/x")
    assert text.startswith(
        "cannot connect to nbd://no-such-host.invalid/x: the host name 'no-such-host.invalid' cannot"
    )


async def test_the_export_does_not_exist(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(512))
    uri = servers.qemu_nbd(str(tmp_path / "image"), export="disk").replace("///disk", "///other")
    assert await refusal(uri) == f"cannot connect to {uri}: the server has no export named 'other'"


async def test_what_is_no_uri() -> None:
    assert "must look like" in await refusal("disk.img")


@contextlib.contextmanager
def listening(servers: Servers) -> Iterator[tuple[socket.socket, str]]:
    path = servers.path("sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        yield listener, f"nbd+unix:///?socket={path}"


async def test_a_server_that_says_nothing_is_given_up(servers: Servers) -> None:
    with listening(servers) as (_, uri):
        assert await refusal(uri, timeout=0.2) == f"cannot connect to {uri}: no answer within 0.2 seconds"


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n" * 9, "it is not an NBD server"),
        (b"NBDMAGIC" + b"x" * 400, "it is not an NBD server"),
        (b"NBDM", "the server closed the connection"),
        (b"", "the server closed the connection"),
    ],
)
async def test_who_is_no_nbd_server(servers: Servers, greeting: bytes, reason: str) -> None:
    loop = asyncio.get_running_loop()
    with listening(servers) as (listener, uri):
        listener.setblocking(False)
        connecting = asyncio.ensure_future(refusal(uri))
        client, _ = await loop.sock_accept(listener)
        with client:
            await loop.sock_sendall(client, greeting)
        assert await connecting == f"cannot connect to {uri}: {reason}"


async def test_connecting_can_be_given_up(servers: Servers) -> None:
    with listening(servers) as (listener, uri):
        listener.setblocking(False)
        connecting = asyncio.ensure_future(RemoteExport.connect(uri))
        client, _ = await asyncio.get_running_loop().sock_accept(listener)
        connecting.cancel()
        with client, pytest.raises(asyncio.CancelledError):
            await connecting


async def test_an_abstract_socket_is_reached(servers: Servers) -> None:
    upstream = servers.nbdkit("pattern", "1M").partition("socket=")[2]
    proxy = Proxy(upstream)
    name = f"nbdstream-test-{os.getpid()}"
    listener = await asyncio.start_unix_server(proxy, f"\0{name}")
    async with connected(f"nbd+unix:///?socket=%00{name}", connections=1) as export:
        assert await read(export, 0, 512) == pattern(0, 512)
    await proxy.close()
    listener.close()


async def test_a_silent_further_connection_does_not_hold_up_the_first(
    servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = servers.nbdkit("pattern", "1M").partition("socket=")[2]
    proxy = Proxy(upstream)
    silent: list[asyncio.StreamWriter] = []

    async def first_only(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if proxy.writers:
            silent.append(writer)
        else:
            await proxy(reader, writer)

    path = servers.path("proxy")
    listener = await asyncio.start_unix_server(first_only, path)
    async with connected(f"nbd+unix:///?socket={path}", connections=3, timeout=0.3) as export:
        assert await read(export, 0, 512) == pattern(0, 512)
        while "no answer within 0.3 seconds" not in caplog.text:
            await read(export, 0, 512)
        assert not export.lost.done()
    await proxy.close()
    for writer in silent:
        writer.close()
    listener.close()


# TLS.


@pytest.fixture
def psk_file(servers: Servers) -> str:
    path = servers.path("keys")
    with open(path, "w") as file:
        file.write("alice:" + "0123456789abcdef" * 4 + "\n")
    return path


async def test_a_key_opens_a_server_that_requires_tls(servers: Servers, psk_file: str) -> None:
    plain = servers.nbdkit("--tls=require", f"--tls-psk={psk_file}", "pattern", "4M", tcp=True)
    uri = plain.replace("nbd://", "nbds://alice@") + f"?tls-psk-file={psk_file}"
    async with connected(uri, connections=3) as export:
        assert export.info.tls
        answers = await asyncio.gather(*(read(export, i * 65536, 65536) for i in range(64)))
        assert b"".join(answers) == pattern(0, 4 * MIB)


async def test_errors_do_not_show_the_key(servers: Servers, psk_file: str) -> None:
    uri = servers.nbdkit("memory", "1M", tcp=True)
    tls = uri.replace("nbd://", "nbds://alice@") + f"?tls-psk-file={psk_file}"
    text = await refusal(tls)
    assert text == (
        f"cannot connect to {uri.replace('nbd:', 'nbds:')}: the server does not offer TLS, which nbds:// requires"
    )


async def test_a_server_that_requires_tls_refuses_a_plain_connection(servers: Servers, psk_file: str) -> None:
    uri = servers.nbdkit("--tls=require", f"--tls-psk={psk_file}", "memory", "1M")
    assert await refusal(uri) == f"cannot connect to {uri}: the server requires TLS: use nbds:// or nbds+unix://"


def make_certificates(directory: str) -> str:
    """A certificate authority, and a server's certificate for 127.0.0.1 of it."""
    os.mkdir(directory)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=directory)

    key = ["-newkey", "rsa:2048", "-nodes", "-days", "2"]
    openssl("req", "-x509", *key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=Test authority")
    openssl("req", *key[:3], "-keyout", "server-key.pem", "-out", "server.csr", "-subj", "/CN=127.0.0.1")
    with open(os.path.join(directory, "names"), "w") as file:
        file.write("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    authority = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-extfile", "names"]
    openssl("x509", "-req", "-in", "server.csr", *authority, "-days", "2", "-out", "server-cert.pem")
    return directory


async def test_certificates_are_checked(servers: Servers) -> None:
    ours, foreign = make_certificates(servers.path("ours")), make_certificates(servers.path("foreign"))
    plain = servers.nbdkit("--tls=require", f"--tls-certificates={ours}", "pattern", "1M", tcp=True)
    uri = plain.replace("nbd://127.0.0.1", "nbds://localhost")
    async with connected(uri, tls_certificates=ours) as export:
        assert await read(export, 0, 512) == pattern(0, 512)
    assert "certificate" in await refusal(uri, tls_certificates=foreign)
    assert "certificate" in await refusal(f"{uri}?tls-certificates={foreign}")


async def test_tls_without_an_authority_is_refused(servers: Servers) -> None:
    text = await refusal("nbds://localhost/", tls_certificates=servers.directory)
    assert text == (
        "cannot connect to nbds://localhost/: the server's certificate cannot be checked without a ca-cert.pem: "
        f"{servers.directory} has no readable one"
    )


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("nbds+unix:///?socket=/s", "over a unix socket"),
        ("nbds://h/?tls-hostname=other", "tls-hostname must be the host"),
        ("nbds://h/?tls-type=anon", "no anonymous TLS"),
        ("nbds://h/?tls-type=psk", "needs the file of the key"),
    ],
)
async def test_tls_that_libnbd_would_not_verify_is_refused(uri: str, reason: str) -> None:
    assert reason in await refusal(uri)
