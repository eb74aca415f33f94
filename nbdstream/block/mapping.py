"""A file's pages as memoryviews, so that a payload is copied once: by the kernel, when it is sent.

Python's own mmap can neither reach past the end of its file nor be resized under views; this one
reaches as far as it is told, so a file that grows needs no second mapping.

Never load from a view: a page that cannot be had is EFAULT to the kernel's send but SIGBUS to a load.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import time
import weakref
from typing import TYPE_CHECKING, Any

from nbdstream.block.residency import Residency

if TYPE_CHECKING:
    from collections.abc import Callable

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_NORESERVE = 0x4000
_MADV_COLD = 20
_MADV_POPULATE_READ = 22

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
# Not to let go of the interpreter for some microseconds: another thread would keep it for much longer.
_madvise = ctypes.PyDLL(None, use_errno=True).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _Pages:
    """The address range itself. It is unmapped when the last generation that refers to it dies."""

    def __init__(self, fd: int, reach: int) -> None:
        own = _reopen(fd)
        try:
            address = _mmap(None, reach, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_NORESERVE, own, 0)
            code = ctypes.get_errno()
        finally:
            os.close(own)
        if address == _MAP_FAILED:
            raise OSError(code, os.strerror(code))
        self.address: int = address
        self.reach = reach
        # The kernel's read-ahead on a fault would read megabytes for a page, and stop the loop meanwhile.
        _madvise(address, reach, mmap.MADV_RANDOM)

    def __del__(self, munmap: Callable[[int, int], int] = _munmap) -> None:
        if hasattr(self, "address"):
            munmap(self.address, self.reach)


class Mapping:
    """A read-only shared mapping of a file, handing out views by generation.

    Whoever wants to use a piece of the file for something else must know that no view of it is still
    queued for sending: :meth:`retire` tells. Its methods belong to the thread of the loop that runs
    when it is made; views may die anywhere.
    """

    def __init__(self, fd: int, reach: int) -> None:
        """Map ``reach`` bytes from the start of ``fd``; they may end far behind the file's end.

        Raises OSError (ENOMEM: there is not so much address space). ``fd`` is not used afterwards.
        """
        self._loop = asyncio.get_running_loop()
        self.reach = reach
        """Bytes from the start of the file that can be viewed."""
        self._pages: _Pages | None = _Pages(fd, reach)
        self._address = self._pages.address
        # A type of its own, since a bare ctypes array has no attributes.
        self._exporter: Any = type("Generation", (ctypes.c_char * reach,), {})
        self._retired: dict[int, weakref.ref[Any]] = {}
        self._retirements = 0
        self._generation: Any = None
        self._bytes = memoryview(b"")
        self._begin_generation()
        self._residency = Residency(self._address)

    def view(self, offset: int, length: int) -> memoryview:
        """Return a view (format B) of the range, belonging to the current generation."""
        end = offset + length
        if end > self.reach:
            raise ValueError(f"{offset}+{length} is out of the mapping's reach")
        return self._bytes[offset:end]

    def view_now(self, offset: int, length: int) -> memoryview | None:
        """Return a view of the range if it is, very probably, in memory (see Residency)."""
        end = offset + length
        if end > self.reach or not self._residency.resident(offset, length):
            return None
        return self._bytes[offset:end]

    def part_folio(self, offset: int) -> bool:
        """Have what is in memory at ``offset`` lie in single pages of the page cache; return if it did not, probably.

        To call a page cold, of a large folio that is mapped as a whole, makes Linux part the folio, if it is clean and
        nobody else has it mapped. That takes longer than to map the page, and much less where there is nothing to part:
        so we tell. A kernel before 5.14 does nothing.
        """
        offset -= offset % mmap.PAGESIZE
        if offset >= self.reach or not self._residency.resident(offset, mmap.PAGESIZE):
            return False
        page = self._address + offset
        begun = time.monotonic()
        if _madvise(page, mmap.PAGESIZE, _MADV_POPULATE_READ):
            return False
        mapped = time.monotonic()
        _madvise(page, mmap.PAGESIZE, _MADV_COLD)
        return time.monotonic() - mapped > mapped - begun

    @property
    def generation(self) -> object:
        """The current generation. Refer to it while you use offsets of the file, as a view does."""
        return self._generation

    def retire(self, callback: Callable[[], None]) -> None:
        """Start a new generation, and have ``callback`` called when no older reference is left.

        "Older" are all generations up to the one that ends here. The callback runs on the loop and
        never before this returns.
        """
        loop, retired, number = self._loop, self._retired, self._retirements

        def gone(_reference: weakref.ref[Any]) -> None:
            del retired[number]
            if not loop.is_closed():
                loop.call_soon_threadsafe(callback)

        retired[number] = weakref.ref(self._generation, gone)
        self._retirements += 1
        self._begin_generation()

    def close(self) -> None:
        """Unmap, at once or when the last view dies. Twice does no harm; nothing else works after it."""
        self._bytes = memoryview(b"")
        self._generation = None
        self._pages = None
        self.reach = 0

    def _begin_generation(self) -> None:
        generation = self._exporter.from_address(self._address)
        generation.pages = self._pages
        if self._generation is not None:
            # An older view can show what was freed later, so an old generation keeps the younger alive.
            self._generation.younger = generation
        self._generation = generation
        self._bytes = memoryview(generation).cast("B")


def _reopen(fd: int) -> int:
    """Return another open file of the same image: a mapping keeps its open file alive, and the image locks with it."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # we may use it, but not open it: somebody passed it to us
        return os.dup(fd)
