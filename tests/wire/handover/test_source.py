"""What the model checker does not ask: texts, notes, orders of effects, who is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
from msgspec.structs import replace

from nbdstream.wire.handover.messages import VERSION, Accepted, Disk, Hello, Independent, Offer, Prepared
from nbdstream.wire.handover.source import Source, SourceFacts, SourceState
from nbdstream.wire.handover.vocabulary import (
    Alarm,
    CloseExport,
    CommandRefusedError,
    Connected,
    Decline,
    Do,
    Done,
    Failed,
    Fence,
    OpenExport,
    Operation,
    Override,
    Persist,
    Phase,
    Received,
    Release,
    Retry,
    Send,
    SourceRecord,
    Tick,
)
from tests.wire.handover.sides import SOURCE_FACTS, manifests

if TYPE_CHECKING:
    from nbdstream.wire.handover.vocabulary import Command

DESTINATION: Final = "d" * 32
KEY: Final[dict[str, Any]] = {"group": SOURCE_FACTS.group, "destination": DESTINATION}
HELLO: Final = Hello(**KEY, epoch=0, version=VERSION, token=SOURCE_FACTS.token)
SOURCE: Final = Source(SOURCE_FACTS)
OFFERED: Final = SourceState(SourceRecord(Phase.OFFERED, 1))
BOUND: Final = SourceState(SourceRecord(Phase.OFFERED, 1, DESTINATION, "f" * 64))
GRANTED: Final = SourceState(SourceRecord(Phase.GRANTED, 2, DESTINATION), connected=True, prepared=True, fenced=True)


def at(phase: Phase, **changes: Any) -> SourceState:
    """The source somewhere, with its destination connected and prepared."""
    return GRANTED._replace(record=replace(GRANTED.record, phase=phase), **changes)


# -- who is talked to -----------------------------------------------------------------------------------------------


def test_the_first_with_the_token_is_the_destination_and_that_is_durable_before_it_hears_anything() -> None:
    assert SOURCE.refusal(OFFERED, HELLO, "f" * 64) is None
    state, effects = SOURCE.step(OFFERED, Connected(DESTINATION, "f" * 64))
    bound = SourceRecord(Phase.OFFERED, 1, DESTINATION, "f" * 64)
    assert state.record == bound
    offer = Offer(**KEY, epoch=1, disks=SOURCE_FACTS.disks, port=SOURCE_FACTS.port)
    assert effects == (Persist(bound, "the token serves this destination"), Send(offer))


def test_the_same_destination_is_served_again_without_a_record() -> None:
    _, effects = SOURCE.step(BOUND, Connected(DESTINATION, "f" * 64))
    assert [type(effect) for effect in effects] == [Send]


@pytest.mark.parametrize("change", [{"token": "c" * 32}, {"group": "c" * 32}])
def test_a_wrong_token_and_a_wrong_group_are_refused_alike(change: dict[str, str]) -> None:
    assert SOURCE.refusal(OFFERED, replace(HELLO, **change), "") == "there is no such offer, or this is not its token"


def test_another_certificate_is_refused_even_with_the_id_of_the_destination() -> None:
    assert SOURCE.refusal(BOUND, HELLO, "e" * 64) == "the token serves another destination"


def test_a_destination_with_a_certificate_is_not_taken_over_without_one() -> None:
    assert SOURCE.refusal(BOUND, HELLO, "") == "the token serves another destination"


def test_on_loopback_another_id_is_refused() -> None:
    bound = SourceState(SourceRecord(Phase.OFFERED, 1, DESTINATION))
    refusal = SOURCE.refusal(bound, replace(HELLO, destination="e" * 32), "")
    assert refusal == "the token serves this destination with another state directory"


def test_a_certificate_may_come_with_another_id_before_the_fence_and_not_after() -> None:
    again = replace(HELLO, destination="e" * 32)
    assert SOURCE.refusal(BOUND, again, "f" * 64) is None
    for phase in set(Phase) - {Phase.OFFERED}:
        state = SourceState(replace(BOUND.record, phase=phase))
        assert (
            SOURCE.refusal(state, again, "f" * 64) == "the token serves this destination with another state directory"
        )


def test_what_the_old_id_says_after_that_is_not_heard() -> None:
    state, _ = SOURCE.step(BOUND, Connected("e" * 32, "f" * 64))
    message = Prepared(**KEY, epoch=1, disks=SOURCE_FACTS.disks)
    assert SOURCE.step(state, Received(message)) == (state, ())


def test_another_version_is_refused() -> None:
    refusal = SOURCE.refusal(OFFERED, replace(HELLO, version=7), "")
    assert refusal == "version 7 is not known here: this is version 1"


# -- commands that cannot be done -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "command", "why"),
    [
        (OFFERED, Fence(), "the destination is not connected and prepared: the guest goes on running"),
        (BOUND._replace(connected=True), Fence(), "not connected and prepared"),
        (GRANTED, Fence(), "the source is GRANTED: only from OFFERED on"),
        (GRANTED, Decline(), "the disks are not its own"),
        (GRANTED, Override("  "), "say how it is known"),
        (OFFERED, Override("it burned"), "there is nothing to take back"),
        (at(Phase.RELEASED), Override("it burned"), "the source is RELEASED: there is nothing to take back"),
        (GRANTED, Release(manifests(whole=False)), "the manifests do not fit: disk"),
        (OFFERED, Release(manifests(whole=True)), "there is nothing to release"),
        (GRANTED, Retry(), "nothing has failed"),
        (at(Phase.RESUMING, failed=Operation.SHOW, pending=Operation.SHOW), Retry(), "nothing has failed"),
    ],
)
def test_a_command_that_cannot_be_done_is_refused_with_the_reason(
    state: SourceState, command: Command, why: str
) -> None:
    with pytest.raises(CommandRefusedError, match=why):
        SOURCE.step(state, command)


# -- what comes before what -----------------------------------------------------------------------------------------


def test_from_fence_to_grant_there_are_two_records() -> None:
    state = BOUND._replace(connected=True, prepared=True)
    done: list[Any] = []
    step = SOURCE.step(state, Fence())
    for operation in (Operation.HOOK_FENCE, Operation.TAKE_FENCE, Operation.HIDE):
        assert step.effects[-1] == Do(operation)
        done += step.effects
        step = SOURCE.step(step.state, Done(operation))
    done += step.effects
    assert [type(effect).__name__ for effect in done] == [
        *("Persist", "Do", "Do", "OpenExport", "Do", "Persist", "Send"),
    ]
    assert step.state.record == replace(BOUND.record, phase=Phase.GRANTED, epoch=2)


def test_the_evidence_of_an_override_is_in_the_journal() -> None:
    _, effects = SOURCE.step(GRANTED, Override("host b was switched off at 12:01 by Ada"))
    assert isinstance(effects[0], Persist)
    assert effects[0].note == "override: host b was switched off at 12:01 by Ada"
    assert effects[0].record == SourceRecord(Phase.RESUMING, 3, DESTINATION, then=Phase.DECLINED)


def test_the_export_is_closed_before_the_images_are_disposed_of() -> None:
    message = Independent(**KEY, epoch=2, manifests=manifests(whole=True))
    state, effects = SOURCE.step(GRANTED, Received(message))
    assert effects == (Persist(state.record), CloseExport(), Do(Operation.DISPOSE))


def test_a_manifest_that_does_not_fit_is_an_alarm_and_changes_nothing() -> None:
    message = Independent(**KEY, epoch=2, manifests=manifests(whole=False))
    state, [alarm] = SOURCE.step(GRANTED, Received(message))
    assert state == GRANTED
    assert isinstance(alarm, Alarm)
    assert "the destination's manifests do not fit" in alarm.text


def test_a_destination_that_prepared_for_other_disks_is_an_alarm() -> None:
    other = (replace(SOURCE_FACTS.disks[0], size=512), *SOURCE_FACTS.disks[1:])
    state = BOUND._replace(connected=True)
    after, effects = SOURCE.step(state, Received(Prepared(**KEY, epoch=1, disks=other)))
    assert after == state
    assert effects == (Alarm("the destination is prepared for other disks than these"),)


def test_a_destination_that_accepted_what_was_taken_back_is_an_alarm() -> None:
    state = at(Phase.DECLINED)
    after, effects = SOURCE.step(state, Received(Accepted(**KEY, epoch=2)))
    assert after == state
    assert effects == (Alarm("the destination owns the disks at epoch 2: stop the guest here"),)


def test_a_failed_resume_waits_for_the_operator() -> None:
    state = at(Phase.RESUMING, pending=Operation.HOOK_RESUME, fenced=False)
    state, effects = SOURCE.step(state, Failed(Operation.HOOK_RESUME))
    assert (state.record.phase, state.failed, effects) == (Phase.RESUMING, Operation.HOOK_RESUME, ())
    assert SOURCE.step(state, Tick()).effects[:1] != (Do(Operation.HOOK_RESUME),)
    assert SOURCE.step(state, Retry()).effects == (Do(Operation.HOOK_RESUME),)


def test_a_fence_that_is_not_to_be_had_again_is_tried_at_every_tick_and_nothing_is_said_meanwhile() -> None:
    state, effects = SOURCE.restart(GRANTED.record)
    assert effects == (Do(Operation.TAKE_FENCE),)
    state = SOURCE.step(state, Failed(Operation.TAKE_FENCE)).state
    state, effects = SOURCE.step(state, Connected(DESTINATION))
    assert effects == ()
    state, effects = SOURCE.step(state, Tick())
    assert effects == (Do(Operation.TAKE_FENCE),)
    state, effects = SOURCE.step(state, Done(Operation.TAKE_FENCE))
    assert [type(effect) for effect in effects] == [OpenExport, Send]


def test_the_end_of_an_operation_that_nobody_waits_for_changes_nothing() -> None:
    state = at(Phase.RESUMING, pending=Operation.SHOW)
    assert SOURCE.step(state, Done(Operation.HOOK_FENCE)) == (state, ())
    assert SOURCE.step(state, Failed(Operation.HOOK_FENCE)) == (state, ())


def test_one_disk_or_many_are_granted_by_one_message() -> None:
    disks = tuple(Disk(f"{number:08x}-0000-0000-0000-000000000000", 1 << 20, f"{number}") for number in range(64))
    source = Source(SourceFacts(SOURCE_FACTS.group, SOURCE_FACTS.token, disks, 10809))
    _, effects = source.step(at(Phase.FENCING, pending=Operation.HIDE), Done(Operation.HIDE))
    assert [type(effect) for effect in effects] == [Persist, Send]
