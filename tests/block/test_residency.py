from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, cast

import pytest

from nbdstream.block import residency as residency_module
from nbdstream.block.mapping import Mapping

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from nbdstream.block.residency import Residency

MiB = 1 << 20


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
async def residency(fd: int) -> AsyncIterator[Residency]:
    mapping = Mapping(fd, 1 << 40)
    yield mapping._residency
    mapping.close()


async def test_written_pages_are_resident_and_holes_are_not(fd: int, residency: Residency) -> None:
    os.pwrite(fd, b"x" * 8192, 4096)
    os.ftruncate(fd, MiB)
    assert residency.resident(4096, 8192)
    assert residency.resident(5000, 1)
    assert not residency.resident(0, 4096)
    assert not residency.resident(4095, 2)
    assert not residency.resident(12287, 2)


async def test_pages_beyond_the_end_and_beyond_reach_are_not_resident(fd: int, residency: Residency) -> None:
    os.pwrite(fd, b"x" * 4096, 0)
    assert not residency.resident(4096, 1)
    assert not residency.resident((1 << 40) - 4096, 8192)


@contextlib.contextmanager
def counted_questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    questions: list[int] = []
    ask = residency_module._mincore

    def counting(address: int, length: int, answer: int) -> int:
        questions.append(length)
        return cast("int", ask(address, length, answer))

    with monkeypatch.context() as patch:
        patch.setattr(residency_module, "_mincore", counting)
        yield questions


async def test_a_block_that_is_read_often_is_asked_for_as_a_whole_and_then_trusted(
    fd: int, residency: Residency, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.pwrite(fd, b"x" * MiB, 0)
    monkeypatch.setattr(residency_module, "_TRUST_SECONDS", 3600)
    with counted_questions(monkeypatch) as questions:
        assert all(residency.resident(i % 256 * 4096, 4096) for i in range(10_000))
    assert questions == [4096, MiB]


async def test_trust_ends(fd: int, residency: Residency, monkeypatch: pytest.MonkeyPatch) -> None:
    os.pwrite(fd, b"x" * MiB, 0)
    monkeypatch.setattr(residency_module, "_TRUST_SECONDS", 0)
    assert residency.resident(0, MiB)
    os.truncate(fd, 0)
    assert not residency.resident(0, 4096)


async def test_large_requests_are_checked_block_by_block(
    fd: int, residency: Residency, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.pwrite(fd, b"x" * (3 * MiB), 0)
    monkeypatch.setattr(residency_module, "_TRUST_SECONDS", 3600)
    with counted_questions(monkeypatch) as questions:
        assert residency.resident(100, 3 * MiB - 100)
        assert residency.resident(0, 3 * MiB)
        assert not residency.resident(0, 4 * MiB)
    assert questions[:3] == [MiB] * 3
    assert len(questions) == 5


async def test_the_table_of_blocks_stays_small(fd: int, residency: Residency, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_module, "_TABLE_LIMIT", 10)
    os.ftruncate(fd, 100 * MiB)
    os.pwrite(fd, b"x" * 30 * MiB, 0)
    for block in range(100):
        residency.resident(block * MiB, 4096 if block % 2 else MiB)
    assert len(residency._asked) <= 10
    assert len(residency._trusted) <= 10
