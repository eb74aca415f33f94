"""Power cuts, with what reached the file recorded from outside the process: the commands as they are, under strace.

From the recording the images are made that a power cut could have left at a moment: with every write that no barrier
covered there or not, sector by sector or as a whole, at any length that the file had, with garbage in what is new.
Each must be sound, and hold what was flushed, or what is newer; a sample is shown to qemu-img, and another is resumed.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed.image import QedImage
from tests.powercut.guest import Guest
from tests.support.crash import SECTOR, DamagedError, Image, Model, Recording
from tests.support.harness import CommandPair, Pairs, make_image
from tests.support.processes import NBDSTREAM, nbdstream
from tests.support.qed import qemu_check
from tests.support.strace import Traced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

CLUSTER = 4096
GEOMETRY = ("--cluster-size", str(CLUSTER), "--table-size", "2")
SPAN = 1024
"""Clusters that one L2 table of two clusters maps."""
SIZE = (SPAN + 100) * CLUSTER - SECTOR
"""Of the source: its last cluster is not whole, and there are two L2 tables."""
DISK = SIZE + SECTOR

QEMU_LOOKS, OPENED, RESUMED = 40, 15, 150
"""Of so many states one is shown to qemu-img, opened for writing, or streamed to the end."""


class Cut:
    """A recorded run, and a judge of the states that a power cut could have left of it."""

    def __init__(self, recording: Recording, model: Model, crashed: str, uri: str | None = None) -> None:
        """``crashed`` is where states are put for others to look at; ``uri`` is the source that they resume from."""
        self.recording = recording
        self.model = model
        self.counts: Counter[str] = Counter()
        self._crashed = crashed
        self._uri = uri

    def sample(self, count: int, chance: random.Random) -> None:
        """Look at ``count`` states, at moments around calls chosen at random."""
        events = self.recording.events
        late = [event for event in events if event.kind == "write" and event.offset == 0]  # the header
        for _ in range(count):
            event = chance.choice(late if chance.random() < 0.1 and late else events)
            moment = chance.choice([event.begin, min(event.end, self.recording.end) - 1, event.end])
            self.look(self.recording.power_cut(moment, chance), moment)

    def exhaust(self, most: int) -> None:
        """Look at every state in which each write is there or not as a whole, at the begin and end of each call.

        Where that would be more than ``most``, the moment is left out (and counted).
        """
        moments = {event.begin for event in self.recording.events} | {event.end for event in self.recording.events}
        for moment in sorted(moments):
            if 1 << self.recording.pending(moment) > most:
                self.counts["moments left out"] += 1
                continue
            for state in self.recording.every_power_cut(moment):
                self.look(state, moment)

    def look(self, state: bytes, moment: int) -> None:
        """Raise AssertionError if a state is not what it may be."""
        self.model.check_power_cut(state, moment)
        number = self.counts["states"]
        self.counts["states"] += 1
        if number % QEMU_LOOKS == 0:
            self._put(state)
            found = qemu_check(self._crashed)
            assert (found.corruptions, found.check_errors) == (0, 0), found
            self.counts["shown to qemu-img"] += 1
        if number % OPENED == 0:
            self._put(state)
            asyncio.run(open_and_close(self._crashed))
            self._examine(moment)
            self.counts["opened"] += 1
        if self._uri and number % RESUMED == 0:
            self._put(state)
            nbdstream("stream", self._uri, self._crashed)
            image = self._examine(moment)
            assert not image.has_backing
            assert image.unused == 0
            self.counts["resumed to the end"] += 1

    def _put(self, state: bytes) -> None:
        with open(self._crashed, "wb") as file:
            file.write(state)

    def _examine(self, moment: int) -> Image:
        with open(self._crashed, "rb") as file:
            content = file.read()
        self.model.check_power_cut(content, moment)
        return Image(content)

    def __str__(self) -> str:
        kinds = Counter(event.kind for event in self.recording.events)
        return f"{dict(kinds)}: {', '.join(f'{count} {what}' for what, count in self.counts.items())}"


async def open_and_close(path: str) -> None:
    image = await QedImage.open(path, writable=True)
    await image.close()


def with_mistake(mistake: str | None) -> Sequence[str]:
    return (sys.executable, "-m", "tests.support.mistakes", mistake) if mistake else (NBDSTREAM,)


def data_of(path: str, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read().ljust(size, b"\0")


def stream(
    pair: CommandPair, chance: random.Random, *, requests: int, mistake: str | None = None, rate: int | None = None
) -> Cut:
    """Stream an overlay to independence beside a guest, and some requests longer."""
    data = [(place, 1 + chance.randrange(200) * SECTOR) for place in range(0, SIZE - (256 << 10), 400 << 10)]
    make_image(pair.image, SIZE, chance, [*data, (SIZE - 70_000, 70_000)])
    pair.start_source()
    nbdstream("create", pair.overlay, "--backing", pair.uri, *GEOMETRY)
    limit = ["--rate", str(rate)] if rate else []
    arguments = ("stream", pair.uri, pair.overlay, "-U", pair.guest_socket, "--progress", "json", *limit)
    streamer = Traced(pair.overlay, f"{pair.overlay}.strace", *arguments, program=with_mistake(mistake))
    pair.streamer = streamer
    streamer.wait_until_serving()
    model = Model(data_of(pair.image, DISK))
    if requests:
        guest = Guest(pair.guest_socket, model.below, CLUSTER, chance)
        with closing(guest):
            independent = "is independent"
            guest.use(lambda count: count < requests or not any(independent in line for line in streamer.lines))
            guest.use(lambda count: count < requests // 4)
        model = guest.model
    streamer.wait_until_independent()
    assert pair.stop_streamer()
    return Cut(streamer.recording(), model, f"{pair.overlay}.crashed", pair.uri)


def serve(
    pair: CommandPair, chance: random.Random, *, requests: int, clusters: int = SPAN + 100, mistake: str | None = None
) -> Cut:
    """Serve an image of its own, empty at first, to a guest."""
    nbdstream("create", pair.overlay, "--size", str(clusters * CLUSTER), *GEOMETRY)
    arguments = ("serve", "--writable", "-f", "qed", pair.overlay, "-U", pair.guest_socket)
    server = Traced(pair.overlay, f"{pair.overlay}.strace", *arguments, program=with_mistake(mistake))
    pair.streamer = server
    server.wait_until_serving()
    with closing(Guest(pair.guest_socket, bytes(clusters * CLUSTER), CLUSTER, chance)) as guest:
        guest.use(lambda count: count < requests)
    assert server.stop() == 0
    return Cut(server.recording(), guest.model, f"{pair.overlay}.crashed")


def test_no_power_cut_hurts_a_stream(pairs: Pairs, seed: int) -> None:
    chance = random.Random(seed)
    cut = stream(pairs.commands(direct=True), chance, requests=400, rate=3 << 20)
    cut.sample(300, chance)
    print(cut)


def test_no_power_cut_hurts_a_guest(pairs: Pairs, seed: int) -> None:
    chance = random.Random(seed)
    cut = serve(pairs.commands(direct=True), chance, requests=500)
    cut.sample(300, chance)
    print(cut)


def test_no_state_of_a_small_run_is_unsound(pairs: Pairs, seed: int) -> None:
    """Every subset of the writes that no barrier covers, at every moment."""
    cut = serve(pairs.commands(direct=True), random.Random(seed), requests=12, clusters=40)
    cut.exhaust(most=1 << 8)
    print(cut)


def find_out(cuts: Iterable[Cut], chance: random.Random) -> None:
    for cut in cuts:
        try:
            cut.sample(400, chance)
        except DamagedError as found:
            print(f"{cut}; found out: {found}")
            return
    pytest.fail("nobody has noticed")


@pytest.mark.parametrize(
    "mistake", ["link_before_the_barrier", "l1_before_the_l2_table", "no_barrier", "reuse_at_once"]
)
def test_a_wrong_order_is_found_out(pairs: Pairs, seed: int, mistake: str) -> None:
    """Chance decides what is tried: a run or two do, nearly always."""
    chance = random.Random(seed)
    pair = (pairs.commands(direct=True) for _ in range(8))
    find_out((serve(each, chance, requests=300, mistake=mistake) for each in pair), chance)


def test_a_backing_file_that_is_forgotten_early_is_found_out(pairs: Pairs, seed: int) -> None:
    chance = random.Random(seed)
    pair = (pairs.commands(direct=True) for _ in range(8))
    mistake = "forget_the_backing_file_early"
    find_out((stream(each, chance, requests=0, mistake=mistake) for each in pair), chance)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("make", [stream, serve])
@pytest.mark.parametrize("part", range(10))
def test_no_power_cut_of_tens_of_thousands_hurts(pairs: Pairs, seed: int, make: Callable[..., Cut], part: int) -> None:
    chance = random.Random(seed)
    cut = make(pairs.commands(direct=True), chance, requests=chance.choice([300, 1000, 3000]))
    cut.sample(1500, chance)
    print(cut)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_no_state_of_a_longer_run_is_unsound(pairs: Pairs, seed: int) -> None:
    cut = serve(pairs.commands(direct=True), random.Random(seed), requests=30, clusters=60)
    cut.exhaust(most=1 << 12)
    print(cut)
