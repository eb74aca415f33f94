"""A rate limit that can be changed while it works: a token bucket over a clock that tests can turn."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_BURST_SECONDS = 0.1
"""What may go at once after a pause: enough for timers' jitter, too little to be felt."""


class Throttle:
    """Says when the next bytes may go. It goes into debt, so a request larger than the bucket is only late."""

    def __init__(self, rate: int | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``rate`` is in bytes a second; None does not limit."""
        self._clock = clock
        self._rate = rate
        self._cap: float | None = None
        self._level = 0.0
        self._at = clock()

    @property
    def rate(self) -> int | None:
        """Bytes a second, None for no limit."""
        return self._rate

    @rate.setter
    def rate(self, rate: int | None) -> None:
        self._refill()
        self._rate = rate
        self._level = min(self._level, 0.0)

    @property
    def cap(self) -> float | None:
        """A second limit in bytes a second, for whoever adjusts it all the time; None for none."""
        return self._cap

    @cap.setter
    def cap(self, cap: float | None) -> None:
        if cap != self._cap:
            self._refill()
            self._cap = cap

    @property
    def limits(self) -> bool:
        """Whether there is any limit."""
        return self._effective is not None

    @property
    def _effective(self) -> float | None:
        if self._rate is None or self._cap is None:
            return self._cap if self._rate is None else self._rate
        return min(self._rate, self._cap)

    def delay(self) -> float:
        """Return for how many seconds nothing may go; 0.0 if something may go now."""
        rate = self._effective
        if rate is None:
            return 0.0
        self._refill()
        return max(0.0, -self._level / rate)

    def spend(self, length: int) -> None:
        """Say that ``length`` bytes go now."""
        if self._effective is not None:
            self._refill()
            self._level -= length

    def _refill(self) -> None:
        now = self._clock()
        rate = self._effective
        if rate is not None:
            self._level = min(rate * _BURST_SECONDS, self._level + (now - self._at) * rate)
        self._at = now
