"""The governor: the guest's requests stay below the objective, the job goes as fast as that allows, and never stops."""

from __future__ import annotations

import pytest

from nbdstream.stream.governor import FLOOR, Governor

MIB = 1 << 20
OBJECTIVE = 0.005


class Machine:
    """A guest whose requests take the longer, the faster the job is; the job can reach ``most``."""

    def __init__(self, governor: Governor, *, idle: float = 0.001, per_byte: float = 20e-12) -> None:
        self.governor = governor
        self.most = 800e6
        self.idle = idle
        self.per_byte = per_byte
        self.rates: list[float] = []
        self.p99s: list[float] = []

    def run(self, seconds: float, requests: int = 1000) -> None:
        for _ in range(int(seconds * 2)):
            rate = self.most if self.governor.rate is None else min(self.most, self.governor.rate)
            p99 = self.idle + rate * self.per_byte
            self.rates.append(rate)
            self.p99s.append(p99)
            self.governor.look(requests, p99 if requests else 0.0, rate)


def test_the_objective_is_kept_and_what_it_leaves_is_used() -> None:
    machine = Machine(Governor(OBJECTIVE))  # 5 ms would be reached at 200 MB/s
    machine.run(5)
    machine.rates.clear()
    machine.p99s.clear()
    machine.run(60)
    assert max(machine.p99s) < OBJECTIVE
    assert sum(machine.rates) / len(machine.rates) > 60e6


def test_a_guest_that_is_not_hurt_does_not_slow_the_job() -> None:
    machine = Machine(Governor(OBJECTIVE), per_byte=1e-12)
    machine.run(10)
    assert machine.rates == [machine.most] * 20


def test_it_yields_within_two_seconds() -> None:
    machine = Machine(Governor(OBJECTIVE), per_byte=1e-12)
    machine.run(10)
    machine.per_byte = 20e-12
    machine.run(2.5)
    assert machine.p99s[-1] < OBJECTIVE


def test_it_takes_all_again_soon_when_the_guest_is_idle() -> None:
    machine = Machine(Governor(OBJECTIVE))
    machine.run(20)
    machine.run(30, requests=0)
    assert machine.rates[-1] == machine.most


def test_it_never_goes_below_its_floor(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(Governor(OBJECTIVE), idle=0.5)
    machine.run(60)
    assert min(machine.rates) == machine.rates[-1] == FLOOR
    assert caplog.text.count("no faster than it must") == 1


def test_a_slow_source_is_no_reason_to_yield_further_and_further() -> None:
    """What the job may do and does not is no help to the guest: the limit follows what it does."""
    governor = Governor(OBJECTIVE)
    governor.look(1000, 0.004, 100 * MIB)
    assert governor.rate == pytest.approx(70 * MIB)
    governor.look(1000, 0.004, 20 * MIB)
    assert governor.rate == pytest.approx(14 * MIB)


@pytest.mark.parametrize(("p99", "left"), [(0.0036, 0.7), (0.007, 0.5), (1.0, 0.3)])
def test_it_yields_as_much_as_the_guest_is_hurt(p99: float, left: float) -> None:
    governor = Governor(OBJECTIVE)
    governor.look(1000, p99, 100 * MIB)
    assert governor.rate == pytest.approx(left * 100 * MIB)


def test_a_few_requests_are_gathered_before_they_are_judged() -> None:
    governor = Governor(OBJECTIVE)
    for _ in range(3):
        governor.look(5, 0.02, 100 * MIB)
        assert governor.rate is None
    governor.look(5, 0.0, 100 * MIB)
    assert governor.rate is not None


def test_its_objective_is_changed_while_it_works() -> None:
    governor = Governor(None)
    governor.look(1000, 0.02, 100 * MIB)
    assert governor.rate is governor.depth is None
    governor.objective = OBJECTIVE
    governor.look(1000, 0.004, 100 * MIB)
    assert governor.rate == pytest.approx(70 * MIB)
    governor.objective = None
    assert governor.rate is governor.depth is None


def test_its_depth_follows_its_rate() -> None:
    governor = Governor(OBJECTIVE)
    assert governor.depth is None
    governor.look(1000, 0.02, 1000 * MIB)
    fast = governor.depth
    assert fast is not None
    for _ in range(20):
        governor.look(1000, 0.02, 10 * MIB)
    assert governor.depth == 256 << 10 < fast
