"""Standard input and output as a connection: for libnbd, ssh, inetd, and whoever starts us as a child."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import threading
from typing import Final

from nbdstream.errors import ListenError

_STEP: Final = 256 << 10
_PATIENCE: Final = 10.0
"""Seconds that the last bytes may take to leave through a pipe."""


class Stdio:
    """What standard input and output were. From now on nothing is read there, and what is printed goes to stderr."""

    def __init__(self) -> None:
        """Take them over; raises ListenError for what cannot be a connection."""
        # Python's own view: a descriptor that was closed when we were started leads nowhere by now.
        if sys.stdin is None or sys.stdout is None:
            raise ListenError("--stdio needs standard input and output, and one of them is closed")
        if os.isatty(0) or os.isatty(1):
            raise ListenError("--stdio is for programs that start nbdstream: standard input or output is a terminal")
        incoming, outgoing = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        self._relays: list[threading.Thread] = []
        if _same_socket(incoming, outgoing):
            os.close(outgoing)
            self.socket = socket.socket(fileno=incoming)
            """The connection."""
        else:
            self.socket, ours = socket.socketpair()
            self._relay(incoming, outgoing, ours)

    def finish(self) -> None:
        """Wait until what was sent has left."""
        for relay in self._relays:
            relay.join(_PATIENCE)

    def _relay(self, incoming: int, outgoing: int, ours: socket.socket) -> None:
        os.set_blocking(incoming, True)
        os.set_blocking(outgoing, True)
        # Nobody waits for the first: what it waits for may never come.
        threading.Thread(target=_receive, args=(incoming, ours), daemon=True).start()
        sender = threading.Thread(target=_send, args=(ours, outgoing), daemon=True)
        sender.start()
        self._relays.append(sender)


def _same_socket(one: int, other: int) -> bool:
    first, second = os.fstat(one), os.fstat(other)
    return stat.S_ISSOCK(first.st_mode) and os.path.samestat(first, second)


def _receive(incoming: int, ours: socket.socket) -> None:
    """Pass on what the client sends, and its end."""
    with contextlib.suppress(OSError):
        while data := os.read(incoming, _STEP):
            ours.sendall(data)
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_WR)


def _send(ours: socket.socket, outgoing: int) -> None:
    """Pass on what the client is sent, and its end; a client that does not take it any more has gone."""
    try:
        while data := ours.recv(_STEP):
            view = memoryview(data)
            while view:
                view = view[os.write(outgoing, view) :]
    except OSError:
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
    os.close(outgoing)
