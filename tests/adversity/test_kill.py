"""``kill -9`` of the streamer while a guest writes all the time: no corruption, nothing acknowledged is lost, nothing
that is local is fetched again."""

from __future__ import annotations

import random
import time

import pytest

from tests.support.crash import Image
from tests.support.harness import CommandPair, Pairs, make_image
from tests.support.qed import content, qemu_check, qemu_info
from tests.support.workload import DiskModel, Workload, examine

MIB = 1 << 20
SIZE = 40 * MIB


def image_of(pair: CommandPair) -> Image:
    with open(pair.overlay, "rb") as file:
        return Image(file.read())


def remote_bytes(image: Image, source: bytes) -> int:
    """How much is still to be fetched: what is not local, and not zero at the source."""
    size = image.cluster_size
    return sum(
        size
        for cluster in range(-(-len(source) // size))
        if cluster not in image.mapped and any(source[cluster * size : (cluster + 1) * size])
    )


def wait_for_moment(rng: random.Random, work: Workload) -> None:
    """Some moment while the streamer starts, or when it has answered some requests."""
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0.0, 1.0))  # not to wait for something: the moment itself is at random
    else:
        work.wait_for(int(rng.choice([1, 10, 100, 1000]) * rng.random()))


def kill(pair: CommandPair, work: Workload) -> Image:
    """Kill the streamer; return what it left, which a stranger would find."""
    pair.kill_streamer()
    work.wait_until_disconnected()
    assert not work.faults
    check = qemu_check(pair.overlay)
    assert check.corruptions == check.check_errors == 0, check
    return image_of(pair)


def kill_again_and_again(pair: CommandPair, rng: random.Random, times: int) -> None:
    make_image(pair.image, SIZE, rng, [(0, 10 * MIB), (14 * MIB, 20 * MIB), (35 * MIB, 5 * MIB - 3000)])
    with open(pair.image, "rb") as file:
        model = DiskModel(file.read())
    rate = 12 * MIB // times  # slow enough to be killed so often before the end
    pair.start(rate=rate)
    local: set[int] = set()
    to_fetch = remote_bytes(image_of(pair), model.source)
    with Workload(pair.guest_socket, model, rng.randrange(1 << 32)) as work:
        for number in range(1, times + 1):
            wait_for_moment(rng, work)
            image = kill(pair, work)
            assert fetched(pair) <= to_fetch, "what was local is fetched again"
            assert local <= image.mapped.keys(), "what was local is remote again"
            local, to_fetch = set(image.mapped), remote_bytes(image, model.source)
            examining = number == times or rng.random() < 0.5
            if examining:
                work.pause()
            streamer = pair.begin_streamer(rate=None if number == times else rate)
            if examining:
                streamer.wait_until_serving()
                assert not examine(pair.guest_socket, model)
                work.go_on()
        pair.wait_until_independent()
    assert not work.faults
    assert fetched(pair) <= to_fetch
    check_the_end(pair, model)
    print(f"killed {times} times; answered: {dict(work.done)}")


def fetched(pair: CommandPair) -> int:
    assert pair.streamer
    return max((line["fetched"] for line in pair.streamer.progress), default=0)


def check_the_end(pair: CommandPair, model: DiskModel) -> None:
    assert not examine(pair.guest_socket, model)
    assert pair.stop_streamer(), "independent"
    assert "backing-filename" not in qemu_info(pair.overlay)
    assert qemu_check(pair.overlay).status == 0, "a clean end leaves no leaks either"
    assert content(pair.overlay) == model.contents()


def test_no_kill_loses_what_was_acknowledged(pairs: Pairs, seed: int) -> None:
    kill_again_and_again(pairs.commands(direct=True), random.Random(seed), 3)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_no_kill_of_fifty_loses_what_was_acknowledged(pairs: Pairs, seed: int) -> None:
    kill_again_and_again(pairs.commands(direct=True), random.Random(seed), 50)
