"""What happens at the same time in one overlay, in every order: each schedule of a few requests is run.

Nothing completes by itself here. The threads of the image are queues, and so is the source; at each point a schedule
chooses whether the next request begins or which queue moves on. All schedules of a small case are tried one after the
other, those of larger ones at random. In each the requests must be *linearizable*, sector by sector: explained by some
order of them in which whoever was answered comes before whoever began later. And when all are answered, a kill -9
must find the disk as the guest does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pytest

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed import image as image_module
from nbdstream.block.qed import record
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import OpenFile, create_file, open_file
from nbdstream.block.qed.record import read_record
from nbdstream.block.qed.tables import _NO_TABLE, UNALLOCATED, ZERO, Tables
from nbdstream.block.remote.commands import zero_mask
from nbdstream.block.worker import settling
from nbdstream.stream.fetch import Fetches
from nbdstream.stream.source import Request as SourceRequest
from nbdstream.stream.source import Source
from nbdstream.uri import NbdUri
from tests.support.crash import SECTOR, Image
from tests.support.mistakes import answer_before_the_link

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from bitarray import bitarray

    from nbdstream.block.device import Buffer
    from nbdstream.block.remote.export import CopyArrived, CopyDone

T = TypeVar("T")

CLUSTER = 4096
CLUSTERS = 3
SIZE = CLUSTERS * CLUSTER
SOURCE = bytes(range(1, 25))
"""What each sector below begins with: all differ."""
TURNS = 12
"""Of the loop, in which everything happens that needs no queue to move on."""


class Request(NamedTuple):
    """``offset`` and ``length`` are sectors."""

    kind: str
    """write, zero, discard, read, flush. What else goes on: fetch (by the hydrator), link, forget (cached tables)."""
    offset: int = 0
    length: int = 0

    def data(self, number: int) -> bytes:
        return bytes([0x80 + number]) * self.length * SECTOR if self.kind == "write" else bytes(self.length * SECTOR)


class Schedule:
    """A sequence of choices, and how many there were of each: enough to find the next schedule."""

    def __init__(self, choices: Sequence[int] = (), chance: random.Random | None = None) -> None:
        self._given = choices
        self._chance = chance
        self.choices: list[int] = []
        self.widths: list[int] = []

    def choose(self, options: Sequence[T]) -> T:
        at = len(self.choices)
        if at < len(self._given):
            choice = self._given[at] % len(options)
        else:
            choice = self._chance.randrange(len(options)) if self._chance else 0
        self.choices.append(choice)
        self.widths.append(len(options))
        return options[choice]

    def next(self) -> list[int] | None:
        """Return the choices of the schedule that comes behind this one, depth first; None behind the last."""
        for at in reversed(range(len(self.choices))):
            if self.choices[at] + 1 < self.widths[at]:
                return [*self.choices[:at], self.choices[at] + 1]
        return None


class Queues:
    """What waits to complete, each queue in its own order."""

    def __init__(self) -> None:
        self.queues: dict[str, deque[Callable[[], None]]] = {}
        self.at_once = False

    def put(self, name: str, job: Callable[[], None]) -> None:
        self.queues.setdefault(name, deque()).append(job)
        if self.at_once:
            asyncio.get_running_loop().call_soon(self.move_on, name)

    @property
    def waiting(self) -> list[str]:
        return [name for name, queue in self.queues.items() if queue]

    def move_on(self, name: str) -> None:
        if self.queues[name]:
            self.queues[name].popleft()()

    def finish(self) -> None:
        """Let everything complete by itself from now on."""
        self.at_once = True
        for name in self.waiting:
            for _ in range(len(self.queues[name])):
                asyncio.get_running_loop().call_soon(self.move_on, name)


class StepWorker:
    """In place of a thread: a queue."""

    queues: Queues

    def __init__(self, name: str, _loop: object = None) -> None:
        self._name = name

    def submit(self, done: Callable[[Any, BaseException | None], None], call: Callable[..., Any], *args: Any) -> None:
        def job() -> None:
            try:
                result, error = call(*args), None
            except OSError as raised:
                result, error = None, raised
            asyncio.get_running_loop().call_soon(done, result, error)

        self.queues.put(self._name, job)

    async def run(self, call: Callable[..., Any], *args: Any) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.submit(settling(answer), call, *args)
        return await answer

    async def close(self) -> None:
        pass


class StepSource(Source):
    """The source, of which every answer is a queue of its own: they come in any order."""

    def __init__(self, data: bytes, queues: Queues) -> None:
        super().__init__(NbdUri.parse("nbd://nowhere"))
        self.expect(len(data))
        self._data = data
        self._queues = queues
        self._numbers = itertools.count()

    @property
    def connected(self) -> bool:
        return True

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.put(f"read {next(self._numbers)}", lambda: answer.set_result(None))
        await answer
        return [self._data[offset : offset + length]]

    def copy_soon(
        self,
        offset: int,
        length: int,
        fd: int,
        place: int,
        done: CopyDone,
        *,
        zero_unit: int,
        short_writes: bool = False,
        urgent: bool,
        wanted: Callable[[], bool],
        arrived: CopyArrived | None = None,
    ) -> SourceRequest:
        data = self._data[offset : offset + length]

        def store() -> None:
            zero = zero_mask(bytearray(data), 0, length, zero_unit)
            os.pwrite(fd, data, place)
            done(zero, None)

        number = next(self._numbers)
        if urgent and arrived:
            self._queues.put(f"copy {number}", lambda: arrived(memoryview(data), None))
        self._queues.put(f"copy {number}", store)
        return SourceRequest(lambda *_: None, lambda error: done(None, error), urgent=urgent, wanted=wanted)


class Answered(NamedTuple):
    """A request, with the steps in which it began and was answered, and what a read returned."""

    request: Request
    number: int
    began: int
    ended: int
    data: bytes


class Case:
    """An overlay and some requests to it."""

    def __init__(self, path: str, *, streaming: bool, recorded: bool = True) -> None:
        """The clusters begin as: below (or remote), zero, data. Without a record every link waits for its epoch."""
        self._path = path
        self._streaming = streaming
        self.recorded = recorded
        self.below = b"".join(bytes([first]) * SECTOR for first in SOURCE)
        create_file(path, SIZE, cluster_size=CLUSTER, table_size=2, backing_name="nbd://nowhere")
        with open(path, "rb") as file:
            self._empty = file.read()
        self.initial = bytearray(self.below)
        self.initial[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
        self.initial[2 * CLUSTER :] = b"\x77" * CLUSTER

    async def run(self, requests: Sequence[Request], schedule: Schedule) -> None:
        """Run the requests in the order of the schedule. Raises AssertionError."""
        queues = StepWorker.queues = Queues()
        with open(self._path, "r+b") as file:
            file.write(self._empty)
            file.truncate()
        image = QedImage(self._path, self._open(), read_only=False)
        source = StepSource(self.below, queues)
        overlay = Overlay(image, source)
        await self._prepare(overlay, queues)
        fetches = self._stream(overlay, source) if self._streaming else None
        answered = await self._steps(overlay, fetches, requests, schedule, queues)
        queues.finish()
        found = await read(overlay, 0, SIZE)
        check_linearizable(
            self.initial, [*answered, Answered(Request("read", 0, SIZE // SECTOR), 99, 999, 1000, found)]
        )
        await overlay.close()
        with open(self._path, "rb") as file:
            assert self._content(Image(file.read())) == found, "closed, it is something else"

    def _open(self) -> OpenFile:
        opened = open_file(self._path, lambda _fd: None, writable=True)
        if self.recorded or not opened.record:
            return opened
        opened.record.close()
        return opened._replace(record=None)

    async def _prepare(self, overlay: Overlay, queues: Queues) -> None:
        queues.at_once = True
        await overlay.write_zeroes(CLUSTER, CLUSTER, may_unmap=True)
        await overlay.write(2 * CLUSTER, b"\x77" * CLUSTER)
        await overlay.flush()
        await overlay.flush()
        queues.at_once = False

    def _stream(self, overlay: Overlay, source: StepSource) -> Fetches:
        remote: bitarray = ~overlay.image.allocated
        remote[1:] = 0
        fetches = Fetches(overlay, source)
        overlay.below.begin_streaming(remote, fetches)
        return fetches

    async def _steps(
        self,
        overlay: Overlay,
        fetches: Fetches | None,
        requests: Sequence[Request],
        schedule: Schedule,
        queues: Queues,
    ) -> list[Answered]:
        waiting = deque(enumerate(requests))
        running: dict[asyncio.Task[bytes], tuple[int, int]] = {}
        answered: list[Answered] = []
        step = 0
        while True:
            step += 1
            for _ in range(TURNS):
                await asyncio.sleep(0)
            for task in [task for task in running if task.done()]:
                number, began = running.pop(task)
                answered.append(Answered(requests[number], number, began, step, task.result()))
            options = [*queues.waiting, *(["begin"] if waiting else [])]
            if not running and not waiting:
                await self._check_kill(overlay)
                return answered
            assert options, "nothing can go on"
            choice = schedule.choose(options)
            if choice == "begin":
                number, request = waiting.popleft()
                running[asyncio.ensure_future(perform(overlay, fetches, request, number))] = number, step
            else:
                queues.move_on(choice)

    async def _check_kill(self, overlay: Overlay) -> None:
        """All is answered: what a kill leaves is what the guest reads now."""
        extension = overlay.image.extension
        assert extension
        tables = overlay.image._tables
        tables.keep_page(0, tables.load_page(0))
        with open(self._path, "rb") as file:
            left = Image(file.read(), read_record(file.fileno(), extension.image_uuid))
        found = self._content(left)
        for cluster in range(CLUSTERS):
            part = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
            kept = found[part] == self._as_seen(overlay, cluster)
            assert kept, f"a kill loses cluster {cluster}"

    def _as_seen(self, overlay: Overlay, cluster: int) -> bytes:
        """What the guest reads, whether or not it is in memory."""
        entry = overlay.image.entry_now(cluster)
        if entry == UNALLOCATED:
            return self.below[cluster * CLUSTER : (cluster + 1) * CLUSTER]
        assert entry is not None
        return bytes(CLUSTER) if entry == ZERO else os.pread(overlay.image.fd, CLUSTER, entry)

    def _content(self, image: Image) -> bytes:
        clusters = [image.read(cluster) for cluster in range(CLUSTERS)]
        return b"".join(
            self.below[i * CLUSTER : (i + 1) * CLUSTER] if found is None else found for i, found in enumerate(clusters)
        )


async def perform(overlay: Overlay, fetches: Fetches | None, request: Request, number: int) -> bytes:
    """Do a request as the server does; return what was read."""
    start, length = request.offset * SECTOR, request.length * SECTOR
    if request.kind == "write":
        if overlay.write_at_once(start, request.data(number)):
            return b""
        answer: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
        if overlay.write_now(start, request.data(number), answer.set_result):
            assert await answer is None
        else:
            await overlay.write(start, request.data(number))
    elif request.kind == "zero":
        await overlay.write_zeroes(start, length, may_unmap=True)
    elif request.kind == "discard":
        await overlay.discard(start, length)
    elif request.kind == "read":
        return await read(overlay, start, length)
    elif request.kind == "flush":
        await overlay.flush()
    elif request.kind == "link":
        overlay.image.nudge()
    elif request.kind == "forget":
        overlay.image._tables._cache.clear()
    elif fetches and overlay.below.remote and overlay.below.remote[0] and not fetches.is_in_flight(0):
        fetches.begin(0, 1)
    return b""


async def read(overlay: Overlay, offset: int, length: int) -> bytes:
    buffers = overlay.read_now(offset, length)
    if buffers is None:
        buffers = await overlay.read(offset, length)
    return b"".join(bytes(buffer) for buffer in buffers)


def check_linearizable(initial: bytes | bytearray, answered: Sequence[Answered]) -> None:
    """Raise AssertionError unless some order explains what was read, for each sector."""
    for sector in range(SIZE // SECTOR):
        steps = []
        for request, number, began, ended, data in answered:
            within = sector - request.offset
            if 0 <= within < request.length and request.kind in ("write", "zero", "discard", "read"):
                is_read = request.kind == "read"
                value = data[within * SECTOR] if is_read else request.data(number)[0]
                assert not is_read or len(set(data[within * SECTOR : (within + 1) * SECTOR])) == 1, "a sector is torn"
                steps.append((is_read, value, began, ended))
        assert is_explained(initial[sector * SECTOR], tuple(steps)), f"sector {sector}: {steps}"


@cache
def is_explained(value: int, steps: tuple[tuple[bool, int, int, int], ...]) -> bool:
    """Whether there is an order: take any step next that began before every other one had ended."""
    if not steps:
        return True
    first_end = min(ended for _, _, _, ended in steps)
    for at, (is_read, what, began, _) in enumerate(steps):
        rest = steps[:at] + steps[at + 1 :]
        if began <= first_end and (not is_read or what == value) and is_explained(what, rest):
            return True
    return False


def cached_only(tables: Tables, page: int) -> memoryview | None:
    """Whatever was forgotten must be read by a thread."""
    return _NO_TABLE if tables._page_offset(page) == 0 else tables._cache.get(page)


@pytest.fixture
def stepwise(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(record, "DIRECTORY", str(tmp_path_factory.mktemp("records")))
    monkeypatch.setattr(image_module, "Worker", StepWorker)
    monkeypatch.setattr(os, "fdatasync", lambda _fd: None)  # no power is cut here
    monkeypatch.setattr(Tables, "page_now", cached_only)
    yield
    is_explained.cache_clear()


pytestmark = pytest.mark.usefixtures("stepwise")

PER = CLUSTER // SECTOR
REQUESTS = {
    "whole write": Request("write", 0, PER),
    "part at the begin": Request("write", 0, 3),
    "part within": Request("write", 2, 3),
    "write over two clusters": Request("write", PER - 2, 4),
    "write over all": Request("write", 0, 3 * PER),
    "write into data": Request("write", 2 * PER + 1, 2),
    "zeroes": Request("zero", 0, PER),
    "zeroes of a part": Request("zero", 1, 3),
    "zeroes over data": Request("zero", PER, 2 * PER),
    "discard": Request("discard", 0, PER),
    "discard of data": Request("discard", 2 * PER, PER),
    "read": Request("read", 0, 2 * PER),
    "read of data": Request("read", PER + 1, 2 * PER - 1),
    "flush": Request("flush"),
    "fetch": Request("fetch"),
    "link": Request("link"),
    "forget": Request("forget"),
}
TWO = list(itertools.product(REQUESTS.values(), repeat=2))


async def explore(case: Case, requests: Sequence[Request], *, most: int) -> tuple[int, bool]:
    """Run schedule after schedule; return how many, and whether these were all."""
    choices: list[int] | None = []
    count = 0
    while choices is not None and count < most:
        schedule = Schedule(choices)
        await run(case, requests, schedule)
        choices = schedule.next()
        count += 1
    return count, choices is None


async def run(case: Case, requests: Sequence[Request], schedule: Schedule) -> None:
    try:
        await case.run(requests, schedule)
    except AssertionError as error:
        raise AssertionError(f"{requests}, schedule {schedule.choices}: {error}") from error


async def explore_all(case: Case, sequences: Sequence[Sequence[Request]], *, most: int) -> None:
    """Explore every one of these sequences."""
    total = complete = 0
    for requests in sequences:
        count, all_of_them = await explore(case, requests, most=most)
        total += count
        complete += all_of_them
    print(f"{total} schedules of {len(sequences)} sequences, {complete} of these in every order")


async def explore_some(case: Case, chance: random.Random, seconds: float) -> None:
    """Run random schedules of random requests."""
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        requests = chance.choices(list(REQUESTS.values()), k=chance.randint(3, 7))
        await run(case, requests, Schedule(chance=chance))
        count += 1
    print(f"{count} random schedules")


@pytest.fixture(params=["streaming", "layered", "layered without a record"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    streaming, recorded = request.param == "streaming", "without" not in request.param
    return Case(str(tmp_path / "image"), streaming=streaming, recorded=recorded)


async def test_orders_of_two_requests_are_linearizable(case: Case) -> None:
    await explore_all(case, TWO, most=25 if case.recorded else 5)


async def test_random_orders_of_several_requests_are_linearizable(case: Case, seed: int) -> None:
    await explore_some(case, random.Random(seed), 3)


def adopt_always(patch: pytest.MonkeyPatch) -> None:
    """What was fetched is taken over, whatever the guest wrote meanwhile."""
    patch.setattr(Overlay, "adopt", lambda self, cluster, place, _count, _zero: self.image.map(cluster, place))


@pytest.mark.parametrize("mistake", [answer_before_the_link, adopt_always])
async def test_a_mistake_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match="schedule"):
        await explore_all(Case(str(tmp_path / "image"), streaming=True), TWO, most=1000)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", REQUESTS)
async def test_every_order_of_three_requests_is_linearizable(case: Case, first: str) -> None:
    await explore_all(case, [(REQUESTS[first], *others) for others in TWO], most=1000)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_random_orders_are_linearizable_for_minutes(case: Case, seed: int) -> None:
    await explore_some(case, random.Random(seed), 300)
