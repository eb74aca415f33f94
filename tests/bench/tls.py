"""Reads inside TLS, with certificates on both sides, over TCP: nbdcopy and qemu-img are the clients.

fio's NBD engine and qemu-img bench cannot be told where their certificates are.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.process import HOST, Server, on_tls, run, serving
from tests.bench.reads import in_turns, nbdcopy
from tests.bench.results import Section, Workload
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.bench.peers import NbdServer

NBDCOPY = Workload("nbdcopy to null:", "bytes/s")
QEMU_IMG = Workload("qemu-img convert to null-co:", "bytes/s")


def make_certificates(directory: str) -> tuple[str, str]:
    """Return two new directories under ``directory``: the servers' and the clients' certificates."""
    authority = Authority()
    return authority.server(Path(directory) / "server", HOST), authority.client(Path(directory) / "client", "bench")


def measure_tls(path: str, servers: Sequence[NbdServer], client: str, *, rounds: int, sockets: str) -> Section:
    """Measure ``servers`` over the file ``path``; ``client`` has the clients' certificates."""
    size = os.path.getsize(path)
    section = Section(
        "tls",
        f"Reads inside TLS from a raw file of {size >> 20} MiB in the page cache, over TCP on loopback",
        [*servers],
        [NBDCOPY, QEMU_IMG],
    )

    @contextlib.contextmanager
    def begin(server: NbdServer) -> Iterator[Server]:
        place = on_tls(client, f"{sockets}/tls-{server.key}.log")
        with serving(server.argv(path, place.where), place) as running:
            images = f"driver=raw,file.filename={path}", _qemu_options(running.uri)
            run(["qemu-img", "compare", *_credentials(client), "--image-opts", *images])
            yield running

    def measure(workload: Workload, server: Server) -> tuple[float, dict[str, float]]:
        seconds = nbdcopy(server.uri) if workload is NBDCOPY else _qemu_img(server.uri, client, size)
        return size / seconds, {}

    in_turns(section, servers, rounds, begin, measure)
    return section


def _qemu_img(uri: str, client: str, size: int) -> float:
    """Return the seconds that qemu-img takes to read everything. Raises BenchError."""
    start = time.perf_counter()
    run([
        "qemu-img", "convert", *_credentials(client), "-n", "--image-opts", "--target-image-opts",
        "-S", "0", "-m", "16", "-W", _qemu_options(uri), f"driver=null-co,size={size}",
    ])  # fmt: skip
    return time.perf_counter() - start


def _credentials(client: str) -> list[str]:
    return ["--object", f"tls-creds-x509,id=tls,dir={client},endpoint=client"]


def _qemu_options(uri: str) -> str:
    port = uri.partition("/?")[0].rpartition(":")[2]
    return f"driver=raw,file.driver=nbd,file.host={HOST},file.port={port},file.tls-creds=tls"
