"""The commands of a hand-over: what a driver of migrations says, with no process started in the guest's downtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from nbdstream.control.arguments import Arguments
from nbdstream.handover.driver import breakdown
from nbdstream.handover.source import SourceDriver
from nbdstream.handover.status import advice, shown_state
from nbdstream.wire.handover.messages import Manifest
from nbdstream.wire.handover.vocabulary import Command, Decline, Fence, Override, Release, Retry
from nbdstream.wire.qmp import QmpError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.control.commands import Commands
    from nbdstream.handover.destination import DestinationDriver

X_HANDOVER_STATE: Final = "X_HANDOVER_STATE"


class ReleaseArguments(Arguments):
    """Of x-handover-release."""

    manifests: list[dict[str, Any]]


class OverrideArguments(Arguments):
    """Of x-handover-override."""

    evidence: str


class HandoverCommands:
    """What can be asked of one side, and said to it."""

    def __init__(self, driver: SourceDriver | DestinationDriver, emit: Callable[[str, dict[str, Any]], None]) -> None:
        """``emit`` is told when the state is another one."""
        self._driver = driver
        driver.listeners.append(lambda shown: emit(X_HANDOVER_STATE, {"state": shown, "epoch": self._epoch}))

    def add_to(self, commands: Commands) -> None:
        """Have them understood."""
        commands.add("x-handover-status", Arguments, self._status)
        commands.add("x-handover-fence", Arguments, lambda _: self._command(Fence()))
        commands.add("x-handover-decline", Arguments, lambda _: self._command(Decline()))
        commands.add("x-handover-retry", Arguments, lambda _: self._command(Retry()))
        commands.add("x-handover-release", ReleaseArguments, self._release)
        commands.add("x-handover-override", OverrideArguments, lambda given: self._command(Override(given.evidence)))

    @property
    def _epoch(self) -> int:
        return int(self._driver.state.record.epoch)

    async def _status(self, _arguments: Arguments) -> object:
        return status_of(self._driver)

    async def _release(self, arguments: ReleaseArguments) -> object:
        try:
            manifests = msgspec.convert(arguments.manifests, tuple[Manifest, ...])
        except msgspec.ValidationError as error:
            raise QmpError(f"that is no manifest: {error}") from error
        return await self._command(Release(manifests))

    async def _command(self, command: Command) -> object:
        await self._driver.command(command)
        return {"state": shown_state(self._driver.state), "epoch": self._epoch}


def status_of(driver: SourceDriver | DestinationDriver) -> dict[str, Any]:
    """Return what there is to see of one side, as JSON can hold it."""
    state = driver.state
    source = isinstance(driver, SourceDriver)
    shown = shown_state(state)
    return {
        "role": "source" if source else "destination",
        "running": True,
        "state": shown,
        "epoch": state.record.epoch,
        "since": driver.since,
        "connected": state.connected,
        "advice": advice(shown, source=source),
        "problem": driver.problem or driver.disk_problem,
        "alarms": list(driver.alarms),
        "remote": driver.remote,
        "disks": _disks(driver),
        "timing": [{"what": what, "seconds": seconds} for what, seconds in breakdown(driver.times)],
    }


def _disks(driver: SourceDriver | DestinationDriver) -> list[dict[str, Any]]:
    if isinstance(driver, SourceDriver):
        return [
            {"path": image.about.path, "uuid": image.about.disk.uuid, "size": image.about.disk.size}
            | ({"name-while-granted": image.hidden_path} if image.guarded else {"unguarded": True})
            for image in driver.images
        ]
    return [
        {"path": disk.path, "uuid": disk.disk.uuid, "size": disk.disk.size, "remote": disk.remote}
        | ({"device": disk.device} if disk.stream else {})
        for disk in driver.disks
    ]
