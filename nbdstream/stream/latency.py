"""How long a guest's requests take, in our hands: from when they could be read from the socket to their replies.

Those that are answered at once, a hundred thousand a second, are not timed one by one. They take what the event loop
takes to come to them, and that is sampled with a timer. The others are few enough to be timed each.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING

from nbdstream.stream.snapshot import Latency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nbdstream.server.export import Export

_SHORTEST = 1e-6
_PER_DOUBLING = 4
"""Buckets: a percentile is right to a fifth."""
_BUCKETS = 30 * _PER_DOUBLING
"""From a microsecond to a quarter of an hour."""

_SAMPLE_SECONDS = 0.005
"""Between two looks at how late the loop is."""
_TIMER_SECONDS = 0.001
"""By which a timer of libuv may be late on a loop that is not: it counts milliseconds."""

LOOK_SECONDS = 0.5
_SHOWN_LOOKS = 10
"""What is shown is about the last five seconds."""


class Histogram:
    """Times, in buckets that grow by a fifth."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = [0.0] * _BUCKETS

    def add(self, seconds: float, weight: float = 1.0) -> None:
        """Count one."""
        bucket = int(math.log2(max(seconds, _SHORTEST) / _SHORTEST) * _PER_DOUBLING)
        self.counts[min(bucket, _BUCKETS - 1)] += weight

    def add_all(self, other: Histogram, weight: float = 1.0) -> None:
        """Count all of another one's."""
        self.counts = [mine + theirs * weight for mine, theirs in zip(self.counts, other.counts, strict=True)]

    @property
    def total(self) -> float:
        """How many there are."""
        return sum(self.counts)

    def percentile(self, share: float) -> float:
        """Return what a share of them does not exceed, in seconds: a bucket's upper edge; 0.0 if there are none."""
        left = self.total * share
        for bucket, count in enumerate(self.counts):
            left -= count
            if left <= 1e-9 and count:
                return float(_SHORTEST * 2 ** ((bucket + 1) / _PER_DOUBLING))
        return 0.0

    def summary(self) -> Latency:
        """Return what is shown of it."""
        return Latency(round(self.total), self.percentile(0.5), self.percentile(0.99))


class GuestLatency:
    """Watches the exports of a server for as long as it runs."""

    def __init__(self, exports: Iterable[Export], needed_source: Callable[[asyncio.Task[object]], bool]) -> None:
        """``needed_source`` tells of the task of a request whether it had to wait for the source."""
        self._exports = list(exports)
        self._needed_source = needed_source
        self._loop = asyncio.get_running_loop()
        self._timed = 0
        self._counted = 0
        self._lags = Histogram()
        self._local = Histogram()
        self._remote = Histogram()
        self._looks: deque[tuple[Histogram, Histogram]] = deque(maxlen=_SHOWN_LOOKS)
        self._due = 0.0
        self._idle = False
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def start(self, looked: Callable[[Latency], None]) -> None:
        """Begin to measure; ``looked`` is told twice a second of what the local requests took since."""
        self._looked = looked
        self._counted = sum(export.requests for export in self._exports)
        for export in self._exports:
            export.timed = self._answered
        self._sample_later()
        self._look_later()

    def stop(self) -> None:
        """Measure no more."""
        for export in self._exports:
            export.timed = None
        for timer in self._timers.values():
            timer.cancel()

    def _sample_later(self) -> None:
        self._due = self._loop.time() + _SAMPLE_SECONDS
        self._timers["sample"] = self._loop.call_later(_SAMPLE_SECONDS, self._sample)

    def _look_later(self) -> None:
        self._timers["look"] = self._loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        latency = self.look()
        self._looked(latency)
        self._look_later()
        if self._idle:
            self._stop_sampling()  # nobody asks for anything: let the process sleep
        elif "sample" not in self._timers:
            self._sample_later()

    def _sample(self) -> None:
        self._lags.add(self._loop.time() - self._due - _TIMER_SECONDS)
        self._sample_later()

    def _answered(self, seconds: float, task: asyncio.Task[object] | None) -> None:
        """Take the time of a request that was not answered at once."""
        self._timed += 1
        if task is not None and self._needed_source(task):
            self._remote.add(seconds)
        else:
            self._local.add(seconds)

    def _stop_sampling(self) -> None:
        if timer := self._timers.pop("sample", None):
            timer.cancel()

    def look(self) -> Latency:
        """Return what the local requests took since the last look."""
        counted = sum(export.requests for export in self._exports)
        self._idle = counted == self._counted and not self._timed
        at_once = max(0, counted - self._counted - self._timed)
        self._counted, self._timed = counted, 0
        local, lags = self._local, self._lags
        if at_once and (total := lags.total):
            local.add_all(lags, at_once / total)
        self._looks.append((local, self._remote))
        self._local, self._remote, self._lags = Histogram(), Histogram(), Histogram()
        return local.summary()

    @property
    def shown(self) -> tuple[Latency, Latency]:
        """Return what the local requests, and those that needed the source, took in the last seconds."""
        local, remote = Histogram(), Histogram()
        for each in self._looks:
            local.add_all(each[0])
            remote.add_all(each[1])
        return local.summary(), remote.summary()
