"""A server in a process of its own, to be attacked: ``python -m tests.support.attacked_server SOCKET DIR LIMITS TLS``.

LIMITS is JSON for nbdstream.server.limits.Limits; TLS is ``off``, ``on`` or ``require``, with the certificates in
DIR/tls. The images are made in DIR:

- ``disk``: writable, 64 MiB, whose first 8 MiB hold numbers; in the next 24 MiB every second page is a hole;
- ``huge``: writable, 16 GiB of nothing;
- ``comb``: read-only, 32 MiB, every second page of which is a hole.

It says ``serving`` and a TCP port of 127.0.0.1 when clients can connect, and ends at SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import struct
import sys
from contextlib import AsyncExitStack
from typing import Final

import uvloop

from nbdstream.block.raw import RawImage
from nbdstream.server.export import Export
from nbdstream.server.limits import Limits
from nbdstream.server.server import NbdServer
from nbdstream.server.tls import TlsPolicy, server_context

DISK_SIZE: Final = 64 << 20
NUMBERS: Final = struct.pack("!2097152I", *range(2 << 20))
"""The first 8 MiB of ``disk``: different everywhere."""
DISK_COMB_END: Final = 32 << 20
HUGE_SIZE: Final = 16 << 30
COMB_SIZE: Final = 32 << 20
PAGE: Final = 4096


def _make_images(directory: str) -> None:
    with open(f"{directory}/disk", "wb") as file:
        file.write(NUMBERS)
        _comb(file.fileno(), len(NUMBERS), DISK_COMB_END)
        file.truncate(DISK_SIZE)
    with open(f"{directory}/huge", "wb") as file:
        file.truncate(HUGE_SIZE)
    with open(f"{directory}/comb", "wb") as file:
        _comb(file.fileno(), 0, COMB_SIZE)
        file.truncate(COMB_SIZE)


def _comb(fd: int, start: int, end: int) -> None:
    for at in range(start, end, 2 * PAGE):
        os.pwrite(fd, b"x" * PAGE, at)


def _policy(directory: str, tls: str) -> TlsPolicy | None:
    if tls == "off":
        return None
    return TlsPolicy(server_context(f"{directory}/tls", verify_peer=False), required=tls == "require")


async def _serve(path: str, directory: str, limits: Limits, tls: TlsPolicy | None) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with AsyncExitStack() as stack:
        exports = []
        for name, writable in (("disk", True), ("huge", True), ("comb", False)):
            image = await RawImage.open(f"{directory}/{name}", writable=writable)
            stack.push_async_callback(image.close)
            exports.append(Export(name, image, writable=writable, description=f"{directory}/{name}"))
        server = NbdServer(exports, limits=limits, tls=tls)
        stack.push_async_callback(server.close, 5.0)
        await server.listen_unix(path)
        await server.listen_tcp("127.0.0.1", 0)
        port = next(uri for uri in server.uris if "127.0.0.1" in uri).rpartition("/")[0].rpartition(":")[2]
        print("serving", port, file=sys.stderr)
        await stop.wait()


def main() -> None:
    """Serve until SIGTERM."""
    path, directory, limits, tls = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    _make_images(directory)
    uvloop.run(_serve(path, directory, Limits(**json.loads(limits)), _policy(directory, tls)))


if __name__ == "__main__":
    main()
