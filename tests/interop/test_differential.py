"""The same requests, good and bad, to nbdstream and to qemu-nbd: the same answers, but for an explained few.

``DIFFERENCES`` is the list of them; docs/differences-from-qemu-nbd.md explains each under the same name. The data must
be the same always, and so must the extents of an image that nobody writes to; of one that is written to, whatever is
said to read as zeroes must do so.
"""

from __future__ import annotations

import os
import random
from contextlib import ExitStack
from itertools import accumulate, count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import pytest

from nbdstream.wire.nbd import Cmd, CmdFlag, Err, TransmissionFlag
from tests.server.raw_client import RawClient
from tests.support.answers import Answer, Asked, ask
from tests.support.processes import Command, Process, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

DOCUMENT = Path(__file__).parents[2] / "docs" / "differences-from-qemu-nbd.md"

SIZE = (80 << 20) + 512
"""Bytes: larger than any payload that either server takes, and no multiple of a page."""
QEMU_PAYLOAD = 32 << 20
OUR_PAYLOAD = 64 << 20
LAST = (1 << 64) - 1

HOLE, ZERO = 1, 2
WRITES = Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES
FLAGS = {
    Cmd.READ: CmdFlag.FUA,
    Cmd.WRITE: CmdFlag.FUA,
    Cmd.FLUSH: CmdFlag.FUA,
    Cmd.TRIM: CmdFlag.FUA,
    Cmd.CACHE: CmdFlag.FUA,
    Cmd.WRITE_ZEROES: CmdFlag.FUA | CmdFlag.NO_HOLE,
    Cmd.BLOCK_STATUS: CmdFlag.FUA | CmdFlag.REQ_ONE,
}
"""Every command, with the flags that always belong to it where FUA is advertised."""


class Way(NamedTuple):
    """How both servers are talked to."""

    writable: bool
    structured: bool


WAYS = {
    "read-only-simple": Way(writable=False, structured=False),
    "read-only-structured": Way(writable=False, structured=True),
    "writable-simple": Way(writable=True, structured=False),
    "writable-structured": Way(writable=True, structured=True),
}


class Case(NamedTuple):
    """A request, and what both servers answered."""

    way: Way
    asked: Asked
    ours: Answer
    theirs: Answer

    @property
    def errors(self) -> tuple[int, int]:
        """Ours and theirs."""
        return self.ours.error, self.theirs.error

    def __str__(self) -> str:
        said = (
            f"error {answer.error} closed {answer.closed} {len(answer.data)} bytes {answer.extents[:8]}"
            for answer in (self.ours, self.theirs)
        )
        return "\n  ".join([f"{self.way}: {self.asked}", *said])


class Difference(NamedTuple):
    """A difference in the error numbers that is explained, and a request that shows it."""

    name: str
    applies: Callable[[Case], bool]
    shown_by: tuple[str, Asked] | None
    """The key of a way, and a request; None where it depends on the file system."""


DIFFERENCES = [
    Difference(
        "ENOSPC for a write past the end",
        lambda case: (
            case.errors == (Err.ENOSPC, Err.EINVAL)
            and case.asked.command in (Cmd.WRITE, Cmd.WRITE_ZEROES)
            and case.asked.end > SIZE
        ),
        ("writable-simple", Asked(Cmd.WRITE_ZEROES, SIZE - 1, 2)),
    ),
    Difference(
        "EPERM for a write to a read-only export",
        lambda case: case.errors == (Err.EPERM, Err.EINVAL) and case.asked.command in WRITES and not case.way.writable,
        ("read-only-structured", Asked(Cmd.TRIM, 0, 512)),
    ),
    Difference(
        "Payloads of 32 to 64 MiB",
        lambda case: (
            case.errors == (0, Err.EINVAL)
            and case.asked.command in (Cmd.READ, Cmd.WRITE)
            and QEMU_PAYLOAD < case.asked.length <= OUR_PAYLOAD
        ),
        ("read-only-simple", Asked(Cmd.READ, 0, QEMU_PAYLOAD + 1)),
    ),
    Difference(
        "CACHE of more than 32 MiB",
        lambda case: (
            case.errors == (0, Err.EINVAL) and case.asked.command == Cmd.CACHE and case.asked.length > QEMU_PAYLOAD
        ),
        ("read-only-simple", Asked(Cmd.CACHE, 0, SIZE)),
    ),
    Difference(
        "EOVERFLOW for a read that is too long",
        lambda case: (
            case.errors == (Err.EOVERFLOW, Err.EINVAL)
            and case.asked.command == Cmd.READ
            and case.asked.length > OUR_PAYLOAD
            and case.way.structured
        ),
        ("read-only-structured", Asked(Cmd.READ, 0, OUR_PAYLOAD + 1)),
    ),
    Difference(
        "A flush with an offset or a length",
        lambda case: (
            case.errors == (Err.EINVAL, 0)
            and case.asked.command == Cmd.FLUSH
            and bool(case.asked.offset or case.asked.length)
        ),
        ("writable-structured", Asked(Cmd.FLUSH, 0, 512)),
    ),
    Difference(
        "Which zeroes are fast",
        lambda case: Err.ENOTSUP in case.errors and 0 in case.errors and bool(case.asked.flags & CmdFlag.FAST_ZERO),
        None,
    ),
]


def errors_of(way: Way, flags: TransmissionFlag, asked: Asked) -> set[int]:
    """Return the errors that proto.md has for a request (it sets no order among them), or just 0 for success."""
    command = asked.command
    if command not in FLAGS:
        return {Err.EINVAL}
    found: set[int] = set()
    known = int(FLAGS[Cmd(command)])
    if command == Cmd.READ and way.structured:
        known |= int(CmdFlag.DF)
    if command == Cmd.WRITE_ZEROES and flags & TransmissionFlag.SEND_FAST_ZERO:
        known |= int(CmdFlag.FAST_ZERO)
    if asked.flags & ~known:
        found.add(Err.EINVAL)
    if command in WRITES and not way.writable:
        found.add(Err.EPERM)
    if command == Cmd.FLUSH:
        return found | ({Err.EINVAL} if asked.offset or asked.length else set()) or {0}
    if asked.end > SIZE:
        found.add(Err.ENOSPC if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Err.EINVAL)
    if command in (Cmd.READ, Cmd.WRITE) and asked.length > OUR_PAYLOAD:
        found |= {Err.EOVERFLOW, Err.EINVAL} if command == Cmd.READ and way.structured else {Err.EINVAL}
    if command == Cmd.BLOCK_STATUS and not (way.structured and asked.length):
        found.add(Err.EINVAL)
    if not found and command == Cmd.WRITE_ZEROES and asked.flags & CmdFlag.FAST_ZERO:
        return {0, Err.ENOTSUP}
    return found or {0}


# -- two servers --------------------------------------------------------------------------------------------


class Peer:
    """A connection to one of the servers, made anew whenever the server ends it."""

    def __init__(self, path: str, way: Way) -> None:
        self.path = path
        self.way = way
        self._cookies = count(1)
        self._client: RawClient | None = None

    async def client(self) -> RawClient:
        if not self._client:
            contexts = ["base:allocation"] if self.way.structured else []
            self._client = await RawClient.connect(self.path)
            await self._client.greet()
            await self._client.go(structured=self.way.structured, contexts=contexts)
        return self._client

    async def ask(self, asked: Asked) -> Answer:
        answer = await ask(await self.client(), asked, next(self._cookies))
        if answer.closed or (asked.command == Cmd.WRITE and asked.length > QEMU_PAYLOAD):
            await self.close()  # qemu-nbd answers such a write and closes behind its answer
        return answer

    async def close(self) -> None:
        if self._client:
            await self._client.close()
            self._client = None


def make_image(path: Path, choices: random.Random) -> None:
    """Make an image of data and holes, whose borders are pages."""
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for _ in range(40):
            at = choices.randrange(0, SIZE >> 12) << 12
            file.seek(at)
            file.write(choices.randbytes(min(choices.randrange(1, 64) << 12, SIZE - at)))


class Pair:
    """Both servers over images of one content, and what the content has to be."""

    def __init__(self, directory: Path, way: Way, seed: int) -> None:
        for name in ("ours", "theirs"):
            make_image(directory / f"{name}.raw", random.Random(seed))
        self.way = way
        self.choices = random.Random(seed)
        self.model = bytearray((directory / "ours.raw").read_bytes())
        self.ours = Peer(f"{directory}/ours.sock", way)
        self.theirs = Peer(f"{directory}/theirs.sock", way)
        self._directory = directory
        self._stack = ExitStack()

    async def __aenter__(self) -> Self:
        where = self._directory
        access = ["--writable"] if self.way.writable else []
        ours = self._stack.enter_context(Command("serve", f"{where}/ours.raw", "-U", self.ours.path, *access))
        arguments = ["--persistent", "--shared=8", "--format=raw", "--discard=unmap", f"--socket={self.theirs.path}"]
        access = [] if self.way.writable else ["--read-only"]
        self._stack.enter_context(Process("qemu-nbd", *arguments, *access, f"{where}/theirs.raw"))
        ours.wait_until_serving()
        wait_until(lambda: os.path.exists(self.theirs.path), "qemu-nbd's socket")
        self.flags = TransmissionFlag((await self.ours.client()).flags)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.ours.close()
        await self.theirs.close()
        self._stack.close()

    async def compare(self, asked: Asked) -> Case:
        """Ask both, check what they say, and see to it that they hold the same afterwards."""
        case = Case(self.way, asked, await self.ours.ask(asked), await self.theirs.ask(asked))
        assert not case.ours.closed, case
        assert case.ours.error in errors_of(self.way, self.flags, asked), case
        if case.ours.error != case.theirs.error or case.theirs.closed:
            assert any(difference.applies(case) for difference in DIFFERENCES), case
            if asked.command in WRITES:
                await self._make_up(case)
        if case.ours.error:
            return case
        if asked.command == Cmd.READ:
            assert case.ours.data == self.model[asked.offset : asked.end], case
            assert case.theirs.error or case.theirs.data == case.ours.data, case
        elif asked.command == Cmd.BLOCK_STATUS:
            self._check_extents(case)
        elif asked.command in WRITES and asked.length:
            await self._check_written(asked)
        return case

    async def check_everything(self) -> None:
        """All that can be read is the same."""
        step = 16 << 20
        for at in range(0, SIZE, step):
            await self.compare(Asked(Cmd.READ, at, min(step, SIZE - at)))

    async def _make_up(self, case: Case) -> None:
        """What only one of them has done, have the other do in a way that it takes."""
        asked = case.asked
        if case.errors[0] == case.errors[1] or 0 not in case.errors:
            return
        behind = self.ours if case.ours.error else self.theirs
        for at in range(0, asked.length, QEMU_PAYLOAD):
            length = min(QEMU_PAYLOAD, asked.length - at)
            flags = asked.flags & ~CmdFlag.FAST_ZERO
            part = Asked(asked.command, asked.offset + at, length, flags, asked.payload[at : at + length])
            answer = await behind.ask(part)
            assert answer == Answer(), part
        case.ours.error = 0

    async def _check_written(self, asked: Asked) -> None:
        whole = slice(asked.offset, asked.end)
        if asked.command == Cmd.WRITE:
            self.model[whole] = asked.payload
        elif asked.command == Cmd.WRITE_ZEROES:
            self.model[whole] = bytes(asked.length)
        for at in range(asked.offset, asked.end, QEMU_PAYLOAD):
            read = Asked(Cmd.READ, at, min(QEMU_PAYLOAD, asked.end - at))
            if asked.command == Cmd.TRIM:
                await self._settle_trimmed(read)
            await self.compare(read)

    async def _settle_trimmed(self, read: Asked) -> None:
        """What was trimmed is as it was or zeroes, and each server has its own mind: have them agree again."""
        before = self.model[read.offset : read.end]
        for peer in (self.ours, self.theirs):
            data = (await peer.ask(read)).data
            assert all(now in (0, then) for now, then in zip(data, before, strict=True)), read
            zeroes = Asked(Cmd.WRITE, read.offset, read.length, payload=bytes(read.length))
            assert await peer.ask(zeroes) == Answer()
        self.model[read.offset : read.end] = bytes(read.length)

    def _check_extents(self, case: Case) -> None:
        asked, ours, theirs = case.asked, case.ours.extents, case.theirs.extents
        for extents in (ours, theirs):
            assert extents, case
            assert all(length for length, _ in extents), case
            assert sum(length for length, _ in extents[:-1]) < asked.length, case
            assert not asked.flags & CmdFlag.REQ_ONE or (len(extents) == 1 and extents[0][0] <= asked.length), case
            at = asked.offset
            for length, status in extents:
                assert not status & ZERO or not any(self.model[at : at + length]), case
                at += length
            assert at <= SIZE, case
        if not self.way.writable:
            reach = min(sum(length for length, _ in extents) for extents in (ours, theirs))
            assert _borders(ours, reach) == _borders(theirs, reach), case


def _borders(extents: list[tuple[int, int]], reach: int) -> list[tuple[int, int]]:
    """Return where the status changes within ``reach`` bytes, and to what."""
    found: list[tuple[int, int]] = []
    starts = accumulate((length for length, _ in extents), initial=0)
    for start, (_, status) in zip(starts, extents, strict=False):
        if start < reach and (not found or found[-1][1] != status):
            found.append((start, status))
    return found


# -- what is asked ------------------------------------------------------------------------------------------


def random_request(choices: random.Random) -> Asked:
    """Return a request: mostly a good one, often one at the border, sometimes a wrong one."""
    command = int(
        choices.choice([*FLAGS, *FLAGS, Cmd.READ, Cmd.WRITE, Cmd.BLOCK_STATUS, 8, choices.randrange(9, 1 << 16)])
    )
    offset, length = _range(choices, 65536 if command == Cmd.WRITE else 1 << 20)
    if command == Cmd.FLUSH and choices.random() < 0.7:
        offset = length = 0
    flags = 0
    if choices.random() < 0.4:
        allowed = int(FLAGS[Cmd(command)]) | CmdFlag.DF | CmdFlag.FAST_ZERO if command in FLAGS else 0
        flags = choices.randrange(1 << 16) & allowed if choices.random() < 0.8 else 1 << choices.randrange(16)
    if command != Cmd.WRITE and choices.random() < 0.04:
        length = choices.choice([0, QEMU_PAYLOAD + 1, SIZE, 0xFFFFFFFF])
    payload = choices.randbytes(length) if command == Cmd.WRITE else b""
    return Asked(command, offset, length, flags, payload)


def _range(choices: random.Random, most: int) -> tuple[int, int]:
    kind = choices.random()
    if kind < 0.4:
        return choices.randrange(SIZE - most), choices.randrange(1, most + 1)
    if kind < 0.75:
        return choices.randrange(SIZE - most) & ~4095, choices.randrange(1, (most >> 12) + 1) << 12
    if kind < 0.9:
        length = choices.choice([0, 1, 2, 511, 512, 513, 4096])
        return SIZE - length + choices.choice([0, 0, -1, -512, 1, 512]), length
    return choices.choice([SIZE + 1, 1 << 40, 1 << 63, LAST, LAST - 511]), choices.choice([0, 1, 512, 4096])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("requests", [150, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
async def test_the_same_requests_have_the_same_answers(way: Way, requests: int, seed: int, tmp_path: Path) -> None:
    async with Pair(tmp_path, way, seed) as pair:
        done = 0
        for _ in range(requests):
            case = await pair.compare(random_request(pair.choices))
            done += not case.ours.error
        await pair.check_everything()
        print(f"{done} of {requests} requests were done")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_every_command_at_every_border_has_the_same_answer(way: Way, seed: int, tmp_path: Path) -> None:
    borders = [
        (0, 4096),
        (100, 333),
        (0, 0),
        (SIZE, 0),
        (SIZE, 1),
        (SIZE + 1, 0),
        (SIZE - 1, 2),
        (1 << 63, 512),
        (LAST, 1),
    ]
    async with Pair(tmp_path, way, seed) as pair:
        for command in (*FLAGS, 8, 9, 0xFFFF):
            for offset, length in borders:
                for flags in (0, *(1 << bit for bit in range(6)), 0x8000):
                    payload = b"x" * length if command == Cmd.WRITE else b""
                    await pair.compare(Asked(int(command), offset, length, flags, payload))
        if way.writable:
            length = QEMU_PAYLOAD + 4096
            await pair.compare(Asked(Cmd.WRITE, 12345, length, payload=pair.choices.randbytes(length)))
        await pair.check_everything()


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.name)
async def test_every_difference_is_there_and_explained(difference: Difference, seed: int, tmp_path: Path) -> None:
    assert f"## {difference.name}\n" in DOCUMENT.read_text()
    if difference.shown_by:
        key, asked = difference.shown_by
        async with Pair(tmp_path, WAYS[key], seed) as pair:
            assert difference.applies(await pair.compare(asked))


def test_no_difference_is_explained_that_is_not_tested() -> None:
    titles = [line[3:].strip() for line in DOCUMENT.read_text().splitlines() if line.startswith("## ")]
    assert titles == [difference.name for difference in DIFFERENCES]
