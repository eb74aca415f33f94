"""The destination's side of a hand-over: once it has accepted the disks it owns them, and nothing talks it back.

::

    JOINING --offer--> PREPARING --> PREPARED --grant--> ACCEPTED --guest started--> HYDRATING --> INDEPENDENT
       |                   |             |                                                              |
       +-------------------+-------------+--> DECLINED     (over, or the operator's decline)            +--> RELEASED

The tables at the end say what happens when; what is in none of them changes nothing. In them stand the rules:

- ACCEPTED is entered in one place: from PREPARED, with the overlays made, by a grant of the very next epoch; and it is
  durable before the guest can write anything.
- From ACCEPTED on nothing leads to DECLINED, and DISCARD is not done.
- INDEPENDENT is said only after the manifests are durable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias, TypeVar

from msgspec.structs import replace

from nbdstream.wire.handover.messages import (
    VERSION,
    Accepted,
    Declined,
    Grant,
    Hello,
    Independent,
    Message,
    Offer,
    Over,
    Prepared,
    Released,
)
from nbdstream.wire.handover.vocabulary import (
    NOTHING,
    Alarm,
    AllowWrites,
    Command,
    CommandRefusedError,
    Connected,
    Decline,
    DestinationRecord,
    Do,
    Done,
    Effect,
    Event,
    Failed,
    Hydrate,
    Hydrated,
    Lost,
    Operation,
    Persist,
    Phase,
    Received,
    Retry,
    Send,
    Tick,
    Written,
)

OWNER: Final = frozenset({Phase.ACCEPTED, Phase.HYDRATING, Phase.INDEPENDENT, Phase.RELEASED})
"""Phases in which the destination owns the disks."""


_REFUSALS: Final[dict[type, str]] = {
    Decline: "the destination is {}: it owns the disks, and nothing gives them back but a hand-over the other way",
}


class DestinationFacts(NamedTuple):
    """Which offer it is that was joined; does not change."""

    group: str
    token: str
    destination: str
    """An id that the destination made for itself."""


class DestinationState(NamedTuple):
    """The record as the journal will have it once the effects are executed, and what a crash forgets."""

    record: DestinationRecord
    connected: bool = False
    pending: Operation | None = None
    """The operation whose end is waited for. (The end of any other is past interest.)"""
    failed: Operation | None = None
    """The last operation that failed, until something succeeds or is tried again."""
    told: bool = False
    """Whether the source knows that it is over."""


class DestinationStep(NamedTuple):
    """What follows from an event."""

    state: DestinationState
    effects: tuple[Effect, ...] = NOTHING


_M = TypeVar("_M", bound=Message)
_Handler: TypeAlias = Callable[["Destination", DestinationState, Event], DestinationStep]


class Destination:
    """Decides for the destination. It keeps nothing: the state is given and returned."""

    def __init__(self, facts: DestinationFacts) -> None:
        self.facts = facts

    def restart(self, record: DestinationRecord) -> DestinationStep:
        """Return how to go on from what the journal says."""
        state = DestinationState(record)
        if record.phase is Phase.JOINING:
            return DestinationStep(state)
        return _do(state, Operation.DISCARD if record.phase is Phase.DECLINED else Operation.PREPARE)

    def step(self, state: DestinationState, event: Event) -> DestinationStep:
        """Return what follows from the event. Raises CommandRefusedError for a command that cannot be done now."""
        phase = state.record.phase
        if isinstance(event, Received):
            return self._received(state, event)
        if isinstance(event, Done | Failed):
            if event.operation is not state.pending:
                return DestinationStep(state)
            if isinstance(event, Failed):
                return DestinationStep(state._replace(pending=None, failed=event.operation))
            handler = self.DONE.get((phase, event.operation))
            ended = state._replace(pending=None, failed=None)
            return handler(self, ended, event) if handler else DestinationStep(ended)
        handler = self.HAPPENED.get((phase, type(event))) or self.HAPPENED_ANYWHERE.get(type(event))
        if handler:
            return handler(self, state, event)
        if isinstance(event, Command):
            raise CommandRefusedError(_REFUSALS[type(event)].format(phase.upper()))
        return DestinationStep(state)

    def statement(self, state: DestinationState) -> tuple[Effect, ...]:
        """Return the message that says where the destination stands; nothing while it does not know."""
        if state.pending is Operation.PREPARE:
            return NOTHING
        record = state.record
        if record.phase is Phase.PREPARED:
            return (self._say(Prepared, record, disks=record.disks),)
        if record.phase in (Phase.ACCEPTED, Phase.HYDRATING):
            return (self._say(Accepted, record),)
        if record.phase in (Phase.INDEPENDENT, Phase.RELEASED):
            return (self._say(Independent, record, manifests=record.manifests),)
        return (self._say(Declined, record),) if record.phase is Phase.DECLINED else NOTHING

    def _say(self, kind: type[Message], record: DestinationRecord, **fields: Any) -> Send:
        facts = self.facts
        return Send(kind(group=facts.group, destination=facts.destination, epoch=record.epoch, **fields))

    # -- the connection -----------------------------------------------------------------------------------------

    def _connected(self, state: DestinationState, _: Event) -> DestinationStep:
        hello = self._say(Hello, state.record, version=VERSION, token=self.facts.token)
        return DestinationStep(state._replace(connected=True), (hello, *self.statement(state)))

    def _lost(self, state: DestinationState, _: Event) -> DestinationStep:
        return DestinationStep(state._replace(connected=False))

    def _tick(self, state: DestinationState, _: Event) -> DestinationStep:
        return DestinationStep(state, self.statement(state) if state.connected else NOTHING)

    def _received(self, state: DestinationState, event: Received) -> DestinationStep:
        message, facts = event.message, self.facts
        if (message.group, message.destination) != (facts.group, facts.destination):
            return DestinationStep(state, (Alarm("the source speaks to somebody else here"),))
        handler = self.HEARD.get((state.record.phase, type(message)))
        return handler(self, state, event) if handler else DestinationStep(state)

    def _answer(self, state: DestinationState, _: Event) -> DestinationStep:
        return DestinationStep(state, self.statement(state))

    # -- up to accepting ----------------------------------------------------------------------------------------

    def _heard_offer(self, state: DestinationState, event: Event) -> DestinationStep:
        offer = _message(event, Offer)
        record = DestinationRecord(Phase.PREPARING, offer.epoch, offer.disks, offer.port)
        return _before(_do(state._replace(record=record), Operation.PREPARE), Persist(record))

    def _prepared(self, state: DestinationState, _: Event) -> DestinationStep:
        step = _go(state, Phase.PREPARED)
        return DestinationStep(step.state, step.effects + self.statement(step.state))

    def _heard_grant(self, state: DestinationState, event: Event) -> DestinationStep:
        """Accept the disks: the only place where that happens."""
        epoch = _message(event, Grant).epoch
        if epoch != state.record.epoch + 1 or state.pending:
            return DestinationStep(state)
        step = _go(state, Phase.ACCEPTED, epoch=epoch)
        begun = self._begin(step.state, event)
        return DestinationStep(begun.state, step.effects + begun.effects)

    # -- calling it off -----------------------------------------------------------------------------------------

    def _heard_over(self, state: DestinationState, event: Event) -> DestinationStep:
        _message(event, Over)
        return self._decline(state._replace(told=True), "the source called it off")

    def _operator_declined(self, state: DestinationState, _: Event) -> DestinationStep:
        return self._decline(state, "the operator called it off")

    def _decline(self, state: DestinationState, note: str) -> DestinationStep:
        step = _go(state._replace(pending=None), Phase.DECLINED, note=note)
        discard = _do(step.state, Operation.DISCARD)
        return DestinationStep(discard.state, (*step.effects, *self.statement(discard.state), *discard.effects))

    def _heard_over_again(self, state: DestinationState, _: Event) -> DestinationStep:
        return DestinationStep(state._replace(told=True))

    # -- the owner ----------------------------------------------------------------------------------------------

    def _begin(self, state: DestinationState, _: Event) -> DestinationStep:
        return _before(_do(state, Operation.HOOK_ACCEPT), AllowWrites(), *self.statement(state))

    def _started(self, state: DestinationState, _: Event) -> DestinationStep:
        step = _go(state, Phase.HYDRATING)
        return DestinationStep(step.state, (*step.effects, Hydrate()))

    def _hydrate(self, state: DestinationState, _: Event) -> DestinationStep:
        return DestinationStep(state, (AllowWrites(), *self.statement(state), Hydrate()))

    def _serve(self, state: DestinationState, _: Event) -> DestinationStep:
        return DestinationStep(state, (AllowWrites(), *self.statement(state)))

    def _hydrated(self, state: DestinationState, _: Event) -> DestinationStep:
        return _do(state, Operation.MANIFEST)

    def _written(self, state: DestinationState, event: Event) -> DestinationStep:
        assert isinstance(event, Written)
        record = replace(state.record, phase=Phase.INDEPENDENT, manifests=event.manifests)
        state = state._replace(record=record, pending=None, failed=None)
        return DestinationStep(state, (Persist(record), *self.statement(state)))

    def _heard_released(self, state: DestinationState, event: Event) -> DestinationStep:
        if _message(event, Released).epoch != state.record.epoch:
            return DestinationStep(state)
        return _go(state, Phase.RELEASED)

    def _heard_conflict(self, state: DestinationState, _: Event) -> DestinationStep:
        """Only an override whose evidence was wrong leads here."""
        return DestinationStep(state, (Alarm("the source has taken the disks back, but they are owned here"),))

    # -- anywhere -----------------------------------------------------------------------------------------------

    def _retry(self, state: DestinationState, _: Event) -> DestinationStep:
        if state.failed is None or state.pending:
            raise CommandRefusedError("nothing has failed that could be tried again")
        return _do(state, state.failed)

    # -- what happens when --------------------------------------------------------------------------------------

    HAPPENED: ClassVar[dict[tuple[Phase, type], _Handler]] = {
        (Phase.JOINING, Decline): _operator_declined,
        (Phase.PREPARING, Decline): _operator_declined,
        (Phase.PREPARED, Decline): _operator_declined,
        (Phase.HYDRATING, Hydrated): _hydrated,
        (Phase.HYDRATING, Written): _written,
    }

    HAPPENED_ANYWHERE: ClassVar[dict[type, _Handler]] = {
        Connected: _connected,
        Lost: _lost,
        Tick: _tick,
        Retry: _retry,
    }

    HEARD: ClassVar[dict[tuple[Phase, type], _Handler]] = {
        (Phase.JOINING, Offer): _heard_offer,
        (Phase.JOINING, Over): _heard_over,
        (Phase.PREPARING, Over): _heard_over,
        (Phase.PREPARED, Grant): _heard_grant,
        (Phase.PREPARED, Over): _heard_over,
        (Phase.ACCEPTED, Grant): _answer,
        (Phase.ACCEPTED, Over): _heard_conflict,
        (Phase.HYDRATING, Grant): _answer,
        (Phase.HYDRATING, Over): _heard_conflict,
        (Phase.INDEPENDENT, Grant): _answer,
        (Phase.INDEPENDENT, Over): _heard_conflict,
        (Phase.INDEPENDENT, Released): _heard_released,
        (Phase.DECLINED, Offer): _answer,
        (Phase.DECLINED, Grant): _answer,
        (Phase.DECLINED, Over): _heard_over_again,
    }

    DONE: ClassVar[dict[tuple[Phase, Operation], _Handler]] = {
        (Phase.PREPARING, Operation.PREPARE): _prepared,
        (Phase.PREPARED, Operation.PREPARE): _answer,
        (Phase.ACCEPTED, Operation.PREPARE): _begin,
        (Phase.ACCEPTED, Operation.HOOK_ACCEPT): _started,
        (Phase.HYDRATING, Operation.PREPARE): _hydrate,
        (Phase.INDEPENDENT, Operation.PREPARE): _serve,
        (Phase.RELEASED, Operation.PREPARE): _serve,
    }


def _go(state: DestinationState, phase: Phase, *, epoch: int | None = None, note: str = "") -> DestinationStep:
    """Enter a phase: that is durable before anything else happens."""
    record = replace(state.record, phase=phase, epoch=state.record.epoch if epoch is None else epoch)
    return DestinationStep(state._replace(record=record), (Persist(record, note),))


def _do(state: DestinationState, operation: Operation) -> DestinationStep:
    return DestinationStep(state._replace(pending=operation, failed=None), (Do(operation),))


def _before(step: DestinationStep, *first: Effect) -> DestinationStep:
    return DestinationStep(step.state, (*first, *step.effects))


def _message(event: Event, kind: type[_M]) -> _M:
    """Return the message of the kind that the tables say it is."""
    assert isinstance(event, Received)
    assert isinstance(event.message, kind)
    return event.message
