"""The paired harness: a source server, a streamer and a guest's client on loopback, with faults to switch on.

The two ends run as commands (:class:`CommandPair`) or as objects in this process (:class:`LocalPair`), behind the same
methods; between them is a :class:`~tests.support.proxy.Proxy`. Everything blocks, and everything is gone when the pair
is closed. ``scripts/pair`` is the same for a person.

A test gets one from the fixture ``pairs``; a conftest imports that from here.
"""

from __future__ import annotations

import asyncio
import os
import threading
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import pytest
import uvloop

from nbdstream.block.raw import RawImage
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.stream.disk import DiskStream
from tests.support.client import NbdClient
from tests.support.processes import Command, run
from tests.support.proxy import Proxy
from tests.support.records import forget_records

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from nbdstream.server.tls import TlsPolicy

T = TypeVar("T")


def socket_uri(path: str) -> str:
    """Return the NBD URI of the default export on a unix socket."""
    return f"nbd+unix:///?socket={path}"


class Pair(ABC):
    """What both kinds have in common: the files, the proxy, the guest's client."""

    def __init__(self, directory: str, *, direct: bool = False) -> None:
        """Lay everything out in ``directory``. ``direct`` goes without the proxy."""
        self.image = f"{directory}/disk.img"
        self.overlay = f"{directory}/overlay.qed"
        self.source_socket = f"{directory}/source.sock"
        self.guest_socket = f"{directory}/guest.sock"
        self.proxy = None if direct else Proxy(self.source_socket, f"{directory}/proxy.sock")
        self.uri = socket_uri(self.source_socket if direct else f"{directory}/proxy.sock")
        """Where the streamer finds its source."""
        self.guest_uri = socket_uri(self.guest_socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def faults(self) -> Proxy:
        """What stands between source and streamer."""
        assert self.proxy, "a direct pair has none"
        return self.proxy

    def start(self, *, rate: int | None = None) -> None:
        """Start the source, then the streamer; the guest's disk is served then."""
        self.start_source()
        self.start_streamer(rate=rate)

    def guest(self) -> NbdClient:
        """Connect to the disk as a guest."""
        return NbdClient(self.guest_socket)

    @abstractmethod
    def start_source(self) -> None:
        """Serve the image."""

    @abstractmethod
    def kill_source(self) -> None:
        """End the source without a word; it can be started again."""

    @abstractmethod
    def start_streamer(self, *, rate: int | None = None) -> None:
        """Serve the overlay to guests and stream it; the same again resumes."""

    @abstractmethod
    def stop_streamer(self) -> bool:
        """Ask the streamer to end; return whether the overlay is independent."""

    @abstractmethod
    def wait_until_independent(self) -> None:
        """Wait until the overlay needs no source any more."""

    def close(self) -> None:
        """End everything."""
        if self.proxy:
            self.proxy.close()


class CommandPair(Pair):
    """``nbdstream serve`` and ``nbdstream stream``."""

    source: Command | None = None
    streamer: Command | None = None

    def tell(self, line: str) -> None:
        """Take a line that one of the commands said; nobody is told here."""

    def start_source(self) -> None:
        self.source = Command("serve", self.image, "-U", self.source_socket, tell=self.tell)
        self.source.wait_until_serving()

    def kill_source(self) -> None:
        assert self.source
        self.source.kill()

    def begin_streamer(self, *options: str, rate: int | None = None) -> Command:
        """Start the streamer and return at once."""
        limit = ["--rate", str(rate)] if rate else []
        served = ["-U", self.guest_socket, "--progress", "json"]
        self.streamer = Command("stream", self.uri, self.overlay, *served, *limit, *options, tell=self.tell)
        return self.streamer

    def start_streamer(self, *, rate: int | None = None) -> None:
        self.begin_streamer(rate=rate).wait_until_serving()

    def kill_streamer(self) -> None:
        """As ``kill -9`` does."""
        assert self.streamer
        self.streamer.kill()

    def stop_streamer(self) -> bool:
        assert self.streamer
        status = self.streamer.stop()
        assert status in (0, 3), self.streamer
        return status == 0

    def wait_until_independent(self) -> None:
        assert self.streamer
        self.streamer.wait_until_independent()

    def close(self) -> None:
        for command in (self.streamer, self.source):
            if command:
                command.kill()
        super().close()


class LocalPair(Pair):
    """:class:`NbdServer` and :class:`DiskStream` in this process, on a loop in a thread of its own."""

    disk: DiskStream | None = None

    def __init__(self, directory: str, *, direct: bool = False) -> None:
        super().__init__(directory, direct=direct)
        self._source: tuple[NbdServer, RawImage] | None = None
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine where the source and the streamer are, and return what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def start_source(self, *, tls: TlsPolicy | None = None) -> None:
        async def start() -> tuple[NbdServer, RawImage]:
            image = await RawImage.open(self.image)
            server = NbdServer([Export("", image, writable=False)], tls=tls)
            await server.listen_unix(self.source_socket)
            return server, image

        self._source = self.on_loop(start())

    def kill_source(self) -> None:
        async def kill(server: NbdServer, image: RawImage) -> None:
            await server.close(0.0)
            await image.close()

        source, self._source = self._source, None
        assert source
        self.on_loop(kill(*source))

    def start_streamer(self, *, rate: int | None = None) -> None:
        self.disk = self.on_loop(DiskStream.start(self.uri, self.overlay, socket=self.guest_socket, speed=rate or 0))

    def stop_streamer(self) -> bool:
        disk, self.disk = self.disk, None
        assert disk
        self.on_loop(disk.close())
        return disk.independent

    def wait_until_independent(self) -> None:
        assert self.disk
        self.on_loop(self.disk.wait())

    def close(self) -> None:
        try:
            if self.disk:
                self.stop_streamer()
            if self._source:
                self.kill_source()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            super().close()


class Pairs:
    """Makes pairs of either kind, and closes them all."""

    def __init__(self, directory: str, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._count = 0

    def commands(self, *, direct: bool = False) -> CommandPair:
        """Return a pair of commands; nothing runs yet, and there is no image yet."""
        return self._stack.enter_context(CommandPair(self._next(), direct=direct))

    def local(self, *, direct: bool = False) -> LocalPair:
        """Return a pair in this process."""
        return self._stack.enter_context(LocalPair(self._next(), direct=direct))

    def _next(self) -> str:
        self._count += 1
        path = f"{self._directory}/{self._count}"
        os.mkdir(path)
        return path


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[Pairs]:
    """Pairs in a directory of the test's own."""
    with ExitStack() as stack:
        yield Pairs(str(tmp_path), stack)


@pytest.fixture(params=["in process", "as commands"])
def pair(request: pytest.FixtureRequest, pairs: Pairs) -> Pair:
    """A pair, of each kind in turn."""
    make: Callable[[], Pair] = pairs.local if request.param == "in process" else pairs.commands
    return make()


def make_image(path: str, size: int, rng: random.Random, data: Sequence[tuple[int, int]] | None = None) -> None:
    """Make a sparse disk image with random data at (offset, length) of ``data``; else in about half of it."""
    if data is None:
        data = [(start, rng.randrange(1, 512) << 10) for start in range(0, size - (512 << 10), 1 << 20)]
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, length in data:
            file.seek(offset)
            file.writelines(rng.randbytes(min(length - start, 1 << 20)) for start in range(0, length, 1 << 20))


@contextmanager
def small_filesystem(directory: str, size: int) -> Iterator[str]:
    """Mount an ext4 of ``size`` bytes, without reserved blocks, and return where (as root)."""
    image, mount = f"{directory}/small.ext4", f"{directory}/small"
    os.mkdir(mount)
    run("mke2fs", "-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", image, f"{size >> 10}k")
    run("mount", "-o", "loop", image, mount)
    try:
        yield mount
    finally:
        forget_records(mount)
        run("umount", mount, status=None)


@contextmanager
def small_memory(directory: str, size: int) -> Iterator[str]:
    """Mount a tmpfs of ``size`` bytes, and return where (as root)."""
    mount = f"{directory}/memory"
    os.mkdir(mount)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount)
    try:
        yield mount
    finally:
        forget_records(mount)
        run("umount", mount, status=None)


def resize_memory(mount: str, size: int) -> None:
    """Let a tmpfs have another size."""
    run("mount", "-o", f"remount,size={size}", mount)


class Filler:
    """A file that takes all room of a file system until it is removed."""

    def __init__(self, directory: str, *, leave: int = 0) -> None:
        """Leave ``leave`` bytes free, to a block or two."""
        self.path = f"{directory}/filler"
        space = os.statvfs(directory)
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            length = space.f_bavail * space.f_frsize - leave
            while length > 0:  # what is free is not always to be had
                try:
                    os.posix_fallocate(fd, 0, length)
                except OSError:
                    length -= space.f_frsize
                else:
                    break
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Give the room back."""
        os.unlink(self.path)
