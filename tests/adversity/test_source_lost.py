"""A source that is slow, silent, lying, or gone: no guest sees an I/O error, and every byte is right in the end."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

from tests.support.client import READ
from tests.support.harness import Pair, make_image
from tests.support.processes import wait_until
from tests.support.qed import content, qemu_check, qemu_compare
from tests.support.workload import DiskModel, Workload, examine

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
SIZE = 16 * MIB
SLOW = 64 << 10
"""A rate at which nothing much is fetched but what the guest asks for."""


def content_of(pair: Pair) -> bytes:
    with open(pair.image, "rb") as file:
        return file.read()


def finish(pair: Pair) -> None:
    """Let the stream come to its end without the rate limit, and compare."""
    pair.stop_streamer()
    pair.start_streamer()
    pair.wait_until_independent()
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    assert qemu_compare(pair.overlay, pair.image)


class Background:
    """A call in a thread: a guest's request that has to wait."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.result = self._call()

    @property
    def waiting(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> object:
        self._thread.join(60)
        assert not self.waiting
        return self.result


def test_a_guest_waits_while_the_source_is_away_and_all_else_goes_on(pair: Pair, seed: int) -> None:
    make_image(pair.image, SIZE, random.Random(seed), [(0, SIZE)])
    source = content_of(pair)
    pair.start(rate=SLOW)
    with pair.guest() as guest, pair.guest() as other:
        other.write(3 * MIB, b"local" * 1000)
        pair.kill_source()
        reading = Background(lambda: guest.read(9 * MIB, 100_000))
        assert other.read(3 * MIB, 5000) == b"local" * 1000
        other.write(3 * MIB, b"again" * 1000)
        other.flush()
        assert reading.waiting
        pair.start_source()
        assert reading.wait() == source[9 * MIB : 9 * MIB + 100_000]
        other.write(3 * MIB, source[3 * MIB : 3 * MIB + 5000])
    finish(pair)


def test_a_stream_goes_on_through_cut_connections(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    make_image(pair.image, SIZE, rng)
    pair.start_source()
    pair.faults.cut_after(rng.randrange(3 * MIB))
    pair.start_streamer()
    connections = pair.faults.connections
    pair.faults.cut()
    wait_until(lambda: pair.faults.connections > connections, "a new connection")
    pair.faults.cut_after(rng.randrange(3 * MIB))
    pair.wait_until_independent()
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    assert qemu_compare(pair.overlay, pair.image)


def test_a_silent_source_holds_the_guest_until_it_speaks_again(pair: Pair, seed: int) -> None:
    make_image(pair.image, SIZE, random.Random(seed), [(0, SIZE)])
    pair.start(rate=SLOW)
    pair.faults.stall()
    with pair.guest() as guest, pair.guest() as other:
        reading = Background(lambda: guest.read(5 * MIB, 4096))
        other.write(0, bytes(65536))
        assert other.read(0, 65536) == bytes(65536)
        assert reading.waiting
        pair.faults.flow()
        assert reading.wait() == content_of(pair)[5 * MIB : 5 * MIB + 4096]
        other.write(0, content_of(pair)[:65536])
    finish(pair)


def test_a_source_far_away_fills_its_line(pair: Pair, seed: int) -> None:
    make_image(pair.image, SIZE, random.Random(seed))
    pair.faults.delay = 0.05
    pair.start()
    with pair.guest() as guest:
        assert guest.read(7 * MIB + 100, 5000) == content_of(pair)[7 * MIB + 100 : 7 * MIB + 5100]
    pair.wait_until_independent()
    assert pair.stop_streamer()
    assert qemu_compare(pair.overlay, pair.image)


def test_a_source_that_breaks_the_protocol_is_left_and_asked_again(pair: Pair, seed: int) -> None:
    make_image(pair.image, SIZE, random.Random(seed), [(0, SIZE)])
    pair.start(rate=SLOW)
    connections = pair.faults.connections
    with pair.guest() as guest:
        offset = 6 * MIB
        while pair.faults.connections == connections:
            pair.faults.corrupt_after(0)  # on a quiet line, the next byte is a reply's magic
            guest.read(offset, 512)
            offset += 65536
        assert guest.read(2 * MIB, 65536) == content_of(pair)[2 * MIB : 2 * MIB + 65536]


def test_a_source_that_refuses_is_asked_until_it_does_not(pair: Pair, seed: int) -> None:
    make_image(pair.image, SIZE, random.Random(seed), [(0, SIZE)])
    pair.start(rate=SLOW)
    with pair.guest() as guest:
        pair.faults.refusing = True
        connections = pair.faults.connections
        pair.faults.cut()
        reading = Background(lambda: guest.read(12 * MIB, 4096))
        wait_until(lambda: pair.faults.connections > connections + 1, "several attempts")
        assert reading.waiting
        pair.faults.refusing = False
        assert reading.wait() == content_of(pair)[12 * MIB : 12 * MIB + 4096]


def test_however_many_requests_wait_none_fails_when_the_source_goes(pair: Pair, seed: int) -> None:
    make_image(pair.image, SIZE, random.Random(seed), [(0, SIZE)])
    source = content_of(pair)
    pair.start(rate=SLOW)
    pair.faults.stall()
    offsets = [2 * MIB + 65536 * number for number in range(200)]
    with pair.guest() as guest, pair.guest() as other:
        cookies = {guest.submit(READ, offset, 4096): offset for offset in offsets}
        other.write(0, source[:65536])  # which is answered when the streamer has had time for those
        pair.kill_source()
        pair.start_source()
        pair.faults.flow()
        for _ in offsets:
            reply = guest.receive()
            offset = cookies[reply.cookie]
            assert reply.error == 0, f"at {offset}"
            assert reply.data == source[offset : offset + 4096]


def test_a_guest_that_works_all_the_time_notices_no_cut(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    make_image(pair.image, SIZE, rng, [(0, SIZE)])
    model = DiskModel(content_of(pair))
    pair.start(rate=MIB)
    with Workload(pair.guest_socket, model, seed) as work:
        for number in range(12):
            work.wait_for(rng.randrange(100))
            if number % 4 == 3:
                pair.kill_source()
                pair.start_source()
            else:
                pair.faults.cut()
    assert not work.faults
    assert not examine(pair.guest_socket, model)
    pair.stop_streamer()
    pair.start_streamer()
    pair.wait_until_independent()
    assert pair.stop_streamer()
    assert content(pair.overlay) == model.contents()
