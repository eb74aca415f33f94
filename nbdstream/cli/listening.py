"""Where ``serve`` has its clients from: a unix socket, TCP, sockets it was started with, or standard input and output.

Whoever can connect without TLS can use the exports. So without --tls require, or --insecure, nothing but loopback and
unix sockets is listened on.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.cli import arguments
from nbdstream.cli.arguments import UsageError
from nbdstream.uri import DEFAULT_PORT

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from nbdstream.server.server import NbdServer

_LOOPBACK = "127.0.0.1"


def add_listening(parser: argparse.ArgumentParser) -> None:
    """Add where to listen."""
    group = parser.add_argument_group(
        "where", "Sockets from systemd or libnbd (LISTEN_FDS, sd_listen_fds(3)) are used without any of these."
    )
    group.add_argument("-U", "--unix", "-k", "--socket", metavar="PATH", help="listen on a unix socket")
    group.add_argument(
        "-b", "--bind", metavar="ADDR", help=f"listen on this address (default: {_LOOPBACK}; see --insecure)"
    )
    group.add_argument(
        "-p",
        "--port",
        type=arguments.count(0, 65535),
        metavar="PORT",
        help=f"listen on this TCP port (default: {DEFAULT_PORT}; 0: any free one)",
    )
    group.add_argument(
        "--stdio",
        action="store_true",
        help="serve one client, on standard input and output (a socket, or two pipes), and exit when it has gone",
    )
    arguments.add_socket_access(group)


class Listening(NamedTuple):
    """A decision on where to listen; nothing of it for --stdio."""

    activated: Sequence[socket.socket] = ()
    unix: str | None = None
    tcp: tuple[str, int] | None = None

    @classmethod
    def choose(cls, options: argparse.Namespace, activated: Sequence[socket.socket]) -> Listening:
        """Return what the command line asks for, given the sockets that we were started with. Raises UsageError."""
        _check(options, activated)
        if options.stdio:
            return cls()
        if activated:
            return cls(activated)
        if options.unix is not None:
            return cls(unix=options.unix)
        bind = _LOOPBACK if options.bind is None else options.bind
        return cls(tcp=(bind, DEFAULT_PORT if options.port is None else options.port))

    async def begin(self, server: NbdServer, options: argparse.Namespace) -> None:
        """Have the server listen there. Raises ListenError."""
        for each in self.activated:
            await server.listen_socket(each)
        if self.unix is not None:
            await server.listen_unix(self.unix, mode=options.socket_mode, group=options.socket_group)
        if self.tcp is not None:
            await server.listen_tcp(*self.tcp)


async def refuse_exposure(sockets: Sequence[socket.socket], tcp: tuple[str, int] | None) -> None:
    """Refuse, with a UsageError, to have clients from beyond this host: on these sockets, or at this host and port."""
    addresses = [str(each.getsockname()[0]) for each in sockets if each.family != socket.AF_UNIX]
    if tcp:
        addresses += await _resolve(*tcp)
    for address in addresses:
        if not is_loopback(address):
            raise UsageError(
                f"without TLS, whoever reaches {address} could use the exports: say --tls require "
                "(with certificates, and --tls-verify-peer to know the clients), or --insecure"
            )


def is_loopback(address: str) -> bool:
    """Whether only this host can reach an IP address. Anything that is no IP address counts as reachable."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)


def _check(options: argparse.Namespace, activated: Sequence[socket.socket]) -> None:
    """Refuse two answers to the question where to listen."""
    tcp = [name for name, value in (("--bind", options.bind), ("--port", options.port)) if value is not None]
    given = (["--unix"] if options.unix is not None else []) + tcp
    if options.unix == "":
        raise UsageError("--unix needs the path of a socket")
    if options.unix is not None and tcp:
        raise UsageError(f"--unix and {tcp[0]} are two places to listen: say one")
    if options.stdio and (given or activated):
        raise UsageError(f"--stdio and {given[0] if given else 'LISTEN_FDS'} cannot be combined")
    if not activated:
        return
    # A unit may say where its socket lies with and without socket activation.
    same = not tcp and [_path(each) for each in activated] == [os.path.abspath(options.unix or "")]
    if given and not same:
        raise UsageError(f"sockets were passed in (LISTEN_FDS), so {given[0]} cannot be given")


def _path(sock: socket.socket) -> str | None:
    """Return the path of a unix socket, unless it is abstract."""
    name = sock.getsockname()
    return os.fsdecode(name) if sock.family == socket.AF_UNIX and not os.fsencode(name).startswith(b"\0") else None


async def _resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host; none if there are none, which the server will say when it comes to that."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for *_, address in found]
