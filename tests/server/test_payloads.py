from __future__ import annotations

import mmap

import pytest

from nbdstream.server.payloads import PayloadMemory


def resident_pages() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


@pytest.mark.parametrize("length", [1, 65536, 65537, 1 << 20, (1 << 20) + 1, 64 << 20])
def test_memory_has_the_length_asked_for(length: int) -> None:
    assert len(PayloadMemory().take(length)) == length


def test_what_is_announced_costs_nothing_until_it_arrives() -> None:
    before = resident_pages()
    payloads = [PayloadMemory().take(64 << 20) for _ in range(10)]
    assert (resident_pages() - before) * mmap.PAGESIZE < 10 << 20
    assert len(payloads) == 10


def test_what_was_given_back_is_used_again() -> None:
    memory = PayloadMemory()
    first = memory.take(300_000)
    first[:4] = b"mark"
    memory.give_back(first)
    assert bytes(memory.take(200_000)[:4]) == b"mark"
    assert bytes(memory.take(200_000)[:4]) == bytes(4)


def test_no_more_is_kept_than_16_mib() -> None:
    memory = PayloadMemory()
    for payload in [memory.take(1 << 20) for _ in range(40)]:
        memory.give_back(payload)
    assert len(memory._idle) == 16


@pytest.mark.parametrize("other", [None, b"bytes", memoryview(bytearray(100_000)), memoryview(mmap.mmap(-1, 4096))])
def test_what_came_from_elsewhere_is_not_kept(other: object) -> None:
    memory = PayloadMemory()
    memory.give_back(other)
    assert not memory._idle
