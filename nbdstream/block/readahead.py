"""Which ranges to read ahead for readers that go through a file in sequence.

The mapping turns the kernel's own read-ahead off, since that would stop the loop. Only reads that found
something missing come here: a reader that finds everything in memory needs no help.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_STREAMS = 16
_FIRST_WINDOW = 512 << 10
_LARGEST_WINDOW = 8 << 20
# A client with many requests in flight sends them nearly in sequence; so far off they still belong together.
_SLACK = 4 << 20


@dataclass(slots=True)
class _Stream:
    reached: int
    """Where the furthest read of the reader ended."""
    ahead: int
    """Up to where it was read ahead."""
    window: int


class ReadAhead:
    """Recognizes a few sequential readers at a time, whichever connection their requests come from."""

    def __init__(self, size: int, *, slack: int = _SLACK) -> None:
        """``size`` is the file's; reads that are no further apart than ``slack`` belong together. Bytes."""
        self._size = size
        self._slack = slack
        self._streams: deque[_Stream] = deque(maxlen=_STREAMS)

    def after(self, offset: int, length: int) -> tuple[int, int] | None:
        """Note a read that has to wait for the disk. Return (offset, length) of what to read ahead, if anything."""
        end = offset + length
        stream = next((s for s in self._streams if s.reached - self._slack <= offset <= s.ahead + self._slack), None)
        if stream is None:
            self._streams.append(_Stream(end, end, 0))
            return None
        if end <= stream.reached:
            return None  # back a little: nothing new to see
        stream.reached = end
        if stream.ahead - end > stream.window // 2:
            return None
        stream.window = min(max(_FIRST_WINDOW, stream.window * 2), _LARGEST_WINDOW)
        start, stream.ahead = max(end, stream.ahead), min(end + stream.window, self._size)
        return (start, stream.ahead - start) if stream.ahead > start else None
