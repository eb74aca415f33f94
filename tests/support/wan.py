"""A long line: a proxy in a process of its own that delays everything, and is fast enough not to be what is measured.

``python -m tests.support.wan TARGET LISTEN SECONDS``, both unix sockets; SECONDS are for one direction. For
faults there is :mod:`tests.support.proxy`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING

from tests.support.processes import Process, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 1 << 20
_WINDOW = 64 << 20
"""Bytes on the line in one direction: a long delay costs time, not throughput."""
_SOCKET_BUFFER = 4 << 20


@contextmanager
def long_line(target: str, listen: str, round_trip: float) -> Iterator[Process]:
    """Have what connects to the socket ``listen`` be connected to ``target``, a round trip in seconds away."""
    with Process(sys.executable, "-m", "tests.support.wan", target, listen, str(round_trip / 2)) as process:
        wait_until(lambda: os.path.exists(listen), "the proxy")
        yield process


def _forward(source: socket.socket, target: socket.socket, delay: float) -> None:
    """Carry one direction until it ends."""
    line: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
    room = threading.Semaphore(_WINDOW // _CHUNK)

    def send() -> None:
        with suppress(OSError):
            while True:
                due, data = line.get()
                if (wait := due - time.monotonic()) > 0:
                    time.sleep(wait)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)
                room.release()

    threading.Thread(target=send, daemon=True).start()
    data = b"not at its end"
    while data:
        room.acquire()
        try:
            data = source.recv(_CHUNK)
        except OSError:
            data = b""
        line.put((time.monotonic() + delay, data))


def main(target: str, listen: str, delay: float) -> None:
    """Serve for ever."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(listen)
        listener.listen()
        while True:
            client, _ = listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(target)
            for one in (client, server):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            for ends in ((client, server), (server, client)):
                threading.Thread(target=_forward, args=(*ends, delay), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
