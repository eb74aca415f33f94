"""The other end of a control socket: what ``job`` and ``top`` ask, by way of the qemu.qmp library.

Import this only where it is needed: the library takes as long to load as short commands run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError, Runstate

from nbdstream.errors import ControlError, ControlLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qemu.qmp import EventListener

_ANSWER_SECONDS: Final = 10.0
"""For the greeting. A server of another kind may wait for us to speak first."""


class Monitor:
    """A connection to a control socket. Use :func:`connected`."""

    def __init__(self, path: str, client: QMPClient, heard: EventListener) -> None:
        self._path = path
        self._client = client
        self._heard = heard
        self._of_handover: bool | None = None
        """Whether it is the socket of one side of a hand-over; None if it has not been asked."""

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run a command. Raises ControlLostError, or ControlError with what it is refused with."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return await self._client.execute(command, given)
        except ExecuteError as error:
            if error.error_class == "CommandNotFound":
                raise ControlError(f"{self._path} is not the control socket of a streamer: {error}") from error
            raise ControlError(str(error)) from error
        except QMPError as error:
            raise ControlLostError(f"{self._path}: nobody answers any more") from error

    async def handover(self) -> dict[str, Any] | None:
        """Return where a side of a hand-over stands; None if this is the control socket of something else."""
        if self._of_handover is None:
            known = await self.execute("query-commands")
            self._of_handover = {"name": "x-handover-status"} in known
        return dict(await self.execute("x-handover-status")) if self._of_handover else None

    async def status(self, wanted: str | None) -> dict[str, Any]:
        """Return how far a disk is that is streamed, the first one unless one is wanted. Raises ControlError."""
        return dict(await self.execute("query-status", **({"device": wanted} if wanted else {})))

    async def device(self, wanted: str | None) -> str:
        """Return the device of that disk. Raises ControlError."""
        return str((await self.status(wanted))["device"])

    async def job(self, wanted: str | None) -> str:
        """Return the id of the first job, or that of a disk that is wanted. Raises ControlError if there is none."""
        if wanted:
            job = (await self.status(wanted)).get("job")
        else:
            job = next(iter(await self.execute("query-block-jobs")), None)
        if not job:
            raise ControlError(f"{self._path}: no job streams the disk")
        return str(job["device"])

    async def next_event(self) -> tuple[str, dict[str, Any]]:
        """Wait for the next event since the connection was made; return its name and data. Raises ControlLostError."""
        event = asyncio.ensure_future(self._heard.get())
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait([event, gone], return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                raise ControlLostError(f"{self._path}: nobody answers any more")
        finally:
            for each in (event, gone):
                each.cancel()
        message: Any = event.result()
        return message["event"], message.get("data", {})

    async def _gone(self) -> None:
        """Wait until the other end has gone; it may have, between two events, when nobody waited."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()


@asynccontextmanager
async def connected(path: str, *, debug: bool = False) -> AsyncIterator[Monitor]:
    """Give a connection to the control socket at ``path``. Raises ControlError."""
    if not debug:
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)  # it logs what it raises
    client = QMPClient()
    with client.listener() as heard:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await client.connect(path)
        except TimeoutError:
            raise ControlError(f"{path}: nobody answers as a control socket does") from None
        except ConnectError as error:
            raise ControlError(_explain(path, error.exc)) from error
        try:
            yield Monitor(path, client, heard)
        finally:
            with contextlib.suppress(QMPError, EOFError, OSError):
                await client.disconnect()


def _explain(path: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{path}: cannot connect: {error.strerror}"
    return f"{path}: this is no control socket"
