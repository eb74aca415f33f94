"""The sockets of the server: bound where nobody listens yet, tuned for NBD, named for people."""

from __future__ import annotations

import contextlib
import grp
import os
import socket
import stat
import struct
from typing import TYPE_CHECKING, Final

from nbdstream.errors import ListenError

if TYPE_CHECKING:
    import asyncio

_SEND_BUFFER: Final = 1 << 20
"""Bytes asked of the kernel for a unix socket. The default, 208 KiB, does not hold one read of 256 KiB."""

_KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""Seconds and a count: a host that has vanished is noticed within two minutes, and its connection is free again."""

BACKLOG: Final = 128


def bind_unix(path: str, *, mode: int, group: str | None) -> socket.socket:
    """Return a socket bound to ``path`` that does not listen yet, with that mode and group.

    The file of a server that is gone is replaced; raises ListenError if somebody answers on it, if it is no
    socket, or if it cannot be made.
    """
    _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        bound.bind(path)
        # Nobody can connect before it listens, so there is no moment at which the wrong people can.
        if group is not None:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        os.chmod(path, mode)
    except KeyError:
        bound.close()
        os.unlink(path)
        msg = f"there is no group {group!r} for {path}"
        raise ListenError(msg) from None
    except OSError as error:
        bound.close()
        msg = f"cannot listen on {path}: {error.strerror or error}"
        raise ListenError(msg) from None
    return bound


def identity(path: str) -> tuple[int, int]:
    """Return what tells this file from another of the same name (device and inode); (0, 0) if there is none."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def remove(path: str, *, made: tuple[int, int]) -> None:
    """Remove the socket file, if it is still the one whose identity is ``made``."""
    if identity(path) == made:
        with contextlib.suppress(OSError):
            os.unlink(path)


def discard(bound: socket.socket) -> None:
    """Close a socket that :func:`bind_unix` returned and that never listened, and remove its file."""
    with contextlib.suppress(OSError):
        os.unlink(bound.getsockname())
    bound.close()


def tune(transport: asyncio.BaseTransport) -> None:
    """Set the options of a connection that has been accepted."""
    sock = transport.get_extra_info("socket")
    # One that is gone already is found out soon enough.
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        elif sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


def describe_peer(transport: asyncio.BaseTransport) -> str:
    """Return who is at the other end, for the log."""
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, _gid = struct.unpack("iii", credentials)
            return f"process {pid} (user {uid})"
        host, port = sock.getpeername()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "a client that is gone"


def _remove_stale(path: str) -> None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        msg = f"cannot listen on {path}: {error.strerror}"
        raise ListenError(msg) from None
    if not stat.S_ISSOCK(found.st_mode):
        msg = f"cannot listen on {path}: it exists and is no socket"
        raise ListenError(msg)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError:
            # A full backlog or a lack of permission: somebody may well be there.
            pass
    msg = f"cannot listen on {path}: another server answers there"
    raise ListenError(msg)
