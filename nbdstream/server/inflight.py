"""The requests of one connection that the device has not answered yet, and how much they may hold."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

from nbdstream.wire.nbd import Cmd, CmdFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdstream.block.device import Buffer
    from nbdstream.server.commands import Commands
    from nbdstream.server.export import Export
    from nbdstream.server.limits import Limits
    from nbdstream.server.payloads import PayloadMemory
    from nbdstream.wire.transmission import Request

_QUESTIONS: Final = frozenset((Cmd.BLOCK_STATUS, Cmd.CACHE))
_READ: Final = int(Cmd.READ)
_WRITE: Final = int(Cmd.WRITE)
_FUA: Final = int(CmdFlag.FUA)


class InFlight:
    """Runs the requests that cannot be answered at once. Every reply goes to ``reply``, on the loop, in any order."""

    def __init__(
        self,
        export: Export,
        commands: Commands,
        limits: Limits,
        memory: PayloadMemory,
        reply: Callable[[Sequence[Buffer]], None],
    ) -> None:
        self.requests = 0
        self._bytes = 0
        self._export = export
        self._commands = commands
        self._limits = limits
        self._memory = memory
        self._reply = reply
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[Sequence[Buffer]], int] = {}
        """The command of each request that runs as a task."""
        self._one_question = asyncio.Lock()
        """Short to ask, long to answer: a client that asks by the hundred keeps itself waiting, not the others."""

    def has_room(self, request: Request) -> bool:
        """Whether a request may join. One alone always may, however long it is."""
        if not self.requests:
            return True
        limits, held = self._limits, self._bytes + _held_bytes(request)
        return self.requests < limits.requests_in_flight and held <= limits.bytes_in_flight

    def start(self, request: Request) -> None:
        """Begin a valid request; its reply comes later, never before this returns."""
        self.requests += 1
        self._bytes += _held_bytes(request)
        began = self._loop.time() if self._export.timed else 0.0
        command, flags, _, offset, length, payload, _ = request
        if command == _READ:
            self._export.bytes_read += length
        elif command == _WRITE:
            self._export.bytes_written += length
        if command == _WRITE and payload and not flags & _FUA:
            try:
                taken = self._export.device.write_now(offset, payload, partial(self._written, request, began))
            except Exception as error:  # noqa: BLE001 - whatever a device does, one request fails
                self._loop.call_soon(self._written, request, began, error)
                return
            if taken:
                return
        task = self._loop.create_task(self._run(request))
        self._tasks[task] = command
        # Not at the end of the coroutine: a task that is cancelled before its first step never gets there.
        task.add_done_callback(partial(self._ran, request, began))

    def cancel_reads(self) -> None:
        """Give up what nobody waits for any more. What changes the device is finished."""
        for task, command in self._tasks.items():
            if command in (Cmd.READ, Cmd.CACHE, Cmd.BLOCK_STATUS):
                task.cancel()

    def cancel(self) -> None:
        """Give up everything that can be given up."""
        for task in self._tasks:
            task.cancel()

    def _written(self, request: Request, began: float, error: Exception | None) -> None:
        self._time(began, None)
        if error:
            self._finish(request, [self._commands.failure(request, error)])
        else:
            self._memory.give_back(request.payload)
            self._finish(request, [self._commands.success(request)])

    async def _run(self, request: Request) -> Sequence[Buffer]:
        try:
            if request.command in _QUESTIONS:
                async with self._one_question:
                    reply = await self._commands.perform(request)
            else:
                reply = await self._commands.perform(request)
        except Exception as error:  # noqa: BLE001 - whatever a device does, one request fails
            return [self._commands.failure(request, error)]
        # Not if it failed or was cancelled: a thread of the device may still be reading it.
        self._memory.give_back(request.payload)
        return reply

    def _ran(self, request: Request, began: float, task: asyncio.Task[Sequence[Buffer]]) -> None:
        self._time(began, task)
        del self._tasks[task]
        self._finish(request, () if task.cancelled() else task.result())

    def _time(self, began: float, task: asyncio.Task[Sequence[Buffer]] | None) -> None:
        if began and (timed := self._export.timed):
            timed(self._loop.time() - began, task)

    def _finish(self, request: Request, reply: Sequence[Buffer]) -> None:
        self.requests -= 1
        self._bytes -= _held_bytes(request)
        self._reply(reply)


def _held_bytes(request: Request) -> int:
    """Return how much memory a request holds while it is in flight, at most."""
    return request.length if request.command in (_READ, _WRITE) else 0
