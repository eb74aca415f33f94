"""The source's side of a hand-over: it owns the disks until it grants them, and again only if the destination declines.

::

    OFFERED --fence--> FENCING --granted--> GRANTED --accepted--> ACCEPTED --independent--> RELEASING --> RELEASED
       ^                  |                    |                      |
       |                  | hook, lock failed; | declined             | (operator's override,
       |                  | nobody came        | (or override)        |  with evidence)
       +----- RESUMING <--+--------------------+----------------------+
                  |
                  +--> DECLINED      (from OFFERED and FENCING too, when either side calls it off)

The tables at the end say what happens when; what is in none of them changes nothing. In them stand the rules:

- GRANTED is entered in one place: fenced, hidden, with a destination that is prepared now; and durable before it is
  said.
- It is left for RESUMING by a decline of the destination or an operator's override, at an epoch of its own. No timer
  is in the tables for it.
- RELEASING is entered in one place: with manifests that show that the destination needs nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable
from hmac import compare_digest
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias, TypeVar

from msgspec.structs import replace

from nbdstream.wire.handover.messages import (
    VERSION,
    Accepted,
    Declined,
    Disks,
    Grant,
    Hello,
    Independent,
    Manifests,
    Message,
    Offer,
    Over,
    Prepared,
    Released,
    manifest_problem,
)
from nbdstream.wire.handover.vocabulary import (
    NOTHING,
    Alarm,
    CloseExport,
    Command,
    CommandRefusedError,
    Connected,
    Decline,
    Do,
    Done,
    Effect,
    Event,
    Failed,
    Fence,
    FenceTimeout,
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
    StartFenceTimer,
    Tick,
)

_GRANTING: Final = (Phase.GRANTED, Phase.ACCEPTED)
"""The source has given the disks away, and holds the fence for their new owner."""


_FIRST_AFTER_RESTART: Final = {
    Phase.FENCING: Operation.HOOK_FENCE,
    Phase.GRANTED: Operation.TAKE_FENCE,
    Phase.ACCEPTED: Operation.TAKE_FENCE,
    Phase.RESUMING: Operation.SHOW,
    Phase.RELEASING: Operation.DISPOSE,
}

_STATEMENTS: Final[dict[Phase, type[Message]]] = {
    Phase.GRANTED: Grant,
    Phase.ACCEPTED: Grant,  # which asks how far the destination is
    Phase.DECLINED: Over,
    Phase.RELEASED: Released,
}

_REFUSALS: Final[dict[type, str]] = {
    Fence: "the source is {}: only from OFFERED on can the guest be fenced",
    Decline: "the source is {}: the disks are not its own, so it cannot call the hand-over off",
    Release: "the source is {}: there is nothing to release",
    Override: "the source is {}: there is nothing to take back",
}


class SourceFacts(NamedTuple):
    """What an offer is about; does not change as long as it stands."""

    group: str
    token: str
    disks: Disks
    port: int
    """Of the NBD server."""


class SourceState(NamedTuple):
    """The record as the journal will have it once the effects are executed, and what a crash forgets."""

    record: SourceRecord
    connected: bool = False
    prepared: bool = False
    """Whether the destination said so on this connection."""
    fenced: bool = False
    pending: Operation | None = None
    """The operation whose end is waited for. (The end of any other is past interest.)"""
    failed: Operation | None = None
    """The last operation that failed, until something succeeds or is tried again."""
    told: bool = False
    """Whether the destination knows that it is over."""


class SourceStep(NamedTuple):
    """What follows from an event."""

    state: SourceState
    effects: tuple[Effect, ...] = NOTHING


_M = TypeVar("_M", bound=Message)
_Handler: TypeAlias = Callable[["Source", SourceState, Event], SourceStep]


class Source:
    """Decides for the source. It keeps nothing: the state is given and returned."""

    def __init__(self, facts: SourceFacts) -> None:
        self.facts = facts

    def restart(self, record: SourceRecord) -> SourceStep:
        """Return how to go on from what the journal says."""
        state = SourceState(record)
        if record.phase is Phase.OFFERED:
            return SourceStep(state, (OpenExport(),))
        first = _FIRST_AFTER_RESTART.get(record.phase)
        return _do(state, first) if first else SourceStep(state)

    def refusal(self, state: SourceState, hello: Hello, fingerprint: str) -> str | None:
        """Return why who says this is not talked to; None if it is the destination.

        ``fingerprint`` is that of its certificate, empty where there is no TLS. The first that has the token is the
        destination. Where a certificate shows that it is the same, it may come with a new journal (a new id) until a
        grant is near: of two that prepared with one certificate, one at most may ever hear of it.
        """
        record = state.record
        if hello.version != VERSION:
            return f"version {hello.version} is not known here: this is version {VERSION}"
        known = compare_digest(hello.group, self.facts.group)
        if not (compare_digest(hello.token, self.facts.token) and known):
            return "there is no such offer, or this is not its token"
        if not record.destination:
            return None
        if fingerprint != record.fingerprint:
            return "the token serves another destination"
        if hello.destination == record.destination or (fingerprint and record.phase is Phase.OFFERED):
            return None
        return "the token serves this destination with another state directory"

    def step(self, state: SourceState, event: Event) -> SourceStep:
        """Return what follows from the event. Raises CommandRefusedError for a command that cannot be done now."""
        phase = state.record.phase
        if isinstance(event, Received):
            return self._received(state, event.message)
        if isinstance(event, Done | Failed):
            if event.operation is not state.pending:
                return SourceStep(state)
            table = self.DONE if isinstance(event, Done) else self.FAILED
            ended = state._replace(pending=None, failed=None if isinstance(event, Done) else event.operation)
            handler = table.get((phase, event.operation))
            return handler(self, ended, event) if handler else SourceStep(ended)
        handler = self.HAPPENED.get((phase, type(event))) or self.HAPPENED_ANYWHERE.get(type(event))
        if handler:
            return handler(self, state, event)
        if isinstance(event, Command):
            raise CommandRefusedError(_REFUSALS[type(event)].format(phase.upper()))
        return SourceStep(state)

    def statement(self, state: SourceState) -> tuple[Effect, ...]:
        """Return the message that says where the source stands; nothing where it must not speak yet."""
        record = state.record
        if record.phase in _GRANTING and not state.fenced:
            return NOTHING  # somebody may be writing: what was granted is not said until that cannot be
        phase = record.then if record.phase is Phase.RESUMING else record.phase
        if phase in (Phase.OFFERED, Phase.FENCING):
            return (self._say(Offer, record, disks=self.facts.disks, port=self.facts.port),)
        kind = _STATEMENTS.get(phase)
        return (self._say(kind, record),) if kind else NOTHING

    def _say(self, kind: type[Message], record: SourceRecord, **fields: Any) -> Send:
        return Send(kind(group=self.facts.group, destination=record.destination, epoch=record.epoch, **fields))

    # -- the connection -----------------------------------------------------------------------------------------

    def _connected(self, state: SourceState, event: Event) -> SourceStep:
        assert isinstance(event, Connected)
        bound = replace(state.record, destination=event.destination, fingerprint=event.fingerprint)
        remember = NOTHING if bound == state.record else (Persist(bound, "the token serves this destination"),)
        state = state._replace(record=bound, connected=True, prepared=False)
        return SourceStep(state, remember + self.statement(state))

    def _lost(self, state: SourceState, _: Event) -> SourceStep:
        return SourceStep(state._replace(connected=False, prepared=False))

    def _received(self, state: SourceState, message: Message) -> SourceStep:
        record = state.record
        if (message.group, message.destination) != (self.facts.group, record.destination):
            return SourceStep(state)  # late: of another offer, or of a journal of the destination's that is gone
        handler = self.HEARD.get((record.phase, type(message)))
        return handler(self, state, Received(message)) if handler else SourceStep(state)

    def _answer(self, state: SourceState, _: Event) -> SourceStep:
        return SourceStep(state, self.statement(state))

    # -- up to the grant ----------------------------------------------------------------------------------------

    def _fence(self, state: SourceState, _: Event) -> SourceStep:
        if not state.prepared:
            raise CommandRefusedError("the destination is not connected and prepared: the guest goes on running")
        return _go(state, Phase.FENCING, then=Operation.HOOK_FENCE)

    def _guest_stopped(self, state: SourceState, _: Event) -> SourceStep:
        return _do(state, Operation.TAKE_FENCE)

    def _fence_taken(self, state: SourceState, event: Event) -> SourceStep:
        fenced = state._replace(fenced=True)
        return _before(self._toward_grant(fenced, event), OpenExport())

    def _toward_grant(self, state: SourceState, _: Event) -> SourceStep:
        """Fenced: hide the images, if there is somebody to grant them to; else wait for that."""
        if state.prepared:
            return _do(state, Operation.HIDE)
        return SourceStep(state, (StartFenceTimer(),))

    def _hidden(self, state: SourceState, _: Event) -> SourceStep:
        """Grant the disks: the only place where that happens."""
        if not state.prepared:
            return SourceStep(state, (StartFenceTimer(),))
        step = _go(state, Phase.GRANTED, epoch=state.record.epoch + 1)
        return SourceStep(step.state, step.effects + self.statement(step.state))

    def _heard_prepared(self, state: SourceState, event: Event) -> SourceStep:
        message = _message(event, Prepared)
        if message.epoch != state.record.epoch:
            return SourceStep(state)
        if message.disks != self.facts.disks:
            return SourceStep(state, (Alarm("the destination is prepared for other disks than these"),))
        state = state._replace(prepared=True)
        if state.record.phase is Phase.FENCING and state.fenced and state.pending is None:
            return self._toward_grant(state, event)
        return SourceStep(state)

    # -- calling it off -----------------------------------------------------------------------------------------

    def _call_off(
        self, state: SourceState, then: Phase, epoch: int | None = None, note: str = "", *, told: bool = False
    ) -> SourceStep:
        """Take the disks back from the fence, or from a grant that nobody can accept any more."""
        record = state.record
        record = replace(record, phase=Phase.RESUMING, then=then, epoch=record.epoch if epoch is None else epoch)
        state = state._replace(record=record, pending=Operation.SHOW, told=told)
        said = self.statement(state) if then is Phase.DECLINED else NOTHING
        return SourceStep(state, (Persist(record, note), *said, CloseExport(), Do(Operation.SHOW)))

    def _fence_failed(self, state: SourceState, _: Event) -> SourceStep:
        return self._call_off(state, Phase.OFFERED)

    def _nobody_came(self, state: SourceState, _: Event) -> SourceStep:
        if state.prepared or not state.fenced or state.pending:
            return SourceStep(state)
        return self._call_off(state, Phase.OFFERED, note="the destination did not come back in time")

    def _heard_declined(self, state: SourceState, event: Event) -> SourceStep:
        record = state.record
        if record.phase is Phase.DECLINED or (record.phase is Phase.RESUMING and record.then is Phase.DECLINED):
            return self._answer(state._replace(told=True), event)
        granted = record.phase is Phase.GRANTED
        if _message(event, Declined).epoch > record.epoch - granted:
            return SourceStep(state)
        epoch = record.epoch + 1 if granted else record.epoch  # a granted epoch is not used again
        return self._decline(state, epoch, "the destination declined", told=True)

    def _operator_declined(self, state: SourceState, _: Event) -> SourceStep:
        return self._decline(state, state.record.epoch, "the operator called it off")

    def _decline(self, state: SourceState, epoch: int, note: str, *, told: bool = False) -> SourceStep:
        """End it, from wherever the source is when it may."""
        if state.record.phase is Phase.OFFERED:
            step = _go(state._replace(told=told, failed=None), Phase.DECLINED, note=note)
            return SourceStep(step.state, (*step.effects, *self.statement(step.state), CloseExport()))
        if state.record.phase is Phase.RESUMING:
            record = replace(state.record, then=Phase.DECLINED)
            state = state._replace(record=record, told=state.told or told)
            return SourceStep(state, (Persist(record, note), *self.statement(state)))
        return self._call_off(state, Phase.DECLINED, epoch, note, told=told)

    def _override(self, state: SourceState, event: Event) -> SourceStep:
        assert isinstance(event, Override)
        if not event.evidence.strip():
            raise CommandRefusedError("say how it is known that the destination does not run, and never will")
        note = f"override: {event.evidence}"
        return self._call_off(state, Phase.DECLINED, state.record.epoch + 1, note)

    def _shown(self, state: SourceState, _: Event) -> SourceStep:
        resuming = _do(state._replace(fenced=False), Operation.HOOK_RESUME)
        return _before(resuming, ReleaseFence())

    def _resumed(self, state: SourceState, _: Event) -> SourceStep:
        step = _go(state, state.record.then)
        if step.state.record.phase is Phase.OFFERED:
            return SourceStep(step.state, (*step.effects, OpenExport()))
        return step

    # -- after the grant ----------------------------------------------------------------------------------------

    def _fence_retaken(self, state: SourceState, _: Event) -> SourceStep:
        state = state._replace(fenced=True)
        return SourceStep(state, (OpenExport(), *self.statement(state)))

    def _tick_granted(self, state: SourceState, event: Event) -> SourceStep:
        if not state.fenced and state.pending is None:
            return _do(state, Operation.TAKE_FENCE)
        return self._tick(state, event)

    def _heard_prepared_for_grant(self, state: SourceState, event: Event) -> SourceStep:
        if _message(event, Prepared).epoch != state.record.epoch - 1:
            return SourceStep(state)
        return self._answer(state, event)

    def _heard_accepted(self, state: SourceState, event: Event) -> SourceStep:
        if _message(event, Accepted).epoch != state.record.epoch:
            return SourceStep(state)
        return _go(state, Phase.ACCEPTED)

    def _heard_conflict(self, state: SourceState, event: Event) -> SourceStep:
        """Only an override whose evidence was wrong leads here: a destination that has accepted stays the owner."""
        epoch = _message(event, Message).epoch
        return SourceStep(state, (Alarm(f"the destination owns the disks at epoch {epoch}: stop the guest here"),))

    def _heard_independent(self, state: SourceState, event: Event) -> SourceStep:
        problem = self._problem(state, _message(event, Independent).manifests)
        if problem:
            return SourceStep(state, (Alarm(f"the destination's manifests do not fit: {problem}"),))
        return self._release(state)

    def _operator_released(self, state: SourceState, event: Event) -> SourceStep:
        assert isinstance(event, Release)
        problem = self._problem(state, event.manifests)
        if problem:
            raise CommandRefusedError(f"the manifests do not fit: {problem}")
        return self._release(state)

    def _problem(self, state: SourceState, manifests: Manifests) -> str | None:
        return manifest_problem(self.facts.disks, state.record.epoch, manifests)

    def _release(self, state: SourceState) -> SourceStep:
        step = _go(state, Phase.RELEASING, then=Operation.DISPOSE)
        persist, dispose = step.effects
        return SourceStep(step.state, (persist, CloseExport(), dispose))

    def _disposed(self, state: SourceState, _: Event) -> SourceStep:
        step = _go(state, Phase.RELEASED)
        return SourceStep(step.state, step.effects + self.statement(step.state))

    # -- anywhere -----------------------------------------------------------------------------------------------

    def _tick(self, state: SourceState, _: Event) -> SourceStep:
        return SourceStep(state, self.statement(state) if state.connected else NOTHING)

    def _retry(self, state: SourceState, _: Event) -> SourceStep:
        if state.failed is None or state.pending:
            raise CommandRefusedError("nothing has failed that could be tried again")
        return _do(state, state.failed)

    # -- what happens when --------------------------------------------------------------------------------------

    HAPPENED: ClassVar[dict[tuple[Phase, type], _Handler]] = {
        (Phase.OFFERED, Fence): _fence,
        (Phase.OFFERED, Decline): _operator_declined,
        (Phase.FENCING, Decline): _operator_declined,
        (Phase.FENCING, FenceTimeout): _nobody_came,
        (Phase.RESUMING, Decline): _operator_declined,
        (Phase.GRANTED, Override): _override,
        (Phase.GRANTED, Release): _operator_released,
        (Phase.GRANTED, Tick): _tick_granted,
        (Phase.ACCEPTED, Override): _override,
        (Phase.ACCEPTED, Release): _operator_released,
        (Phase.ACCEPTED, Tick): _tick_granted,
    }

    HAPPENED_ANYWHERE: ClassVar[dict[type, _Handler]] = {
        Connected: _connected,
        Lost: _lost,
        Tick: _tick,
        Retry: _retry,
    }

    HEARD: ClassVar[dict[tuple[Phase, type], _Handler]] = {
        (Phase.OFFERED, Prepared): _heard_prepared,
        (Phase.OFFERED, Declined): _heard_declined,
        (Phase.FENCING, Prepared): _heard_prepared,
        (Phase.FENCING, Declined): _heard_declined,
        (Phase.GRANTED, Prepared): _heard_prepared_for_grant,
        (Phase.GRANTED, Accepted): _heard_accepted,
        (Phase.GRANTED, Declined): _heard_declined,
        (Phase.GRANTED, Independent): _heard_independent,
        (Phase.ACCEPTED, Independent): _heard_independent,
        (Phase.RESUMING, Declined): _heard_declined,
        (Phase.RESUMING, Accepted): _heard_conflict,
        (Phase.RESUMING, Independent): _heard_conflict,
        (Phase.DECLINED, Declined): _heard_declined,
        (Phase.DECLINED, Accepted): _heard_conflict,
        (Phase.DECLINED, Independent): _heard_conflict,
        (Phase.RELEASED, Independent): _answer,
    }

    DONE: ClassVar[dict[tuple[Phase, Operation], _Handler]] = {
        (Phase.FENCING, Operation.HOOK_FENCE): _guest_stopped,
        (Phase.FENCING, Operation.TAKE_FENCE): _fence_taken,
        (Phase.FENCING, Operation.HIDE): _hidden,
        (Phase.GRANTED, Operation.TAKE_FENCE): _fence_retaken,
        (Phase.ACCEPTED, Operation.TAKE_FENCE): _fence_retaken,
        (Phase.RESUMING, Operation.SHOW): _shown,
        (Phase.RESUMING, Operation.HOOK_RESUME): _resumed,
        (Phase.RELEASING, Operation.DISPOSE): _disposed,
    }

    FAILED: ClassVar[dict[tuple[Phase, Operation], _Handler]] = {
        (Phase.FENCING, Operation.HOOK_FENCE): _fence_failed,
        (Phase.FENCING, Operation.TAKE_FENCE): _fence_failed,
        (Phase.FENCING, Operation.HIDE): _fence_failed,
    }


def _go(
    state: SourceState, phase: Phase, *, epoch: int | None = None, then: Operation | None = None, note: str = ""
) -> SourceStep:
    """Enter a phase: that is durable before anything else happens; then begin an operation."""
    record = replace(state.record, phase=phase, epoch=state.record.epoch if epoch is None else epoch)
    step = _do(state._replace(record=record), then) if then else SourceStep(state._replace(record=record))
    return _before(step, Persist(record, note))


def _do(state: SourceState, operation: Operation) -> SourceStep:
    return SourceStep(state._replace(pending=operation, failed=None), (Do(operation),))


def _before(step: SourceStep, first: Effect) -> SourceStep:
    return SourceStep(step.state, (first, *step.effects))


def _message(event: Event, kind: type[_M]) -> _M:
    """Return the message of the kind that the tables say it is."""
    assert isinstance(event, Received)
    assert isinstance(event.message, kind)
    return event.message
