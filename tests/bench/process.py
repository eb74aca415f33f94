"""The commands that are measured: run to the end, or kept running behind a socket."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_SECONDS = 30.0
STOP_SECONDS = 30.0


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


class Server:
    """A server that listens on a unix socket, from the moment it answers until ``stop``."""

    def __init__(self, argv: Sequence[str], socket_path: str) -> None:
        """Start ``argv`` and wait until somebody accepts on ``socket_path``. Raises BenchError."""
        self._argv = argv
        self._log_path = f"{socket_path}.log"
        self.uri = f"nbd+unix:///?socket={socket_path}"
        try:
            with open(self._log_path, "w") as log:
                self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            msg = f"{shlex.join(argv)}: {error}"
            raise BenchError(msg) from error
        try:
            self._wait_for(socket_path)
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

    def _wait_for(self, socket_path: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
                client.connect(socket_path)
                return
            time.sleep(0.01)
        msg = f"{shlex.join(self._argv)}: nobody listens on {socket_path} after {START_SECONDS:.0f} s"
        raise BenchError(msg)


@contextlib.contextmanager
def serving(argv: Sequence[str], socket_path: str) -> Iterator[Server]:
    """A Server for the length of a ``with`` block."""
    server = Server(argv, socket_path)
    try:
        yield server
    finally:
        server.stop()


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:]) or "(it said nothing)"
