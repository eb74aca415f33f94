"""``kill -9`` of source and streamer at random moments, the guest a QEMU that reconnects: it notices but a pause."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.qed import content, qemu_check
from tests.support.qemu_guest import QemuGuest, contents, make_source

if TYPE_CHECKING:
    from tests.support.harness import CommandPair, Pairs

MIB = 1 << 20
SIZE = 24 * MIB
SLOW = 2 * MIB
"""A rate at which the stream does not come to its end between two kills."""


def some_moment(chance: random.Random, guest: QemuGuest) -> None:
    if chance.random() < 0.5:
        guest.wait_for(chance.randrange(100))
    else:
        time.sleep(chance.uniform(0.0, 0.3))  # not to wait for something: the moment itself is at random


def kill_and_start(pair: CommandPair, chance: random.Random, *, rate: int | None) -> str:
    """Kill one of the two, or both; the source may be away for a while."""
    victim = chance.choice(["streamer", "streamer", "source", "both"])
    if victim != "streamer":
        pair.kill_source()
    if victim != "source":
        pair.kill_streamer()
        check = qemu_check(pair.overlay)
        assert check.corruptions == check.check_errors == 0, check
        pair.begin_streamer(rate=rate)
        if victim == "both":
            time.sleep(chance.uniform(0.0, 0.3))
    if victim != "streamer":
        pair.start_source()
    assert pair.streamer
    if victim != "source":
        pair.streamer.wait_until_serving()
    return victim


def kill_again_and_again(pair: CommandPair, chance: random.Random, times: int) -> None:
    cells = make_source(pair.image, SIZE)
    pair.start(rate=SLOW)
    killed: list[str] = []
    with QemuGuest(pair.guest_socket, cells, chance.randrange(1 << 32)) as guest:
        for number in range(times):
            some_moment(chance, guest)
            last = number == times - 1
            killed.append(kill_and_start(pair, chance, rate=None if last else SLOW))
            guest.wait_for(1)
            assert not guest.complaints
        if killed[-1] == "source":
            pair.kill_streamer()
            pair.start_streamer()
        pair.wait_until_independent()
        guest.finish()
    assert not guest.complaints
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    assert content(pair.overlay) == contents(cells)
    counts = {victim: killed.count(victim) for victim in sorted(set(killed))}
    print(f"killed {counts}; {guest.done} commands of qemu-io")


def test_a_qemu_notices_no_kill(pairs: Pairs, seed: int) -> None:
    kill_again_and_again(pairs.commands(direct=True), random.Random(seed), 4)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_qemu_notices_none_of_three_hundred_kills(pairs: Pairs, seed: int) -> None:
    for _ in range(10):
        kill_again_and_again(pairs.commands(direct=True), random.Random(seed), 30)
        seed += 1
