"""Everybody who is compared: how they serve a file, how they move a disk, and where they run.

nbdstream is one of them, and gets no treatment of its own.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from tests.bench.process import run
from tests.bench.qmp import block_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OURS = "nbdstream"
AGAINST = "against"
"""The other nbdstream of ``--against``."""


@dataclass(frozen=True)
class System:
    """The Debian that a command comes from: this machine's own, or a chroot that ``scripts/peers`` makes."""

    title: str
    name: str = ""
    """What ``scripts/peers`` calls it; empty for the machine's own."""
    directories: tuple[str, ...] = ()
    """What commands in a chroot see of this machine, each at its own path."""

    def command(self, *argv: str) -> list[str]:
        """``argv`` as it is run there."""
        if not self.name:
            return list(argv)
        binds = [word for directory in self.directories for word in ("--bind", directory)]
        return [f"{ROOT}/scripts/peers", self.name, *binds, "--", *argv]

    def key(self, tool: str) -> str:
        """The name of ``tool`` in the results: ``nbdkit``, ``nbdkit@debian13``."""
        return f"{tool}@{self.name}" if self.name else tool

    def label(self, tool: str, version: str) -> str:
        """The name of ``tool`` for people: ``nbdkit 1.32.5 (Debian 12)``."""
        return f"{tool} {version} ({self.title})"


def host_system() -> System:
    """This machine's own Debian."""
    facts = platform.freedesktop_os_release()
    return System(f"{facts['ID'].capitalize()} {facts.get('VERSION_ID', '')}".strip())


def chroot_system(name: str, directories: Sequence[str]) -> System:
    """The chroot ``name``, made if it is not there yet. Raises BenchError."""
    run([f"{ROOT}/scripts/peers", name])
    return System(f"Debian {name.removeprefix('debian')}", name, tuple(directories))


@dataclass(frozen=True)
class Competitor:
    """Somebody who is measured."""

    key: str
    label: str


Argv: TypeAlias = "Callable[[str, str], list[str]]"


@dataclass(frozen=True)
class NbdServer(Competitor):
    """Somebody who serves a raw file; ``argv`` takes the file, and where to listen (:class:`Place`)."""

    argv: Argv


@dataclass(frozen=True)
class Transfer:
    """One disk to be moved."""

    source: str
    """The raw file itself, for those that need no server."""
    uri: str
    """The export that serves it."""
    destination: str
    monitor: str
    """A path for a QMP socket."""


@dataclass(frozen=True)
class Mover(Competitor):
    """Somebody who makes ``destination`` a whole copy; ``prepare`` runs before the clock starts."""

    image_format: str
    move: Callable[[Transfer], None]
    prepare: Callable[[Transfer], None] = field(default=lambda transfer: None)


@dataclass(frozen=True)
class Versions:
    """The versions of one system's tools."""

    qemu: str
    nbdkit: str
    libnbd: str
    coreutils: str


def versions(system: System) -> Versions:
    """Ask the tools of ``system`` who they are. Raises BenchError if one is missing."""

    def version(tool: str, word: int) -> str:
        return run(system.command(tool, "--version")).splitlines()[0].split()[word]

    return Versions(version("qemu-img", 2), version("nbdkit", 1), version("nbdcopy", 1), version("cp", 3))


def commit(command: str) -> str:
    """The commit of the tree that an nbdstream command lies in, with ``-dirty`` where files differ from it."""
    tree = os.path.dirname(os.path.abspath(command))
    try:
        done = subprocess.run(["git", "-C", tree, "describe", "--always", "--dirty"],
                              capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "of an unknown commit"
    return done.stdout.strip()


def our_commands(ours: str, against: str | None) -> dict[str, tuple[str, str]]:
    """Label and command of each nbdstream that is measured, by key: ours, and the one that it is held against."""
    commands = {OURS: ours} | ({AGAINST: against} if against else {})
    return {key: (f"{OURS} {commit(command)}", command) for key, command in commands.items()}


def nbd_servers(systems: Sequence[System], ours: str, against: str | None) -> list[NbdServer]:
    """nbdstream, then nbdkit and qemu-nbd of each system; ``argv`` takes the path of a unix socket."""
    servers = []
    for key, (label, command) in our_commands(ours, against).items():

        def nbdstream(path: str, sock: str, command: str = command) -> list[str]:
            return [command, "serve", path, "-U", sock]

        servers.append(NbdServer(key, label, nbdstream))
    for system in systems:

        def nbdkit(path: str, sock: str, system: System = system) -> list[str]:
            return system.command("nbdkit", "-f", "-r", "-U", sock, "file", path)

        def qemu_nbd(path: str, sock: str, system: System = system) -> list[str]:
            return system.command("qemu-nbd", "-t", "-r", "-f", "raw", "-k", sock, "--shared=16", path)

        servers += _servers_of(system, nbdkit, qemu_nbd)
    return servers


def tls_servers(systems: Sequence[System], ours: str, certificates: str) -> list[NbdServer]:
    """The same with TLS, on a port of ``localhost``; each asks its clients for a certificate."""

    def nbdstream(path: str, port: str) -> list[str]:
        tls = ["--tls", "require", "--tls-certificates", certificates, "--tls-verify-peer"]
        return [ours, "serve", path, "-b", "localhost", "-p", port, *tls]

    servers = [NbdServer(OURS, f"{OURS} {commit(ours)}", nbdstream)]
    for system in systems:

        def nbdkit(path: str, port: str, system: System = system) -> list[str]:
            tls = ["--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer"]
            return system.command("nbdkit", "-f", "-r", "-i", "localhost", "-p", port, *tls, "file", path)

        def qemu_nbd(path: str, port: str, system: System = system) -> list[str]:
            tls = ["--object", f"tls-creds-x509,id=tls,dir={certificates},endpoint=server", "--tls-creds=tls"]
            where = ["-b", "localhost", "-p", port]
            return system.command("qemu-nbd", "-t", "-r", "-f", "raw", *where, *tls, "--shared=16", path)

        servers += _servers_of(system, nbdkit, qemu_nbd)
    return servers


def _servers_of(system: System, nbdkit: Argv, qemu_nbd: Argv) -> list[NbdServer]:
    found = versions(system)
    return [
        NbdServer(system.key("nbdkit"), system.label("nbdkit", found.nbdkit), nbdkit),
        NbdServer(system.key("qemu-nbd"), system.label("qemu-nbd", found.qemu), qemu_nbd),
    ]


def movers(systems: Sequence[System], ours: str, against: str | None) -> list[Mover]:
    """nbdstream, the tools of each system, and cp."""
    result = []
    for key, (label, command) in our_commands(ours, against).items():

        def stream(transfer: Transfer, command: str = command) -> None:
            run([command, "stream", transfer.uri, transfer.destination, "-c", "4"])

        result.append(Mover(key, label, "qed", stream))
    for system in systems:
        result += _movers_of(system, versions(system))
    host = systems[0]
    cp = host.label("cp", versions(host).coreutils)
    result.append(Mover("cp", cp, "raw", lambda transfer: _run(host, "cp", transfer.source, transfer.destination)))
    return result


def _movers_of(system: System, found: Versions) -> list[Mover]:
    def stream(transfer: Transfer) -> None:
        block_stream(system.command("qemu-storage-daemon"), transfer.destination, transfer.monitor)

    def make_overlay(transfer: Transfer) -> None:
        _run(system, "qemu-img", "create", "-q", "-f", "qed", "-b", transfer.uri, "-F", "raw", transfer.destination)

    def convert(transfer: Transfer) -> None:
        _run(system, "qemu-img", "convert", "-f", "raw", "-O", "qed", transfer.uri, transfer.destination)

    def nbdcopy(transfer: Transfer) -> None:
        _run(system, "nbdcopy", transfer.uri, transfer.destination)

    def mover(tool: str, version: str, image_format: str, *steps: Callable[[Transfer], None]) -> Mover:
        return Mover(system.key(tool), system.label(tool, version), image_format, *steps)

    return [
        mover("block-stream", found.qemu, "qed", stream, make_overlay),
        mover("qemu-img convert", found.qemu, "qed", convert),
        mover("nbdcopy", found.libnbd, "raw", nbdcopy),
    ]


def _run(system: System, *argv: str) -> None:
    run(system.command(*argv))


CompetitorT = TypeVar("CompetitorT", bound=Competitor)


def selected(competitors: Sequence[CompetitorT], only: Sequence[str]) -> list[CompetitorT]:
    """Those with a key in ``only``; without any name, all of them."""
    return [competitor for competitor in competitors if not only or competitor.key in only]
