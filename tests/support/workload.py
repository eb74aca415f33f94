"""A guest that uses its disk all the time, and knows what may be read from it.

It behaves as QEMU's NBD client: 16 requests in flight; when the connection is lost it connects again and *replays
nothing*. So what was acknowledged must be there, and what was not, may be.
"""

from __future__ import annotations

import random
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, Self

from tests.support.client import (
    FLUSH,
    FUA,
    MOST_IN_FLIGHT,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    LostError,
    NbdClient,
    Reply,
)
from tests.support.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTOR = 512
SOURCE, ZERO = -1, 0
"""Values of a sector: what the source has, zeroes; any other number is that of the write that it is from."""

Value = int | bytes
"""Such a number, or what was found where a kill came in the middle of a sector: the kernel copies bytes."""

_KINDS = {WRITE: 50, READ: 30, WRITE_ZEROES: 8, TRIM: 6, FLUSH: 6}
_LONGEST = 300 << 10
_PAUSE_SECONDS = 0.005


class DiskModel:
    """The values that each sector may have. All sectors begin with what the source has."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self._values: dict[int, tuple[Value, ...]] = {}

    def data(self, sector: int, value: Value) -> bytes:
        """Return the bytes of a sector that has this value."""
        if isinstance(value, bytes):
            return value
        if value == SOURCE:
            return self.source[sector * SECTOR : (sector + 1) * SECTOR]
        return struct.pack("<QQ", value, sector) * (SECTOR // 16) if value else bytes(SECTOR)

    def may_become(self, sectors: range, value: int) -> None:
        """Take note that somebody began to write this."""
        for sector in sectors:
            self._values[sector] = (*self._values.get(sector, (SOURCE,)), value)

    def has_become(self, sectors: range, value: int) -> None:
        """Take note that this is there, for certain."""
        for sector in sectors:
            self._values[sector] = (value,)

    def check(self, sector: int, data: bytes) -> str | None:
        """Return what is wrong if the sector cannot be this; it is this from now on, if it can be.

        What was found once cannot become what it was before.
        """
        allowed = self._values.get(sector, (SOURCE,))
        found: tuple[Value, ...] = tuple(value for value in allowed if self.data(sector, value) == data)
        if not found and self._is_torn(data, [self.data(sector, value) for value in allowed]):
            found = (data,)
        if not found:
            return f"sector {sector} is {data[:16]!r}..., may be from {allowed}"
        if len(allowed) > 1:
            self._values[sector] = found
        return None

    @staticmethod
    def _is_torn(data: bytes, allowed: list[bytes]) -> bool:
        """Whether it begins as one of the values and ends as another."""
        begins = max(_common(data, value) for value in allowed)
        ends = max(_common(data[::-1], value[::-1]) for value in allowed)
        return len(allowed) > 1 and begins + ends >= SECTOR

    def touched(self) -> Iterator[range]:
        """Return the runs of sectors that somebody wrote, or may have written."""
        sectors = sorted(self._values)
        start = 0
        for place in range(1, len(sectors) + 1):
            if place == len(sectors) or sectors[place] != sectors[place - 1] + 1:
                yield range(sectors[start], sectors[place - 1] + 1)
                start = place

    def check_range(self, sectors: range, data: bytes) -> list[str]:
        """Return what is wrong with what was read from these sectors; see :meth:`check`."""
        found = (
            self.check(sector, data[place * SECTOR : (place + 1) * SECTOR]) for place, sector in enumerate(sectors)
        )
        return [fault for fault in found if fault]

    def contents(self) -> bytes:
        """Return the whole disk. Every sector that was touched must have been read."""
        contents = bytearray(self.source)
        for sector, values in self._values.items():
            contents[sector * SECTOR : (sector + 1) * SECTOR] = self.data(sector, values[0])
        return bytes(contents)


def _common(one: bytes, other: bytes) -> int:
    """Return how many bytes two sectors begin with in common."""
    return next((place for place in range(SECTOR) if one[place] != other[place]), SECTOR)


class _Request(NamedTuple):
    command: int
    sectors: range
    value: int


class Workload:
    """Uses the disk behind a socket from a thread of its own until it is closed."""

    def __init__(self, socket: str, model: DiskModel, seed: int, *, cluster_size: int = 65536) -> None:
        self.model = model
        self.done: Counter[int] = Counter()
        """Requests that were answered, by command."""
        self.faults: list[str] = []
        """What was read or answered and should not have been. The thread ends with the first."""
        self.connected = False
        self._socket = socket
        self._rng = random.Random(seed)
        self._cluster_sectors = cluster_size // SECTOR
        self._disk_sectors = len(model.source) // SECTOR
        self._sent = 0
        self._in_flight: dict[int, _Request] = {}
        self._stop = threading.Event()
        self._going = threading.Event()
        self._going.set()
        self._paused = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pause(self) -> None:
        """Complete what was sent, if anybody answers, and hang up until :meth:`go_on`."""
        self._paused.clear()
        self._going.clear()
        wait_until(lambda: self._paused.is_set() or not self._thread.is_alive(), "the guest to pause")

    def go_on(self) -> None:
        """Connect again."""
        self._going.set()

    def close(self) -> None:
        """End, with every request answered if somebody answers."""
        self._stop.set()
        self._going.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a request is never answered"

    def wait_for(self, count: int) -> None:
        """Wait until so many more requests have been answered."""
        aim = self.done.total() + count
        wait_until(lambda: self.faults or self.done.total() >= aim, f"{count} answers")

    def wait_until_disconnected(self) -> None:
        """Wait until the loss of the server has been noticed; the model does not change from then on."""
        wait_until(lambda: not self.connected, "the loss of the connection")

    def _run(self) -> None:
        while not self._stop.is_set() and not self.faults:
            if not self._going.is_set():  # an attempt to connect that began before the pause has ended
                self._paused.set()
                self._going.wait()
                continue
            try:
                client = NbdClient(self._socket)
            except LostError:
                self._stop.wait(_PAUSE_SECONDS)
                continue
            with client:
                self.connected = True
                try:
                    self._use(client)
                except (LostError, TimeoutError) as error:
                    if isinstance(error, TimeoutError):
                        self.faults.append(f"never answered: {list(self._in_flight.values())}")
                finally:
                    self._in_flight.clear()
                    self.connected = False

    def _use(self, client: NbdClient) -> None:
        while not self.faults:
            while client.in_flight < MOST_IN_FLIGHT and self._going.is_set() and not self._stop.is_set():
                if not self._submit(client):
                    break
            if not client.in_flight:
                return
            self._take(client.receive())

    def _submit(self, client: NbdClient) -> bool:
        """Send a request; False if everything that was thought of overlaps with what is in flight."""
        command = self._rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        sectors = range(0) if command == FLUSH else self._range(command)
        if any(_overlap(sectors, other.sectors) for other in self._in_flight.values()):
            return False
        self._sent += 1
        value = self._sent if command == WRITE else ZERO
        request = _Request(command, sectors, value)
        if command not in (READ, FLUSH):
            self.model.may_become(sectors, value)
        data = b"".join(self.model.data(sector, value) for sector in sectors) if command == WRITE else b""
        flags = self._rng.choice([0, 0, 0, FUA]) if command in (WRITE, WRITE_ZEROES, TRIM) else 0
        if command == WRITE_ZEROES:
            flags |= self._rng.choice([0, NO_HOLE])
        cookie = client.submit(command, sectors.start * SECTOR, len(sectors) * SECTOR, data, flags)
        self._in_flight[cookie] = request
        return True

    def _range(self, command: int) -> range:
        """Anything from a sector to a few clusters; what is discarded is clusters, of which parts mean nothing."""
        unit = self._cluster_sectors if command == TRIM or self._rng.random() < 0.3 else 1
        longest = self._rng.choice([8, self._cluster_sectors, _LONGEST // SECTOR])
        length = unit * self._rng.randint(1, max(1, longest // unit))
        start = self._rng.randrange(0, self._disk_sectors - length + 1, unit)
        return range(start, start + length)

    def _take(self, reply: Reply) -> None:
        request = self._in_flight.pop(reply.cookie)
        if reply.error:
            self.faults.append(f"{request} is answered with error {reply.error}")
        elif request.command == READ:
            self.faults += self.model.check_range(request.sectors, reply.data)
        elif request.command != FLUSH:
            self.model.has_become(request.sectors, request.value)
        self.done[request.command] += 1


def examine(socket: str, model: DiskModel) -> list[str]:
    """Read all that was written, and return what is wrong with it."""
    faults = []
    with NbdClient(socket) as client:
        for run in model.touched():
            for start in range(run.start, run.stop, 2048):
                sectors = range(start, min(start + 2048, run.stop))
                faults += model.check_range(sectors, client.read(start * SECTOR, len(sectors) * SECTOR))
    return faults


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
