"""The hand-over protocol, explored exhaustively with the real machines, and with machines that break one rule each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import pytest

from nbdstream.wire.handover.destination import Destination, DestinationState, DestinationStep
from nbdstream.wire.handover.messages import Accepted, Declined, Grant, Over
from nbdstream.wire.handover.source import Source, SourceState, SourceStep
from nbdstream.wire.handover.vocabulary import (
    AllowWrites,
    Do,
    Effect,
    FenceTimeout,
    Hydrate,
    OpenExport,
    Operation,
    Persist,
    Phase,
    ReleaseFence,
)
from tests.wire.handover.explore import Exploration
from tests.wire.handover.rules import check_owner, check_pair
from tests.wire.handover.settle import check_settling
from tests.wire.handover.sides import BrokenError, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.wire.handover.vocabulary import Event, SourceRecord
    from tests.wire.handover.explore import Check

STATES_AT_LEAST: Final = 100_000


@pytest.fixture(scope="module")
def everything() -> Exploration:
    """All that there is, to the depth that the tests have time for (``scripts/model-check`` goes deeper)."""
    found = Exploration(World(most_todo=1))
    found.run()
    return found


def test_every_state_keeps_the_rules_and_settles_with_one_owner(
    everything: Exploration, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = check_settling(everything)
    with capsys.disabled():
        print(f"\n{everything.summary()}, {ends} ends")
    assert len(everything.parents) >= STATES_AT_LEAST
    assert ends > 1


def test_every_transition_meets_a_crash_at_every_point_of_it(everything: Exploration) -> None:
    for host in (everything.source, everything.destination):
        assert host.points
        assert host.crashed_at == host.points


def test_everything_in_the_tables_happens(everything: Exploration) -> None:
    for host, machine in ((everything.source, Source), (everything.destination, Destination)):
        assert not [each for each in _events(machine) if each not in host.events]


def _events(machine: Any) -> list[tuple[Phase, str]]:
    """What the machine's tables have, by the names of the moves."""
    found = [(phase, kind.__name__) for phase, kind in machine.HAPPENED]
    found += [(phase, f"hears {kind.__name__}") for phase, kind in machine.HEARD]
    found += [(phase, f"Done {operation}") for phase, operation in machine.DONE]
    found += [(phase, f"Failed {operation}") for phase, operation in getattr(machine, "FAILED", ())]
    return [each for each in found if each not in _ONLY_AFTER_A_FALSE_OVERRIDE]


def test_a_guest_that_ignores_locks_is_stopped_by_its_hook() -> None:
    found = Exploration(World(most_todo=0, locks=False))
    found.run()
    check_settling(found)


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_of_two_destinations_with_one_certificate_one_is_granted_the_disks(depth: int) -> None:
    Exploration(World(depth, fingerprint="f" * 64, rival=True)).run()


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_of_two_destinations_on_loopback_one_is_granted_the_disks(depth: int) -> None:
    Exploration(World(depth, rival=True)).run()


def test_not_even_a_false_override_takes_anything_from_a_destination_that_accepted() -> None:
    found = Exploration(World(most_todo=0), trust_anybody=True, check=check_owner)
    found.run()
    happened = {(point.phase, point.event) for host in (found.source, found.destination) for point in host.points}
    assert happened >= _ONLY_AFTER_A_FALSE_OVERRIDE


_ONLY_AFTER_A_FALSE_OVERRIDE: Final = frozenset(
    (phase, f"hears {message}")
    for phase, message in (
        (Phase.RESUMING, "Accepted"),
        (Phase.RESUMING, "Independent"),
        (Phase.DECLINED, "Accepted"),
        (Phase.DECLINED, "Independent"),
        (Phase.ACCEPTED, "Over"),
        (Phase.HYDRATING, "Over"),
        (Phase.INDEPENDENT, "Over"),
    )
)


# -- one rule broken each ---------------------------------------------------------------------------------------------


_T = TypeVar("_T", bound=type[Source | Destination])


def wired(**changes: dict[tuple[Phase, Any], str]) -> Callable[[_T], _T]:
    """Change what a machine's tables have, by the names of its methods."""

    def change(machine: _T) -> _T:
        for table, entries in changes.items():
            changed = {key: getattr(machine, name) for key, name in entries.items()}
            setattr(machine, table, {**getattr(machine, table), **changed})
        return machine

    return change


def _persist_last(effects: tuple[Effect, ...]) -> tuple[Effect, ...]:
    """The order of somebody who writes down what he has done."""
    operations = [each for each in effects if isinstance(each, Do)]
    journal = [each for each in effects if isinstance(each, Persist)]
    return (*(each for each in effects if not isinstance(each, Do | Persist)), *journal, *operations)


@wired(DONE={(Phase.FENCING, Operation.HIDE): "_hidden"})
class SaysGrantFirst(Source):
    def _hidden(self, state: SourceState, event: Event) -> SourceStep:
        step = super()._hidden(state, event)
        return SourceStep(step.state, _persist_last(step.effects))


@wired(HEARD={(Phase.PREPARED, Grant): "_heard_grant"})
class StartsGuestFirst(Destination):
    def _heard_grant(self, state: DestinationState, event: Event) -> DestinationStep:
        step = super()._heard_grant(state, event)
        return DestinationStep(step.state, _persist_last(step.effects))


class SaysDeclinedFirst(Destination):
    def _decline(self, state: DestinationState, note: str) -> DestinationStep:
        step = super()._decline(state, note)
        return DestinationStep(step.state, _persist_last(step.effects))


@wired(DONE={(Phase.FENCING, Operation.HOOK_FENCE): "_straight_to_hiding"})
class TakesNoFence(Source):
    def _straight_to_hiding(self, state: SourceState, event: Event) -> SourceStep:
        return self._toward_grant(state._replace(fenced=True), event)


class HidesNothing(Source):
    def _toward_grant(self, state: SourceState, event: Event) -> SourceStep:
        return self._hidden(state, event)


@wired(HAPPENED={(Phase.GRANTED, FenceTimeout): "_nobody_came"})
class TimesOutAfterTheGrant(Source):
    def _nobody_came(self, state: SourceState, _: Event) -> SourceStep:
        return self._call_off(state, Phase.OFFERED, state.record.epoch + 1)


@wired(FAILED={(Phase.FENCING, Operation.HOOK_FENCE): "_guest_stopped"})
class IgnoresFailedHook(Source):
    pass


class SpeaksBeforeItIsFencedAgain(Source):
    def restart(self, record: SourceRecord) -> SourceStep:
        state, effects = super().restart(record)
        return SourceStep(state._replace(fenced=True), (OpenExport(), *effects))


class TakesAnybody(Source):
    def refusal(self, state: SourceState, hello: Any, fingerprint: str) -> str | None:
        return None


@wired(HEARD={(Phase.GRANTED, Declined): "_back_to_before"})
class UsesAnEpochTwice(Source):
    def _back_to_before(self, state: SourceState, event: Event) -> SourceStep:
        return self._decline(state, state.record.epoch - 1, "", told=True)


class NeverShowsTheImagesAgain(Source):
    def _call_off(self, *arguments: Any, **named: Any) -> SourceStep:
        state, effects = super()._call_off(*arguments, **named)
        return SourceStep(
            state._replace(pending=Operation.HOOK_RESUME),
            (*effects[:-1], ReleaseFence(), Do(Operation.HOOK_RESUME)),
        )


@wired(DONE={(Phase.RESUMING, Operation.SHOW): "_shown"})
class ResumesBehindTheFence(Source):
    def _shown(self, state: SourceState, event: Event) -> SourceStep:
        step = super()._shown(state, event)
        return SourceStep(step.state, step.effects[1:])


class SaysGrantOnce(Source):
    def statement(self, state: SourceState) -> tuple[Effect, ...]:
        said = super().statement(state)
        return said if state.record.phase not in (Phase.GRANTED, Phase.ACCEPTED) or state.prepared else ()


@wired(HEARD={(Phase.GRANTED, Accepted): "_straight_to_release"})
class ReleasesWhenAccepted(Source):
    def _straight_to_release(self, state: SourceState, _: Event) -> SourceStep:
        return self._release(state)


class ChecksNoManifest(Source):
    def _problem(self, *_: Any) -> str | None:
        return None


@wired(HEARD={(Phase.DECLINED, Grant): "_heard_grant"})
class AcceptsWhatItDeclined(Destination):
    pass


@wired(DONE={(Phase.PREPARING, Operation.PREPARE): "_prepared"})
class KeepsWhatItReadsEarly(Destination):
    def _prepared(self, state: DestinationState, event: Event) -> DestinationStep:
        step = super()._prepared(state, event)
        return DestinationStep(step.state, (*step.effects, Hydrate()))


@wired(DONE={(Phase.PREPARING, Operation.PREPARE): "_prepared"})
class OpensForWritesEarly(Destination):
    def _prepared(self, state: DestinationState, event: Event) -> DestinationStep:
        step = super()._prepared(state, event)
        return DestinationStep(step.state, (*step.effects, AllowWrites()))


@wired(HEARD={(Phase.ACCEPTED, Over): "_heard_over", (Phase.HYDRATING, Over): "_heard_over"})
class IsTalkedBack(Destination):
    pass


class NeverSaysItIsIndependent(Destination):
    def statement(self, state: DestinationState) -> tuple[Effect, ...]:
        return () if state.record.phase is Phase.INDEPENDENT else super().statement(state)


class Sabotage(NamedTuple):
    """A machine that breaks a rule, and what is found."""

    broken: type[Source | Destination]
    found: str
    world: World = World(most_todo=0)
    check: Check = check_pair
    trust_anybody: bool = False


@pytest.mark.parametrize(
    "sabotage",
    [
        Sabotage(SaysGrantFirst, "a grant is said that is not durable"),
        Sabotage(StartsGuestFirst, "its host does not know that it owns the disks"),
        Sabotage(SaysDeclinedFirst, "two"),
        Sabotage(TakesNoFence, "without the fence|the guest runs on images that are hidden"),
        Sabotage(HidesNothing, "an autostart finds the images"),
        Sabotage(TimesOutAfterTheGrant, "two"),
        Sabotage(IgnoresFailedHook, "the guest runs", World(most_todo=0, locks=False)),
        Sabotage(SpeaksBeforeItIsFencedAgain, "without the fence|not fenced"),
        Sabotage(TakesAnybody, "two destinations were granted", World(most_todo=0, locks=False, rival=True)),
        Sabotage(UsesAnEpochTwice, "an epoch that was granted is used again"),
        Sabotage(NeverShowsTheImagesAgain, "nobody owns|round in circles"),
        Sabotage(ResumesBehindTheFence, "nobody owns|round in circles"),
        Sabotage(SaysGrantOnce, "nobody owns the disks"),
        Sabotage(ReleasesWhenAccepted, "the source is released, and the destination is not independent"),
        Sabotage(ChecksNoManifest, "the source is released, and the destination is not independent"),
        Sabotage(AcceptsWhatItDeclined, "two|there is no overlay"),
        Sabotage(KeepsWhatItReadsEarly, "what may still be written at the source is kept"),
        Sabotage(OpensForWritesEarly, "its host does not know that it owns the disks|two guests"),
        Sabotage(IsTalkedBack, "lost|does not know", check=check_owner, trust_anybody=True),
        Sabotage(NeverSaysItIsIndependent, "it does not come to its end"),
        Sabotage(Source, "two", trust_anybody=True),
    ],
    ids=lambda sabotage: sabotage.broken.__name__,
)
def test_a_broken_rule_is_found(sabotage: Sabotage) -> None:
    broken = sabotage.broken
    machines: dict[str, Any] = {"source" if issubclass(broken, Source) else "destination": broken}
    found = Exploration(sabotage.world, check=sabotage.check, trust_anybody=sabotage.trust_anybody, **machines)
    with pytest.raises(BrokenError, match=sabotage.found):  # noqa: PT012 - either of them finds it
        found.run()
        check_settling(found)


def test_the_way_to_a_broken_rule_is_told() -> None:
    with pytest.raises(BrokenError) as found:
        Exploration(World(most_todo=0), source=TakesNoFence).run()
    told = str(found.value).splitlines()
    assert told[1] == "restart"
    assert "Fence" in told
    assert "Done on-fence hook" in told
