"""A control socket, asked once: blocking, and with nothing but a socket and JSON."""

from __future__ import annotations

import json
import socket
from typing import Any, Self


class RefusedError(Exception):
    """The answer was an error; its text is what it says."""


class Monitor:
    """A connection to a QMP server, ours or QEMU's. Events are left out."""

    def __init__(self, path: str) -> None:
        """Connect. Raises OSError."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines = self._socket.makefile("rb")
        self._socket.settimeout(60)
        try:
            self._socket.connect(path)
            self._receive()
            self.execute("qmp_capabilities")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Return what a command returns. Raises RefusedError, OSError."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": given}).encode() + b"\n")
        while "event" in (answer := self._receive()):
            pass
        if "error" in answer:
            raise RefusedError(answer["error"]["desc"])
        return answer["return"]

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the other end is gone")
        message: dict[str, Any] = json.loads(line)
        return message


def ask(path: str, command: str, **arguments: object) -> Any:
    """Connect, run one command, and return what it returns. Raises RefusedError, OSError."""
    with Monitor(path) as monitor:
        return monitor.execute(command, **arguments)
