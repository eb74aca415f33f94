"""How fast something grows: a counter, looked at now and then."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_WINDOW_SECONDS = 5.0
"""Long enough to even out bursts, short enough to follow a change."""
_STEP_SECONDS = 0.1


class RateMeter:
    """Growth per second over the last seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])

    def of(self, count: int) -> float:
        """Return how much a second the counter grew, which is at ``count`` now."""
        now = self._clock()
        samples = self._samples
        if now - samples[-1][0] > _STEP_SECONDS:
            samples.append((now, count))
        while len(samples) > 2 and now - samples[1][0] > _WINDOW_SECONDS:
            samples.popleft()
        since, before = samples[0]
        return (count - before) / (now - since) if now > since else 0.0
