"""The throttle, by a clock that the tests turn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbdstream.stream.throttle import Throttle


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_rate_nothing_waits() -> None:
    throttle = Throttle(None, clock=Clock())
    throttle.spend(1 << 60)
    assert throttle.rate is None
    assert throttle.delay() == 0.0


def test_the_first_request_goes_at_once_and_the_next_when_it_is_paid_for() -> None:
    clock = Clock()
    throttle = Throttle(1000, clock=clock)
    assert throttle.delay() == 0.0
    throttle.spend(2000)
    assert throttle.delay() == 2.0
    clock.now += 1.5
    assert throttle.delay() == 0.5
    clock.now += 0.5
    assert throttle.delay() == 0.0


def test_a_long_pause_is_worth_a_tenth_of_a_second() -> None:
    clock = Clock()
    throttle = Throttle(1000, clock=clock)
    clock.now += 3600
    throttle.spend(100)
    assert throttle.delay() == 0.0
    throttle.spend(1000)
    assert throttle.delay() == 1.0


def test_a_higher_rate_shortens_the_wait_at_once() -> None:
    throttle = Throttle(1000, clock=Clock())
    throttle.spend(1000)
    throttle.rate = 10_000
    assert throttle.delay() == 0.1


def test_a_lower_rate_makes_the_wait_longer_at_once() -> None:
    throttle = Throttle(1000, clock=Clock())
    throttle.spend(1000)
    throttle.rate = 100
    assert throttle.delay() == 10.0


def test_what_was_paid_at_the_old_rate_stays_paid() -> None:
    clock = Clock()
    throttle = Throttle(1000, clock=clock)
    throttle.spend(1000)
    clock.now += 0.5
    throttle.rate = 100
    assert throttle.delay() == 5.0


def test_a_limit_that_goes_lets_everything_go() -> None:
    throttle = Throttle(1, clock=Clock())
    throttle.spend(1000)
    throttle.rate = None
    assert throttle.delay() == 0.0


def test_a_limit_that_comes_gives_no_credit_for_the_time_without_one() -> None:
    clock = Clock()
    throttle = Throttle(None, clock=clock)
    clock.now += 3600
    throttle.rate = 1000
    throttle.spend(1000)
    assert throttle.delay() == 1.0


@given(st.integers(1, 1 << 30), st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 5)), max_size=50))
def test_before_each_request_no_more_has_gone_than_the_rate_and_a_burst_allow(
    rate: int, requests: list[tuple[int, float]]
) -> None:
    clock = Clock()
    throttle = Throttle(rate, clock=clock)
    began, spent = clock.now, 0
    for length, pause in requests:
        clock.now += pause
        if throttle.delay() == 0.0:
            assert spent <= rate * (clock.now - began + 0.1) + 1
            throttle.spend(length)
            spent += length


def test_either_of_two_limits_limits() -> None:
    throttle = Throttle()
    assert not throttle.limits
    throttle.cap = 5.0
    assert throttle.limits
    throttle.cap, throttle.rate = None, 7
    assert throttle.limits


def test_of_two_limits_the_lower_one_holds() -> None:
    throttle = Throttle(1000, clock=Clock())
    throttle.cap = 500.0
    throttle.spend(1000)
    assert throttle.delay() == 2.0
    throttle.cap = 5000.0
    assert throttle.delay() == 1.0
    throttle.rate = None
    assert throttle.delay() == 0.2
    throttle.cap = None
    assert throttle.delay() == 0.0
