"""The requests of one connection that the device has not answered yet, and how much they may hold."""

from __future__ import annotations

import asyncio
import mmap
from functools import partial
from typing import TYPE_CHECKING, Final

from nbdstream.wire.nbd import Cmd, CmdFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdstream.block.device import Buffer
    from nbdstream.server.commands import Commands
    from nbdstream.server.export import Export
    from nbdstream.server.limits import Limits
    from nbdstream.wire.transmission import Request

_SMALL_PAYLOAD: Final = 64 << 10
"""Bytes. The memory for larger payloads is the kernel's, which gives each page when its first byte arrives: a client
that announces 64 MiB and sends one byte costs a page."""

_READ: Final = int(Cmd.READ)
_WRITE: Final = int(Cmd.WRITE)
_FUA: Final = int(CmdFlag.FUA)


def payload_memory(length: int) -> memoryview:
    """Return memory to receive a payload in."""
    return memoryview(bytearray(length) if length <= _SMALL_PAYLOAD else mmap.mmap(-1, length))


class InFlight:
    """Runs the requests that cannot be answered at once. Every reply goes to ``reply``, on the loop, in any order."""

    def __init__(
        self,
        export: Export,
        commands: Commands,
        limits: Limits,
        reply: Callable[[Sequence[Buffer]], None],
    ) -> None:
        self.requests = 0
        self._bytes = 0
        self._export = export
        self._commands = commands
        self._limits = limits
        self._reply = reply
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[None], int] = {}
        """The command of each request that runs as a task."""

    def has_room(self, length: int) -> bool:
        """Whether a request of that length may join. One alone always may, however long it is."""
        if not self.requests:
            return True
        limits = self._limits
        return self.requests < limits.requests_in_flight and self._bytes + length <= limits.bytes_in_flight

    def start(self, request: Request) -> None:
        """Begin a valid request; its reply comes later, never before this returns."""
        self.requests += 1
        self._bytes += _held_bytes(request)
        command, flags, _, offset, length, payload, _ = request
        if command == _READ:
            self._export.bytes_read += length
        elif command == _WRITE:
            self._export.bytes_written += length
        if command == _WRITE and payload and not flags & _FUA:
            try:
                taken = self._export.device.write_now(offset, payload, partial(self._written, request))
            except OSError as error:
                self._loop.call_soon(self._written, request, error)
                return
            if taken:
                return
        task = self._loop.create_task(self._run(request))
        self._tasks[task] = command

    def cancel_reads(self) -> None:
        """Give up what nobody waits for any more. What changes the device is finished."""
        for task, command in self._tasks.items():
            if command in (Cmd.READ, Cmd.CACHE, Cmd.BLOCK_STATUS):
                task.cancel()

    def cancel(self) -> None:
        """Give up everything that can be given up."""
        for task in self._tasks:
            task.cancel()

    def _written(self, request: Request, error: OSError | None) -> None:
        commands = self._commands
        self._finish(request, [commands.failure(request, error) if error else commands.success(request)])

    async def _run(self, request: Request) -> None:
        reply: Sequence[Buffer] = ()
        try:
            reply = await self._commands.answer(request)
        finally:
            task = asyncio.current_task()
            assert task is not None
            del self._tasks[task]
            self._finish(request, reply)

    def _finish(self, request: Request, reply: Sequence[Buffer]) -> None:
        self.requests -= 1
        self._bytes -= _held_bytes(request)
        self._reply(reply)


def _held_bytes(request: Request) -> int:
    """Return how much memory a request holds while it is in flight, at most."""
    return request.length if request.command in (_READ, _WRITE) else 0
