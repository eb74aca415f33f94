"""``nbdstream serve --tls``: who gets in, and what each of them sees. The clients are libnbd's and QEMU's."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.certificates import Authority
from tests.support.processes import NBDSTREAM, Command, nbdstream, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20


class Site:
    """An image, and certificates for a server and its clients: alice, bob, nobody, and mallory, who is no alice."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self.image = f"{directory}/disk.img"
        with open(self.image, "wb") as file:
            file.write(b"data")
            file.truncate(SIZE)
        self.server = authority.server(directory / "server")
        self.clients = {name: authority.client(directory / name, name) for name in ("alice", "bob")}
        self.clients["nobody"] = authority.client(directory / "nobody")
        # Signed by somebody else, but believing in our authority: the server has to find out.
        Authority().client(directory / "mallory", "alice")
        self.clients["mallory"] = authority.client(directory / "mallory")

    @contextmanager
    def serve(self, *arguments: str, tls: str = "require", bind: str = "127.0.0.1") -> Iterator[str]:
        """Run ``serve``, and yield the host and port that its clients see."""
        options = ["--tls", tls, "--tls-certificates", self.server, "-b", bind, "-p", "0"]
        with Command("serve", *arguments, *options) as server:
            uri = server.wait_until_serving()
            assert uri.startswith("nbds://") == (tls == "require" or "allow=" in arguments[0])
            yield "localhost:" + uri.rpartition("/")[0].rpartition(":")[2]

    def info(self, uri: str, client: str | None = None, status: int = 0) -> str:
        """Let a client look at an export; return what it is told (the error, if there is to be one)."""
        certificates = ["--tls-certificates", self.clients[client]] if client else []
        result = nbdstream("info", uri, *certificates, status=status)
        return result.stderr if status else result.stdout

    def listed(self, address: str, client: str | None = None) -> list[str]:
        """Return the names of the exports that a client sees in the list."""
        uri = f"nbds://{address}?tls-certificates={self.clients[client]}" if client else f"nbd://{address}"
        program = [
            "h.set_opt_mode(True)",
            "h.set_uri_allow_local_file(True)",
            f"h.connect_uri({uri!r})",
            "h.opt_list(lambda name, description: print(name))",
            "h.opt_abort()",
        ]
        return run("nbdsh", *(part for line in program for part in ("-c", line))).stdout.split()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def site(tmp_path: Path, authority: Authority) -> Site:
    return Site(tmp_path, authority)


def test_where_tls_is_required_nobody_gets_in_without(site: Site) -> None:
    with site.serve(site.image) as address:
        assert "the server requires TLS" in site.info(f"nbd://{address}", status=1)
        assert "export-size" in site.info(f"nbds://{address}", "nobody")


def test_the_network_can_be_listened_on_where_tls_is_required(site: Site) -> None:
    with site.serve(site.image, bind="0.0.0.0") as address:
        assert "export-size" in site.info(f"nbds://{address}", "nobody")


def test_where_tls_is_offered_clients_choose(site: Site) -> None:
    with site.serve(site.image, tls="on") as address:
        assert "export-size" in site.info(f"nbd://{address}")
        assert "export-size" in site.info(f"nbds://{address}", "nobody")


def test_only_clients_of_our_authority_get_in_where_peers_are_verified(site: Site) -> None:
    with site.serve(site.image, "--tls-verify-peer") as address:
        assert "export-size" in site.info(f"nbds://{address}", "alice")
        for stranger in ("nobody", "mallory"):
            assert site.info(f"nbds://{address}", stranger, status=1).count("\n") == 1


@pytest.mark.parametrize("tls", ["on", "require"])
def test_an_export_is_for_the_clients_it_names(site: Site, tmp_path: Path, tls: str) -> None:
    other, public = f"{tmp_path}/other.img", f"{tmp_path}/public.img"
    for path in (other, public):
        with open(path, "wb") as file:
            file.truncate(SIZE)
    arguments = [
        f"a={site.image},allow=alice",
        f"both={other},allow=alice:bob",
        f"public={public}",
        "--tls-verify-peer",
    ]
    with site.serve(*arguments, tls=tls) as address:
        assert site.listed(address, "alice") == ["a", "both", "public"]
        assert site.listed(address, "bob") == ["both", "public"]
        site.info(f"nbds://{address}/a", "alice")
        for name in ("both", "public"):
            site.info(f"nbds://{address}/{name}", "bob")
        site.info(f"nbds://{address}/a", "bob", status=1)
        site.info(f"nbd://{address}/a", status=1)
        if tls == "on":
            assert site.listed(address) == ["public"]
            site.info(f"nbd://{address}/public")


def test_qemu_reads_through_tls(site: Site) -> None:
    with site.serve(site.image, "--tls-verify-peer") as address:
        host, _, port = address.partition(":")
        options = f"driver=nbd,host={host},port={port},tls-creds=tls"
        credentials = f"tls-creds-x509,id=tls,dir={site.clients['alice']},endpoint=client"
        said = run("qemu-img", "info", "--output=json", "--object", credentials, "--image-opts", options).stdout
        assert json.loads(said)["virtual-size"] == SIZE


def test_a_child_on_standard_input_and_output_can_require_tls_as_well(site: Site) -> None:
    command = [NBDSTREAM, "serve", "--stdio", "--tls", "require", "--tls-certificates", site.server, site.image]
    program = [
        "h.set_tls(nbd.TLS_REQUIRE)",
        f"h.set_tls_certificates({site.clients['nobody']!r})",
        # Over a socket pair libnbd has no name to compare.
        "h.set_tls_verify_peer(False)",
        f"h.connect_command({command!r})",
        "print(h.get_tls_negotiated(), h.get_size())",
        "h.shutdown()",
    ]
    assert run("nbdsh", *(part for line in program for part in ("-c", line))).stdout == f"True {SIZE}\n"


def test_certificates_that_cannot_be_used_are_one_clear_line(site: Site, tmp_path: Path) -> None:
    os.unlink(f"{site.server}/server-key.pem")
    result = nbdstream("serve", site.image, "--tls", "require", "--tls-certificates", site.server, status=1)
    assert result.stderr == (f"nbdstream: {site.server}/server-key.pem cannot be read: No such file or directory\n")
