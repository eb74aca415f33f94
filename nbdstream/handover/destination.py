"""The destination's side of a hand-over, on a real host: overlays, the guest's sockets, streams, hooks."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdstream.errors import NbdstreamError, ProtocolError, SourceError, WrongSourceError
from nbdstream.handover.disk import DestinationDisk, remove_overlay
from nbdstream.handover.driver import Driver, HandoverError
from nbdstream.handover.journal import Contents, DestinationSetup, Entry, Journal
from nbdstream.handover.link import HANDSHAKE_SECONDS, Link, client_context
from nbdstream.handover.offer import Offer
from nbdstream.uri import NbdUri
from nbdstream.wire.handover.destination import OWNER, Destination, DestinationFacts, DestinationState
from nbdstream.wire.handover.messages import FROM_SOURCE, Accepted, Refused, plain
from nbdstream.wire.handover.vocabulary import (
    AllowWrites,
    Connected,
    DestinationRecord,
    Hydrate,
    Hydrated,
    Operation,
    Phase,
    Received,
    Written,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nbdstream.handover.journal import DestinationContents
    from nbdstream.stream.disk import DiskStream
    from nbdstream.stream.source import SourceOptions
    from nbdstream.wire.handover.messages import Disk, Message
    from nbdstream.wire.handover.vocabulary import Effect, Event

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 5.0
_PREPARE_AGAIN_SECONDS: Final = 1.0
"""The source's export is there as soon as the source is; only a firewall that is wrong keeps anybody waiting."""


class DestinationOptions(NamedTuple):
    """How a destination behaves."""

    sockets: Sequence[str]
    """Of the guest, one for each disk."""
    source: SourceOptions
    """How the source's exports are used, certificates included."""
    socket_mode: int = 0o600
    socket_group: str | None = None
    on_accept: str | None = None
    speed: int = 0
    """Bytes a second for each disk in the background; 0: no limit."""
    guest_latency: float | None = None
    """Of each disk: what 99 % of the guest's requests that need no source shall take at most, seconds."""


def open_destination(directory: str, offer: Offer, overlays: Sequence[str]) -> tuple[Journal, DestinationContents]:
    """Return the journal in a directory, and what it says; a new one joins the offer (*blocking*).

    Raises NbdstreamError if the journal is of another hand-over, or an overlay exists that no journal here made.
    """
    paths = tuple(map(os.path.abspath, overlays))
    journal = Journal.open(directory)
    try:
        found = journal.read_destination()
        ended = found is not None and found.record.phase is Phase.DECLINED and found.setup.offer != str(offer)
        if found is None or ended:
            _refuse_existing(paths)
            setup = DestinationSetup(1, str(offer), secrets.token_hex(16), paths)
            found = Contents(setup, [Entry(time.time(), DestinationRecord(Phase.JOINING), "joined")])
        elif found.setup.offer != str(offer):
            raise HandoverError(f"{directory} is of another offer: each hand-over has a state directory of its own")
        elif found.setup.overlays != paths:
            raise HandoverError(f"{directory} is of the overlays {', '.join(found.setup.overlays)}")
        journal.begin(found)
    except BaseException:
        journal.close()
        raise
    return journal, found


def _refuse_existing(paths: Sequence[str]) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise HandoverError(f"{path} exists, and this hand-over has not made it: name one that does not exist")
        if not os.access(os.path.dirname(path), os.W_OK):
            raise HandoverError(f"{path} cannot be made: {os.path.dirname(path)} cannot be written")


class DestinationDriver(Driver[Destination, DestinationState]):
    """Runs the destination's side."""

    def __init__(self, journal: Journal, contents: DestinationContents, options: DestinationOptions) -> None:
        setup = contents.setup
        self.offer = Offer.parse(setup.offer)
        machine = Destination(DestinationFacts(self.offer.group, self.offer.token, setup.destination))
        super().__init__(machine, *machine.restart(contents.record), journal)
        self.setup = setup
        self.disks: list[DestinationDisk] = []
        """Once they are prepared."""
        self.streaming: list[Callable[[DiskStream], None]] = []
        """Called with each disk's stream, when the disk is owned here."""
        self._options = options
        certificates = options.source.tls_certificates
        self._tls = client_context(certificates) if self.offer.tls and certificates else None
        if self.offer.tls and not self._tls:
            raise HandoverError("the offer needs TLS: say --tls-certificates DIR")
        self._source_missing = ""
        accepted = [entry.time for entry in contents.entries if entry.record.phase in OWNER]
        self._accepted = accepted[0] if accepted else 0.0

    def connect(self) -> None:
        """Begin to talk to the source."""
        self.spawn(self._stay_connected())

    async def close(self) -> None:
        """Let go of everything. What was written is durable."""
        if self.peer:
            self.peer.close()
        for disk in self.disks:
            await disk.close()
        self._journal.close()

    # -- the connection -----------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while self.state.record.phase is not Phase.RELEASED and not self.state.told:
            began = time.monotonic()
            try:
                await self._converse()
            except (EOFError, OSError, ProtocolError) as error:
                self._disconnected(str(error) or type(error).__name__)
            if time.monotonic() - began > _LONGEST_PAUSE_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _disconnected(self, reason: str) -> None:
        where = f"{self.offer.host} port {self.offer.port}"
        if self.peer:
            self.lost(self.peer, reason)
        elif (text := f"the source at {where} is not there: {reason}") != self.problem:
            self.problem = text
            log.warning("%s", text)

    async def _converse(self) -> None:
        offer = self.offer
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            reader, writer = await asyncio.open_connection(
                offer.host, offer.port, ssl=self._tls, server_hostname=offer.host if self._tls else None
            )
        link = Link(reader, writer, FROM_SOURCE)
        self.peer = link
        try:
            self.happened(Connected())
            while self.state.record.phase is not Phase.RELEASED:
                message = await link.receive()
                if isinstance(message, Refused):
                    self._was_refused(message)
                    return
                self.problem = ""
                self.happened(Received(message))
            self.lost(link, "it is over")
        finally:
            link.close()

    def _was_refused(self, refused: Refused) -> None:
        reason = f"the source refuses: {plain(refused.reason)}"
        if self.state.record.phase is Phase.JOINING:
            raise HandoverError(reason)  # nothing was made: whoever gave the offer has to give another
        assert self.peer
        self.lost(self.peer, reason)

    # -- what the machine wants ---------------------------------------------------------------------------------

    def about(self) -> Mapping[str, str]:
        """Return what hooks are told of."""
        return {
            "role": "destination",
            "group": self.offer.group,
            "overlays": "\n".join(self.setup.overlays),
            "sockets": "\n".join(self._options.sockets),
        }

    def finished(self) -> bool:
        """Whether it was called off, nothing is left of it, and the source knows."""
        return self.state.record.phase is Phase.DECLINED and self.state.told and not self._todo

    @property
    def remote(self) -> int:
        """Bytes that are only at the source."""
        return sum(disk.remote for disk in self.disks)

    @property
    def disk_problem(self) -> str:
        """Why a disk's source is not to be had."""
        return self._source_missing or next((disk.problem for disk in self.disks if disk.problem), "")

    def _complete(self, message: Message) -> Message:
        if isinstance(message, Accepted):
            return Accepted(
                group=message.group, destination=message.destination, epoch=message.epoch, remote=self.remote
            )
        return message

    async def operate(self, operation: Operation) -> Event | None:
        """Do an operation. Raises NbdstreamError, OSError."""
        if operation is Operation.PREPARE:
            await self._prepare_with_source()
        elif operation is Operation.HOOK_ACCEPT:
            await self.hook("on-accept hook", self._options.on_accept)
        elif operation is Operation.MANIFEST:
            epoch = self.state.record.epoch
            return Written(tuple([await disk.write_manifest(epoch, self._accepted) for disk in self.disks]))
        elif operation is Operation.DISCARD:
            await self._discard()
        return None

    async def _prepare_with_source(self) -> None:
        """Prepare as soon as the source's export is to be had, unless it is called off before."""
        while self.state.pending is Operation.PREPARE:
            try:
                await self._prepare()
                break
            except WrongSourceError:
                raise
            except SourceError as error:
                if str(error) != self._source_missing:
                    self._source_missing = str(error)
                    log.warning("%s", error)
                await asyncio.sleep(_PREPARE_AGAIN_SECONDS)
        self._source_missing = ""

    async def _prepare(self) -> None:
        record, options = self.state.record, self._options
        if len(record.disks) != len(self.setup.overlays):
            raise HandoverError(
                f"the offer has {len(record.disks)} disks: name as many overlays, and as many sockets with -U"
            )
        while len(self.disks) < len(record.disks):
            number = len(self.disks)
            disk = record.disks[number]
            self.disks.append(
                await DestinationDisk.open(
                    disk,
                    self.setup.overlays[number],
                    self._uri(disk),
                    options.source,
                    device=f"disk{number}",
                    socket=options.sockets[number],
                    socket_mode=options.socket_mode,
                    socket_group=options.socket_group,
                    owned=record.phase in OWNER,
                )
            )

    def _uri(self, disk: Disk) -> NbdUri:
        return NbdUri(tls=self.offer.tls, host=self.offer.host, port=self.state.record.port, export=disk.export)

    async def _discard(self) -> None:
        for disk in self.disks:
            await disk.close()
        self.disks.clear()
        for offered, path in zip(self.state.record.disks, self.setup.overlays, strict=False):  # none: none was made
            await asyncio.to_thread(remove_overlay, path, self._uri(offered))

    async def act(self, effect: Effect) -> None:
        """Do what cannot fail, or ends this process if it does."""
        if isinstance(effect, AllowWrites):
            self._accepted = self._accepted or time.time()
            for disk in self.disks:
                if disk.stream is None:
                    stream = disk.allow_writes(self._options.guest_latency)
                    for listener in self.streaming:
                        listener(stream)
        elif isinstance(effect, Hydrate):
            for disk in self.disks:
                disk.hydrate(self._options.speed)
            self.spawn(self._wait_until_independent())

    async def _wait_until_independent(self) -> None:
        await asyncio.gather(*(disk.wait() for disk in self.disks))
        self.happened(Hydrated())

    async def _do(self, operation: Operation) -> None:
        """As any operation; but if the disks cannot be prepared this process ends, and the next tries again."""
        await super()._do(operation)
        if self.state.failed is Operation.PREPARE:
            raise NbdstreamError(self.problem)
