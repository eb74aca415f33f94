from __future__ import annotations

import errno
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.block.remote.commands import Alignment, BufferPool, Piece, Read, Status, data_runs, extents_of, zero_mask
from nbdstream.extents import Extent, ExtentFlags


def pieces_of(offset: int, length: int, alignment: Alignment) -> list[tuple[int, int]]:
    pieces: list[Piece] = Read(offset, length, lambda *_: None, urgent=False).cut(alignment)
    return [(piece.offset, piece.length) for piece in pieces]


def test_a_request_within_the_limits_is_one_piece() -> None:
    assert pieces_of(5, 7, Alignment(100, 1, 32)) == [(5, 7)]


def test_a_request_is_widened_to_the_alignment_but_not_beyond_the_end() -> None:
    assert pieces_of(5, 7, Alignment(100, 8, 32)) == [(0, 16)]
    assert pieces_of(95, 5, Alignment(100, 8, 32)) == [(88, 12)]


def test_a_long_request_is_cut() -> None:
    assert pieces_of(9, 60, Alignment(100, 8, 32)) == [(8, 32), (40, 32)]


def test_a_status_request_is_one_piece_however_long() -> None:
    command = Status(0, 1 << 40, lambda *_: None)
    assert [(piece.offset, piece.length) for piece in command.cut(Alignment(1 << 40, 512, 4096))] == [(0, 1 << 30)]


@given(st.lists(st.sampled_from([b"\0" * 8, b"\0\0\0\0\0\0\0\1", b"abcdefgh"]), min_size=1), st.integers(0, 16))
def test_the_zero_mask_names_the_zero_units(units: list[bytes], tail: int) -> None:
    data = b"".join(units)[: len(units) * 8 - tail % 8]
    buffer = bytearray(b"xxx" + data + bytes(20))  # what is behind the range is no part of the last unit
    expected = sum(1 << i for i in range(len(units)) if not any(data[i * 8 : i * 8 + 8]))
    assert zero_mask(buffer, 3, len(data), 8) == expected


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_data_runs_hold_what_the_mask_leaves_out(length: int, unit: int, data: st.DataObject) -> None:
    mask = data.draw(st.integers(0, (1 << -(-length // unit)) - 1))
    runs = data_runs(mask, length, unit)
    kept = {position for begin, end in runs for position in range(begin, end)}
    assert kept == {position for position in range(length) if not mask >> position // unit & 1}
    assert all(one[1] < other[0] for one, other in itertools.pairwise(runs))


def test_buffers_are_used_again() -> None:
    pool = BufferPool(1 << 20)
    buffer = pool.take(100_000)
    pool.give(buffer)
    assert pool.take(120_000) is buffer
    assert pool.take(120_000) is not buffer


@given(st.integers(1, 32 << 20))
def test_a_buffer_is_long_enough(length: int) -> None:
    assert length <= len(BufferPool(1 << 20).take(length)) <= max(2 * length, 65536)


def test_memory_is_bounded_and_a_lone_long_buffer_may_exceed_it() -> None:
    pool = BufferPool(8 << 20)
    assert pool.reserve(32 << 20)
    assert not pool.reserve(65536)
    pool.release(32 << 20)
    assert pool.reserve(6 << 20, share=0.75)
    assert not pool.reserve(1 << 20, share=0.75)
    assert pool.reserve(2 << 20)
    assert not pool.reserve(65536)


def test_buffers_that_wait_for_use_count_too() -> None:
    pool = BufferPool(4 << 20)
    for size in (1 << 20, 256 << 10, 1 << 20, 64 << 10):
        most = (4 << 20) // size
        assert all(pool.reserve(size) for _ in range(most))
        buffers = [pool.take(size) for _ in range(most)]
        assert sum(map(len, buffers)) + pool._free_bytes <= 4 << 20
        for buffer in buffers:
            pool.give(buffer)
            pool.release(size)
        assert pool._free_bytes == 4 << 20


DATA, HOLE, ZERO = ExtentFlags.DATA, ExtentFlags.HOLE, ExtentFlags.ZERO


def test_extents_are_those_that_the_server_named() -> None:
    assert extents_of([10, 0, 20, 3, 5, 2], 100, 100, 35) == [
        Extent(100, 10, DATA),
        Extent(110, 20, HOLE | ZERO),
        Extent(130, 5, ZERO),
    ]


def test_extents_are_cut_to_what_was_asked() -> None:
    assert extents_of([10, 0, 4000, 1], 96, 100, 35) == [Extent(100, 6, DATA), Extent(106, 29, HOLE)]


def test_fewer_extents_than_asked_for_are_fine() -> None:
    assert extents_of([10, 0], 100, 100, 4000) == [Extent(100, 10, DATA)]


def test_neighbours_in_one_state_are_one_extent() -> None:
    assert extents_of([10, 0, 10, 0x80000000], 0, 0, 20) == [Extent(0, 20, DATA)]


@pytest.mark.parametrize("answer", [[], [7], [0, 0, 10, 0], [4, 0]])
def test_an_answer_that_describes_nothing_is_an_error(answer: list[int]) -> None:
    with pytest.raises(OSError, match="the source describes") as caught:
        extents_of(answer, 96, 100, 50)
    assert caught.value.errno == errno.EIO


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=12),
    st.integers(0, 1 << 20),
    st.integers(0, 65535),
    st.integers(1, 999),
)
def test_whatever_a_server_answers_the_extents_lie_in_the_range(
    answer: list[int], start: int, skipped: int, length: int
) -> None:
    try:
        extents = extents_of(answer, start, start + skipped, length)
    except OSError:
        return
    assert extents[0].offset == start + skipped
    assert extents[-1].end <= start + skipped + length
    assert all(one.end == other.offset for one, other in itertools.pairwise(extents))
    assert all(extent.length > 0 for extent in extents)
