"""A small Linux guest under QEMU's TCG: Debian's cloud kernel, busybox, and an /init made of shell lines.

The guest tells what it does on its serial console, in lines that start with ``guest:``; each gets the host's time as
it arrives. What ``scripts/setup`` unpacked into ``.cache/kernel`` is the kernel.
"""

from __future__ import annotations

import json
import lzma
import os
import queue
import shutil
import stat
import struct
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support.monitor import ask

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

KERNEL = Path(__file__).resolve().parents[2] / ".cache" / "kernel"
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")

# `fail` ends the guest; its line makes an error of the host's next wait.
PROLOGUE = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
say() { echo "guest: $*"; }
fail() { say "failed $*"; poweroff -f; }
for module in /modules/*; do insmod "$module" || fail "insmod $module"; done
until [ -b /dev/vda ]; do usleep 10000; done
say disk
"""
EPILOGUE = """
say bye
poweroff -f
"""

Node = dict[str, Any]


class GuestError(Exception):
    """The guest or its QEMU failed, or did not come as far as was waited for; with the end of its console."""


def initramfs(script: str, files: Mapping[str, bytes] = {}) -> bytes:
    """An uncompressed initramfs whose /init loads the disk's driver and then runs the shell lines of `script`.

    `files` are put into its root directory, by name. In the script, `say WORDS` tells the host and `fail WORDS` gives
    up; /dev/vda is the disk.
    """
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "mnt", "modules", "proc")]
    entries += [
        ("dev/console", stat.S_IFCHR | 0o600, b""),
        ("bin/busybox", stat.S_IFREG | 0o755, _busybox().read_bytes()),
        ("init", stat.S_IFREG | 0o755, (PROLOGUE + script + EPILOGUE).encode()),
    ]
    # The shell expands /modules/* in the order of the names.
    for place, module in enumerate(_modules()):
        entries.append((f"modules/{place}-{module.name.removesuffix('.xz')}", stat.S_IFREG | 0o644, _unpacked(module)))
    entries += [(name, stat.S_IFREG | 0o644, content) for name, content in files.items()]
    return b"".join(_cpio(number, *entry) for number, entry in enumerate([*entries, ("TRAILER!!!", 0, b"")]))


def _busybox() -> Path:
    path = shutil.which("busybox", path="/bin:/usr/bin")
    if path is None or b"\0/lib64/ld-linux" in Path(path).read_bytes()[:4096]:
        raise GuestError("there is no statically linked busybox: run scripts/setup")
    return Path(path)


def _modules() -> Iterator[Path]:
    if not (KERNEL / "vmlinuz").exists():
        raise GuestError("there is no kernel for the guest: run scripts/setup")
    for name in MODULES:
        yield from KERNEL.glob(f"modules/{name}.ko*")


def _unpacked(module: Path) -> bytes:
    content = module.read_bytes()
    return lzma.decompress(content) if module.suffix == ".xz" else content


def _cpio(number: int, name: str, mode: int, content: bytes) -> bytes:
    """One entry of a cpio archive in the format that the kernel reads ("newc")."""
    console = (5, 1) if stat.S_ISCHR(mode) else (0, 0)
    numbers = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *console, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % value for value in numbers) + name.encode() + b"\0"
    return _padded(header) + _padded(content)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)


def nbd_disk(socket: str | Path) -> Node:
    """The block node of a disk that is the default export of the NBD server on a unix socket."""
    return {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}, "reconnect-delay": 60}


def qed_disk(path: str | Path) -> Node:
    """The block node of a disk that is a QED image which QEMU opens itself; a backing file is not allowed."""
    return {"driver": "qed", "backing": None, "file": {"driver": "file", "filename": str(path)}}


def logged_disk(disk: Node, log: str | Path) -> Node:
    """The same disk, with every write of the guest logged to the file `log`, which is made or emptied."""
    Path(log).write_bytes(b"")
    return {"driver": "blklogwrites", "file": disk, "log": {"driver": "file", "filename": str(log)}}


def logged_writes(log: str | Path) -> Iterator[tuple[int, int]]:
    """Offset and length in bytes of every write, write-zeroes and discard in a finished log of blklogwrites.

    The format is that of Linux's dm-log-writes: a superblock, then entries of one sector, each followed by its data.
    """
    flush_or_mark_only, discard = 0, 4
    with open(log, "rb") as file:
        magic, version, entries, sector_size = struct.unpack("<QQQI", file.read(28))
        if (magic, version) != (0x6A736677736872, 1):
            raise GuestError(f"{log} is no log of blklogwrites")
        position = sector_size
        for _ in range(entries):
            file.seek(position)
            sector, sectors, flags, _ = struct.unpack("<QQQQ", file.read(32))
            position += sector_size
            if sectors == flush_or_mark_only:
                continue
            yield sector * sector_size, sectors * sector_size
            if not flags & discard:
                position += sectors * sector_size


def overlay_without_writes(overlay: Path, logs: Iterable[Path], source: Path, result: Path) -> int:
    """Make `result`, a raw image of the QED overlay in which all that the logs tell of has the source's content.

    It equals the source if and only if everything that the guests did not write does. Returns how many bytes of the
    disk they wrote.
    """
    subprocess.run(["qemu-img", "convert", "-f", "qed", "-O", "raw", overlay, result], check=True)
    total = end = 0
    with source.open("rb") as old, result.open("r+b") as new:
        for offset, length in sorted(extent for log in logs for extent in logged_writes(log)):
            position, end = max(offset, end), max(offset + length, end)
            total += end - position
            for piece in range(position, end, 1 << 20):
                os.pwrite(new.fileno(), os.pread(old.fileno(), min(1 << 20, end - piece), piece), piece)
    return total


@dataclass(frozen=True)
class Event:
    """A line that the guest said: when it arrived (time.monotonic()) and its words without ``guest:``."""

    time: float
    text: str


class Guest:
    """A running guest. As a context manager it is ended at the end of the block, whatever happened."""

    def __init__(
        self,
        disk: Node,
        script: str,
        files: Mapping[str, bytes] = {},
        *,
        memory_mib: int = 256,
        control: Path | None = None,
        incoming: Path | None = None,
    ) -> None:
        """With ``control`` its QEMU has a QMP socket there.

        With ``incoming`` (and ``control``) it does not begin by itself: its state comes by a migration to that socket,
        and then it stands still until ``cont``. All else must be as it is where it comes from.
        """
        self.events: list[Event] = []
        self._console: list[str] = []
        self._arrived: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        with tempfile.NamedTemporaryFile(prefix="initramfs-") as image:
            image.write(initramfs(script, files))
            image.flush()
            self.started = time.monotonic()
            self._process = subprocess.Popen(
                [*_qemu_command(disk, image.name, memory_mib), *_migration_options(control, incoming)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )
            self._reader = threading.Thread(target=self._read_console, name="guest console", daemon=True)
            self._reader.start()
            # QEMU has read the initramfs when the guest says its first word.
            try:
                if incoming and control:
                    self._wait_for_control(control)
                else:
                    self._next(time.monotonic() + 60)
            except BaseException:
                self.kill()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_for(self, word: str, timeout: float = 60) -> Event:
        """The guest's first line, said or to come, whose first word is `word`."""
        deadline = time.monotonic() + timeout
        for event in self.events:
            if event.text.split()[0] == word:
                return event
        while (event := self._next(deadline)).text.split()[0] != word:
            pass
        return event

    def wait(self, timeout: float = 60) -> Event:
        """Wait until the guest has come to the end of its script and is off; its last word."""
        bye = self.wait_for("bye", timeout)
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._error("the guest does not power off") from None
        if status:
            raise self._error(f"QEMU ended with status {status}")
        return bye

    def kill(self) -> None:
        """End the guest at once, as a power cut would; nothing if it is off. All that it said is in its events then."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        while not self._arrived.empty():
            if event := self._arrived.get():
                self.events.append(event)
        if self._process.stdout:
            self._process.stdout.close()

    def _wait_for_control(self, control: Path) -> None:
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                ask(str(control), "query-status")
            except OSError:
                time.sleep(0.02)
            else:
                return
        self._reader.join(1)
        raise self._error("its QEMU does not answer")

    def _next(self, deadline: float) -> Event:
        try:
            event = self._arrived.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            raise self._error("the guest is too slow") from None
        if event is None:
            raise self._error("the guest ended early")
        if event.text.startswith("failed"):
            raise self._error(f"the guest {event.text}")
        self.events.append(event)
        return event

    def _read_console(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._console.append(line.rstrip())
            _, said, text = line.partition("guest: ")
            if said:
                self._arrived.put(Event(time.monotonic(), text.strip()))
        self._arrived.put(None)

    def _error(self, what: str) -> GuestError:
        return GuestError("\n".join([f"{what}; the end of its console:", *self._console[-25:]]))


def _migration_options(control: Path | None, incoming: Path | None) -> list[str]:
    options = ["-qmp", f"unix:{control},server=on,wait=off"] if control else []
    return options + (["-S", "-incoming", f"unix:{incoming}"] if incoming else [])


def _qemu_command(disk: Node, initramfs_path: str, memory_mib: int) -> Sequence[str]:
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-accel", "tcg", "-m", str(memory_mib), "-no-reboot",
        "-display", "none", "-monitor", "none", "-serial", "stdio",
        "-kernel", str(KERNEL / "vmlinuz"), "-initrd", initramfs_path,
        "-append", "console=ttyS0 quiet panic=-1 rdinit=/init",
        "-blockdev", json.dumps({"node-name": "disk", **disk}), "-device", "virtio-blk-pci,drive=disk",
    ]
