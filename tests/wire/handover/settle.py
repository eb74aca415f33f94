"""Where a state of the model leads when nothing bad happens any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.wire.handover.explore import BITS, MASK
from tests.wire.handover.rules import end_problem
from tests.wire.handover.sides import BrokenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.wire.handover.explore import Exploration, Host, Step


def check_settling(found: Exploration) -> int:
    """See that every state settles with exactly one owner, whether both processes die in it or the link is cut.

    From then on nothing fails any more, processes are started again, messages arrive, and the operator overrides if
    the destination is destroyed. Returns how many ends there are. Raises BrokenError.
    """
    settling = Settling(found)
    begin = (settling.dead, settling.cut)
    beginnings = {each(pair): state for pair, state in found.pairs.items() for each in begin}
    return len({settling.end(here, came_from) for here, came_from in beginnings.items()})


class Settling:
    """What becomes of a state when nothing bad happens any more: one way, always the same."""

    def __init__(self, exploration: Exploration) -> None:
        self._all = exploration
        self._ends: dict[int, int] = {}

    def dead(self, state: int) -> int:
        """Both processes die, and what is in flight is lost."""
        source, destination = state >> BITS & MASK, state & MASK
        source = _named(self._all.source.own(source), "crash", source)
        return source << BITS | _named(self._all.destination.own(destination), "crash", destination)

    def cut(self, state: int) -> int:
        """The connection is lost, and what is in flight."""
        found = [
            self._disconnected(host, number)
            for host, number in (
                (self._all.source, state >> BITS & MASK),
                (self._all.destination, state & MASK),
            )
        ]
        return found[0] << BITS | found[1]

    def _disconnected(self, host: Host, number: int) -> int:
        while (side := host.sides[number]).state is not None and side.state.connected:
            lost = _named(host.own(number), "Lost", number)
            number = lost if lost != number else _executed(host, number).after
        return number

    def end(self, here: int, came_from: int) -> int:
        """Return the state that this one ends in."""
        way: list[int] = []
        while here not in self._ends:
            if here in way:
                circle = "\n".join(self._all.describe(each) for each in way[way.index(here) :])
                raise BrokenError(f"it goes round in circles:\n{circle}\nafter\n{self._all.way_to(came_from)}")
            way.append(here)
            following = self._next(here)
            if following is None:
                self._check_end(here, came_from)
                self._ends[here] = here
            else:
                here = following
        self._ends.update(dict.fromkeys(way, self._ends[here]))
        return self._ends[here]

    def _next(self, here: int) -> int | None:
        """Return the state after this one; None if nothing is left to happen."""
        source = self._all.source.sides[here >> BITS & MASK]
        destination = self._all.destination.sides[here & MASK]
        if source.state is None or (destination.state is None and not destination.destroyed):
            return self._moved(here, "restart")
        if source.todo or destination.todo:
            return self._drained(here)
        chances = ["Retry", "Connected", "Hydrated", "Tick", "FenceTimeout"]
        if destination.destroyed:
            chances.append("Override")
        for _, after in self._hearings(here):
            if (drained := self._drained(after)) != here:
                return drained
        for name in chances:
            for found, after in self._all.steps(here):
                if found == name and (drained := self._drained(after)) != here:
                    return drained
        return None

    def _hearings(self, here: int) -> Iterator[tuple[str, int]]:
        """Everything that is heard; hello only once on a connection."""
        source = self._all.source.sides[here >> BITS & MASK]
        greeted = source.state is not None and source.state.connected
        for name, after in self._all.steps(here):
            if name.startswith("hears") and not (greeted and name == "hears Hello"):
                yield name, after

    def _moved(self, here: int, name: str) -> int:
        return next(after for found, after in self._all.steps(here) if found == name)

    def _drained(self, here: int) -> int:
        """Execute all effects, with success where that can be."""
        while True:
            source, destination, net = here >> BITS & MASK, here & MASK, here >> 2 * BITS
            if self._all.source.sides[source].todo:
                step = _executed(self._all.source, source)
                source = step.after
            elif self._all.destination.sides[destination].todo:
                step = _executed(self._all.destination, destination)
                destination = step.after
            else:
                return here
            here = (net | step.sent) << 2 * BITS | source << BITS | destination

    def _check_end(self, here: int, came_from: int) -> None:
        source = self._all.source.sides[here >> BITS & MASK]
        destination = self._all.destination.sides[here & MASK]
        problem = end_problem(source, destination)
        if problem:
            raise BrokenError(f"{problem}:\n{self._all.describe(here)}\nafter\n{self._all.way_to(came_from)}")


def _named(steps: list[Step], name: str, otherwise: int) -> int:
    return next((step.after for step in steps if step.name == name), otherwise)


def _executed(host: Host, number: int) -> Step:
    """The first effect is executed; it does not fail if it can succeed."""
    steps = [step for step in host.own(number) if step.name in ("persist", "send", "act")]
    steps += [step for step in host.own(number) if step.name.startswith("Done") or step.name == "Written"]
    steps += [step for step in host.own(number) if step.name.startswith("Failed")]
    return steps[0]
