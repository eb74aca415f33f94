"""Real clients inside TLS, with certificates on both sides: libnbd, QEMU, nbd-client, nbdkit's proxy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.raw import RawImage
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.server.tls import TlsPolicy, server_context
from tests.server.test_peers import SIZE, make_image, run, served_on
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])


class Secured:
    """Two exports on a TCP port: "disk" (writable) and "copy" (read-only, other contents), both for alice alone."""

    def __init__(self, tmp_path: Path, certificates: Path, port: int) -> None:
        self.image, self.copy, self.scratch = (str(tmp_path / name) for name in ("disk", "copy", "scratch"))
        self.port = port
        self.alice = str(certificates / "alice")
        self.credentials = f"tls-creds-x509,id=tls,dir={self.alice},endpoint=client"

    def uri(self, name: str, *, client: str | None = None) -> str:
        return f"nbds://localhost:{self.port}/{name}?tls-certificates={client or self.alice}"

    def options(self, name: str) -> str:
        return f"driver=nbd,host=localhost,port={self.port},export={name},tls-creds=tls"

    def same(self, one: str, other: str) -> bool:
        with open(one, "rb") as first, open(other, "rb") as second:
            return first.read() == second.read()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    authority = Authority()
    authority.server(directory / "server")
    for name in ("alice", "bob"):
        authority.client(directory / name, name)
    return directory


@pytest.fixture
async def secured(tmp_path: Path, certificates: Path, seed: int) -> AsyncIterator[Secured]:
    make_image(tmp_path / "disk", seed)
    make_image(tmp_path / "copy", seed + 1)
    disk = await RawImage.open(str(tmp_path / "disk"), writable=True)
    copy = await RawImage.open(str(tmp_path / "copy"))
    policy = TlsPolicy(server_context(str(certificates / "server"), verify_peer=True), required=True)
    exports = [
        Export("disk", disk, writable=True, allow=["alice"]),
        Export("copy", copy, writable=False, allow=["alice"]),
    ]
    server = NbdServer(exports, tls=policy)
    await server.listen_tcp("localhost", 0)
    port = int(server.uris[0].rpartition("/")[0].rpartition(":")[2])
    yield Secured(tmp_path, certificates, port)
    await server.close()
    await disk.close()
    await copy.close()


async def test_nbdinfo_says_that_it_is_encrypted(secured: Secured) -> None:
    told = json.loads(await run("nbdinfo", "--json", secured.uri("disk")))
    assert told["TLS"]
    assert told["exports"][0]["export-size"] == SIZE + 1536
    listed = json.loads(await run("nbdinfo", "--json", "--list", secured.uri("")))
    assert [export["export-name"] for export in listed["exports"]] == ["disk", "copy"]


@pytest.mark.parametrize("connections", ["1", "4"])
async def test_nbdcopy_copies_out_and_in(secured: Secured, connections: str) -> None:
    await run("nbdcopy", f"--connections={connections}", secured.uri("copy"), secured.scratch)
    assert secured.same(secured.copy, secured.scratch)
    await run("nbdcopy", f"--connections={connections}", "--flush", secured.scratch, secured.uri("disk"))
    assert secured.same(secured.copy, secured.image)


async def test_nbdsh_reads_and_writes_what_the_receive_buffer_does_not_hold(secured: Secured) -> None:
    program = """
data = b"0123456789abcdef" * (1 << 19)
h.pwrite(data, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 4096) == data
assert h.get_tls_negotiated()
assert h.get_structured_replies_negotiated()
h.shutdown()
"""
    connect = f"h.set_uri_allow_local_file(True); h.connect_uri({secured.uri('disk')!r})"
    await run("nbdsh", "-c", connect, "-c", program)


async def test_qemu_img_converts_compares_and_maps(secured: Secured) -> None:
    disk, copy = secured.options("disk"), secured.options("copy")
    tls = ("--object", secured.credentials)
    await run("qemu-img", "convert", *tls, "-n", "--image-opts", "--target-image-opts", copy, disk)
    await run("qemu-img", "compare", *tls, "--image-opts", copy, disk)
    assert secured.same(secured.copy, secured.image)
    extents = json.loads(await run("qemu-img", "map", "--output=json", *tls, "--image-opts", copy))
    assert [extent["zero"] for extent in extents[:4]] == [False, True, False, True]


async def test_qemu_nbd_lists_them(secured: Secured) -> None:
    listed = await run(
        *("qemu-nbd", "-L", "--object", secured.credentials, "--tls-creds", "tls"),
        *("-b", "localhost", "-p", str(secured.port)),
    )
    assert "export: 'disk'" in listed
    assert "export: 'copy'" in listed


async def test_nbd_client_lists_them(secured: Secured) -> None:
    files = {"-certfile": "client-cert", "-keyfile": "client-key", "-cacertfile": "ca-cert"}
    certificates = [part for name, file in files.items() for part in (name, f"{secured.alice}/{file}.pem")]
    address = ("-tlshostname", "localhost", "-l", "localhost", str(secured.port))
    listed = await run("nbd-client", "-enable-tls", *certificates, *address)
    assert listed.split()[-2:] == ["disk", "copy"]


async def test_nbdkit_serves_us_on_as_a_proxy(secured: Secured, directory: str) -> None:
    await run(
        *("nbdkit", "-U", f"{directory}/proxy", "nbd", "hostname=localhost", f"port={secured.port}", "export=copy"),
        *("tls=require", f"tls-certificates={secured.alice}"),
        *("--run", f"nbdcopy nbd+unix:///?socket={directory}/proxy {secured.scratch}"),
    )
    assert secured.same(secured.copy, secured.scratch)


async def test_qemu_storage_daemon_serves_us_on(secured: Secured, directory: str) -> None:
    server = f"server.type=inet,server.host=localhost,server.port={secured.port}"
    node = f"driver=nbd,node-name=disk,read-only=on,export=copy,tls-creds=tls,{server}"
    await served_on(node, ["--object", secured.credentials], directory, secured.scratch)
    assert secured.same(secured.copy, secured.scratch)


async def test_somebody_else_sees_nothing(secured: Secured, certificates: Path) -> None:
    bob = str(certificates / "bob")
    listed = json.loads(await run("nbdinfo", "--json", "--list", secured.uri("", client=bob)))
    assert listed["exports"] == []
    await run("nbdinfo", secured.uri("disk", client=bob), status=1)
    await run("nbdinfo", f"nbd://localhost:{secured.port}/disk", status=1)
