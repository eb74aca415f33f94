"""What the line to a source carries, learnt from the fetches themselves: how much has to be on its way to fill it."""

from __future__ import annotations

import math

_FIRST_BYTES = 2 << 20
"""To begin with, and after every loss. More would be a queue on a slow line, and be taken for the line's length; on a
fast one it becomes three times as much with every round trip."""

_LEAST_BYTES = 1 << 20
"""Below that every source and every disk has pauses between one request and the next."""

_QUEUE_SECONDS = 0.05
"""What is on its way beyond what the line itself holds. It evens out pauses of both ends and lets the estimate grow;
and it is what a guest's read waits longer where it has to share a connection."""

_WINDOW_SECONDS = 5.0
"""What a line did carry counts for once or twice so long."""


class Line:
    """The most that arrived a second, and the shortest time that a fetch took, lately."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything: it is another line."""
        self._rates = [0.0, 0.0]
        self._latency = math.inf
        self._turn_at = -math.inf

    def arrived(self, now: float, took: float, meanwhile: int) -> None:
        """Note a fetch that took ``took`` seconds, in which ``meanwhile`` bytes arrived, its own among them."""
        if took <= 0:
            return
        if now >= self._turn_at:
            self._rates = [0.0, self._rates[0]]
            self._turn_at = now + _WINDOW_SECONDS
        self._rates[0] = max(self._rates[0], meanwhile / took)
        self._latency = min(self._latency, took)

    @property
    def bytes_held(self) -> int:
        """How much the line itself holds, without any queue in front of it or behind it."""
        return self.bytes_within(0.0)

    def bytes_within(self, seconds: float) -> int:
        """How much arrives in so many seconds, or in the time of the quickest fetch if that is longer."""
        rate = max(self._rates)
        return int(rate * max(seconds, self._latency)) if rate else 0

    @property
    def bytes_to_fill(self) -> int:
        """How much has to be on its way."""
        rate = max(self._rates)
        if not rate:
            return _FIRST_BYTES
        return max(_LEAST_BYTES, int(rate * (self._latency + _QUEUE_SECONDS)))
