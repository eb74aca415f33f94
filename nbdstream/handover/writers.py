"""Who has an image open for writing without saying so by QEMU's locks.

A lock proves nothing about somebody who takes none: a QEMU with ``locking=off``, or with ``share-rw=on``, which lets a
second writer in. So at the offer, while the guest runs, everybody who has the file open is looked at (as far as we may:
root sees all). At the fence that is too late: the guest's own QEMU keeps the file open after it has let go.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_USES_WRITE = 101
_SHARES_NO_WRITE = 201


class _Open(NamedTuple):
    """An open file of some process."""

    writable: bool
    locks: tuple[tuple[int, int], ...]
    """Ranges of bytes, the last one of each included."""


def careless_writers(path: str) -> list[str]:
    """Name the processes that have the image open for writing, and do not keep other writers out."""
    image = os.stat(path)
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        opened = list(_opened(pid, image))
        if any(each.writable for each in opened) and pid != os.getpid():
            locks = [lock for each in opened for lock in each.locks]
            if not (_covers(locks, _USES_WRITE) and _covers(locks, _SHARES_NO_WRITE)):
                found.append(f"{_name(pid)} (process {pid})")
    return found + _loop_devices(path)


def _opened(pid: int, image: os.stat_result) -> Iterator[_Open]:
    """Give the descriptors that a process has of the image."""
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return  # it has ended, or it is not ours to look at
    for number in numbers:
        try:
            if _same(os.stat(f"/proc/{pid}/fd/{number}"), image):
                with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as fdinfo:
                    yield _parse(fdinfo.read())
        except OSError:
            continue  # closed meanwhile


def _same(one: os.stat_result, image: os.stat_result) -> bool:
    if stat.S_ISBLK(image.st_mode):
        return stat.S_ISBLK(one.st_mode) and one.st_rdev == image.st_rdev
    return (one.st_dev, one.st_ino) == (image.st_dev, image.st_ino)


def _parse(fdinfo: str) -> _Open:
    """Read proc(5)'s fdinfo: flags in octal, and a line like "lock: 1: OFDLCK ADVISORY READ -1 fe:00:7 100 101"."""
    flags, locks = 0, []
    for line in fdinfo.splitlines():
        words = line.split()
        if words[0] == "flags:":
            flags = int(words[1], 8)
        elif words[0] == "lock:":
            locks.append((int(words[-2]), 1 << 63 if words[-1] == "EOF" else int(words[-1])))
    return _Open(flags & os.O_ACCMODE != os.O_RDONLY, tuple(locks))


def _covers(locks: list[tuple[int, int]], byte: int) -> bool:
    return any(first <= byte <= last for first, last in locks)


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip()
    except OSError:
        return "?"


def _loop_devices(path: str) -> list[str]:
    """Name the loop devices over the image that can be written: the kernel has it open for them, and no process."""
    found = []
    for name in sorted(os.listdir("/sys/block")):
        try:
            with open(f"/sys/block/{name}/loop/backing_file", encoding="utf-8", errors="surrogateescape") as backing:
                same = os.path.samefile(backing.read().rstrip("\n"), path)
            with open(f"/sys/block/{name}/ro", encoding="ascii") as read_only:
                if same and read_only.read().strip() == "0":
                    found.append(f"the loop device /dev/{name}")
        except OSError:
            continue  # it is none, or has been taken down
    return found
