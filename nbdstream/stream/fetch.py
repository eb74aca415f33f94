"""The one table of fetches in flight: whoever needs a cluster that is being fetched joins, nobody fetches it twice.

A fetch copies remote clusters from the source into new clusters of the image, and lets the overlay adopt those that
are still remote then. What the guest wrote meanwhile went elsewhere and is not touched.
"""

from __future__ import annotations

import asyncio
import errno
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from nbdstream.block.readahead import ReadAhead
from nbdstream.stream.line import Line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nbdstream.block.device import Buffer
    from nbdstream.block.overlay import Overlay
    from nbdstream.stream.source import Request, Source

_LONGEST_FETCH = 1 << 20
"""Bytes that one fetch asks for at most: a guest's read waits behind those that are on the line."""

_MOST_ALONG = 1 << 20
"""Bytes that all the reads which somebody waits for bring along together: each of them waits for the others', too."""

_SMALL_PART = 8
"""An eighth of a fetch, or less, is copied for who reads it: else all of it is in memory until a client takes that."""

_SLACK = 256 << 10
"""Bytes: readers whose requests are further apart than that do not read in sequence, as far as a line is concerned."""


class Fetch:
    """Clusters ``first .. behind-1`` on their way to ``place`` in the file."""

    __slots__ = (
        "began", "behind", "data", "fetched_before", "first", "length", "place", "readers", "request", "stored",
        "waiters",
    )  # fmt: skip

    request: Request
    """As long as it is in flight."""
    began: float
    """By the loop's clock."""
    fetched_before: int
    """What had been fetched then, of anything."""

    def __init__(self, first: int, behind: int, place: int, length: int) -> None:
        self.first = first
        self.behind = behind
        self.place = place
        self.length = length
        self.stored = False
        """Whether any of it was written to the file: it is there, and not all zero."""
        self.waiters: list[asyncio.Future[OSError | None]] = []
        """Who needs it in the file."""
        self.readers: list[asyncio.Future[None]] = []
        """Who needs its bytes."""
        self.data: memoryview | None = None
        """They are there, though not in the file yet."""


class Fetches:
    """Fetches remote clusters of one overlay. It is the overlay's :class:`~nbdstream.block.below.Keeper`."""

    def __init__(self, overlay: Overlay, source: Source) -> None:
        self._overlay = overlay
        self._image = overlay.image
        self._source = source
        self._cluster_size = overlay.image.cluster_size
        self._loop = asyncio.get_running_loop()
        self._in_flight: dict[int, Fetch] = {}
        self._ahead = ReadAhead(overlay.size, slack=_SLACK)
        self.bytes_in_flight = 0
        self.waited: WeakSet[asyncio.Task[Any]] = WeakSet()
        """The tasks that had to wait for a fetch."""
        self.along: Callable[[], int] | None = None
        """Returns how many bytes a guest's read may bring along: what follows in the disk."""
        self.line = Line()
        self.waiting = 0
        """How many wait for a fetch now."""
        self.last_wanted = -math.inf
        """When somebody last had to wait for a fetch, by the loop's clock."""
        self.bytes_fetched = 0
        """What came over the connection, in bytes."""
        self.on_finished: Callable[[Fetch, OSError | None], None] = lambda _fetch, _error: None
        """Called when a fetch ended, with what went wrong."""

    def want(self, offset: int, length: int) -> None:
        """Have what is remote in this range on its way, ahead of all that nobody waits for."""
        first, behind = offset // self._cluster_size, -(-(offset + length) // self._cluster_size)
        if not self._is_remote(first, behind):
            return
        self._read_ahead(first, behind)
        if length < self._cluster_size and behind == first + 1 and first not in self._in_flight:
            self.begin(first, 1 + self._clusters_along(), urgent=True)
            return
        for fetch in self._needed(first, behind):
            self._source.hurry(fetch.request)

    def _clusters_along(self) -> int:
        """Return how many clusters a guest's read may bring along: none for a partial write, which needs all of one."""
        if not self.along:
            return 0
        return min(self.along(), _MOST_ALONG // (self.waiting + 1)) // self._cluster_size

    async def read(self, cluster: int, within: int, length: int) -> Buffer | None:
        """Return bytes of a remote cluster that is wanted as soon as they are there, which is before it is kept.

        None if it is local, or its bytes cannot be had so: :meth:`keep` says then what is wrong, if anything.
        """
        fetch = self._in_flight.get(cluster)
        if fetch is None:
            return None
        if fetch.data is None:
            arrival: asyncio.Future[None] = self._loop.create_future()
            fetch.readers.append(arrival)
            with self._somebody_waits():
                await arrival
        start = (cluster - fetch.first) * self._cluster_size + within
        # What the guest was told is written meanwhile is what it reads, though the old bytes would be allowed, too.
        if fetch.data is None or start + length > fetch.length or not self._overlay.below.has(cluster):
            return None
        data = fetch.data[start : start + length]
        return bytes(data) if length <= fetch.length // _SMALL_PART else data

    async def keep(self, first: int, behind: int) -> None:
        """Make clusters local for somebody who waits. Returns without, where the disk is full.

        Raises OSError if the source answers with an error, or is away for too long.
        """
        if self._is_remote(first, behind):
            self._read_ahead(first, behind)
        while waiting := [self._join(fetch) for fetch in self._needed(first, behind)]:
            with self._somebody_waits():
                errors = await asyncio.gather(*waiting)
            if any(error is not None and error.errno == errno.ECONNRESET for error in errors):
                continue  # nobody had waited for it when the source was lost: ask as somebody who does
            for error in errors:
                if error is not None and error.errno != errno.ENOSPC and self._is_remote(first, behind):
                    raise OSError(error.errno, error.strerror)
            return

    @contextmanager
    def _somebody_waits(self) -> Iterator[None]:
        self.last_wanted = self._loop.time()
        if task := asyncio.current_task():
            self.waited.add(task)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def _is_remote(self, first: int, behind: int) -> bool:
        remote = self._overlay.below.remote
        return remote is not None and remote.find(1, first, behind) >= 0

    def _needed(self, first: int, behind: int) -> list[Fetch]:
        """Return the fetches that together make these clusters local, begun where there was none."""
        needed: list[Fetch] = []
        remote = self._overlay.below.remote
        while remote is not None and (first := remote.find(1, first, behind)) >= 0:
            fetch = self._in_flight.get(first) or self.begin(first, behind - first, urgent=True)
            needed.append(fetch)
            first = fetch.behind
        return needed

    def _read_ahead(self, first: int, behind: int) -> None:
        """Have what a sequential reader is going to want next on its way, if the source is there."""
        ahead = self._ahead.after(first * self._cluster_size, (behind - first) * self._cluster_size)
        remote = self._overlay.below.remote
        if ahead is None or remote is None or not self._source.connected:
            return
        first, behind = ahead[0] // self._cluster_size, -(-(ahead[0] + ahead[1]) // self._cluster_size)
        behind = min(behind, first + (self._source.memory_for_bulk - self.bytes_in_flight) // self._cluster_size)
        while first < behind and (first := remote.find(1, first, behind)) >= 0:
            first = first + 1 if first in self._in_flight else self.begin(first, behind - first).behind

    def _join(self, fetch: Fetch) -> asyncio.Future[OSError | None]:
        waiter: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
        fetch.waiters.append(waiter)
        self._source.hurry(fetch.request)
        return waiter

    def is_in_flight(self, cluster: int) -> bool:
        """Whether a cluster is being fetched."""
        return cluster in self._in_flight

    @property
    def in_flight_clusters(self) -> list[int]:
        """Which clusters are being fetched, sorted."""
        return sorted(self._in_flight)

    def begin(self, first: int, most: int, *, urgent: bool = False) -> Fetch:
        """Begin to fetch ``first``, which is remote and not in flight, with the like behind it: ``most`` at most."""
        count = self._run(first, min(most, max(1, _LONGEST_FETCH // self._cluster_size)))
        place, count = self._image.allocate(first, count)
        offset = first * self._cluster_size
        length = max(0, min(count * self._cluster_size, self._source.size - offset))
        fetch = Fetch(first, first + count, place, length)
        fetch.began, fetch.fetched_before = self._loop.time(), self.bytes_fetched
        self._in_flight.update(dict.fromkeys(range(first, fetch.behind), fetch))
        self.bytes_in_flight += length
        fetch.request = self._source.copy_soon(
            offset,
            length,
            self._image.fd,
            place,
            lambda zero, error: self._copied(fetch, zero, error),
            zero_unit=self._cluster_size,
            short_writes=self._overlay.beside_flushes,
            urgent=urgent,
            wanted=lambda: urgent or bool(fetch.waiters or fetch.readers),
            arrived=lambda data, _error: self._arrived(fetch, data),
        )
        return fetch

    def _run(self, first: int, most: int) -> int:
        """Return how many clusters from ``first`` on are remote and not in flight."""
        remote = self._overlay.below.remote
        assert remote is not None
        local = remote.find(0, first, first + most)
        behind = min(first + most, len(remote)) if local < 0 else local
        return next((c - first for c in range(first + 1, behind) if c in self._in_flight), behind - first)

    def _arrived(self, fetch: Fetch, data: memoryview | None) -> None:
        fetch.data = data
        for reader in fetch.readers:
            if not reader.done():
                reader.set_result(None)

    def _copied(self, fetch: Fetch, zero: int | None, error: OSError | None) -> None:
        if error is None and zero is not None:
            self.bytes_fetched += fetch.length
            now = self._loop.time()
            self.line.arrived(now, now - fetch.began, self.bytes_fetched - fetch.fetched_before)
            missing = (fetch.behind - fetch.first) * self._cluster_size - fetch.length
            if missing:  # the last cluster of a disk that ends within it: a cluster lies in the file as a whole
                if not self._image.write_now(
                    fetch.place + fetch.length, bytes(missing), lambda failed: self._store(fetch, zero, failed)
                ):
                    self._store(fetch, 0, self._image.failed)
                return
        self._store(fetch, zero or 0, error)

    def _store(self, fetch: Fetch, zero: int, error: OSError | None) -> None:
        for cluster in range(fetch.first, fetch.behind):
            del self._in_flight[cluster]
        del fetch.request  # it refers to the fetch: both would wait for the garbage collector
        self.bytes_in_flight -= fetch.length
        count = fetch.behind - fetch.first
        try:
            if error is None:
                fetch.stored = zero != (1 << count) - 1
                self._overlay.adopt(fetch.first, fetch.place, count, zero)
            else:
                self._image.release(fetch.place, count)
        finally:  # whatever happens, nobody waits for ever
            for waiter in fetch.waiters:
                if not waiter.done():
                    waiter.set_result(error)
            if fetch.data is None:
                self._arrived(fetch, None)
            self.on_finished(fetch, error)
