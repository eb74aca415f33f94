"""What the model checker does not ask: texts, notes, orders of effects."""

from __future__ import annotations

from typing import Any, Final

import pytest
from msgspec.structs import replace

from nbdstream.wire.handover.destination import OWNER, Destination, DestinationState
from nbdstream.wire.handover.messages import Grant, Offer, Over, Released
from nbdstream.wire.handover.vocabulary import (
    Alarm,
    CommandRefusedError,
    Connected,
    Decline,
    DestinationRecord,
    Do,
    Done,
    Failed,
    Hydrated,
    Operation,
    Persist,
    Phase,
    Received,
    Retry,
    Written,
)
from tests.wire.handover.sides import DESTINATION_FACTS, SOURCE_FACTS, manifests

KEY: Final[dict[str, Any]] = {"group": DESTINATION_FACTS.group, "destination": DESTINATION_FACTS.destination}
DESTINATION: Final = Destination(DESTINATION_FACTS)
OFFER: Final = Offer(**KEY, epoch=1, disks=SOURCE_FACTS.disks, port=SOURCE_FACTS.port)


def at(phase: Phase, **changes: Any) -> DestinationState:
    """The destination somewhere, connected to its source."""
    epoch = 2 if phase in OWNER else 1
    record = DestinationRecord(phase, epoch, SOURCE_FACTS.disks, SOURCE_FACTS.port)
    return DestinationState(record, connected=True, **changes)


def _names(effects: tuple[Any, ...]) -> list[str]:
    return [type(getattr(effect, "message", effect)).__name__ for effect in effects]


def test_the_first_word_is_hello_with_the_token() -> None:
    _, effects = DESTINATION.step(DestinationState(DestinationRecord(Phase.JOINING)), Connected())
    assert _names(effects) == ["Hello"]


def test_after_hello_it_says_where_it_stands() -> None:
    for phase, statement in (
        (Phase.PREPARED, "Prepared"),
        (Phase.ACCEPTED, "Accepted"),
        (Phase.HYDRATING, "Accepted"),
        (Phase.INDEPENDENT, "Independent"),
        (Phase.DECLINED, "Declined"),
    ):
        assert _names(DESTINATION.step(at(phase), Connected()).effects) == ["Hello", statement]


def test_what_it_makes_is_in_the_journal_before_it_is_made() -> None:
    state, effects = DESTINATION.step(DestinationState(DestinationRecord(Phase.JOINING)), Received(OFFER))
    assert state.record == at(Phase.PREPARING).record
    assert effects == (Persist(state.record), Do(Operation.PREPARE))


def test_accepting_is_durable_then_the_guest_may_write_then_the_source_hears_of_it_then_the_hook_runs() -> None:
    state, effects = DESTINATION.step(at(Phase.PREPARED), Received(Grant(**KEY, epoch=2)))
    assert state.record == at(Phase.ACCEPTED).record
    assert _names(effects) == ["Persist", "AllowWrites", "Accepted", "Do"]
    assert effects[-1] == Do(Operation.HOOK_ACCEPT)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_grant_of_another_epoch_is_not_accepted(epoch: int) -> None:
    assert DESTINATION.step(at(Phase.PREPARED), Received(Grant(**KEY, epoch=epoch))) == (at(Phase.PREPARED), ())


def test_a_grant_that_comes_while_the_overlays_are_being_opened_again_waits_for_the_next() -> None:
    state = DESTINATION.restart(at(Phase.PREPARED).record).state
    assert DESTINATION.step(state, Received(Grant(**KEY, epoch=2))) == (state, ())


def test_a_grant_for_somebody_else_is_not_accepted() -> None:
    grant = Grant(group=DESTINATION_FACTS.group, destination="e" * 32, epoch=2)
    state, effects = DESTINATION.step(at(Phase.PREPARED), Received(grant))
    assert state == at(Phase.PREPARED)
    assert effects == (Alarm("the source speaks to somebody else here"),)


def test_a_guest_that_does_not_start_stops_the_hand_over_until_the_operator_tries_again() -> None:
    state = at(Phase.ACCEPTED, pending=Operation.HOOK_ACCEPT)
    state, effects = DESTINATION.step(state, Failed(Operation.HOOK_ACCEPT))
    assert (state.record.phase, state.failed, effects) == (Phase.ACCEPTED, Operation.HOOK_ACCEPT, ())
    state, effects = DESTINATION.step(state, Retry())
    assert effects == (Do(Operation.HOOK_ACCEPT),)
    state, effects = DESTINATION.step(state, Done(Operation.HOOK_ACCEPT))
    assert _names(effects) == ["Persist", "Hydrate"]


def test_independent_is_said_after_the_manifests_are_written_and_that_is_in_the_journal() -> None:
    state, effects = DESTINATION.step(at(Phase.HYDRATING), Hydrated())
    assert effects == (Do(Operation.MANIFEST),)
    state, effects = DESTINATION.step(state, Written(manifests(whole=True)))
    assert _names(effects) == ["Persist", "Independent"]
    assert state.record.manifests == manifests(whole=True)


def test_declined_is_durable_then_said_then_the_overlays_are_removed() -> None:
    for phase in (Phase.JOINING, Phase.PREPARING, Phase.PREPARED):
        for event in (Decline(), Received(Over(**KEY, epoch=3))):
            state, effects = DESTINATION.step(at(phase), event)
            assert state.record.phase is Phase.DECLINED
            assert _names(effects) == ["Persist", "Declined", "Do"]
            assert effects[-1] == Do(Operation.DISCARD)


@pytest.mark.parametrize("phase", sorted(OWNER))
def test_the_owner_cannot_decline(phase: Phase) -> None:
    with pytest.raises(CommandRefusedError, match=f"the destination is {phase.upper()}: it owns the disks"):
        DESTINATION.step(at(phase), Decline())


@pytest.mark.parametrize("phase", sorted(OWNER - {Phase.RELEASED}))
def test_a_late_word_of_the_source_does_not_talk_the_owner_back(phase: Phase) -> None:
    state, effects = DESTINATION.step(at(phase), Received(Over(**KEY, epoch=3)))
    assert state == at(phase)
    assert effects == (Alarm("the source has taken the disks back, but they are owned here"),)


def test_a_release_of_another_epoch_is_not_heard() -> None:
    state = at(Phase.INDEPENDENT)
    assert DESTINATION.step(state, Received(Released(**KEY, epoch=1))) == (state, ())
    assert DESTINATION.step(state, Received(Released(**KEY, epoch=2))).state.record.phase is Phase.RELEASED


def test_a_new_offer_does_not_change_what_it_prepared_for() -> None:
    other = replace(OFFER, epoch=9)
    assert DESTINATION.step(at(Phase.PREPARED), Received(other)) == (at(Phase.PREPARED), ())
