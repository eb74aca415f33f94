from __future__ import annotations

import random
from itertools import pairwise

from nbdstream.block.readahead import ReadAhead

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30


def test_a_single_read_causes_nothing() -> None:
    assert ReadAhead(GiB).after(0, 256 * KiB) is None


def test_the_second_read_in_sequence_reads_ahead_right_behind_it() -> None:
    read_ahead = ReadAhead(GiB)
    read_ahead.after(5 * MiB, 256 * KiB)
    assert read_ahead.after(5 * MiB + 256 * KiB, 256 * KiB) == (5 * MiB + 512 * KiB, 512 * KiB)


def test_a_long_sequence_is_read_ahead_without_gaps_or_repetition_and_never_by_much() -> None:
    read_ahead = ReadAhead(GiB)
    hints = []
    for offset in range(0, 64 * MiB, 64 * KiB):
        if hint := read_ahead.after(offset, 64 * KiB):
            hints.append(hint)
            assert offset < sum(hint) <= offset + 64 * KiB + 8 * MiB
    assert all(start + length == following for (start, length), (following, _) in pairwise(hints))
    assert len(hints) < 40


def test_a_reader_that_comes_back_after_its_window_goes_on_with_a_larger_one() -> None:
    read_ahead = ReadAhead(GiB)
    read_ahead.after(0, MiB)
    lengths = []
    at = MiB
    for _ in range(8):
        hint = read_ahead.after(at, MiB)
        assert hint
        lengths.append(hint[1])
        at = sum(hint)  # all up to there was in memory, and was never asked for here
    assert lengths == sorted(lengths)
    assert lengths[-1] == 8 * MiB


def test_requests_a_little_out_of_order_are_one_sequence() -> None:
    read_ahead = ReadAhead(GiB)
    rng = random.Random(7)
    hints = []
    for base in range(0, 64 * MiB, 4 * MiB):
        offsets = [base + i * 256 * KiB for i in range(16)]
        rng.shuffle(offsets)
        hints += [hint for offset in offsets if (hint := read_ahead.after(offset, 256 * KiB))]
    assert sum(length for _, length in hints) > 48 * MiB


def test_random_reads_cause_nothing() -> None:
    read_ahead = ReadAhead(1 << 40)
    rng = random.Random(7)
    assert not any(read_ahead.after(rng.randrange(1 << 40), 4 * KiB) for _ in range(1000))


def test_several_sequences_are_followed_at_the_same_time() -> None:
    read_ahead = ReadAhead(1 << 40)
    starts = [i << 32 for i in range(8)]
    assert not any(read_ahead.after(start, MiB) for start in starts)
    assert all(read_ahead.after(start + MiB, MiB) for start in starts)


def test_nothing_is_read_ahead_behind_the_end() -> None:
    read_ahead = ReadAhead(2 * MiB + 100)
    read_ahead.after(0, MiB)
    assert read_ahead.after(MiB, MiB) == (2 * MiB, 100)
    assert read_ahead.after(2 * MiB, 100) is None
