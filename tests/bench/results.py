"""What was measured, and what follows from it: medians, ratios, the floors that we promised."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tests.bench.peers import OURS

if TYPE_CHECKING:
    from tests.bench.peers import Competitor

Unit = Literal["reads/s", "writes/s", "bytes/s", "s", "ms"]
"""ms: the value is in seconds all the same."""


@dataclass(frozen=True)
class Workload:
    """One thing that everybody does. Less is better where the unit is a time, more elsewhere."""

    title: str
    unit: Unit

    def speed(self, value: float) -> float:
        """``value`` as something of which more is better."""
        return 1 / value if self.unit in ("s", "ms") else value


@dataclass
class Samples:
    """What one competitor did in one workload, a value a round."""

    values: list[float] = field(default_factory=list)
    details: list[dict[str, float]] = field(default_factory=list)
    """What else was seen in each round, by name."""

    def add(self, value: float, details: dict[str, float] | None = None) -> None:
        """Keep the value of one more round."""
        self.values.append(value)
        if details:
            self.details.append(details)

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return statistics.median(self.values)


@dataclass(frozen=True)
class Floor:
    """How many times as fast as a peer we have to be at least."""

    workload: str
    peer: str
    ratio: float


@dataclass
class Section:
    """A table: workloads down, competitors across."""

    name: str
    title: str
    competitors: list[Competitor]
    workloads: list[Workload]
    floors: tuple[Floor, ...] = ()
    samples: dict[tuple[str, str], Samples] = field(default_factory=dict)
    """By title of the workload and key of the competitor; nobody who failed is in it."""
    problems: dict[str, str] = field(default_factory=dict)
    """Who could not be measured, or moved the wrong bytes, and why."""

    def add(self, workload: Workload, competitor: Competitor, value: float, **details: float) -> None:
        """Keep what ``competitor`` did in one round."""
        self.samples.setdefault((workload.title, competitor.key), Samples()).add(value, details)

    def fail(self, competitor: Competitor, why: str) -> None:
        """Leave ``competitor`` out: figures of somebody who fails now and then mean nothing."""
        self.problems[competitor.key] = why
        for workload in self.workloads:
            self.samples.pop((workload.title, competitor.key), None)

    def turn(self, round_number: int) -> list[Competitor]:
        """Who is still in it: another one first in each round, and every second round the other way about.

        So nobody is always first, and nobody always follows the same one.
        """
        running = [competitor for competitor in self.competitors if competitor.key not in self.problems]
        step = -1 if round_number % 2 else 1
        return [running[(round_number + step * place) % len(running)] for place in range(len(running))]

    def ratio(self, workload: Workload, peer: str) -> float | None:
        """How many times as fast as ``peer`` we are, the median of the rounds; None where one of the two is missing.

        Round by round, because a machine that others use is twice as fast in one round as in the next, for both.
        """
        ours, theirs = self.samples.get((workload.title, OURS)), self.samples.get((workload.title, peer))
        if not ours or not theirs:
            return None
        rounds = zip(ours.values, theirs.values, strict=True)
        return statistics.median(workload.speed(our) / workload.speed(their) for our, their in rounds)

    def floor_ratios(self) -> list[tuple[Floor, float | None]]:
        """Each floor with the ratio that was measured."""
        workloads = {workload.title: workload for workload in self.workloads}
        return [(floor, self.ratio(workloads[floor.workload], floor.peer)) for floor in self.floors]

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {
            "title": self.title,
            "competitors": {competitor.key: competitor.label for competitor in self.competitors},
            "workloads": {workload.title: self._workload_as_json(workload) for workload in self.workloads},
            "floors": [
                {"workload": floor.workload, "peer": floor.peer, "floor": floor.ratio, "measured": ratio,
                 "met": None if ratio is None else ratio >= floor.ratio}
                for floor, ratio in self.floor_ratios()
            ],
            "problems": self.problems,
        }  # fmt: skip

    def _workload_as_json(self, workload: Workload) -> dict[str, Any]:
        results = {}
        for competitor in self.competitors:
            samples = self.samples.get((workload.title, competitor.key))
            if samples:
                results[competitor.key] = {
                    "median": samples.median,
                    "min": min(samples.values),
                    "max": max(samples.values),
                    "values": samples.values,
                    "details": samples.details,
                    "nbdstream_is_times_as_fast": self.ratio(workload, competitor.key),
                }
        return {"unit": workload.unit, "results": results}
