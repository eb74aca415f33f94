"""The state of the disk and of the page cache when somebody's turn begins: the same for everybody."""

from __future__ import annotations

import os
import tempfile
import time

SETTLE_SECONDS = 5.0
SETTLED_BYTES = 4 << 20
STEP = 1 << 20
_MORE_MEMORY = 128 << 20
"""Bytes, above what a turn puts into the page cache: with 2 GiB, still less than the kernel begins to write back."""
_FIRST_CLUSTER = 9 << 16
"""Where qemu-nbd puts the first cluster: how large a folio can be is a matter of where in the file it begins."""


def settle() -> None:
    """Wait until the disk has nothing left to write for whoever went before."""
    os.sync()
    deadline = time.monotonic() + SETTLE_SECONDS
    while _undurable_bytes() > SETTLED_BYTES and time.monotonic() < deadline:
        time.sleep(0.1)


def bring_in_memory(length: int, scratch: str) -> None:
    """Have free memory be there for ``length`` bytes of a file that a turn writes in the directory ``scratch``.

    A virtual machine gives what is free back to its host for a while (free page reporting; Linux does it two seconds
    after the memory was freed). Whoever writes there first waits for the host: a copy into new pages of the page cache
    takes ten times as long. So a file is written as somebody's turn writes one, and removed before it gets to the disk.
    Touching as much anonymous memory instead does not do: single pages of it leave folios of a file to be found
    elsewhere, for some turns and not for others.
    """
    piece = bytes(STEP)
    with tempfile.TemporaryFile(dir=scratch) as file:
        for offset in range(_FIRST_CLUSTER, _FIRST_CLUSTER + length + _MORE_MEMORY, STEP):
            os.pwrite(file.fileno(), piece, offset)


def _undurable_bytes() -> int:
    with open("/proc/meminfo") as file:
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in file)}
    return (kib["Dirty"] + kib["Writeback"]) * 1024


def bring_into_cache(path: str, *, afresh: bool = False) -> None:
    """Have all of a file in the page cache: other work, and a kernel that looks for cold pages, push it out.

    With ``afresh`` it is pushed out first, and comes back in single pages, as random access brings it in: what comes in
    by reading in sequence lies in folios of up to 2 MiB, and a write of 4 KiB into such a one costs ten times as much
    in the kernel (Linux 6.18, ext4), whoever does it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if afresh:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, os.fstat(descriptor).st_size, STEP):
            os.pread(descriptor, STEP, offset)
    finally:
        os.close(descriptor)
