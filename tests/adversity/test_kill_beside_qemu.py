"""``kill -9`` of source and streamer at random moments, the guest a QEMU that reconnects: it notices but a pause.

The QEMU is qemu-io, which says what it does; or a storage daemon, with fio in front that verifies all that it reads.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.client import NbdClient
from tests.support.fio import Area, Fio, fill, reading, writing
from tests.support.harness import socket_uri
from tests.support.processes import Process, wait_until
from tests.support.qed import content, qemu_check
from tests.support.qemu_guest import RECONNECT_SECONDS, QemuGuest, contents, make_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.harness import CommandPair, Pairs

MIB = 1 << 20
SIZE = 24 * MIB
SLOW = 2 * MIB
"""A rate at which the stream does not come to its end between two kills."""


READ, WRITTEN = Area(0, 2 * MIB), Area(2 * MIB, 2 * MIB)
"""What fio reads and what it writes, all the time."""


def some_time(chance: random.Random) -> None:
    time.sleep(chance.uniform(0.0, 0.3))  # not to wait for something: the moment itself is at random


def some_moment(chance: random.Random, guest: QemuGuest) -> None:
    if chance.random() < 0.5:
        guest.wait_for(chance.randrange(100))
    else:
        some_time(chance)


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
            some_time(chance)
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
        guest.wait_for(1)  # it comes back to a disk that it has opened
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
    print(f"killed {dict(Counter(killed))}; {guest.done} commands of qemu-io")


def test_a_qemu_notices_no_kill(pairs: Pairs, seed: int) -> None:
    kill_again_and_again(pairs.commands(direct=True), random.Random(seed), 4)


@contextmanager
def storage_daemon(pair: CommandPair) -> Iterator[str]:
    """A QEMU that serves the guest's disk on, and comes back by itself when the streamer was gone; and its socket."""
    socket = f"{pair.guest_socket}.qemu"
    disk = f"driver=nbd,node-name=disk,server.type=unix,server.path={pair.guest_socket}"
    command = [
        "qemu-storage-daemon",
        *("--blockdev", f"{disk},reconnect-delay={RECONNECT_SECONDS}"),
        *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
        *("--export", "type=nbd,id=guest,node-name=disk,name=,writable=on"),
    ]
    with Process(*command) as process:
        wait_until(lambda: os.path.exists(socket) or not process.running, "the storage daemon")
        assert process.running, process
        yield socket


def kill_beside_fio(pair: CommandPair, chance: random.Random, *, loops: int) -> int:
    """Kill as long as fio works; return how many there were."""
    fill(pair.image, SIZE)
    report = f"{pair.overlay}.fio"
    pair.start(rate=SLOW)
    killed: list[str] = []
    with storage_daemon(pair) as socket, NbdClient(socket) as other:
        uri = socket_uri(socket)
        again = f"--loops={loops}"
        with Fio(uri, report, reading(READ, again), writing(WRITTEN, again), rate=1000) as fio:
            while fio.running:
                some_time(chance)
                killed.append(kill_and_start(pair, chance, rate=SLOW))
                # QEMU tries again ever more seldom: killed all the time, the streamer is never there when it does.
                other.read(0, 512)
            fio.finish()
        pair.kill_streamer()
        pair.start_streamer()
        pair.wait_until_independent()
        rest = Area(4 * MIB, SIZE - 4 * MIB)
        with Fio(uri, report, reading(READ), reading(WRITTEN, own=True), reading(rest)) as fio:
            fio.finish()
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    print(f"killed {dict(Counter(killed))}")
    return len(killed)


def test_a_fio_behind_a_storage_daemon_notices_no_kill(pairs: Pairs, seed: int) -> None:
    assert kill_beside_fio(pairs.commands(direct=True), random.Random(seed), loops=1)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(10))
def test_a_fio_behind_a_storage_daemon_notices_none_of_three_hundred_kills(pairs: Pairs, seed: int, part: int) -> None:
    kills = 0
    while kills < 30:
        kills += kill_beside_fio(pairs.commands(direct=True), random.Random(seed + kills), loops=10)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(10))
def test_a_qemu_notices_none_of_three_hundred_kills(pairs: Pairs, seed: int, part: int) -> None:
    kill_again_and_again(pairs.commands(direct=True), random.Random(seed), 30)
