"""The guest of a machine that is handed over, as its disk sees it: it writes all the time, on whichever host it may.

Each side has one, in an area of the disk of its own, and each knows what it was told is written.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Self

from nbdstream.block.locks import Sharing, take_locks
from nbdstream.errors import ImageError, ImageLockedError
from tests.support.client import LostError, NbdClient
from tests.support.processes import wait_until

if TYPE_CHECKING:
    from pathlib import Path

BLOCK: Final = 64 << 10
"""A whole cluster: it is written without the source."""
BLOCKS: Final = 8
PAUSE_SECONDS: Final = 0.002


class WritingGuest(ABC):
    """Writes blocks, each with the number of the write all over it, until it is stopped."""

    def __init__(self, first: int) -> None:
        """``first`` is the number of its first block on the disk."""
        self.offset = first * BLOCK
        self.tries = 0
        self.complaint = ""
        self._succeeds = False
        self._possible: list[list[int]] = [[] for _ in range(BLOCKS)]
        """The write that a block must have; or one of those whose answers were lost after it."""
        self._answered = [False] * BLOCKS
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def takes_a_write(self) -> bool:
        """Whether a write that begins now is done."""
        last = self.tries + 2
        wait_until(lambda: self.tries >= last, "a guest's write")
        return self._succeeds

    def check(self, disk: bytes, before: bytes) -> None:
        """Find on a disk what was told to be written, and where nothing was, what there was before."""
        for number, possible in enumerate(self._possible):
            start = self.offset + number * BLOCK
            expected = [_block(value) for value in possible]
            if not self._answered[number]:
                expected.append(before[start : start + BLOCK])
            found = disk[start : start + BLOCK]
            assert found in expected, f"block {number} begins with {found[:8].hex()}, of the writes {possible}"

    def _run(self) -> None:
        while not self._ended.is_set():
            write = self.tries + 1
            number = write % BLOCKS
            done = self._write(self.offset + number * BLOCK, _block(write))
            if done:
                self._possible[number] = [write]
                self._answered[number] = True
            elif done is None:
                self._possible[number].append(write)
            self._succeeds = bool(done)
            self.tries = write
            time.sleep(PAUSE_SECONDS)
        self._close()

    @abstractmethod
    def _write(self, offset: int, data: bytes) -> bool | None:
        """Write, if somebody lets it; None if nobody says whether it is done."""

    @abstractmethod
    def _close(self) -> None:
        """Let go of the disk."""


def _block(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


class SourceGuest(WritingGuest):
    """On the image itself, with a writer's locks, as a QEMU has them. Hooks stop it, and let it go on.

    It does not run while there is ``stopped``, and there is ``running`` while it does.
    """

    def __init__(self, image: Path) -> None:
        self._image = image
        self._fd = -1
        self._stopped, self._running = image.with_name("stopped"), image.with_name("running")
        super().__init__(0)

    @property
    def fence_hook(self) -> str:
        """Has it stop, and let go of the image."""
        return f"touch {self._stopped}; while test -e {self._running}; do sleep 0.02; done"

    @property
    def resume_hook(self) -> str:
        """Has it run again."""
        return f"rm -f {self._stopped}; until test -e {self._running}; do sleep 0.02; done"

    def stands_still(self) -> bool:
        """Whether it has let go of the image."""
        return not self._running.exists()

    def could_run(self) -> bool:
        """Whether it runs, or would if somebody started it, as an autostart does."""
        if self._running.exists():
            return self.takes_a_write()
        try:
            fd = self._open()
        except (ImageError, ImageLockedError, FileNotFoundError):
            return False
        os.close(fd)
        return True

    def _open(self) -> int:
        fd = os.open(self._image, os.O_RDWR)
        try:
            take_locks(fd, Sharing.WRITER, str(self._image))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _write(self, offset: int, data: bytes) -> bool:
        if self._stopped.exists():
            self._close()
            return False
        if self._fd < 0:
            try:
                self._fd = self._open()
            except (ImageError, ImageLockedError, FileNotFoundError) as error:
                self.complaint = str(error)
                return False
            self._running.touch()
        return os.pwrite(self._fd, data, offset) == len(data)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._running.unlink()


class DestinationGuest(WritingGuest):
    """By its socket, with no patience: it connects again whenever nobody is there."""

    def __init__(self, socket: str) -> None:
        self._path = socket
        self._client: NbdClient | None = None
        super().__init__(BLOCKS)

    def _write(self, offset: int, data: bytes) -> bool | None:
        try:
            self._client = self._client or NbdClient(self._path)
            self._client.submit(1, offset, len(data), data)
            return self._client.receive().error == 0
        except LostError:
            self._close()
            return None

    def _close(self) -> None:
        client, self._client = self._client, None
        if client:
            client.__exit__()
