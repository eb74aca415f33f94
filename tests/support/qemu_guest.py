"""A QEMU as the guest's side: its own NBD client, which comes back by itself when the server was gone.

It works on cells of one value each, one command after the other, and checks what it reads; so a single wrong or lost
byte is found out.
"""

from __future__ import annotations

import os
import random
import subprocess
import threading
from contextlib import suppress
from typing import Self

from tests.support.processes import PATIENCE_SECONDS, wait_until

CELL = 4096
RECONNECT_SECONDS = 60
"""For so long its requests wait for a server that is gone (QEMU's ``reconnect-delay``)."""
_LONGEST = 40
"""Cells that a write covers at most: more than two clusters."""


def cells_of_source(size: int) -> bytearray:
    """Return the values of the cells of a source disk: none of them is zero."""
    return bytearray(number * 7 % 255 + 1 for number in range(size // CELL))


def contents(cells: bytes | bytearray) -> bytes:
    """Return the disk that has these cells."""
    return b"".join(bytes([value]) * CELL for value in cells)


class QemuGuest:
    """``qemu-io`` with ``reconnect-delay``, at work until it is told to stop."""

    def __init__(self, socket: str, cells: bytearray, seed: int) -> None:
        """Begin to work on the disk behind ``socket``, which has these ``cells`` now."""
        self.cells = cells
        self.done = 0
        """Commands that are complete."""
        self.complaints: list[str] = []
        """What it said that is not as it should be."""
        self._chance = random.Random(seed)
        self._stop = threading.Event()
        options = f"driver=nbd,server.type=unix,server.path={socket},reconnect-delay={RECONNECT_SECONDS}"
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "qemu-io", "--image-opts", options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        )  # fmt: skip
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._command, self._listen)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        assert self._process.stdout
        self._process.stdout.close()

    def wait_for(self, count: int) -> None:
        """Wait until so many more commands are complete."""
        until = self.done + count
        wait_until(lambda: self.done >= until or self.complaints, f"{count} commands of qemu-io")

    def finish(self) -> None:
        """Let it complete what it was given, and end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        assert self._process.wait(PATIENCE_SECONDS) == 0

    def _command(self) -> None:
        given = 0
        pipe = self._process.stdin
        assert pipe
        while not self._stop.is_set() and not self.complaints:
            if given > self.done:  # a second line, read together with the first, would be forgotten until a third comes
                self._stop.wait(0.0005)
                continue
            with suppress(BrokenPipeError):  # it was killed
                pipe.write(self._next() + "\n")
            given += 1
        with suppress(BrokenPipeError):
            pipe.close()

    def _next(self) -> str:
        chance, cells = self._chance, self.cells
        first = chance.randrange(len(cells))
        kind = chance.choices(["write", "durable", "zero", "read"], [5, 1, 1, 5])[0]
        if kind == "read":
            return f"read -P {cells[first]} {first * CELL} {CELL}"
        count = min(chance.randint(1, _LONGEST), len(cells) - first)
        value = 0 if kind == "zero" else chance.randrange(1, 256)
        cells[first : first + count] = bytes([value]) * count
        how = {"zero": "-z", "durable": f"-f -P {value}"}.get(kind, f"-P {value}")
        return f"write {how} {first * CELL} {count * CELL}"

    def _listen(self) -> None:
        pipe = self._process.stdout
        assert pipe
        for line in pipe:
            text = line.strip().removeprefix("qemu-io> ").strip()
            while text.startswith("qemu-io>"):
                text = text.removeprefix("qemu-io>").strip()
            if " bytes at offset " in text and not text.startswith("Pattern"):
                self.done += 1
            elif text and "ops;" not in text:
                self.complaints.append(text)


def make_source(path: str, size: int) -> bytearray:
    """Make a disk of cells, and return their values."""
    cells = cells_of_source(size)
    with open(path, "wb") as file:
        file.write(contents(cells))
        os.fsync(file.fileno())
    return cells
