"""The commands that are measured: run to the end, or kept running behind a socket."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_SECONDS = 30.0
STOP_SECONDS = 30.0
HOST = "localhost"
"""The name in the certificates."""


class BenchError(Exception):
    """Somebody could not be measured, or moved the wrong bytes. The text is for people."""


def run(argv: Sequence[str], *, accepted: Sequence[int] = (0,)) -> str:
    """Run ``argv`` to its end and return what it wrote to stdout. Raises BenchError for other exit codes."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        msg = f"{shlex.join(argv)}: {error}"
        raise BenchError(msg) from error
    if done.returncode not in accepted:
        msg = f"{shlex.join(argv)}: exit code {done.returncode}: {_last_lines(done.stderr or done.stdout)}"
        raise BenchError(msg)
    return done.stdout


@dataclass(frozen=True)
class Place:
    """Where a server listens."""

    where: str
    """What its command is told: the path of a unix socket, or a port of ``localhost``."""
    uri: str
    log_path: str

    def connect(self) -> None:
        """Connect, and hang up. Raises OSError if nobody accepts."""
        if os.path.isabs(self.where):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(self.where)
        else:
            socket.create_connection((HOST, int(self.where))).close()


def on_unix(socket_path: str) -> Place:
    """A unix socket."""
    return Place(socket_path, f"nbd+unix:///?socket={socket_path}", f"{socket_path}.log")


def on_tls(certificates: str, log_path: str) -> Place:
    """A free port for TLS; ``certificates`` is the clients' directory."""
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    return Place(str(port), f"nbds://{HOST}:{port}/?tls-certificates={certificates}", log_path)


class Server:
    """A server, from the moment it answers until ``stop``."""

    def __init__(self, argv: Sequence[str], place: Place) -> None:
        """Start ``argv`` and wait until somebody accepts at ``place``. Raises BenchError."""
        self._argv = argv
        self._log_path = place.log_path
        self.uri = place.uri
        try:
            with open(self._log_path, "w") as log:
                self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            msg = f"{shlex.join(argv)}: {error}"
            raise BenchError(msg) from error
        try:
            self._wait_for(place)
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Raise BenchError if the server has ended."""
        if self._process.poll() is not None:
            with open(self._log_path) as log:
                said = _last_lines(log.read())
            msg = f"{shlex.join(self._argv)}: ended by itself with exit code {self._process.returncode}: {said}"
            raise BenchError(msg)

    def stop(self) -> None:
        """End the server: politely, and then not."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End the server as if its machine had lost its power: nothing is said to its clients."""
        self._process.kill()
        self._process.wait()

    def _wait_for(self, place: Place) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(OSError):
                place.connect()
                return
            time.sleep(0.01)
        msg = f"{shlex.join(self._argv)}: nobody listens on {place.where} after {START_SECONDS:.0f} s"
        raise BenchError(msg)


@contextlib.contextmanager
def serving(argv: Sequence[str], place: Place) -> Iterator[Server]:
    """A Server for the length of a ``with`` block."""
    server = Server(argv, place)
    try:
        yield server
    finally:
        server.stop()


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:]) or "(it said nothing)"
