"""A guest that keeps a model of what its disk may hold after a power cut."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from tests.support.client import FLUSH, FUA, NO_HOLE, TRIM, WRITE, WRITE_ZEROES, NbdClient
from tests.support.crash import SECTOR, Model

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.support.crash import Written

_KINDS = {WRITE: 10, WRITE_ZEROES: 3, TRIM: 2, FLUSH: 2}
_MOST_IN_FLIGHT = 6


class _Request(NamedTuple):
    command: int
    sectors: range
    began: int
    written: list[Written]
    durable: bool


class Guest:
    """Writes, zeroes, discards and flushes, several at a time and never two in one sector."""

    def __init__(self, socket: str, below: bytes, cluster_size: int, chance: random.Random) -> None:
        """``below`` is what the disk reads as where nobody writes."""
        self.model = Model(below)
        self._client = NbdClient(socket)
        self._cluster_sectors = cluster_size // SECTOR
        self._clusters = self._client.size // cluster_size
        self._chance = chance
        self._in_flight: dict[int, _Request] = {}
        # A few that are written again and again, the others now and then.
        self._favourites = chance.sample(range(self._clusters), min(20, self._clusters))

    def use(self, going_on: Callable[[int], bool]) -> int:
        """Go on as long as ``going_on`` says so of the number of requests; return that, with all answered."""
        count = 0
        while going_on(count):
            if len(self._in_flight) < _MOST_IN_FLIGHT and self._submit():
                count += 1
            else:
                self._take()
        while self._in_flight:
            self._take()
        return count

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _submit(self) -> bool:
        """Send a request; False if it would write where another one does."""
        chance = self._chance
        command = chance.choices(list(_KINDS), list(_KINDS.values()))[0]
        sectors = range(0) if command == FLUSH else self._range(command)
        if any(sectors.start < other.sectors.stop and other.sectors.start < sectors.stop for other in self._others()):
            return False
        flags = 0
        if command != FLUSH and chance.random() < 0.1:
            flags |= FUA
        if command == WRITE_ZEROES and chance.random() < 0.3:
            flags |= NO_HOLE
        data = chance.randbytes(len(sectors) * SECTOR) if command == WRITE else bytes(len(sectors) * SECTOR)
        began = time.time_ns()
        written = self.model.begin(began, sectors.start * SECTOR, data)
        payload = data if command == WRITE else b""
        cookie = self._client.submit(command, sectors.start * SECTOR, len(data), payload, flags)
        self._in_flight[cookie] = _Request(command, sectors, began, written, bool(flags & FUA))
        return True

    def _others(self) -> list[_Request]:
        return list(self._in_flight.values())

    def _range(self, command: int) -> range:
        """Parts of a cluster, or a few whole ones; only whole ones are discarded, since parts mean nothing."""
        chance, per_cluster = self._chance, self._cluster_sectors
        cluster = chance.choice(self._favourites) if chance.random() < 0.5 else chance.randrange(self._clusters)
        start = cluster * per_cluster
        if command == TRIM or chance.random() < 0.5:
            return range(start, start + per_cluster * min(chance.choice([1, 1, 2, 5]), self._clusters - cluster))
        start += chance.randrange(per_cluster)
        return range(start, min(start + chance.choice([1, 3, 2 * per_cluster]), self._clusters * per_cluster))

    def _take(self) -> None:
        reply = self._client.receive()
        answered = time.time_ns()
        request = self._in_flight.pop(reply.cookie)
        assert reply.error == 0, request
        if request.command == FLUSH:
            self.model.flushes.append((request.began, answered))
        else:
            self.model.answered(answered, request.written, durable=request.durable)
