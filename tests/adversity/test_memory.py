"""Size never matters to memory: a sparse terabyte is streamed with the buffers of a gigabyte."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest

from tests.support.harness import CommandPair, Pairs, make_image
from tests.support.processes import memory
from tests.support.qed import qemu_check, qemu_compare

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
MOST_MEMORY = 150 * MIB
SAMPLE_SECONDS = 0.05


class Peak:
    """Samples the memory that processes have of their own until it is ended: neither files nor the page cache."""

    def __init__(self, **pids: int) -> None:
        self.bytes = dict.fromkeys(pids, 0)
        self._pids = pids
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            for name, pid in self._pids.items():
                try:
                    now = memory(pid, "RssAnon", "RssShmem")
                except (OSError, KeyError):  # it has ended
                    continue
                self.bytes[name] = max(self.bytes[name], now)

    def end(self) -> None:
        self._end.set()
        self._thread.join()


def first_read(pair: CommandPair) -> float:
    """Start the streamer; return after how many seconds a guest has read its first bytes."""
    began = time.monotonic()
    pair.start_streamer()
    with pair.guest() as guest:
        guest.read(0, 4096)
    return time.monotonic() - began


def stream_terabyte(pair: CommandPair, rng: random.Random, data: list[tuple[int, int]]) -> None:
    make_image(pair.image, TIB, rng, data)
    pair.start_source()
    seconds = first_read(pair)
    assert pair.source
    assert pair.streamer
    peak = Peak(source=pair.source.pid, streamer=pair.streamer.pid)
    try:
        with pair.guest() as guest:
            for _ in range(200):  # all over the disk: that touches as many tables as can be
                guest.read(rng.randrange(TIB >> 12) << 12, 4096)
                guest.write(rng.randrange(TIB >> 16) << 16, b"guest" * 1000)
        pair.wait_until_independent()
    finally:
        peak.end()
    print(f"first read after {seconds:.2f} s; peaks: {({name: size >> 20 for name, size in peak.bytes.items()})} MiB")
    assert 0 < peak.bytes["streamer"] < MOST_MEMORY
    assert 0 < peak.bytes["source"] < MOST_MEMORY


def allocated(path: str) -> int:
    return os.stat(path).st_blocks * 512


def check_size(pair: CommandPair, guest_writes: int) -> None:
    """The overlay holds what is allocated, what the guest wrote, and the tables for that: no more."""
    tables = TIB // (2 * GIB) * (256 << 10)  # an L2 table maps 2 GiB
    most = allocated(pair.image) + guest_writes * 65536 + tables + 16 * MIB
    assert os.path.getsize(pair.overlay) <= most


def places(rng: random.Random, count: int, length: int) -> list[tuple[int, int]]:
    return [(rng.randrange((TIB - length) >> 20) << 20, length) for _ in range(count)] + [(0, MIB), (TIB - MIB, MIB)]


def test_a_sparse_terabyte_is_streamed_in_little_memory(pairs: Pairs, seed: int) -> None:
    rng = random.Random(seed)
    pair = pairs.commands(direct=True)
    stream_terabyte(pair, rng, places(rng, 16, 16 * MIB))
    assert pair.stop_streamer()
    check_size(pair, 200)
    assert qemu_check(pair.overlay).corruptions == 0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_terabyte_with_gigabytes_in_it_is_streamed_in_little_memory(pairs: Pairs, seed: int) -> None:
    rng = random.Random(seed)
    pair = pairs.commands(direct=True)
    stream_terabyte(pair, rng, places(rng, 2500, MIB) + places(rng, 16, 128 * MIB))
    assert pair.stop_streamer()
    check_size(pair, 200)
    assert qemu_check(pair.overlay).corruptions == 0


def test_what_was_streamed_of_a_terabyte_is_right(pairs: Pairs, seed: int) -> None:
    rng = random.Random(seed)
    pair = pairs.commands(direct=True)
    make_image(pair.image, TIB, rng, places(rng, 5, MIB))
    pair.start_source()
    pair.start_streamer()
    pair.wait_until_independent()
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    assert qemu_compare(pair.overlay, pair.image)
    assert os.path.getsize(pair.overlay) < 32 * MIB
