"""Memory for the payloads of writes that the receive buffer does not hold."""

from __future__ import annotations

import mmap
from typing import Final

_SMALL: Final = 64 << 10
"""Bytes. Up to here memory is cheap, and an announcement costs no more than a receive buffer does."""

_POOLED: Final = 1 << 20
"""Bytes: what clients send at a time. Mapping and faulting it anew for every write halves the throughput."""

_MOST_IDLE: Final = 16
"""Memories that are kept for the next write: 16 MiB, shared by all connections."""


class PayloadMemory:
    """Gives memory for payloads, and takes it back.

    The kernel provides the pages of fresh memory when their first byte arrives: a client that announces 64 MiB and
    sends one byte costs a page.
    """

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []

    def take(self, length: int) -> memoryview:
        """Return ``length`` writable bytes, of any contents."""
        if length <= _SMALL:
            return memoryview(bytearray(length))
        if length > _POOLED:
            return memoryview(mmap.mmap(-1, length))
        memory = self._idle.pop() if self._idle else mmap.mmap(-1, _POOLED)
        return memoryview(memory)[:length]

    def give_back(self, payload: object) -> None:
        """Take back what nobody reads any more. What did not come from here is none of its business."""
        if not isinstance(payload, memoryview) or len(self._idle) >= _MOST_IDLE:
            return
        memory = payload.obj
        if isinstance(memory, mmap.mmap) and len(memory) == _POOLED:
            self._idle.append(memory)
