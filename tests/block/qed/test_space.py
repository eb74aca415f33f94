"""Space: no cluster is given to two, what is given back is used again, and the end moves both ways."""

from __future__ import annotations

from itertools import pairwise

from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdstream.block.qed.space import Space

CLUSTER = 4096


def space_of(used: str) -> Space:
    return Space.of_used(CLUSTER, bitarray(used))


class SpaceMachine(RuleBasedStateMachine):
    """Against a set of the clusters in use."""

    @initialize(used=st.lists(st.booleans(), max_size=20))
    def begin(self, used: list[bool]) -> None:
        self.space = Space.of_used(CLUSTER, bitarray(used))
        self.used = {number for number, bit in enumerate(used) if bit}
        self.touched = set(range(self.space.end // CLUSTER))
        self.runs: list[range] = [range(number, number + 1) for number in self.used]

    def take(self, offset: int, count: int) -> None:
        assert offset % CLUSTER == 0
        run = range(offset // CLUSTER, offset // CLUSTER + count)
        assert not self.used.intersection(run)
        self.used.update(run)
        self.touched.update(run)
        self.runs.append(run)

    @rule(count=st.integers(1, 5))
    def allocate(self, count: int) -> None:
        free = bool(self.space.free)
        end = self.space.end
        offset, got = self.space.allocate(count)
        assert 1 <= got <= count
        assert free == (offset < end)
        self.take(offset, got)

    @rule(count=st.integers(1, 5))
    def append(self, count: int) -> None:
        end = self.space.end
        assert self.space.append(count) == end
        self.take(end, count)

    @rule()
    def append_untouched(self) -> None:
        end = self.space.end
        offset = self.space.append_untouched()
        number = end // CLUSTER
        if offset is None:
            assert self.space.free or number in self.touched
        else:
            assert offset == end
            assert number not in self.touched
            self.take(offset, 1)

    @rule()
    def cut(self) -> None:
        self.space.cut()
        self.touched = {number for number in self.touched if number < self.space.end // CLUSTER}

    @rule(limit=st.integers(0, 30))
    def allocate_below(self, limit: int) -> None:
        lowest = min((number for number in range(self.space.end // CLUSTER) if number not in self.used), default=limit)
        offset = self.space.allocate_below(limit * CLUSTER)
        if lowest >= limit:
            assert offset is None
        else:
            assert offset == lowest * CLUSTER
            self.take(offset, 1)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        run = self.runs.pop(data.draw(st.integers(0, len(self.runs) - 1)))
        first = data.draw(st.integers(run.start, run.stop - 1))
        behind = data.draw(st.integers(first + 1, run.stop))
        self.runs += [part for part in (range(run.start, first), range(behind, run.stop)) if part]
        self.used.difference_update(range(first, behind))
        self.space.release(first * CLUSTER, behind - first)

    @invariant()
    def what_is_free_is_what_is_not_used(self) -> None:
        free = {n for start, length in self.space.free for n in range(start // CLUSTER, (start + length) // CLUSTER)}
        assert free == set(range(self.space.end // CLUSTER)) - self.used

    @invariant()
    def the_end_is_where_the_last_used_cluster_ends(self) -> None:
        assert self.space.end == (max(self.used, default=-1) + 1) * CLUSTER

    @invariant()
    def free_runs_are_sorted_and_do_not_touch(self) -> None:
        assert all(start + length < following for (start, length), (following, _) in pairwise(self.space.free))


TestSpace = SpaceMachine.TestCase


@given(st.lists(st.booleans(), max_size=64))
def test_what_is_not_used_is_free_and_the_tail_is_not_there(used: list[bool]) -> None:
    space = Space.of_used(CLUSTER, bitarray(used))
    count = len(used) - sum(used)
    tail = len(used) - space.end // CLUSTER
    assert not any(used[space.end // CLUSTER :])
    assert sum(length for _, length in space.free) == (count - tail) * CLUSTER


def test_free_runs_come_before_the_end() -> None:
    space = space_of("1011")
    assert space.allocate(1) == (CLUSTER, 1)
    assert space.allocate(1) == (4 * CLUSTER, 1)


def test_a_free_run_that_is_too_short_is_taken_all_the_same() -> None:
    assert space_of("10011").allocate(5) == (CLUSTER, 2)


def test_a_table_never_goes_into_a_free_run() -> None:
    assert space_of("10011").append(2) == 5 * CLUSTER


def test_the_last_cluster_given_back_makes_the_file_shorter_by_all_that_is_free_in_front_of_it() -> None:
    space = space_of("110011")
    space.release(4 * CLUSTER, 2)
    assert space.end == 2 * CLUSTER
    assert space.free == []


def test_neighbours_given_back_are_one_run() -> None:
    space = space_of("111111")
    space.release(1 * CLUSTER)
    space.release(3 * CLUSTER)
    space.release(2 * CLUSTER)
    assert space.free == [(CLUSTER, 3 * CLUSTER)]


def test_nothing_is_allocated_at_or_behind_the_limit() -> None:
    space = space_of("1101")
    assert space.allocate_below(2 * CLUSTER) is None
    assert space.allocate_below(3 * CLUSTER) == 2 * CLUSTER
