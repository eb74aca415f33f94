"""Two hosts: network namespaces with a wire between them, TLS, and a wire that is cut."""

from __future__ import annotations

import json
import os
import random
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.certificates import Authority
from tests.support.client import NbdClient
from tests.support.processes import NBDSTREAM, Process, nbdstream, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOURCE, DESTINATION = "192.0.2.1", "192.0.2.2"
SIZE: Final = 4 << 20


class Wire:
    """A namespace for each host, and a wire; needs root."""

    def __init__(self) -> None:
        self.names = [f"nbdstream-{os.getpid()}-{side}" for side in ("a", "b")]
        self._ends = [f"nbd{os.getpid() % 100_000}{side}" for side in ("a", "b")]
        for name in self.names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
        for name, end, address in zip(self.names, self._ends, (SOURCE, DESTINATION), strict=True):
            run("ip", "link", "set", end, "netns", name)
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
            run("ip", "-n", name, "link", "set", end, "up")

    def on(self, host: int, *arguments: str) -> list[str]:
        """Return a command that runs nbdstream on a host."""
        return ["ip", "netns", "exec", self.names[host], NBDSTREAM, *arguments]

    def cut(self) -> None:
        """Nothing gets through any more."""
        run("ip", "-n", self.names[0], "link", "set", self._ends[0], "down")

    def mend(self) -> None:
        """Everything gets through again."""
        run("ip", "-n", self.names[0], "link", "set", self._ends[0], "up")

    def close(self) -> None:
        for name in self.names:
            run("ip", "netns", "delete", name)


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def state(directory: Path, side: str) -> str:
    said = nbdstream("handover", "status", "--state", str(directory / side), "--json").stdout
    return str(json.loads(said)["state"])


def test_a_disk_changes_hosts_with_its_wire_cut_on_the_way(wire: Wire, tmp_path: Path) -> None:
    authority = Authority()
    server = authority.server(tmp_path / "server", SOURCE)
    client = authority.client(tmp_path / "client", "destination")
    image, overlay, socket = tmp_path / "disk.img", tmp_path / "disk.qed", str(tmp_path / "guest.sock")
    image.write_bytes(random.Random(3).randbytes(SIZE))
    offer = tmp_path / "offer"
    source = Process(
        *("sh", "-c", f'exec "$0" "$@" > {offer}'),
        *wire.on(0, "offer", str(image), "--listen", f"{SOURCE}:0", "--state", str(tmp_path / "source")),
        *("--tls-certificates", server),
    )
    with source:
        wait_until(lambda: offer.exists() and offer.read_text().endswith("\n"), "the offer")
        assert offer.read_text().startswith(f"handovers://{SOURCE}:")
        destination = Process(
            *wire.on(1, "receive", f"@{offer}", str(overlay), "-U", socket, "--state", str(tmp_path / "destination")),
            *("--tls-certificates", client, "--rate", "2M"),
        )
        with destination:
            wait_until(lambda: state(tmp_path, "source") == "PREPARED", "both to be prepared")
            wire.cut()
            with NbdClient(socket) as guest:
                wire.mend()
                assert guest.read(0, 512) == image.read_bytes()[:512]
            nbdstream("handover", "fence", "--state", str(tmp_path / "source"))
            wire.cut()
            with NbdClient(socket) as guest:
                guest.write(0, bytes(1 << 16))  # a whole cluster, which needs no source
                assert guest.read(0, 512) == bytes(512)
            assert state(tmp_path, "destination") == "HYDRATING"
            wire.mend()
            wait_until(lambda: state(tmp_path, "destination") == "RELEASED", "all to be done")
            assert source.wait() == 0
            assert destination.stop() == 0
    hidden = next(tmp_path.glob("disk.img.handed-over-*"))
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", str(overlay), f"{overlay}.raw")
    assert (tmp_path / "disk.qed.raw").read_bytes() == bytes(1 << 16) + hidden.read_bytes()[1 << 16 :]
