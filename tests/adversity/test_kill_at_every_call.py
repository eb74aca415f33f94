"""``kill -9`` of the streamer at each system call that changes the overlay: the same command line always goes on.

strace counts the calls and kills at the N-th: from making the overlay to taking the backing file's name out of it.
"""

from __future__ import annotations

import random

import pytest

from tests.support.harness import Pairs, make_image
from tests.support.processes import NBDSTREAM, run
from tests.support.qed import qemu_check, qemu_compare, qemu_info

MIB = 1 << 20
KILLED = (-9, 128 + 9)

MAKING = ["fallocate 1", "pwrite64 1", "pwrite64 2", "pwrite64 3", "fsync 1", "linkat 1"]
"""The calls that make the overlay, each with its number in the thread that does it."""

STREAMING = [f"{call} {number}" for call in ("fdatasync", "pwrite64") for number in range(4, 8)] + ["ftruncate 1"]
"""Some of those that come later."""

CHANGES = ("fallocate", "pwrite64", "pwritev", "fsync", "fdatasync", "ftruncate", "linkat", "unlink")


def survives_kill(pairs: Pairs, seed: int, call: str) -> bool:
    """Kill the streamer at a call, and see whether the same command goes on; False if the call never came."""
    name, number = call.split()
    with pairs.commands(direct=True) as pair:
        make_image(pair.image, 3 * MIB, random.Random(seed), [(0, MIB), (2 * MIB, 70_000)])
        pair.start_source()
        kill = ["-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}"]
        stream = [NBDSTREAM, "stream", pair.uri, pair.overlay]
        status = run("strace", "-f", "-qq", "-o", "/dev/null", *kill, *stream, status=None).returncode
        if status == 0:
            return False
        assert status in KILLED, f"status {status} at {call}"
        run(*stream)
        assert "backing-filename" not in qemu_info(pair.overlay)
        assert qemu_check(pair.overlay).status == 0
        assert qemu_compare(pair.overlay, pair.image)
    return True


def test_a_kill_while_the_overlay_is_made_leaves_nothing_in_the_way(pairs: Pairs, seed: int) -> None:
    assert sum(survives_kill(pairs, seed, call) for call in MAKING) > 3


def test_a_kill_at_a_later_call_leaves_what_can_be_resumed(pairs: Pairs, seed: int) -> None:
    kills = [survives_kill(pairs, seed, call) for call in random.Random(seed).sample(STREAMING, 4)]
    assert any(kills)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_kill_at_each_call_leaves_what_can_be_resumed(pairs: Pairs, seed: int) -> None:
    for name in CHANGES:
        number = 1
        while survives_kill(pairs, seed, f"{name} {number}"):
            number += 1
        print(f"{name}: {number - 1} times")
