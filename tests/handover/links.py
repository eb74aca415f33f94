"""What lies between two hosts: loopback behind proxies, or a wire between two network namespaces."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from tests.support.processes import NBDSTREAM, run
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Sequence


class Link(Protocol):
    """A link between a source and a destination, which can be cut."""

    listens: str
    """Where the source listens."""
    name: str
    """Where the destination finds it."""

    def on(self, side: str, *arguments: str) -> Sequence[str]:
        """Return a command that runs nbdstream on the host of a side."""

    def open(self, port: int, nbd_port: int) -> None:
        """Begin to carry the connections to these ports of the source."""

    def cut(self) -> None:
        """Nothing gets through any more; whether the ends are told differs."""

    def stall(self) -> None:
        """Nothing gets through any more, and the ends are not told."""

    def hold_data(self) -> None:
        """Let the hand-over's messages through, and nothing of the disks."""

    def mend(self) -> None:
        """Everything gets through again."""

    def close(self) -> None:
        """Take it down."""


class Loopback:
    """Two proxies. The ends are told when it is cut: connections are reset, and refused."""

    listens = "127.0.0.1"
    name = "127.0.0.2"

    def __init__(self) -> None:
        self._proxies: list[Proxy] = []

    def on(self, side: str, *arguments: str) -> list[str]:
        del side
        return [NBDSTREAM, *arguments]

    def open(self, port: int, nbd_port: int) -> None:
        if not self._proxies:
            self._proxies = [Proxy((self.listens, each), (self.name, each)) for each in (port, nbd_port)]

    def cut(self) -> None:
        for proxy in self._proxies:
            proxy.refusing = True
            proxy.cut()

    def stall(self) -> None:
        for proxy in self._proxies:
            proxy.stall()

    def hold_data(self) -> None:
        self._proxies[1].stall()

    def mend(self) -> None:
        for proxy in self._proxies:
            proxy.refusing = False
            proxy.flow()

    def close(self) -> None:
        for proxy in self._proxies:
            proxy.close()


class Wire:
    """A network namespace for each host, and a wire between them; needs root. Nobody is told when it is cut."""

    listens = name = "192.0.2.1"
    _other = "192.0.2.2"

    def __init__(self) -> None:
        self._hosts = {side: f"nbdstream-{os.getpid()}-{side}" for side in ("source", "destination")}
        self._ends = [f"nbd{os.getpid() % 100_000}{end}" for end in ("a", "b")]
        self._held: list[str] = []
        self._nbd_port = 0
        for host in self._hosts.values():
            run("ip", "netns", "add", host)
        run("ip", "link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
        for host, end, address in zip(self._hosts.values(), self._ends, (self.name, self._other), strict=True):
            run("ip", "link", "set", end, "netns", host)
            run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", end)
            run("ip", "-n", host, "link", "set", end, "up")

    def on(self, side: str, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self._hosts[side], NBDSTREAM, *arguments]

    def open(self, port: int, nbd_port: int) -> None:
        del port
        self._nbd_port = nbd_port

    def cut(self) -> None:
        run("ip", "-n", self._hosts["source"], "link", "set", self._ends[0], "down")

    def stall(self) -> None:
        self.cut()

    def hold_data(self) -> None:
        self._held = ["ipproto", "tcp", "sport", str(self._nbd_port), "blackhole"]
        run("ip", "-n", self._hosts["source"], "rule", "add", *self._held)

    def mend(self) -> None:
        run("ip", "-n", self._hosts["source"], "link", "set", self._ends[0], "up")
        if self._held:
            run("ip", "-n", self._hosts["source"], "rule", "delete", *self._held)
            self._held = []

    def close(self) -> None:
        for host in self._hosts.values():
            run("ip", "netns", "delete", host)
