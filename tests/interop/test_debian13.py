"""Debian 13's clients, which speak extended headers: nbdinfo, nbdcopy and nbdsh of libnbd 1.22, QEMU 10, nbdkit 1.42.

They live in the chroot that ``scripts/peers debian13`` makes. That takes root, a mirror and half a minute, so these are
soak tests: ``scripts/test --soak tests/interop/test_debian13.py``.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.certificates import Authority
from tests.support.harness import make_image
from tests.support.processes import Command, Process, run, wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

PEERS = str(Path(__file__).parents[2] / "scripts/peers")
GIB = 1 << 30
BIG = 6 * GIB
"""More than 32 bits can tell."""


class Site:
    """A directory that both see, with a large sparse image and a copy to write to."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.image, self.scratch = f"{directory}/disk.img", f"{directory}/scratch.img"
        data = [(0, 1 << 20), (5 * GIB, 1 << 20), (BIG - 4096, 4096)]
        make_image(self.image, BIG, random.Random(seed), data)
        make_image(self.scratch, BIG, random.Random(seed + 1), data)
        self.socket = f"{directory}/nbd.sock"

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"

    def peer(self, *command: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run one of Debian 13's programs."""
        return run(PEERS, "debian13", "--bind", str(self.directory), "--", *command, status=status, patience=300)

    def same(self) -> None:
        """Check that the copy equals the image, with this system's own QEMU."""
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", self.image, self.scratch)


@pytest.fixture
def site(tmp_path: Path, seed: int) -> Iterator[Site]:
    site = Site(tmp_path, seed)
    with Command(
        *("serve", f"disk={site.image},writable=off", f"scratch={site.scratch}"), "--writable", "-U", site.socket
    ) as server:
        server.wait_until_serving()
        yield site


def test_nbdinfo_speaks_extended_headers(site: Site) -> None:
    assert "using extended packets" in site.peer("nbdinfo", site.uri("disk")).stdout
    listed = json.loads(site.peer("nbdinfo", "--json", "--list", site.uri("")).stdout)
    assert [export["export-name"] for export in listed["exports"]] == ["disk", "scratch"]


def test_nbdinfo_maps_extents_of_more_than_4_gib(site: Site) -> None:
    extents = json.loads(site.peer("nbdinfo", "--json", "--map", site.uri("disk")).stdout)
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
        (0, 1 << 20, 0),
        (1 << 20, 5 * GIB - (1 << 20), 3),
        (5 * GIB, 1 << 20, 0),
        (5 * GIB + (1 << 20), GIB - (1 << 20) - 4096, 3),
        (BIG - 4096, 4096, 0),
    ]


def test_nbdcopy_copies_from_one_export_to_another(site: Site) -> None:
    site.peer("nbdcopy", "--flush", site.uri("disk"), site.uri("scratch"))
    site.same()


NBDSH = """
h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert h.get_extended_headers_negotiated()
size, gib = h.get_size(), 1 << 30

def fails(errno, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except nbd.Error as error:
        assert error.errno == errno, error
    else:
        assert False, (call, arguments)

def extents(*arguments, **named):
    told = []
    h.block_status_64(*arguments, lambda name, offset, found, error: told.append((name, found)), **named)
    return told

data = b"0123456789abcdef" * (1 << 18)
h.pwrite(data, 5 * gib - 4096, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 5 * gib - 4096) == data
h.zero(size - 100, 100)
assert h.pread(len(data), 5 * gib - 4096) == bytes(len(data))
((name, found),) = extents(size, 0)
assert name == "base:allocation" and found[-1][0] > 4 * gib and found[-1][1] == 3, found
h.trim(size, 0)
h.cache(size, 0)
told = []
h.block_status_filter(size, 0, ["base:allocation"], lambda name, offset, found, error: told.append(found))
assert told == [[(size, 3)]], told
assert extents(1 << 20, 5 * gib, flags=nbd.CMD_FLAG_REQ_ONE) == [("base:allocation", [(1 << 20, 3)])]
h.set_strict_mode(0)
fails("ENOSPC", h.zero, size, 1)
fails("EINVAL", h.trim, size, 1)
fails("EINVAL", h.pread, 512, size)
fails("EINVAL", h.block_status_64, 0, 0, lambda *_: 0)
h.flush()
h.shutdown()
"""


def test_nbdsh_gets_every_answer_right(site: Site) -> None:
    site.peer("nbdsh", "-c", f"uri = {site.uri('scratch')!r}", "-c", NBDSH)


def test_qemu_img_converts_and_compares(site: Site) -> None:
    disk, scratch = site.uri("disk"), site.uri("scratch")
    site.peer("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", disk, scratch)
    site.peer("qemu-img", "compare", "-f", "raw", "-F", "raw", disk, scratch)
    site.same()


def test_qemu_io_zeroes_and_discards_more_than_4_gib_at_once(site: Site) -> None:
    commands = ["write -z -u -n 0 5G", "discard 5G 1G", "write -P 0x11 4608M 1M", "flush", "read -P 0 0 1M"]
    said = site.peer(
        *("qemu-io", "-f", "raw", *(part for command in commands for part in ("-c", command)), site.uri("scratch"))
    ).stdout
    assert "failed" not in said
    extents = json.loads(site.peer("nbdinfo", "--json", "--map", site.uri("scratch")).stdout)
    assert [(extent["offset"], extent["length"]) for extent in extents if not extent["type"]] == [(4608 << 20, 1 << 20)]


def test_qemu_nbd_lists_what_there_is(site: Site) -> None:
    said = site.peer("qemu-nbd", "--list", "-k", site.socket).stdout
    assert "export: 'disk'" in said
    assert "export: 'scratch'" in said


def test_qemu_storage_daemon_serves_us_on(site: Site) -> None:
    proxy = f"{site.directory}/proxy.sock"
    node = f"driver=nbd,node-name=disk,read-only=on,export=disk,server.type=unix,server.path={site.socket}"
    with Process(
        *(PEERS, "debian13", "--bind", str(site.directory), "--", "qemu-storage-daemon", "--blockdev", node),
        *("--nbd-server", f"addr.type=unix,addr.path={proxy}", "--export", "type=nbd,id=disk,node-name=disk,name="),
    ):
        wait_until(lambda: os.path.exists(proxy), proxy)
        site.peer("nbdcopy", f"nbd+unix:///?socket={proxy}", site.uri("scratch"))
    site.same()


def test_nbdkit_serves_us_on_as_a_proxy(site: Site) -> None:
    site.peer("nbdkit", "-U", "-", "nbd", f"uri={site.uri('disk')}", "--run", f'nbdcopy "$uri" "{site.uri("scratch")}"')
    site.same()


def test_tls_with_names_on_both_sides(tmp_path: Path, site: Site) -> None:
    authority = Authority()
    server, alice, bob = (tmp_path / name for name in ("server", "alice", "bob"))
    authority.server(server)
    authority.client(alice, "alice")
    authority.client(bob, "bob")
    with Command(
        *("serve", f"disk={site.image},allow=alice", "-p", "0"),
        *("--tls", "require", "--tls-verify-peer", "--tls-certificates", str(server)),
    ) as command:
        port = command.wait_until_serving().rpartition("/")[0].rpartition(":")[2]
        # The chroot knows no host names, so the name in the certificate is told apart.
        uri = f"nbds://127.0.0.1:{port}/disk?tls-hostname=localhost&tls-certificates="
        assert "using extended packets" in site.peer("nbdinfo", f"{uri}{alice}").stdout
        site.peer("nbdinfo", f"{uri}{bob}", status=1)
        site.peer("nbdinfo", f"nbd://127.0.0.1:{port}/disk", status=1)
        site.peer("nbdcopy", f"{uri}{alice}", site.uri("scratch"))
        credentials = f"tls-creds-x509,id=tls,dir={alice},endpoint=client"
        options = f"driver=nbd,host=127.0.0.1,port={port},export=disk,tls-creds=tls,tls-hostname=localhost"
        site.peer("qemu-img", "map", "--object", credentials, "--image-opts", options)
    site.same()
