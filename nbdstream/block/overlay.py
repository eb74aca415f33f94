"""A QED image as a device, layered on what lies below it: the backing file, or a source that is streamed from.

This is the only place that knows which of the two answers for a cluster, and that merges a partial write with what
lies below. Everything that decides happens on the event loop, between two awaits; so "write if still
unallocated" is atomic without a lock. What must not happen at the same time in one cluster (two writes that both
allocate it, a discard during one) is kept apart by marking the cluster *busy*.
"""

from __future__ import annotations

import asyncio
import errno
import math
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING

from nbdstream.block.below import Below, remote_extent
from nbdstream.block.device import ZEROES, BlockDevice, Buffer, WriteDone, read_only_error, zero_buffers
from nbdstream.block.qed.tables import UNALLOCATED, ZERO
from nbdstream.block.qed.tidy import tidy
from nbdstream.extents import Extent, ExtentFlags, merge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bitarray import bitarray

    from nbdstream.block.below import Keeper
    from nbdstream.block.qed.image import QedImage

_EXTENTS_AT_ONCE = 1024
"""Extents that one call returns at most; a reply of more helps nobody, and the loop must not stand still."""

_MOST_TIDIED = 256 << 20
"""Bytes that are moved when an image is closed: a clean image is worth a second, not a minute."""

_FLUSHES_AGAIN_SECONDS = 0.5
"""For so long after a guest flushed, it is assumed to do so again."""

_CLUSTERS_AT_ONCE = 512
"""Clusters changed before others get a turn on the loop."""


class Overlay(BlockDevice):
    """A QED image over another device, or over nothing.

    Reads come from the image where it has a cluster, else from below, else they are zeroes. Writes go to the image.
    """

    preferred_block = 65536
    layered = True

    def __init__(self, image: QedImage, below: BlockDevice | None = None) -> None:
        self.image = image
        self.below = Below(below)
        """What lies below, and which clusters are remote."""
        self.size = image.size
        self.read_only = image.read_only
        self.preferred_block = min(image.cluster_size, 65536)
        self.zero: bitarray = image.zeroes if below is not None else image.zeroes | ~image.allocated
        """Opened for writing: the clusters that are known to read as zero and have no data."""
        self._cluster_size = image.cluster_size
        self.written: bitarray | None = None
        """While streaming: the clusters that the guest may have written (see :attr:`QedImage.written`)."""
        self._last_flushed = -math.inf
        self._busy: dict[int, asyncio.Future[None]] = {}

    # -- reading ----------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """Answer if all of it is local and in memory, or known to be zero."""
        cluster, within = divmod(offset, self._cluster_size)
        if within + length <= self._cluster_size:
            entry = self.image.entry_now(cluster)
            if entry and entry > ZERO:
                view = self.image.view_now(entry + within, length)
                return None if view is None else (view,)
            return self._read_cluster_now(cluster, within, length)
        buffers: list[Buffer] = []
        for cluster, within, count in self._pieces(offset, length):
            piece = self._read_cluster_now(cluster, within, count)
            if piece is None:
                return None
            buffers.extend(piece)
        return buffers

    def _read_cluster_now(self, cluster: int, within: int, length: int) -> Sequence[Buffer] | None:
        entry = self.image.entry_now(cluster)
        if entry is None:
            return None
        if entry > ZERO:
            view = self.image.view_now(entry + within, length)
            return None if view is None else (view,)
        if entry == ZERO or not self.below.has(cluster):
            return zero_buffers(length)
        return None

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Read; what is remote is kept, if somebody keeps it."""
        if self.below.keeper:
            self.below.keeper.want(offset, length)
        buffers: list[Buffer] = []
        end = offset + length
        while offset < end:
            entry, run = await self._run(offset, end - offset)
            if entry > ZERO:
                view = self.image.view_now(entry, run)  # what was fetched just now is in memory
                buffers.append(await self.image.view(entry, run) if view is None else view)
            elif entry == ZERO:
                buffers.extend(zero_buffers(run))
            elif keeper := self.below.keeper:
                run = min(run, self._cluster_size - offset % self._cluster_size)
                kept = await self._read_kept(keeper, offset, run)
                if kept is None:
                    continue
                buffers.extend(kept)
            else:
                buffers.extend(await self.below.read(offset, run))
            offset += run
        return buffers

    async def _read_kept(self, keeper: Keeper, offset: int, length: int) -> Sequence[Buffer] | None:
        """Read in a remote cluster, which becomes local; None if it is so by now, and to be read once more."""
        cluster, within = divmod(offset, self._cluster_size)
        if data := await keeper.read(cluster, within, length):
            return [data]
        await keeper.keep(cluster, cluster + 1)
        return await self.below.read(offset, length) if self.below.has(cluster) else None

    async def _run(self, offset: int, length: int) -> tuple[int, int]:
        """Return (where, bytes) of what begins at ``offset`` and lies together.

        *where* is an offset in the file, or ZERO, or UNALLOCATED for what is below.
        """
        cluster, within = divmod(offset, self._cluster_size)
        clusters = -(-(within + length) // self._cluster_size)
        entry, count = await self.image.run(cluster, clusters)
        if entry == UNALLOCATED:
            count = self.below.run(cluster, count)
            entry = UNALLOCATED if self.below.has(cluster) else ZERO
        where = entry + within if entry > ZERO else entry
        return where, min(length, count * self._cluster_size - within)

    # -- writing ----------------------------------------------------------------------------------------------

    def write_at_once(self, offset: int, data: Buffer) -> bool:
        """Take a write into one cluster that is allocated and linked, or of which everything else is zero."""
        cluster, within = divmod(offset, self._cluster_size)
        if within + len(data) > self._cluster_size or self.read_only:
            return False
        image = self.image
        entry = image.entry_now(cluster)
        if entry is None or cluster in self._busy:
            return False
        if entry > ZERO:
            if cluster in image.unlinked and cluster not in image.noted:
                return False
            if self.written is not None:
                self.written[cluster] = 1
            return image.prompt.write(data, entry + within)
        if entry == UNALLOCATED and self.below.has(cluster):
            return False
        self._mark_written(cluster, cluster + 1)
        if not image.write_new_at_once(cluster, within, data):
            return False
        self.zero[cluster] = 0
        return True

    def write_now(self, offset: int, data: Buffer, done: WriteDone) -> bool:
        """Take a write into clusters that are allocated, linked, and one behind the other."""
        start = position = -1
        image, written = self.image, self.written
        for cluster, within, count in self._pieces(offset, len(data)):
            entry = image.entry_now(cluster)
            if not entry or entry == ZERO or cluster in self._busy:
                return False
            if cluster in image.unlinked and cluster not in image.noted:
                return False
            if written is not None and not written[cluster]:
                written[cluster] = 1
            if start < 0:
                start = position = entry + within
            elif entry != position:
                return False
            position += count
        return image.write_now(start, data, done)

    async def write(self, offset: int, data: Buffer) -> None:
        """Write; returns when a kill -9 can lose nothing of it: the clusters are linked, or their links are noted."""
        if self.read_only:
            raise read_only_error()
        view = memoryview(data)
        safe = True
        while view:
            cluster, within = divmod(offset, self._cluster_size)
            whole = self._whole_clusters(offset, len(view))
            self._mark_written(cluster, cluster + (whole or 1))
            if whole:
                taken = await self._write_whole(cluster, whole, view)
            else:
                taken = min(len(view), self._cluster_size - within)
                await self._write_part(cluster, within, view[:taken])
            safe = self._make_safe(cluster, -(-taken // self._cluster_size)) and safe
            offset += taken
            view = view[taken:]
        if not safe:
            await self.image.linked()

    def _make_safe(self, cluster: int, count: int) -> bool:
        """Note those of these clusters that are not linked; return False if an epoch has to be waited for."""
        unlinked, noted = self.image.unlinked, self.image.noted
        missing = [c for c in range(cluster, cluster + count) if c in unlinked and c not in noted]
        return all(self.image.note(c) for c in missing)

    def _whole_clusters(self, offset: int, length: int) -> int:
        """Return how many clusters from ``offset`` on are covered; the last one of the device ends with it."""
        if offset % self._cluster_size:
            return 0
        if offset + length == self.size:
            return -(-length // self._cluster_size)
        return length // self._cluster_size

    async def _write_whole(self, cluster: int, count: int, data: memoryview) -> int:
        """Write some of ``count`` whole clusters, which ``data`` begins with; return how many bytes."""
        entry = await self._settled_entry(cluster)
        if entry > ZERO:
            taken = min(len(data), self._cluster_size)
            await self.image.write(entry, [data[:taken]])
            return taken
        free = self._unallocated_run(cluster, count)
        offset, got = self.image.allocate(cluster, free)
        taken = min(len(data), got * self._cluster_size)
        with self._mark_busy(cluster, got):
            await self._fill(offset, got, [data[:taken]])
            for index in range(got):
                await self._map(cluster + index, offset + index * self._cluster_size)
        return taken

    def _unallocated_run(self, cluster: int, count: int) -> int:
        """Return how many clusters, ``cluster`` among them, can be allocated together now."""
        for index in range(1, count):
            entry = self.image.entry_now(cluster + index)
            if entry is None or entry > ZERO or cluster + index in self._busy:
                return index
        return count

    async def _write_part(self, cluster: int, within: int, data: memoryview) -> None:
        """Write a part of one cluster; around it stays what was there, wherever that is."""
        while True:
            entry = await self._settled_entry(cluster)
            if entry > ZERO:
                await self.image.write(entry + within, [data])
                return
            start = cluster * self._cluster_size
            head, tail = (start, within), (start + within + len(data), self._cluster_size - within - len(data))
            if entry == UNALLOCATED and self.below.has(cluster):
                keeper = self.below.keeper
                whole: Buffer | None = None
                if keeper:
                    length = min(self._cluster_size, self.size - start)
                    keeper.want(start, length)
                    whole = await keeper.read(cluster, 0, length)
                around: list[Sequence[Buffer]]
                if whole:
                    around = [[whole[:within]], [whole[within + len(data) :]]]
                else:
                    if keeper:
                        await keeper.keep(cluster, cluster + 1)
                        if not self.below.has(cluster):
                            continue
                    around = [await self._edge_below(*head), await self._edge_below(*tail)]
                if cluster in self._busy or self.image.entry_now(cluster) != entry:
                    continue  # somebody allocated it while we read
            elif (place := self.image.allocate_untouched(cluster)) is not None:
                await self._fill_hole(cluster, place, within, data)
                return
            else:
                around = [zero_buffers(head[1]), zero_buffers(tail[1])]
            await self._allocate_part(cluster, [*around[0], data, *around[1]])
            return

    async def _edge_below(self, offset: int, length: int) -> Sequence[Buffer]:
        """Return what lies below beside a partial write; zeroes behind the end of the device."""
        inside = max(0, min(length, self.size - offset))
        buffers = await self.below.read(offset, inside) if inside else ()
        return [*buffers, *zero_buffers(length - inside)]

    async def _allocate_part(self, cluster: int, buffers: list[Buffer]) -> None:
        offset, _ = self.image.allocate(cluster, 1)
        with self._mark_busy(cluster, 1):
            await self._fill(offset, 1, buffers)
            await self._map(cluster, offset)

    async def _fill_hole(self, cluster: int, place: int, within: int, data: memoryview) -> None:
        with self._mark_busy(cluster, 1):
            try:
                await self.image.write_in_zeroes(place, within, data)
            except OSError:  # not if it was cancelled: the thread may be writing there
                self.image.release(place, 1)
                raise
            await self._map(cluster, place)

    async def _fill(self, offset: int, count: int, buffers: list[Buffer]) -> None:
        """Write newly allocated clusters whole, and give them back if that fails."""
        missing = count * self._cluster_size - sum(len(buffer) for buffer in buffers)
        try:
            await self.image.write(offset, [*buffers, *zero_buffers(missing)])
        except OSError:  # not if it was cancelled: the thread may be writing there
            self.image.release(offset, count)
            raise

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast_only: bool = False) -> None:
        """Make zero clusters; parts of clusters, and all of it if nothing may be unmapped, are written."""
        if self.read_only:
            raise read_only_error()
        if fast_only and (not may_unmap or self._whole_range(offset, length) != (offset, length)):
            raise OSError(errno.ENOTSUP, "only whole clusters are zeroed fast")
        start, whole = self._whole_range(offset, length) if may_unmap else (offset, 0)
        await self._write_zero_bytes(offset, start - offset)
        await self._zero_clusters(start, whole)
        await self._write_zero_bytes(start + whole, offset + length - start - whole)

    async def discard(self, offset: int, length: int) -> None:
        """Make zero clusters of whole ones (not unallocated ones: what is below would show); leave parts alone."""
        if self.read_only:
            raise read_only_error()
        await self._zero_clusters(*self._whole_range(offset, length))

    def _whole_range(self, offset: int, length: int) -> tuple[int, int]:
        """Return (offset, length) of the whole clusters in a range."""
        start = -(-offset // self._cluster_size) * self._cluster_size
        end = offset + length
        if end < self.size:
            end -= end % self._cluster_size
        return (start, end - start) if end > start else (min(start, offset + length), 0)

    async def _write_zero_bytes(self, offset: int, length: int) -> None:
        for position in range(offset, offset + length, len(ZEROES)):
            await self.write(position, ZEROES[: min(len(ZEROES), offset + length - position)])

    async def _zero_clusters(self, offset: int, length: int) -> None:
        if not length:
            return
        safe = True
        first, behind = offset // self._cluster_size, -(-(offset + length) // self._cluster_size)
        self._mark_written(first, behind)
        for cluster in range(first, behind):
            entry = await self._settled_entry(cluster)
            if entry > ZERO or (entry == UNALLOCATED and self.below.has(cluster)):
                await self._map(cluster, ZERO)
            # Somebody else may have made it a zero cluster, and still be waiting for its link.
            safe = self._make_safe(cluster, 1) and safe
            if (cluster - first) % _CLUSTERS_AT_ONCE == _CLUSTERS_AT_ONCE - 1:
                await asyncio.sleep(0)
        if not safe:
            await self.image.linked()

    async def _settled_entry(self, cluster: int) -> int:
        """Return the entry of a cluster that nobody is busy with; true until the next await."""
        while True:
            if busy := self._busy.get(cluster):
                await asyncio.shield(busy)
                continue
            entry = self.image.entry_now(cluster)
            if entry is not None:
                return entry
            await self.image.load_entry(cluster)

    async def _map(self, cluster: int, entry: int) -> None:
        """Let a cluster lead elsewhere from now on. No await happens once its present entry is known."""
        await self.image.room()
        while (present := self.image.entry_now(cluster)) is None:
            await self.image.load_entry(cluster)
        self.below.mark_local(cluster)
        self.zero[cluster] = entry == ZERO
        self.image.map(cluster, entry, replaced=present if present > ZERO else 0)

    def _mark_written(self, first: int, behind: int) -> None:
        """Note that the guest is about to write to clusters ``first .. behind-1``."""
        if self.written is not None:
            self.written[first:behind] = 1

    def hold(self, cluster: int) -> AbstractContextManager[None] | None:
        """Keep a cluster as it is until the context ends (see :class:`nbdstream.block.qed.tidy.Guard`)."""
        return None if cluster in self._busy else self._mark_busy(cluster, 1)

    @contextmanager
    def _mark_busy(self, cluster: int, count: int) -> Iterator[None]:
        """Keep everybody else from allocating or discarding these clusters."""
        free = asyncio.get_running_loop().create_future()
        clusters = range(cluster, cluster + count)
        self._busy.update(dict.fromkeys(clusters, free))
        try:
            yield
        finally:
            for each in clusters:
                del self._busy[each]
            free.set_result(None)

    async def flush(self) -> None:
        """Make every answered write durable."""
        self._last_flushed = asyncio.get_running_loop().time()
        await self.image.flush()

    @property
    def beside_flushes(self) -> bool:
        """Whether a guest is likely to flush soon: it did a moment ago."""
        return asyncio.get_running_loop().time() - self._last_flushed < _FLUSHES_AGAIN_SECONDS

    # -- streaming --------------------------------------------------------------------------------------------

    @property
    def hydrating(self) -> bool:
        """Whether somebody keeps what is fetched."""
        return self.below.keeper is not None

    def begin_streaming(self, keeper: Keeper) -> None:
        """Take all that is unallocated to be remote, and have ``keeper`` keep what is read of it."""
        self.below.begin_streaming(~self.image.allocated, keeper)
        self.written = self.image.written

    def adopt(self, cluster: int, place: int, count: int, zero: int) -> None:
        """Take over fetched clusters: those only that are still remote.

        They lie one behind the other at ``place`` in the file, but for those whose bit is set in ``zero`` (bit i: the
        i-th): these were all zero and not written. What is not needed is given back to the image.
        """
        remote = self.below.remote
        for index in range(count):
            wanted = remote is not None and remote[cluster + index]
            stored = wanted and not zero >> index & 1
            if wanted:
                self.below.mark_local(cluster + index)
                self.zero[cluster + index] = not stored
                self.image.map(cluster + index, place if stored else ZERO)
            if not stored:
                self.image.release(place, 1)
            place += self._cluster_size

    def reads_zero(self, first: int, behind: int) -> None:
        """Note that the source says these clusters read as zero: they need not be fetched, nor allocated."""
        if self.below.remote is not None:
            self.zero[first:behind] |= self.below.remote[first:behind]
            self.below.mark_zero(first, behind)

    def become_independent(self) -> None:
        """Forget what is below. No cluster is remote any more."""
        self.below.forget()
        self.written = None

    # -- describing -------------------------------------------------------------------------------------------

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Describe the range; a cluster that is still remote is described without asking the source."""
        found: list[Extent] = []
        end = offset + length
        while offset < end and len(found) < _EXTENTS_AT_ONCE:
            found.extend(await self._extents_of_run(offset, end - offset))
            offset = found[-1].end
        return list(merge(found))

    async def _extents_of_run(self, offset: int, length: int) -> list[Extent]:
        cluster, within = divmod(offset, self._cluster_size)
        entry, count = await self.image.run(cluster, -(-(within + length) // self._cluster_size))
        unallocated = entry == UNALLOCATED
        if unallocated:
            count = self.below.run(cluster, count)
        length = min(length, count * self._cluster_size - within)
        if entry > ZERO:
            return [Extent(offset, length, ExtentFlags.DATA)]
        if unallocated and self._misses_backing:
            return [remote_extent(offset, length)]
        if unallocated and self.below.has(cluster):
            return await self.below.extents(offset, length)
        return [Extent(offset, length, ExtentFlags.HOLE | ExtentFlags.ZERO, depth=0 if unallocated else 1)]

    @property
    def _misses_backing(self) -> bool:
        """Whether the image has a backing file that was not opened: what is there can be described, not read."""
        return self.below.device is None and self.below.remote is None and self.image.backing_name is not None

    async def close(self) -> None:
        """Close the image, and what is below. A clean end leaves no leaks, unless there is much to move for that."""
        image = self.image
        if not self.read_only and not image.failed and sum(run for _, run in image.free_runs) <= _MOST_TIDIED:
            with suppress(OSError):  # a full disk; leaks do no harm
                await tidy(image, self, fill=self.below.device is None and not self._misses_backing)
        await image.close()
        await self.below.close()

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Split a range at the cluster boundaries: (cluster, offset within it, bytes)."""
        cluster, within = divmod(offset, self._cluster_size)
        while length:
            count = min(length, self._cluster_size - within)
            yield cluster, within, count
            length -= count
            cluster, within = cluster + 1, 0
