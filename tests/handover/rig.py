"""Both sides of a hand-over in one loop, with real files and sockets, and a death for either at any effect."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from typing import TYPE_CHECKING, Any, Self

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.handover.destination import DestinationDriver, DestinationOptions, open_destination
from nbdstream.handover.source import SourceDriver, SourceOptions, new_offer, open_source
from nbdstream.stream.source import SourceOptions as NbdOptions
from nbdstream.wire.handover.vocabulary import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.handover.offer import Offer
    from nbdstream.server.tls import TlsPolicy

SIZE = 1 << 20


class DiedError(Exception):
    """The process died, as far as the test goes."""


class Death:
    """When a side dies: before or after its n-th effect. It dies once. With ``link``, only its connection does."""

    def __init__(self, at: int = -1, *, after: bool = False, link: bool = False) -> None:
        self.at = at
        self.after = after
        self.link = link
        self.count = 0
        self.came = False

    def passes(self, driver: SourceDriver | DestinationDriver, *, after: bool) -> None:
        """Count an effect. Raises DiedError if this is the one."""
        here = self.count == self.at and self.after == after
        self.count += after
        if here and not self.came:
            self.came = True
            if not self.link:
                raise DiedError
            if driver.peer:
                driver.peer.abort()


class DyingSource(SourceDriver):
    death: Death

    async def _next(self) -> None:
        self.death.passes(self, after=False)
        await super()._next()
        self.death.passes(self, after=True)


class DyingDestination(DestinationDriver):
    death: Death

    async def _next(self) -> None:
        self.death.passes(self, after=False)
        await super()._next()
        self.death.passes(self, after=True)


class Rig:
    """A source and a destination; :meth:`start` them, and again after they died."""

    def __init__(self, directory: str, *, disks: int = 1, tls: TlsPolicy | None = None, certificates: str = "") -> None:
        self.directory = directory
        self.images = [f"{directory}/{number}.img" for number in range(disks)]
        self.overlays = [f"{directory}/{number}.qed" for number in range(disks)]
        self.sockets = [f"{directory}/{number}.sock" for number in range(disks)]
        self.source_options = SourceOptions(tls=tls)
        self.host = "localhost" if tls else "127.0.0.1"
        self.certificates = certificates or None
        self.on_accept: str | None = None
        self.speed = 0
        self.offer: Offer
        self.source: DyingSource
        self.destination: DyingDestination
        self.source_death = Death()
        self.destination_death = Death()
        self._running: dict[str, asyncio.Task[None]] = {}
        rng = random.Random(7)
        for image in self.images:
            with open(image, "wb") as file:
                file.write(rng.randbytes(SIZE // 2) + bytes(SIZE // 2))

    async def __aenter__(self) -> Self:
        await self.start_source()
        await self.start_destination()
        return self

    async def __aexit__(self, *_: object) -> None:
        for side in list(self._running):
            await self.kill(side)

    async def start_source(self) -> None:
        state = f"{self.directory}/source"
        renew = None
        if not os.path.exists(f"{state}/journal"):
            offered = [(image, "raw") for image in self.images]
            tls = self.source_options.tls is not None
            renew = new_offer(offered, host=self.host, port=0, nbd_port=0, tls=tls, expires=3600)
        journal, contents = open_source(state, renew)
        self.source = DyingSource(journal, contents, self.source_options)
        self.source.death = self.source_death
        await self.source.listen()
        self.offer = self.source.offer
        self._run("source", self.source)

    async def start_destination(self) -> None:
        journal, contents = open_destination(f"{self.directory}/destination", self.offer, self.overlays)
        nbd = NbdOptions(connections=1, tls_certificates=self.certificates)
        options = DestinationOptions(self.sockets, nbd, on_accept=self.on_accept, speed=self.speed)
        self.destination = DyingDestination(journal, contents, options)
        self.destination.death = self.destination_death
        self.destination.connect()
        self._run("destination", self.destination)

    def _run(self, side: str, driver: Any) -> None:
        self._running[side] = asyncio.get_running_loop().create_task(driver.run())

    async def kill(self, side: str) -> None:
        """End a side without a word."""
        task = self._running.pop(side)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, DiedError):
            await task
        await getattr(self, side).close()

    async def stays_dead(self, side: str) -> None:
        """Wait for a side's death, after which it is not started again."""
        await asyncio.wait([self._running[side]], timeout=30)
        await self.kill(side)

    async def ended(self, side: str) -> None:
        """Wait until a side has come to its end by itself."""
        await asyncio.wait_for(asyncio.shield(self._running[side]), 30)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something; a side that has died meanwhile is started again."""
        async with asyncio.timeout(30):
            while not condition():
                for side, task in list(self._running.items()):
                    if task.done() and isinstance(task.exception() if not task.cancelled() else None, DiedError):
                        await self.kill(side)
                        await (self.start_source() if side == "source" else self.start_destination())
                    elif task.done() and task.exception():
                        await task
                await asyncio.sleep(0.01)

    def phases(self) -> tuple[Phase, Phase]:
        """Where the source and the destination stand."""
        return self.source.state.record.phase, self.destination.state.record.phase

    async def prepared(self) -> None:
        """Wait until the source may fence."""
        await self.until(lambda: self.source.state.prepared)

    async def released(self) -> None:
        """Wait until all is done."""
        await self.until(lambda: self.phases() == (Phase.RELEASED, Phase.RELEASED))


async def contents_of(path: str) -> bytes:
    """Return the disk in a QED image that nobody uses."""
    image = await QedImage.open(path)
    device = Overlay(image)
    try:
        return b"".join(await device.read(0, device.size))
    finally:
        await device.close()
