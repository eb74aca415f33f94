"""``kill -9`` of the streamer at each system call that changes the overlay: the same command line always goes on.

From making the overlay to taking the backing file's name out of it, while a guest writes and remembers what was
acknowledged.
"""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import pytest

from tests.support.harness import CommandPair, Pairs, make_image
from tests.support.processes import NBDSTREAM, Command, Process, nbdstream, run, wait_until
from tests.support.qed import content, qemu_check, qemu_compare, qemu_info
from tests.support.workload import DiskModel, Workload, examine

MIB = 1 << 20
SIZE = 3 * MIB
CLUSTER = 4096
MAKING = [
    *[("fallocate", 1), ("fallocate", 2), ("pwrite64", 1), ("pwrite64", 2), ("pwrite64", 3)],
    *[("fsync", 1), ("fsync", 2), ("linkat", 1), ("linkat", 2)],
]
"""The calls that make the overlay, and its record."""

CHANGES = {
    "pwrite64": 100,
    "pwritev2": 200,
    "fdatasync": 30,
    "sync_file_range": 6,
    "fallocate": 2,
    "ftruncate": 4,
    "linkat": 1,
    "unlink": 5,
}
"""The calls that change an overlay and what is kept beside it, and how many of them there are in every run."""

PARTS = {"pwrite64": 2, "pwritev2": 4}
"""Of those that are many, for a test of some minutes."""

REQUESTS = 300
"""Of the guest: few, so that every call can be tried."""


def killed_at(call: str, number: int, *arguments: str) -> list[str]:
    """Return the command line of an nbdstream command that is killed when it makes its ``number``-th such call."""
    return [sys.executable, "-m", "tests.support.kill_at", call, str(number), NBDSTREAM, *arguments]


class Killed(Command):
    """A command that is killed at a call."""

    def __init__(self, call: str, number: int, *arguments: str) -> None:
        Process.__init__(self, *killed_at(call, number, *arguments))


def prepared(pair: CommandPair, seed: int) -> None:
    make_image(pair.image, SIZE, random.Random(seed), [(0, MIB), (2 * MIB, 70_000)])
    pair.start_source()


def is_enough(streamer: Command, work: Workload) -> bool:
    return work.done.total() >= REQUESTS and any("is independent" in line for line in streamer.lines)


def survives_kill(pairs: Pairs, seed: int, call: str, number: int) -> bool:
    """Kill a streamer beside a guest; what was acknowledged is there afterwards. False if the call never came."""
    with pairs.commands(direct=True) as pair:
        prepared(pair, seed)
        nbdstream("create", pair.overlay, "--backing", pair.uri, "--cluster-size", str(CLUSTER), "--table-size", "2")
        model = DiskModel(Path(pair.image).read_bytes())
        arguments = ("stream", pair.uri, pair.overlay, "-U", pair.guest_socket, "--rate", str(2 * MIB))
        pair.streamer = streamer = Killed(call, number, *arguments)
        with Workload(pair.guest_socket, model, seed, cluster_size=CLUSTER) as work:
            wait_until(lambda: not streamer.running or is_enough(streamer, work), "a kill, or the end")
            work.pause()
            status = streamer.stop()
            assert status in (0, -signal.SIGKILL), streamer
            check = qemu_check(pair.overlay)
            assert check.corruptions == check.check_errors == 0, check
            pair.start_streamer()
            assert not examine(pair.guest_socket, model)
            work.go_on()
            pair.wait_until_independent()
        assert not work.faults
        assert pair.stop_streamer()
        assert qemu_check(pair.overlay).status == 0
        assert content(pair.overlay) == model.contents()
    return status != 0


@pytest.mark.parametrize(("call", "number"), MAKING)
def test_a_kill_while_the_overlay_is_made_leaves_nothing_in_the_way(
    pairs: Pairs, seed: int, call: str, number: int
) -> None:
    with pairs.commands(direct=True) as pair:
        prepared(pair, seed)
        stream = ["stream", pair.uri, pair.overlay]
        run(*killed_at(call, number, *stream), status=-signal.SIGKILL)
        nbdstream(*stream)
        assert "backing-filename" not in qemu_info(pair.overlay)
        assert qemu_check(pair.overlay).status == 0
        assert qemu_compare(pair.overlay, pair.image)


@pytest.mark.parametrize("call", CHANGES)
def test_a_kill_at_a_call_loses_nothing_that_was_acknowledged(pairs: Pairs, seed: int, call: str) -> None:
    assert survives_kill(pairs, seed, call, random.Random(seed).randint(1, CHANGES[call]))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("call", "part"), [(call, part) for call in CHANGES for part in range(1, PARTS.get(call, 1) + 1)]
)
def test_a_kill_at_each_call_loses_nothing_that_was_acknowledged(pairs: Pairs, seed: int, call: str, part: int) -> None:
    number = part
    while survives_kill(pairs, seed + number, call, number):
        number += PARTS.get(call, 1)
    print(f"{call}: {(number - part) // PARTS.get(call, 1)} times")
