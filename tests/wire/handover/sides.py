"""Each side of a hand-over as the model checker sees it: the real machine, its journal, its effects that are not yet
executed, and the world around it; and every move that it can make.

A side's moves do not depend on the other side, but for the messages and where a :class:`Move` says so. So they are
worked out once for each state of a side, by the real code, however many states of both there are.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from nbdstream.wire.handover.destination import OWNER, Destination, DestinationFacts, DestinationState
from nbdstream.wire.handover.messages import VERSION, Declined, Disk, Grant, Hello, Manifest, Message, Prepared
from nbdstream.wire.handover.source import Source, SourceFacts, SourceState
from nbdstream.wire.handover.vocabulary import (
    AllowWrites,
    CloseExport,
    CommandRefusedError,
    Connected,
    Decline,
    DestinationRecord,
    Do,
    Done,
    Effect,
    Event,
    Failed,
    Fence,
    FenceTimeout,
    Hydrate,
    Hydrated,
    Lost,
    OpenExport,
    Operation,
    Override,
    Persist,
    Phase,
    Received,
    Release,
    ReleaseFence,
    Retry,
    Send,
    SourceRecord,
    Tick,
    Written,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

EPOCH: Final = 1
_ID: Final = "d" * 32
_UUID: Final = "11111111-2222-3333-4444-555555555555"
_DISKS: Final = (Disk(_UUID, 1 << 20, "disk"), Disk(_UUID[::-1], 1 << 16, "another"))
SOURCE_FACTS: Final = SourceFacts(group="a" * 32, token="b" * 32, disks=_DISKS, port=10809)
DESTINATION_FACTS: Final = DestinationFacts(group="a" * 32, token="b" * 32, destination=_ID)


KEEPER: Final = frozenset({Phase.OFFERED, Phase.FENCING, Phase.RESUMING, Phase.DECLINED})
"""Phases in which the source owns the disks."""

_RIVAL: Final = "e" * 32
_BY_RIVAL: Final[dict[str, Any]] = {"group": SOURCE_FACTS.group, "destination": _RIVAL}
_RIVAL_SAYS: Final[tuple[Message, ...]] = (
    Hello(**_BY_RIVAL, epoch=0, version=VERSION, token=SOURCE_FACTS.token),
    Prepared(**_BY_RIVAL, epoch=EPOCH, disks=_DISKS),
    Declined(**_BY_RIVAL, epoch=EPOCH),
)


def manifests(*, whole: bool) -> tuple[Manifest, ...]:
    """What a destination that has all data says truly, and one that lacks a cluster."""
    return tuple(
        Manifest(disk.uuid, EPOCH + 1, disk.size, 1 << 16, disk.size // (1 << 16) - (not whole), 0, 0, 1, 2)
        for disk in _DISKS
    )


class BrokenError(Exception):
    """A rule is broken. The text says which."""


class Need(Enum):
    """What a move needs of the other side."""

    NOTHING = auto()
    EVIDENCE = auto()
    """The destination can certainly never run: it is destroyed, or has declined durably."""
    MANIFESTS = auto()
    """The destination has written its manifests."""


class Point(NamedTuple):
    """Where in a transition a side is: what it came from, and how many of its effects are executed."""

    phase: Phase
    event: str
    executed: int


class Todo(NamedTuple):
    """An effect that is not executed yet."""

    effect: Effect
    point: Point


class SourceSide(NamedTuple):
    """The source host."""

    disk: SourceRecord
    """What the journal says, durably."""
    state: SourceState | None = None
    """None: the process does not run."""
    todo: tuple[Todo, ...] = ()
    guest: bool = True
    """Whether the guest runs."""
    fence: bool = False
    hidden: bool = False
    export: bool = False
    disposed: bool = False
    granted: int = 0
    """The highest epoch that was ever granted, durably."""
    rival: bool = False
    """Whether the rival was granted the disks."""


class DestinationSide(NamedTuple):
    """The destination host."""

    disk: DestinationRecord
    state: DestinationState | None = None
    todo: tuple[Todo, ...] = ()
    overlay: bool = False
    writes: bool = False
    """Whether the guest's sockets take writes now."""
    ran: bool = False
    """Whether the guest may have run, and written."""
    hydrating: bool = False
    whole: bool = False
    destroyed: bool = False


Side: TypeAlias = SourceSide | DestinationSide


class Move(NamedTuple):
    """Something that can happen to a side."""

    name: str
    after: Side
    sent: tuple[Message, ...] = ()
    need: Need = Need.NOTHING


class World(NamedTuple):
    """What is assumed of the hosts."""

    most_todo: int = 2
    """Nothing new happens to a side while more effects than these wait: the queue must end somewhere."""
    always_open: bool = False
    """Whether something new may happen before any effect. Else: only where nothing is to be done, or an operation
    takes its time; what comes before other effects could as well come behind them, but for what is sent when."""
    locks: bool = True
    """Whether the source's guest honours image locks. Without, nothing but its hooks stops it; then the host does not
    start it on its own either, since nobody could do anything about that."""
    fingerprint: str = ""
    """Of the destination's certificate; empty without TLS."""
    rival: bool = False
    """Whether there is a second destination with the same offer and certificate, which says what it likes, whenever."""


class SourceMoves:
    """Every move of a source."""

    def __init__(self, machine: Source, world: World) -> None:
        self._machine = machine
        self._world = world

    def start(self) -> SourceSide:
        """The source before its first start, with its guest running."""
        return SourceSide(SourceRecord(Phase.OFFERED, EPOCH))

    def own(self, side: SourceSide) -> Iterator[Move]:
        """Give every move but that of hearing something."""
        if side.state is None:
            state, effects = self._machine.restart(side.disk)
            yield Move("restart", side._replace(state=state, todo=_queue(side.disk.phase, "restart", effects)))
        else:
            dead = side._replace(state=None, todo=(), fence=False, export=False)
            yield Move("crash", dead)
            if side.todo:
                yield from self._execute(side, side.todo[0].effect)
            if _open(side.todo, self._world):
                yield from self._happen(side)
        if self._world.locks:
            # A host that dies, whether or not the process had ended before; when it is back it starts what it finds.
            yield Move("host dies", side._replace(state=None, todo=(), fence=False, export=False, guest=False))
            if not (side.guest or side.hidden or side.fence or side.disposed):
                yield Move("autostart", side._replace(guest=True))

    def hear(self, side: SourceSide, message: Message) -> Iterator[Move]:
        """Give the move of hearing this message, if it can be heard now."""
        if side.state is None or not _open(side.todo, self._world):
            return
        if not isinstance(message, Hello):
            yield from self._event(side, Received(message))
        elif self._machine.refusal(side.state, message, self._world.fingerprint) is None:
            yield from self._event(side, Connected(message.destination, self._world.fingerprint))

    def _happen(self, side: SourceSide) -> Iterator[Move]:
        assert side.state
        for message in _RIVAL_SAYS if self._world.rival else ():
            yield from self.hear(side, message)
        if side.state.connected:
            yield from self._event(side, Lost())
        for event in (Fence(), Decline(), Retry(), FenceTimeout(), Release(manifests(whole=False))):
            yield from self._event(side, event)
        yield from self._event(side, Override("its disks are ashes"), need=Need.EVIDENCE)
        yield from self._event(side, Release(manifests(whole=True)), need=Need.MANIFESTS)
        if not side.todo:
            yield from self._event(side, Tick())

    def _event(self, side: SourceSide, event: Event, *, need: Need = Need.NOTHING) -> Iterator[Move]:
        assert side.state
        try:
            state, effects = self._machine.step(side.state, event)
        except CommandRefusedError:
            return
        name = _name(event)
        after = side._replace(state=state, todo=side.todo + _queue(side.state.record.phase, name, effects))
        if after != side:
            yield Move(name, after, need=need)

    def _execute(self, side: SourceSide, effect: Effect) -> Iterator[Move]:
        rest = side._replace(todo=side.todo[1:])
        assert side.state
        if isinstance(effect, Do):
            yield from self._do(rest, effect.operation)
        elif isinstance(effect, Send):
            yield self._send(side, rest, effect.message)
        elif isinstance(effect, Persist):
            assert isinstance(effect.record, SourceRecord)
            yield Move("persist", _recorded(rest, effect.record))
        else:
            after = _acted(rest, effect)
            if after.export and side.disk.phase in (Phase.GRANTED, Phase.ACCEPTED) and not side.fence:
                raise BrokenError("what was granted is exported, but not fenced")
            yield Move("act", after)

    def _send(self, side: SourceSide, rest: SourceSide, message: Message) -> Move:
        granting = isinstance(message, Grant)
        if granting:
            _check_grant(side, message)
        assert side.state
        if not side.state.connected:
            return Move("send", rest)
        if message.destination == _RIVAL:
            return Move("send", rest._replace(rival=rest.rival or granting))
        return Move("send", rest, sent=(message,))

    def _do(self, side: SourceSide, operation: Operation) -> Iterator[Move]:
        """The operation succeeds; or fails with nothing done, or after having done it."""
        done = self._worked(side, operation)
        for after in {side, done or side}:
            yield from self._ended(after, Failed(operation))
        if done:
            yield from self._ended(done, Done(operation))

    def _worked(self, side: SourceSide, operation: Operation) -> SourceSide | None:
        """What the world is after it; None if it cannot succeed."""
        if operation is Operation.HOOK_FENCE:
            return side._replace(guest=False)
        if operation is Operation.TAKE_FENCE:
            return None if side.guest and self._world.locks else side._replace(fence=True)
        if operation is Operation.HIDE:
            return side._replace(hidden=True)
        if operation is Operation.SHOW:
            return side._replace(hidden=False)
        if operation is Operation.HOOK_RESUME:
            return None if side.fence or side.hidden else side._replace(guest=True)
        assert operation is Operation.DISPOSE
        return side._replace(disposed=True)

    def _ended(self, side: SourceSide, event: Done | Failed) -> Iterator[Move]:
        assert side.state
        state, effects = self._machine.step(side.state, event)
        name = _name(event)
        yield Move(name, side._replace(state=state, todo=side.todo + _queue(side.state.record.phase, name, effects)))


def _recorded(side: SourceSide, record: SourceRecord) -> SourceSide:
    if record.phase in KEEPER and record.epoch <= side.granted:
        raise BrokenError("an epoch that was granted is used again")
    granted = record.epoch if record.phase is Phase.GRANTED else side.granted
    return side._replace(disk=record, granted=granted)


def _acted(side: SourceSide, effect: Effect) -> SourceSide:
    """What the world is after an effect that is neither a record, a message nor an operation."""
    if isinstance(effect, OpenExport | CloseExport):
        return side._replace(export=isinstance(effect, OpenExport))
    return side._replace(fence=False) if isinstance(effect, ReleaseFence) else side


def _check_grant(side: SourceSide, message: Message) -> None:
    """What must be true when a grant leaves the source."""
    if side.disk.phase not in (Phase.GRANTED, Phase.ACCEPTED) or side.disk.epoch != message.epoch:
        raise BrokenError("a grant is said that is not durable")
    if side.guest:
        raise BrokenError("a grant is said while the guest runs")
    if not side.fence:
        raise BrokenError("a grant is said without the fence")
    if not side.hidden:
        raise BrokenError("a grant is said, and an autostart finds the images")


class DestinationMoves:
    """Every move of a destination."""

    def __init__(self, machine: Destination, world: World) -> None:
        self._machine = machine
        self._world = world

    def start(self) -> DestinationSide:
        """The destination before its first start."""
        return DestinationSide(DestinationRecord(Phase.JOINING))

    def own(self, side: DestinationSide) -> Iterator[Move]:
        """Give every move but that of hearing something."""
        if side.destroyed:
            return
        yield Move("destroyed", DestinationSide(DestinationRecord(Phase.JOINING), destroyed=True, whole=side.whole))
        if side.state is None:
            state, effects = self._machine.restart(side.disk)
            yield Move("restart", side._replace(state=state, todo=_queue(side.disk.phase, "restart", effects)))
            return
        yield Move("crash", side._replace(state=None, todo=(), writes=False, hydrating=False))
        if side.todo:
            yield from self._execute(side, side.todo[0].effect)
        if _open(side.todo, self._world):
            yield from self._happen(side)

    def hear(self, side: DestinationSide, message: Message) -> Iterator[Move]:
        """Give the move of hearing this message, if it can be heard now."""
        if side.state is not None and _open(side.todo, self._world):
            yield from self._event(side, Received(message))

    def _happen(self, side: DestinationSide) -> Iterator[Move]:
        assert side.state
        yield from self._event(side, Lost() if side.state.connected else Connected())
        for event in (Decline(), Retry()):
            yield from self._event(side, event)
        if side.hydrating:
            yield from self._event(side._replace(whole=True, hydrating=False), Hydrated())
        if not side.todo:
            yield from self._event(side, Tick())

    def _event(self, side: DestinationSide, event: Event) -> Iterator[Move]:
        assert side.state
        try:
            state, effects = self._machine.step(side.state, event)
        except CommandRefusedError:
            return
        name = _name(event)
        after = side._replace(state=state, todo=side.todo + _queue(side.state.record.phase, name, effects))
        if after != side or isinstance(event, Hydrated):
            yield Move(name, after)

    def _execute(self, side: DestinationSide, effect: Effect) -> Iterator[Move]:
        rest = side._replace(todo=side.todo[1:])
        assert side.state
        if isinstance(effect, Do):
            yield from self._do(rest, effect.operation)
        elif isinstance(effect, Send):
            yield Move("send", rest, sent=(effect.message,) if side.state.connected else ())
        elif isinstance(effect, Persist):
            assert isinstance(effect.record, DestinationRecord)
            yield Move("persist", rest._replace(disk=effect.record))
        elif isinstance(effect, AllowWrites):
            if not side.overlay:
                raise BrokenError("the guest may write, and there is no overlay")
            yield Move("act", rest._replace(writes=True, ran=True))
        elif isinstance(effect, Hydrate):
            if side.disk.phase not in OWNER:
                raise BrokenError("what may still be written at the source is kept")
            yield Move("act", rest._replace(hydrating=True))
        else:
            yield Move("act", rest)

    def _do(self, side: DestinationSide, operation: Operation) -> Iterator[Move]:
        done = side
        if operation is Operation.PREPARE:
            if side.ran and not side.overlay:
                raise BrokenError("an overlay is made anew, and what was written is lost")
            done = side._replace(overlay=True)
        elif operation is Operation.DISCARD:
            if side.ran:
                raise BrokenError("an overlay is removed, and what was written is lost")
            done = side._replace(overlay=False)
        if operation is not Operation.PREPARE:  # for that one failing, the command ends: as a crash
            for after in {side, done}:
                yield from self._ended(after, Failed(operation))
        written = operation is Operation.MANIFEST
        yield from self._ended(done, Written(manifests(whole=side.whole)) if written else Done(operation))

    def _ended(self, side: DestinationSide, event: Done | Failed | Written) -> Iterator[Move]:
        assert side.state
        state, effects = self._machine.step(side.state, event)
        name = _name(event)
        yield Move(name, side._replace(state=state, todo=side.todo + _queue(side.state.record.phase, name, effects)))


def _open(todo: tuple[Todo, ...], world: World) -> bool:
    """Whether something new may happen now."""
    return not todo or (len(todo) <= world.most_todo and (world.always_open or isinstance(todo[0].effect, Do)))


def _queue(phase: Phase, event: str, effects: tuple[Effect, ...]) -> tuple[Todo, ...]:
    return tuple(Todo(effect, Point(phase, event, executed)) for executed, effect in enumerate(effects))


def _name(event: Event) -> str:
    kind = type(event).__name__
    if isinstance(event, Connected) and event.destination:
        return "hears Hello"
    if isinstance(event, Received):
        return f"hears {type(event.message).__name__}"
    return f"{kind} {event.operation}" if isinstance(event, Done | Failed) else kind
