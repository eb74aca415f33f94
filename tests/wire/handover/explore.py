"""Breadth first through every state that a hand-over can get into, and what must be true in each of them.

A state is a source, a destination, and the messages that were sent since everything in flight was last lost. A message
stays when it is heard: so it may be heard late, twice, after others, by a process that was started since, or never.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from nbdstream.wire.handover.destination import Destination
from nbdstream.wire.handover.source import Source
from nbdstream.wire.handover.vocabulary import Phase
from tests.wire.handover.rules import check_pair
from tests.wire.handover.sides import (
    DESTINATION_FACTS,
    SOURCE_FACTS,
    BrokenError,
    DestinationMoves,
    DestinationSide,
    Need,
    Point,
    SourceMoves,
    SourceSide,
    World,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from nbdstream.wire.handover.messages import Message
    from tests.wire.handover.sides import Move

Check: TypeAlias = "Callable[[SourceSide, DestinationSide], None]"

BITS: Final = 24
MASK: Final = (1 << BITS) - 1


class Step(NamedTuple):
    """A move, in numbers."""

    name: str
    after: int
    sent: int
    """Bits of the messages that are sent."""
    need: Need


class Host:
    """The states of one side, numbered, and the moves between them, each worked out once."""

    def __init__(self, moves: Any, messages: _Messages) -> None:
        self._of = moves
        self._messages = messages
        self._numbers: dict[Any, int] = {}
        self.sides: list[Any] = []
        self._own: dict[int, list[Step]] = {}
        self._heard: dict[tuple[int, int], list[Step]] = {}
        self.start = self._number(moves.start())
        self.points: set[Point] = set()
        """Every point of every transition."""
        self.crashed_at: set[Point] = set()
        self.events: set[tuple[Phase, str]] = set()
        """Everything that happened to it, by phase."""

    def own(self, number: int) -> list[Step]:
        """Return every move but that of hearing something."""
        if number not in self._own:
            side = self.sides[number]
            steps = self._steps(number, self._of.own(side))
            self._own[number] = steps
            self.points.update(todo.point for todo in side.todo)
            if side.todo and any(step.name == "crash" for step in steps):
                self.crashed_at.add(side.todo[0].point)
        return self._own[number]

    def heard(self, number: int, bit: int) -> list[Step]:
        """Return the moves of hearing a message."""
        steps = self._heard.get((number, bit))
        if steps is None:
            steps = self._steps(number, self._of.hear(self.sides[number], self._messages[bit]))
            self._heard[number, bit] = steps
        return steps

    def _steps(self, number: int, moves: Iterable[Move]) -> list[Step]:
        steps = [
            Step(move.name, self._number(move.after), sum(map(self._messages.bit, move.sent)), move.need)
            for move in moves
        ]
        state = self.sides[number].state
        if state:
            self.events.update((state.record.phase, step.name) for step in steps)
        return steps

    def _number(self, side: Any) -> int:
        number = self._numbers.get(side)
        if number is None:
            number = self._numbers[side] = len(self.sides)
            self.sides.append(side)
        return number


class _Messages:
    """The messages that are ever sent, a bit each."""

    def __init__(self) -> None:
        self._bits: dict[Message, int] = {}
        self._at: dict[int, Message] = {}
        self.to_source = self.to_destination = 0

    def bit(self, message: Message) -> int:
        bit = self._bits.get(message)
        if bit is None:
            bit = self._bits[message] = 1 << len(self._bits)
            self._at[bit] = message
            if type(message).__name__ in _FROM_DESTINATION:
                self.to_source |= bit
            else:
                self.to_destination |= bit
        return bit

    def __getitem__(self, bit: int) -> Message:
        return self._at[bit]

    def __len__(self) -> int:
        return len(self._at)


_FROM_DESTINATION: Final = frozenset({"Hello", "Prepared", "Accepted", "Declined", "Independent"})


class Exploration:
    """All states from the beginning on. :meth:`run` finds them."""

    def __init__(
        self,
        world: World = World(),  # noqa: B008 - it is immutable
        *,
        source: type[Source] = Source,
        destination: type[Destination] = Destination,
        trust_anybody: bool = False,
        check: Check | None = None,
    ) -> None:
        """Explore these machines.

        ``trust_anybody`` overrides without evidence; ``check`` stands in for :func:`check_pair`.
        """
        self.messages = _Messages()
        self.source = Host(SourceMoves(source(SOURCE_FACTS), world), self.messages)
        self.destination = Host(DestinationMoves(destination(DESTINATION_FACTS), world), self.messages)
        self._trust_anybody = trust_anybody
        self._check = check or check_pair
        self._first = self._state(self.source.start, self.destination.start, 0)
        self.parents: dict[int, int] = {self._first: -1}
        """Every state that was found, and the one that it was found from."""
        self.moves = 0
        self.pairs: dict[int, int] = {}
        """Every pair of sides' states, and a state that has it."""

    @staticmethod
    def _state(source: int, destination: int, net: int) -> int:
        return net << 2 * BITS | source << BITS | destination

    def run(self, limit: int | None = None) -> None:
        """Find every state, or ``limit`` of them. Raises BrokenError, with the way there, where a rule is broken."""
        parents = self.parents
        queue = deque(parents)
        while queue and (limit is None or len(parents) < limit):
            state = queue.popleft()
            try:
                for after in self._after(state):
                    self.moves += 1
                    if after not in parents:
                        parents[after] = state
                        self._check_pair(after)
                        queue.append(after)
            except BrokenError as error:
                raise BrokenError(f"{error}\n{self.way_to(state)}") from None

    def _after(self, state: int) -> Iterator[int]:
        return (after for _, after in self.steps(state))

    def steps(self, state: int) -> Iterator[tuple[str, int]]:
        """Give every move and the state that it leads to."""
        source, destination, net = state >> BITS & MASK, state & MASK, state >> 2 * BITS
        high, low = net << 2 * BITS | destination, net << 2 * BITS | source << BITS
        for step in self.source.own(source):
            if step.need is Need.NOTHING or self._has(step.need, destination):
                yield step.name, high | step.sent << 2 * BITS | step.after << BITS
        for step in self.destination.own(destination):
            yield step.name, low | step.sent << 2 * BITS | step.after
        rest = net & self.messages.to_source
        while rest:
            bit = rest & -rest
            rest ^= bit
            for step in self.source.heard(source, bit):
                yield step.name, high | step.after << BITS
        rest = net & self.messages.to_destination
        while rest:
            bit = rest & -rest
            rest ^= bit
            for step in self.destination.heard(destination, bit):
                yield step.name, low | step.after

    def _has(self, need: Need, destination: int) -> bool:
        side: DestinationSide = self.destination.sides[destination]
        if need is Need.MANIFESTS:
            return side.disk.phase in (Phase.INDEPENDENT, Phase.RELEASED)
        return side.destroyed or side.disk.phase is Phase.DECLINED or self._trust_anybody

    def _check_pair(self, state: int) -> None:
        pair = state & (1 << 2 * BITS) - 1
        if pair not in self.pairs:
            self.pairs[pair] = state
            self._check(self.source.sides[pair >> BITS], self.destination.sides[pair & MASK])

    def way_to(self, state: int) -> str:
        """Return the moves that lead to a state, one a line."""
        lines = []
        while (before := self.parents[state]) >= 0:
            lines.append(next(name for name, after in self.steps(before) if after == state))
            state = before
        return "\n".join(reversed(lines))

    def summary(self) -> str:
        """Return how much was found, for people."""
        return (
            f"{len(self.parents):,} distinct states, {self.moves:,} moves between them; {len(self.source.sides):,} "
            f"states of the source, {len(self.destination.sides):,} of the destination; "
            f"crashes at {len(self.source.crashed_at | self.destination.crashed_at)} points of transitions"
        )

    def describe(self, state: int) -> str:
        """Return a state as text."""
        source = self.source.sides[state >> BITS & MASK]
        net = state >> 2 * BITS
        messages = [type(self.messages[1 << bit]).__name__ for bit in range(len(self.messages)) if net >> bit & 1]
        return f"{source}\n{self.destination.sides[state & MASK]}\n{messages}"
