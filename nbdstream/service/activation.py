"""Sockets that whoever started us has opened already: sd_listen_fds(3), for systemd, libnbd and others."""

from __future__ import annotations

import os
import socket
from typing import Final

from nbdstream.errors import ListenError

_FIRST: Final = 3
"""SD_LISTEN_FDS_START."""

_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def activated_sockets() -> list[socket.socket]:
    """Take over the sockets that we were started with, to listen on them; empty if there are none.

    The second call finds none, and no child inherits any. Names (``FileDescriptorName=``) are not looked at: libnbd
    gives none. Raises ListenError for what cannot be listened on.
    """
    told = {name: os.environ.pop(name, "") for name in _VARIABLES}
    # A child of the process that was meant has the variables, too, but the descriptors are others there.
    if told["LISTEN_PID"] != str(os.getpid()):
        return []
    count = told["LISTEN_FDS"]
    if not (count.isascii() and count.isdecimal()):
        raise ListenError(f"LISTEN_FDS={count!r} is not a number of sockets")
    return [_take(fd) for fd in range(_FIRST, _FIRST + int(count))]


def _take(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        taken = socket.socket(fileno=fd)
    except OSError as error:
        msg = f"descriptor {fd}, which LISTEN_FDS announces, is no socket: {error.strerror}"
        raise ListenError(msg) from None
    if taken.type != socket.SOCK_STREAM or not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        taken.close()
        msg = f"descriptor {fd}, which LISTEN_FDS announces, is not listening (with Accept=yes, say --stdio)"
        raise ListenError(msg)
    return taken
