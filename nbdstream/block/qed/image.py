"""A QED image file, open: lookups, data in and out, and new links on their way to durability.

This layer knows clusters of the file and nothing of what a backing file holds: it never reads one. Data is read
through one mapping of the file and written by a thread; links go through :mod:`nbdstream.block.qed.epochs`.
"""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdstream.block.folios import Folios
from nbdstream.block.locks import Sharing, take_locks
from nbdstream.block.mapping import Mapping
from nbdstream.block.prompt import PromptWriter
from nbdstream.block.qed.check import CheckResult, check
from nbdstream.block.qed.epochs import Epochs
from nbdstream.block.qed.marks import AUTOCLEAR_MARKS, Marks
from nbdstream.block.qed.opening import OpenFile, open_file
from nbdstream.block.qed.rebase import replace_backing
from nbdstream.block.qed.tables import PAGE_ENTRIES, ZERO, Tables
from nbdstream.block.worker import Worker, as_os_error, pread_exact, pwrite_all, pwritev_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitarray import bitarray

    from nbdstream.block.device import Buffer, WriteDone
    from nbdstream.block.qed.extension import Extension
    from nbdstream.block.qed.layout import Header
    from nbdstream.block.qed.space import Space

_WARM_BYTES = 1 << 20
"""How much of a cold range is read at a time to get it into the page cache."""

_UNLINKED_AT_ONCE = 16
"""Clusters that are looked up for one run, while some are unlinked: who reads on asks again, and the loop goes on."""

_MOST_REACH = 96 << 40
"""Of the 128 TiB of address space that a process has."""


class QedImage:
    """One open QED image. Offsets named *place* are offsets in the file; all else is in the disk it describes.

    Use :meth:`open`. Its methods belong to the loop's thread; those that end in ``_now`` never block.
    """

    def __init__(self, path: str, file: OpenFile, *, read_only: bool) -> None:
        loop = asyncio.get_running_loop()
        self.path = path
        self.read_only = read_only
        self.header: Header = file.header
        self.extension: Extension | None = file.extension
        self.backing_name: str | None = file.backing_name
        self.size = file.header.image_size
        self.cluster_size = file.header.cluster_size
        self.allocated: bitarray = file.allocated
        """Opened for writing: a bit for each cluster of the disk that was not UNALLOCATED then."""
        self.zeroes: bitarray = file.zeroes
        """The same of those that were ZERO."""
        self._marks: Marks | None = file.marks
        self._fd = file.fd
        self._space: Space = file.space
        self._tables: Tables = file.tables
        self._misaligned = self.cluster_size - 1
        self._first_place = file.header.header_size * self.cluster_size
        self._mapping = self._map_file()
        self.view_now = self._mapping.view_now
        """Returns a view of the file's pages at a place if they are in memory; only to be sent (see Mapping)."""
        self.prompt = PromptWriter(file.fd, file.space.end, Folios(file.fd, self._mapping.part_folio))
        """Writes into a cluster that is allocated before it returns, or says that another way must be used."""
        self._worker = Worker("qed-data", loop)
        self._barriers = Worker("qed-barrier", loop)
        self._epochs = Epochs(
            self._fd, self._tables, self._space, file.header.table_size, self._barriers, self._recycle, file.record,
            self.prompt,
        )  # fmt: skip
        self.noted = self._epochs.noted
        """Those of ``unlinked`` that a kill -9 of this process does not lose."""
        self.unlinked = self._epochs.unlinked
        """Clusters that the tables in the file do not lead to yet, with their L2 entries."""
        self.unlinked.update(file.links)
        self._closed = False

    @classmethod
    async def open(
        cls, path: str, *, writable: bool = False, marked: bool = False, sharing: Sharing | None = None
    ) -> QedImage:
        """Open an image and take QEMU's locks on it: as WRITER or READER by default, as ``writable`` says.

        With ``marked``, whoever opens it for writing sets a bit in :attr:`written` for what the guest writes.

        Opening for writing makes durable what an earlier owner left in the page cache, and takes back what nothing
        refers to. Raises ImageError, ImageLockedError.
        """
        share = sharing or (Sharing.WRITER if writable else Sharing.READER)
        file = await asyncio.to_thread(
            open_file, path, lambda fd: take_locks(fd, share, path), writable=writable, marked=marked
        )
        return cls(path, file, read_only=not writable)

    @property
    def written(self) -> bitarray | None:
        """Opened with ``marked``, and as long as there is a backing file: the clusters that the guest may have written.

        A bit must be set before the write is begun. There may be more bits than clusters.
        """
        return self._marks.bits if self._marks else None

    def _map_file(self) -> Mapping:
        """Map the file and the room it may grow into, or as much of that as there is address space for."""
        reach = min(_MOST_REACH, self.size + self.size // 4 + os.fstat(self._fd).st_size + (1 << 30))
        while True:
            try:
                mapping = Mapping(self._fd, reach)
            except OSError as error:
                if error.errno != errno.ENOMEM or reach < 1 << 30:
                    raise
                reach //= 2
            else:
                return mapping

    # -- looking up -------------------------------------------------------------------------------------------

    def entry_now(self, cluster: int) -> int | None:
        """Return the L2 entry of a cluster: UNALLOCATED, ZERO or its place; None if the table must be read first.

        Raises OSError (EIO) if the table is damaged.
        """
        entry = self.unlinked.get(cluster)
        if entry is None:
            page = self._tables.page_now(cluster // PAGE_ENTRIES)
            if page is None:
                return None
            entry = page[cluster % PAGE_ENTRIES]
        if entry > ZERO and (entry & self._misaligned or not self._first_place <= entry < self._space.end):
            raise OSError(errno.EIO, f"{self.path}: damaged: the L2 entry of cluster {cluster} is {entry:#x}")
        return entry

    async def load_entry(self, cluster: int) -> None:
        """Read the part of the tables that :meth:`entry_now` needs for a cluster."""
        page = cluster // PAGE_ENTRIES
        # In the thread that links: what it read cannot be older than what it linked.
        self._tables.keep_page(page, await self._barriers.run(self._tables.load_page, page))

    async def run(self, cluster: int, most: int) -> tuple[int, int]:
        """Return (entry, clusters) of the run that begins at ``cluster``.

        A run is clusters that are all UNALLOCATED, all ZERO, or one behind the other in the file; at most ``most``, and
        not always as long as it could be.
        """
        entry = await self.entry(cluster)
        step = 0
        if entry > ZERO:
            step = self.cluster_size
            most = min(most, (self._space.end - entry) // step)
        if self.unlinked:
            return entry, self._run_unlinked(cluster, entry, step, most)
        count = 1
        while count < most:
            behind = cluster + count
            absent = 0 if entry else self._tables.absent(behind)
            more = absent or self._tables.follow_now(behind, entry + count * step, step, most - count)
            count = min(most, count + more)
            if not more or (not absent and (cluster + count) % PAGE_ENTRIES):
                break
        return entry, count

    def _run_unlinked(self, cluster: int, entry: int, step: int, most: int) -> int:
        """Return how long a run is, cluster by cluster: any of them can lead elsewhere than the tables say."""
        most = min(most, _UNLINKED_AT_ONCE)
        count = 1
        while count < most and self.entry_now(cluster + count) == entry + count * step:
            count += 1
        return count

    async def entry(self, cluster: int) -> int:
        """Return the L2 entry of a cluster, true until the next await."""
        while (entry := self.entry_now(cluster)) is None:
            await self.load_entry(cluster)
        return entry

    # -- data -------------------------------------------------------------------------------------------------

    async def view(self, place: int, length: int) -> Buffer:
        """Return what :meth:`view_now` does, having read the pages first."""
        if place + length > self._mapping.reach:
            return await self._worker.run(pread_exact, self._fd, length, place)
        view = self._mapping.view(place, length)  # taken first: it keeps the place from being used again
        await self._worker.run(_warm, self._fd, length, place)
        return view

    async def read(self, place: int, length: int) -> bytes:
        """Return bytes to be looked at, which those of a view must not be. Raises OSError."""
        return await self._worker.run(pread_exact, self._fd, length, place)

    def write_new_at_once(self, cluster: int, within: int, data: Buffer) -> bool:
        """Allocate a cluster that holds ``data`` in zeroes, map it and note it, before this returns, or do nothing."""
        if not (self.prompt.ready() and self._epochs.can_note(cluster)):
            return False
        place = self._space.append_untouched()
        if place is None:
            return False
        # The cluster lies in the file as a whole before anything leads there.
        if not (self.prompt.lengthen(place + self.cluster_size) and self.prompt.write(data, place + within)):
            self._space.release(place)
            return False
        self._epochs.add(cluster, place)
        self._epochs.note(cluster)
        return True

    def write_now(self, place: int, data: Buffer, done: WriteDone) -> bool:
        """Write into a cluster that is allocated, in a batch with others."""
        if self._epochs.failed:
            return False

        # The generation goes along: no cluster that is being written is used again.
        def finished(_: None, error: BaseException | None, _generation: object = self._mapping.generation) -> None:
            done(as_os_error(error))

        self._worker.submit(finished, pwrite_all, self._fd, data, place)
        return True

    async def write(self, place: int, buffers: Sequence[Buffer]) -> None:
        """Write buffers one behind the other at ``place``. Raises OSError."""
        if self._epochs.failed:
            raise OSError(errno.EIO, "the image could not be made durable before")
        await self._worker.run(_write, self._fd, buffers, place, self._mapping.generation)

    async def write_in_zeroes(self, place: int, within: int, data: Buffer) -> None:
        """Write a part of a cluster that was never used; all the rest of it stays a hole. Raises OSError."""
        if self._epochs.failed:
            raise OSError(errno.EIO, "the image could not be made durable before")
        await self._worker.run(_write_in_hole, self._fd, data, place + within, place + self.cluster_size)

    @property
    def fd(self) -> int:
        """The file, for those who write into places they allocated."""
        return self._fd

    # -- space and links --------------------------------------------------------------------------------------

    def allocate(self, cluster: int, count: int) -> tuple[int, int]:
        """Return (place, clusters) of new clusters that lie together: at least one, at most ``count``.

        ``cluster`` is the first one that will be mapped to them.
        """
        self._epochs.reserve_table(cluster)
        return self._space.allocate(count)

    def allocate_untouched(self, cluster: int) -> int | None:
        """Return the place of a new cluster that reads as zeroes (see :meth:`write_in_zeroes`), if there is one."""
        self._epochs.reserve_table(cluster)
        return self._space.append_untouched()

    def release(self, place: int, count: int) -> None:
        """Give back clusters that were allocated and never mapped."""
        self._space.release(place, count)

    def map(self, cluster: int, entry: int, *, replaced: int = 0) -> None:
        """Let a cluster be ZERO or lie at a place, from now on; the file learns of it in the next epoch.

        The data at the place must be written completely. ``replaced`` is the place it had before, if any.
        """
        self._epochs.add(cluster, entry, replaced)

    async def room(self) -> None:
        """Wait, seldom, until a cluster can be mapped on behalf of a guest. Raises OSError."""
        await self._epochs.room()

    def note(self, cluster: int) -> bool:
        """Make a cluster that was mapped safe from a kill -9; False: wait for :meth:`linked` then."""
        return self._epochs.note(cluster)

    def _recycle(self, places: list[int]) -> None:
        def release() -> None:
            for place in places:
                self._space.release(place)

        self._mapping.retire(release)  # views of the old contents may still be on their way to a client

    @property
    def backlog(self) -> int:
        """How many clusters wait to be linked."""
        return self._epochs.backlog

    def nudge(self) -> None:
        """Have what was mapped linked soon, without waiting for it."""
        self._epochs.nudge()

    async def linked(self) -> None:
        """Wait until what was mapped before is linked: no kill -9 of this process loses it any more."""
        await self._epochs.linked()

    async def flush(self) -> None:
        """Make durable everything that was answered before."""
        await self._epochs.flush()

    @property
    def failed(self) -> OSError | None:
        """Why the image could not be made durable; nothing is written any more then."""
        return self._epochs.failed

    # -- leaving nothing unused (see tidy) --------------------------------------------------------------------

    async def settle(self) -> None:
        """Make durable what was mapped before, and have free what it replaced, but for what clients still look at."""
        await self.linked()
        await self.flush()
        await asyncio.sleep(0)  # the mapping tells on the loop that nobody looks at the replaced clusters
        await asyncio.sleep(0)
        self._epochs.release_reserved()

    async def check(self) -> CheckResult:
        """Check the file. Links wait meanwhile; places that are being filled count as leaks."""
        if not self.read_only:
            await self.settle()
        return await self._barriers.run(check, self._fd, list(self.unlinked.items()))

    @property
    def end(self) -> int:
        """Where the used part of the file ends."""
        return self._space.end

    @property
    def free_runs(self) -> list[tuple[int, int]]:
        """The unused runs in front of the end: (place, bytes)."""
        return self._space.free

    def allocate_below(self, limit: int) -> int | None:
        """Return the place of an unused cluster below ``limit``, None if there is none."""
        return self._space.allocate_below(limit)

    async def clusters_behind(self, place: int) -> list[tuple[int, int]]:
        """Return (cluster, place) of all data that lies there or behind, the last first."""
        return await self._barriers.run(self._tables.clusters_behind, place)

    async def zero_clusters(self, most: int) -> list[int]:
        """Return clusters that have no data and need no new table to get some."""
        return await self._barriers.run(self._tables.zero_clusters, most)

    async def copy_cluster(self, place: int, target: int) -> None:
        """Copy a cluster within the file, behind all writes that were taken before."""
        await self._worker.run(_copy, self._fd, place, target, self.cluster_size)

    def cut(self) -> None:
        """Cut the unused end of the file off.

        This is done on the loop: nobody may be given a place behind the end before the file has been cut.
        """
        self.prompt.cut(self._space.end)
        self._space.cut()

    # -- the header, closing ----------------------------------------------------------------------------------

    async def forget_backing(self) -> None:
        """Take the backing file's name out of the header, everything else being durable first."""
        await self.settle()
        header = self.header.without_backing()
        kept = header.autoclear_features & ~AUTOCLEAR_MARKS
        await self._replace_header(replace(header, autoclear_features=kept))
        self.backing_name = None
        if self._marks:
            self._marks.forget()
            self._marks = None

    async def set_size(self, size: int) -> None:
        """Let the disk have ``size`` bytes; what would show there is covered, and that is durable already."""
        await self._replace_header(self.header.with_size(size))
        self.size = self.header.image_size

    async def _replace_header(self, header: Header) -> None:
        await self._barriers.run(pwrite_all, self._fd, header.pack(), 0)
        await self._epochs.barrier()
        self.header = header
        self._tables.header_changed(header)

    async def change_backing(self, name: str, origin_size: int) -> None:
        """Let the backing file have another name: the source has moved. Raises ImageError if that has no room."""
        header, self.extension = await self._barriers.run(
            replace_backing, self._fd, self.header, self.extension, name, origin_size
        )
        self.header = header
        self._tables.header_changed(header)
        self.backing_name = name

    async def close(self) -> None:
        """Make everything durable, if that is still possible, and close the file."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self.read_only and not self.failed:
                await self.settle()
                await self._epochs.close()
                self.cut()
                if self._marks:
                    await self._barriers.run(self._marks.save)
        finally:
            await self._worker.close()
            await self._barriers.close()
            self._mapping.close()
            os.close(self._fd)


def _warm(fd: int, length: int, place: int) -> None:
    """Get a range into the page cache; EIO where the file ends before (*blocking*)."""
    for offset in range(place, place + length, _WARM_BYTES):
        pread_exact(fd, min(_WARM_BYTES, place + length - offset), offset)


def _write(fd: int, buffers: Sequence[Buffer], place: int, _generation: object) -> None:
    """Write, with a reference to the generation held even if nobody waits for it any more (*blocking*)."""
    pwritev_all(fd, buffers, place)


def _write_in_hole(fd: int, data: Buffer, offset: int, end: int) -> None:
    """Write, and see that the file reaches to ``end``: as a whole it lies in it before anything leads there."""
    pwrite_all(fd, data, offset)
    if os.fstat(fd).st_size < end:
        # No truncation: others make the file longer, too.
        pwrite_all(fd, b"\0", end - 1)


def _copy(fd: int, place: int, target: int, length: int) -> None:
    pwrite_all(fd, pread_exact(fd, length, place), target)
