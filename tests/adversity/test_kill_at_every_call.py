"""``kill -9`` of the streamer at each system call that changes the overlay: the same command line always goes on.

strace counts the calls of each thread, and kills at the N-th: from making the overlay to taking the backing file's name
out of it, while a guest writes and remembers what was acknowledged.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.harness import CommandPair, Pairs, make_image
from tests.support.processes import NBDSTREAM, Command, Process, nbdstream, run, wait_until
from tests.support.qed import content, qemu_check, qemu_compare, qemu_info
from tests.support.strace import killing
from tests.support.workload import DiskModel, Workload, examine

MIB = 1 << 20
SIZE = 3 * MIB
CLUSTER = 4096
KILLED = (-9, 128 + 9)

MAKING = ["fallocate 1", "pwrite64 1", "pwrite64 2", "pwrite64 3", "fsync 1", "linkat 1"]
"""The calls that make the overlay, each with its number in the thread that does it."""

CHANGES = ("pwrite64", "pwritev2", "fdatasync", "ftruncate", "sync_file_range")
REQUESTS = 300
"""Of the guest: few, so that every call can be tried."""


class Killed(Command):
    """A streamer that kills itself; its status is the streamer's own."""

    def __init__(self, call: str, number: int, *arguments: str) -> None:
        strace = ("strace", "-D", "-f", "-qq", "-o", "/dev/null")  # with --seccomp-bpf it miscounts
        Process.__init__(self, *strace, *killing(call, number), NBDSTREAM, *arguments)


def prepared(pair: CommandPair, seed: int) -> None:
    make_image(pair.image, SIZE, random.Random(seed), [(0, MIB), (2 * MIB, 70_000)])
    pair.start_source()


def survives_kill_while_making(pairs: Pairs, seed: int, call: str, number: int) -> bool:
    """Kill a streamer without an overlay, and see whether the same command goes on; False if the call never came."""
    with pairs.commands(direct=True) as pair:
        prepared(pair, seed)
        stream = [NBDSTREAM, "stream", pair.uri, pair.overlay]
        status = run("strace", "-f", "-qq", "-o", "/dev/null", *killing(call, number), *stream, status=None).returncode
        if status == 0:
            return False
        assert status in KILLED, f"status {status} at {call}"
        run(*stream)
        assert "backing-filename" not in qemu_info(pair.overlay)
        assert qemu_check(pair.overlay).status == 0
        assert qemu_compare(pair.overlay, pair.image)
    return True


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
            killed = not streamer.running
            if killed:
                assert streamer.wait() in KILLED
            else:
                streamer.kill()
            work.wait_until_disconnected()
            work.pause()
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
    return killed


def test_a_kill_while_the_overlay_is_made_leaves_nothing_in_the_way(pairs: Pairs, seed: int) -> None:
    calls = [call.split() for call in MAKING]
    assert sum(survives_kill_while_making(pairs, seed, call, int(number)) for call, number in calls) > 3


@pytest.mark.parametrize("call", CHANGES)
def test_a_kill_at_a_call_loses_nothing_that_was_acknowledged(pairs: Pairs, seed: int, call: str) -> None:
    number = random.Random(seed).choice({"ftruncate": [1], "sync_file_range": [1]}.get(call, range(2, 12)))
    assert survives_kill(pairs, seed, call, number)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("call", CHANGES)
def test_a_kill_at_each_call_loses_nothing_that_was_acknowledged(pairs: Pairs, seed: int, call: str) -> None:
    number = 1
    while survives_kill(pairs, seed + number, call, number):
        number += 1
    print(f"{call}: {number - 1} times")
