"""Keeping a guest's requests fast: the job's rate and depth follow their 99th percentile.

Additive increase, multiplicative decrease, as TCP shares a line: it finds the rate that the guest leaves, whatever
makes requests slow, and yields within a second when the guest needs more. A floor keeps it from yielding for ever.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

FLOOR = 8 << 20
"""Bytes a second that are fetched however slow the guest's requests are: a terabyte takes a day and a half then."""

_TOO_SLOW = 0.7
"""Of the objective: from there on the job yields. The percentile of a whole run lies above that of most moments."""
_FAST_ENOUGH = 0.5
"""Of the objective: below that the job takes more."""

_DECREASE = 0.7
_LARGEST_DECREASE = 0.3
"""How much slower the job gets at a time: by as much as the guest's requests take too long, within these bounds."""
_STEPS = 20
"""From the floor to the fastest that was seen, in increases: ten seconds, since they come every half one."""

_ENOUGH_REQUESTS = 32
"""For a judgement. Of fewer the slowest decides, so more are waited for,"""
_PATIENCE = 4
"""but not for longer than so many looks."""

_DEPTH_SECONDS = 0.02
"""So much of the rate is on its way at a time: what the guest's own reads may find in front of them."""
_LEAST_DEPTH = 256 << 10


class Governor:
    """Says how fast a job may be, so that a share of 99 % of the guest's requests take less than the objective."""

    def __init__(self, objective: float | None) -> None:
        """``objective`` is in seconds; None for none: then the job is as fast as it can."""
        self._objective = objective
        self.rate: float | None = None
        """Bytes a second; None for no limit."""
        self._fastest = float(FLOOR)
        self._looks = self._requests = 0
        self._p99 = 0.0
        self._complained = False

    @property
    def objective(self) -> float | None:
        """Seconds, or None. It may be set at any time: the rate follows from where it is, or is free at once."""
        return self._objective

    @objective.setter
    def objective(self, objective: float | None) -> None:
        self._objective = objective
        self._complained = False
        if objective is None:
            self.rate = None

    def look(self, requests: int, p99: float, rate: float) -> None:
        """Adjust, every half second: to how many requests there were, what they took, and how fast the job was."""
        if self._objective is None:
            return
        self._fastest = max(self._fastest, rate)
        self._looks += 1
        self._requests += requests
        self._p99 = max(self._p99, p99)
        if self._requests and self._requests < _ENOUGH_REQUESTS and self._looks < _PATIENCE:
            return
        if self._requests and self._p99 > _TOO_SLOW * self._objective:
            self._yield(self._p99, rate, self._objective)
        elif not self._requests or self._p99 < _FAST_ENOUGH * self._objective:
            self._take()
        self._looks = self._requests = 0
        self._p99 = 0.0

    def _yield(self, p99: float, rate: float, objective: float) -> None:
        at_floor = self.rate is not None and self.rate <= FLOOR
        if at_floor and p99 > objective and not self._complained:
            self._complained = True
            log.warning(
                "the guest's requests take %.1f ms (99th percentile) though the job goes no faster than it must",
                p99 * 1000,
            )
        # What it may do and does not is no help to the guest.
        now = rate if self.rate is None else min(self.rate, max(rate, FLOOR))
        self.rate = max(FLOOR, now * max(_LARGEST_DECREASE, min(_DECREASE, _TOO_SLOW * objective / p99)))

    def _take(self) -> None:
        self._complained = False
        if self.rate is None:
            return
        self.rate += max(FLOOR, self._fastest / _STEPS)
        if self.rate > 2 * self._fastest:
            self.rate = None

    @property
    def depth(self) -> int | None:
        """How many bytes may be on their way; None for no limit."""
        return None if self.rate is None else max(_LEAST_DEPTH, int(self.rate * _DEPTH_SECONDS))
