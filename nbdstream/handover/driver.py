"""What both sides' drivers have in common: a machine is told what happens, and its effects are executed in order."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from nbdstream.errors import NbdstreamError
from nbdstream.handover.hooks import run_hook
from nbdstream.handover.link import TICK_SECONDS
from nbdstream.handover.status import shown_state
from nbdstream.wire.handover.destination import Destination, DestinationState
from nbdstream.wire.handover.source import Source, SourceState
from nbdstream.wire.handover.vocabulary import (
    Alarm,
    CommandRefusedError,
    Do,
    Done,
    Failed,
    Lost,
    Persist,
    Phase,
    Send,
    Tick,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from nbdstream.handover.journal import Journal
    from nbdstream.handover.link import Link
    from nbdstream.wire.handover.messages import Message
    from nbdstream.wire.handover.vocabulary import Command, Effect, Event, Operation

log = logging.getLogger(__name__)

_M = TypeVar("_M", Source, Destination)
_S = TypeVar("_S", SourceState, DestinationState)

_MOST_ALARMS: Final = 20


class HandoverError(NbdstreamError):
    """A command cannot be done as things stand, or the hand-over cannot go on in this process."""


class Driver(ABC, Generic[_M, _S]):
    """Runs one side. Everything it does it does because the machine says so."""

    def __init__(self, machine: _M, state: _S, effects: tuple[Effect, ...], journal: Journal) -> None:
        """Begin with what the machine said of a restart."""
        self._machine: Any = machine
        self.state: _S = state
        self._journal = journal
        self._todo: deque[Effect | asyncio.Future[None]] = deque(effects)
        self._more = asyncio.Event()
        self._more.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.listeners: list[Callable[[str], None]] = []
        """Called with the state that is shown, whenever that is another one."""
        self._shown = ""
        self.peer: Link[Any] | None = None
        self.problem = ""
        """Why the last operation failed, or the last connection ended; for people."""
        self._problem_of: Operation | None = None
        """The operation whose failure that is; it is none any more when it has been done after all."""
        self.alarms: deque[str] = deque(maxlen=_MOST_ALARMS)
        """What must not have happened."""
        self.times: list[tuple[str, float]] = []
        """What was done since the last command, and when (``time.monotonic()``)."""
        self.since = time.time()
        """When the phase was entered, as far as this process knows."""

    # -- what happens -------------------------------------------------------------------------------------------

    def happened(self, event: Event) -> None:
        """Tell the machine, and have its effects executed."""
        before = self.state.record.phase
        self.state, effects = self._machine.step(self.state, event)
        self._todo.extend(effects)
        self._more.set()
        if self.state.record.phase is not before:
            self.since = time.time()
        if (shown := shown_state(self.state)) != self._shown:
            self._shown = shown
            log.info("%s", shown)
            if shown == "ACCEPTED":
                parts = [f"{what} {seconds * 1000:.1f}" for what, seconds in breakdown(self.times)]
                log.info("what led here took, in milliseconds: %s", ", ".join(parts))
            for listener in self.listeners:
                listener(shown)

    async def command(self, command: Command) -> None:
        """Do what the operator says, and return when that is durable. Raises HandoverError if it cannot be done."""
        self.times = [("command", time.monotonic())]
        try:
            before = len(self._todo)
            self.happened(command)
        except CommandRefusedError as error:
            raise HandoverError(str(error)) from None
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        behind = len(self._todo)
        while behind > before and isinstance(self._todo[behind - 1], Do):
            behind -= 1
        self._todo.insert(behind, durable)
        await durable

    def lost(self, link: Link[Any], reason: str) -> None:
        """Take note that a connection is gone, if it is the one that counts."""
        if self.peer is link:
            self.peer = None
            # What was to be said on it would be the first word on the next one, which is hello.
            self._todo = deque(effect for effect in self._todo if not isinstance(effect, Send))
            if self.state.record.phase is Phase.RELEASED:
                log.info("the other side is not connected any more, and needs not be")
            else:
                self.problem, self._problem_of = reason, None
                log.warning("the other side is not connected any more: %s", reason)
            self.happened(Lost())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside, as long as this runs; what it raises ends this."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._more.set()  # _run raises it
        else:
            self._tasks.discard(task)

    @property
    def disk_problem(self) -> str:
        """What is wrong with a disk, for people; empty if nothing is."""
        return ""

    # -- what is done about it ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Execute effects, until :meth:`finished`. Raises NbdstreamError if this process has to end."""
        self.spawn(self._tick())
        try:
            while not self.finished():
                self._raise_failures()
                if not self._todo:
                    self._more.clear()
                    await self._more.wait()
                    continue
                await self._next()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def _raise_failures(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def _next(self) -> None:
        effect = self._todo.popleft()
        if isinstance(effect, asyncio.Future):
            if not effect.done():
                effect.set_result(None)
            return
        log.debug("%s", effect)
        if isinstance(effect, Persist):
            await asyncio.to_thread(self._journal.append, effect.record, effect.note)
            self._mark(f"journal {effect.record.phase.upper()}")
        elif isinstance(effect, Send):
            if self.peer:
                self.peer.send(self._complete(effect.message))
                self._mark(f"say {type(effect.message).__name__.lower()}")
        elif isinstance(effect, Alarm):
            self.alarms.append(effect.text)
            log.error("%s", effect.text)
        elif isinstance(effect, Do):
            await self._do(effect.operation)
        else:
            await self.act(effect)
            self._mark(type(effect).__name__)

    async def _do(self, operation: Operation) -> None:
        try:
            event = await self.operate(operation)
        except (NbdstreamError, OSError) as error:
            self.problem = f"{operation}: {_said(error)}"
            self._problem_of = operation
            log.error("%s", self.problem)
            event = Failed(operation)
        else:
            if operation is self._problem_of:
                self.problem, self._problem_of = "", None
        self._mark(str(operation))
        self.happened(event or Done(operation))

    def _mark(self, what: str) -> None:
        self.times.append((what, time.monotonic()))
        del self.times[:-64]

    async def hook(self, name: str, command: str | None, **about: str) -> None:
        """Run a hook, if there is one. Raises HookError."""
        if command:
            record = self.state.record
            await run_hook(name, command, {"state": record.phase, "epoch": str(record.epoch), **self.about(), **about})

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.happened(Tick())

    # -- what each side does in its own way ---------------------------------------------------------------------

    @abstractmethod
    def about(self) -> Mapping[str, str]:
        """Return what hooks are told of."""

    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing is left to be done here."""

    @abstractmethod
    async def operate(self, operation: Operation) -> Event | None:
        """Do an operation; return what is to be told in the place of Done. Raises NbdstreamError, OSError."""

    @abstractmethod
    async def act(self, effect: Effect) -> None:
        """Do what cannot fail, or ends this process if it does."""

    def _complete(self, message: Message) -> Message:
        """Fill in what the machine does not know."""
        return message


def _said(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return str(error)


def breakdown(times: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return how long each of the things took, in seconds."""
    return [(what, when - before) for (_, before), (what, when) in pairwise(times)]
