"""The ways in which a stream of bytes may arrive, all of which must come to the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def ways_to_cut(seed: int, stream: bytes) -> Iterator[Iterator[bytes]]:
    """Give the stream whole, byte by byte, and in portions that grow and shrink with ``seed``."""
    yield iter([stream])
    yield (stream[at : at + 1] for at in range(len(stream)))
    yield _uneven(seed, stream)


def _uneven(seed: int, stream: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(stream):
        seed = (seed * 137 + 57) & 0xFFFF
        length = 1 + (seed >> 8) % 48
        yield stream[at : at + length]
        at += length
