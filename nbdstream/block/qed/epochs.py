"""Data before metadata: how links to clusters get into the file.

A *link* is an L2 entry that leads to a cluster. An epoch takes all links that were asked for since the last one began
(their data is written already, though not durable), and

1. writes whole new L2 tables, which nothing refers to yet,
2. makes everything so far durable with one ``fdatasync``, the *barrier*,
3. writes the links into the page cache.

The next barrier makes those links durable. So no link can reach the disk before what it leads to, in whatever
order the kernel writes back, and a power cut leaves leaked clusters at worst. All that wait, share: a write waits for
the end of its epoch, a flush for the barrier behind it. With a :class:`~nbdstream.block.qed.record.Record` a write
does not even wait: its link is noted there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.block.prompt import PromptWriter
    from nbdstream.block.qed.record import Record
    from nbdstream.block.qed.space import Space
    from nbdstream.block.qed.tables import Tables
    from nbdstream.block.worker import Worker

log = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")

_NOTED_SECONDS = 1.0
"""How long a link may be noted only: a stranger who opens the image after a kill -9 does not know the record."""

_NOTED_SECONDS_BUSY = 5.0
"""The same where barriers take long (ext4 commits as often)."""

_BARRIER_SHARE = 5
"""Links that are noted only make barriers of at most a fifth of the time. While one runs, writes have to wait for the
journal, and the disk for what later writes to the same pages would have saved it."""


class Epochs:
    """The links of one image that are on their way into its file."""

    def __init__(
        self,
        fd: int,
        tables: Tables,
        space: Space,
        table_clusters: int,
        worker: Worker,
        recycle: Callable[[list[int]], None],
        record: Record | None,
        prompt: PromptWriter,
    ) -> None:
        """``worker`` must be this object's alone: barriers take long.

        ``recycle`` is called with the clusters that were replaced, once that is durable.
        """
        self._fd = fd
        self._tables = tables
        self._space = space
        self._table_clusters = table_clusters
        self._worker = worker
        self._recycle = recycle
        self._record = record
        self._prompt = prompt
        self._timer: asyncio.TimerHandle | None = None
        self._barrier_seconds = 0.0
        self._lost: OSError | None = None  # the thread's own: it knows of a failed barrier before the loop does
        self._queue: list[tuple[int, int]] = []
        self._replaced: list[int] = []
        self._replaced_by_links_not_durable: list[int] = []
        self._linkers: list[asyncio.Future[None]] = []
        self._flushers: list[asyncio.Future[None]] = []
        self._reserved: dict[int, int] = {}
        self._nudged = False
        self._running: asyncio.Task[None] | None = None
        self.unlinked: dict[int, int] = {}
        """Cluster to L2 entry, for every link that the tables in the file do not hold yet."""
        self.noted: set[int] = set()
        """Those of them that are safe from a kill -9 all the same."""
        self.failed: OSError | None = None
        """Why the first failed barrier failed. After it nothing is ever linked again: what the kernel
        still has of the unwritten pages, nobody knows."""

    def add(self, cluster: int, entry: int, replaced: int = 0) -> None:
        """Queue a link for the next epoch. ``replaced`` is the data cluster that nothing leads to any more, if any."""
        self._queue.append((cluster, entry))
        self.unlinked[cluster] = entry
        self.noted.discard(cluster)
        if replaced:
            self._replaced.append(replaced)

    async def room(self) -> None:
        """Wait until the record has room for one more link. Raises OSError."""
        while self._record and self._record.full:
            await self.linked()

    def note(self, cluster: int) -> bool:
        """Make a link that is queued safe from a kill -9 at once, or return False: then only an epoch does.

        What is noted must be noted for every later link of the same cluster, so :meth:`room` is waited for first.
        """
        if not self._record or not self.can_note(cluster):
            return False
        self._record.note(cluster, self.unlinked[cluster])
        self.noted.add(cluster)
        if not self._timer:
            delay = min(max(_NOTED_SECONDS, self._barrier_seconds * (_BARRIER_SHARE - 1)), _NOTED_SECONDS_BUSY)
            self._timer = asyncio.get_running_loop().call_later(delay, self._link_noted)
        return True

    def can_note(self, cluster: int) -> bool:
        """Whether :meth:`note` would make a link to ``cluster`` safe."""
        if not self._record or self._record.full or self._record.gone or self.failed:
            return False
        # Without a table it needs a new one, and only an epoch finds out whether there is room for that.
        return bool(self._tables.l1[self._tables.l1_index(cluster)])

    def _link_noted(self) -> None:
        self._timer = None
        if self.noted:
            self.nudge()

    def reserve_table(self, cluster: int) -> None:
        """Set the place of the L2 table aside that a link to ``cluster`` will need, if there is none yet.

        Called before the cluster's data gets its place, so that tables lie in front of their data: what is
        at the end of the file can then be moved, and the file cut.
        """
        index = self._tables.l1_index(cluster)
        if not self._tables.l1[index] and index not in self._reserved:
            self._reserved[index] = self._space.append(self._table_clusters)

    def release_reserved(self) -> None:
        """Give back the tables that were set aside and not needed yet."""
        while self._reserved and not self._running:
            self._space.release(self._reserved.popitem()[1], self._table_clusters)

    @property
    def backlog(self) -> int:
        """How many links wait for an epoch to begin."""
        return len(self._queue)

    async def linked(self) -> None:
        """Wait until every link queued before is in the page cache, its data durable. Raises OSError."""
        await self._join(self._linkers)

    async def flush(self) -> None:
        """Wait until everything that was answered before is durable: at most two barriers. Raises OSError.

        Links that are queued and not noted are nobody's yet: such a write is answered only when it is linked.
        """
        record = self._record
        # What the running epoch links, the next barrier makes durable; what was noted since then is linked first.
        if record and (record.fresh or not (record.empty or self._running)):
            await self.linked()
        await self._join(self._flushers)

    def nudge(self) -> None:
        """Have an epoch run as soon as possible, without waiting for it."""
        if not self.failed:
            self._nudged = True
            self._start()

    async def barrier(self) -> None:
        """Make durable what was written to the file itself, as a header is. Raises OSError; that is final, as ever."""
        if self.failed:
            raise _final(self.failed)
        try:
            await self._barrier(self._sync)
        except OSError as error:
            self._fail(error, [])
            raise _final(error) from error

    async def close(self) -> None:
        """Wait for the epoch that runs. The record goes if nothing depends on it."""
        if self._timer:
            self._timer.cancel()
        if self._running:
            await self._running
        if self._record and self._record.empty:
            self._record.close()

    async def _join(self, waiters: list[asyncio.Future[None]]) -> None:
        if self.failed:
            raise _final(self.failed)
        waiter = asyncio.get_running_loop().create_future()
        waiters.append(waiter)
        self._start()
        await waiter

    def _start(self) -> None:
        if not self._running:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Run epochs as long as anybody asks for them."""
        try:
            while (self._linkers or self._flushers or self._nudged) and not self.failed:
                await asyncio.sleep(0)  # those who ask in the same iteration of the loop share the barrier
                await self._epoch()
        finally:
            self._running = None

    async def _epoch(self) -> None:
        queue, self._queue = self._queue, []
        replaced, self._replaced = self._replaced, []
        # _join holds on to these lists: they are emptied, not exchanged.
        linkers, flushers = self._linkers.copy(), self._flushers.copy()
        self._linkers.clear()
        self._flushers.clear()
        self._nudged = False
        half = self._record.begin_epoch() if self._record else 0
        try:
            tables = await self._write_new_tables(queue)
        except OSError as error:  # a full disk
            _reject(linkers, error)
            queue, linkers, tables = self._postpone(queue), [], {}
        try:
            await self._barrier(self._sync_and_link, tables, queue)
            self._recycle_durably(replaced)
            self._linked(tables, queue)
            if self._record:
                self._record.clear(half)
            _resolve(flushers + linkers)
        except OSError as error:
            self._fail(error, linkers + flushers)

    async def _barrier(self, call: Callable[[*Ts], None], *args: *Ts) -> None:
        """Have the thread call what makes durable all that was written before."""
        begun = time.monotonic()
        self._prompt.held += 1
        try:
            await self._worker.run(call, *args)
        finally:
            self._prompt.held -= 1
            self._barrier_seconds = time.monotonic() - begun

    def _sync(self) -> None:
        """Pass the barrier, or fail as one before did (*blocking*): the kernel tells of what it lost only once."""
        if self._lost:
            raise self._lost
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._lost = error
            raise

    def _sync_and_link(self, tables: dict[int, int], links: list[tuple[int, int]]) -> None:
        """Pass the barrier and write the links (*blocking*). To hop to the loop between takes as long as that."""
        self._sync()
        self._tables.link(tables, links)

    async def _write_new_tables(self, queue: list[tuple[int, int]]) -> dict[int, int]:
        """Return the L2 tables that these links need and that did not exist: L1 index to file offset."""
        l1, index_of = self._tables.l1, self._tables.l1_index
        needed = {index_of(cluster): cluster for cluster, _ in queue}
        missing = sorted(index for index in needed if not l1[index])
        for index in missing:
            self.reserve_table(needed[index])
        tables = {index: self._reserved[index] for index in missing}
        if tables:
            await self._worker.run(self._tables.write_new_tables, tables, queue)
        return tables

    def _postpone(self, queue: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Queue those links again that need a new table, and return the others.

        What was noted is among the others always, so a flush keeps its word on a full disk, too.
        """
        l1, index_of = self._tables.l1, self._tables.l1_index
        self._queue[:0] = [link for link in queue if not l1[index_of(link[0])]]
        return [link for link in queue if l1[index_of(link[0])]]

    def _recycle_durably(self, replaced: list[int]) -> None:
        """Give back what the *last* epoch's links replaced: the barrier just passed made those links durable."""
        earlier, self._replaced_by_links_not_durable = self._replaced_by_links_not_durable, replaced
        if earlier:
            self._recycle(earlier)

    def _linked(self, tables: dict[int, int], queue: list[tuple[int, int]]) -> None:
        self._tables.linked(tables, queue)
        for index in tables:
            del self._reserved[index]
        unlinked = self.unlinked
        for cluster, entry in dict(queue).items():  # the last link of each cluster is what the file has now
            if unlinked.get(cluster) == entry:
                del unlinked[cluster]
                self.noted.discard(cluster)

    def _fail(self, error: OSError, waiters: list[asyncio.Future[None]]) -> None:
        self.failed = error
        self._prompt.held += 1  # for ever
        log.critical("the image cannot be made durable (%s): nothing more will be linked to it", error)
        _reject([*waiters, *self._linkers, *self._flushers], _final(error))
        self._linkers.clear()
        self._flushers.clear()


def _resolve(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


def _reject(waiters: list[asyncio.Future[None]], error: OSError) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_exception(OSError(error.errno, error.strerror))


def _final(error: OSError) -> OSError:
    return OSError(errno.EIO, f"the image could not be made durable: {error.strerror}")
