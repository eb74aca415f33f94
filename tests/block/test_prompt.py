"""Writes on the loop: done at once or not at all, and not while they may have to wait."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

import pytest

from nbdstream.block import folios, prompt
from nbdstream.block.folios import Folios
from nbdstream.block.prompt import PromptWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
DATA = b"x" * PAGE


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def prompt_writer(fd: int) -> PromptWriter:
    return PromptWriter(fd, 0, Folios(fd, lambda _offset: False))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(prompt, "time", type("Clock", (), {"monotonic": lambda: now[0]}))
    return now


def slow_down(monkeypatch: pytest.MonkeyPatch, clock: list[float], seconds: float, wait: Callable[[], None]) -> None:
    """Let each write take so long, and ``wait`` meanwhile."""
    pwrite = os.pwrite

    def slow(fd: int, data: bytes, offset: int) -> int:
        clock[0] += seconds
        wait()
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)


def test_whole_pages_are_written_before_it_returns(fd: int) -> None:
    assert prompt_writer(fd).write(DATA, PAGE)
    assert os.pread(fd, 2 * PAGE, 0) == bytes(PAGE) + DATA


@pytest.mark.parametrize(("offset", "length"), [(1, PAGE), (0, PAGE - 1), (512, 512)])
def test_a_part_of_a_page_is_not_written(fd: int, offset: int, length: int) -> None:
    assert not prompt_writer(fd).write(b"x" * length, offset)
    assert os.fstat(fd).st_size == 0


def test_nothing_is_written_while_somebody_holds_it(fd: int) -> None:
    writer = prompt_writer(fd)
    writer.held += 1
    assert not writer.ready()
    assert not writer.write(DATA, 0)
    assert os.fstat(fd).st_size == 0
    writer.held -= 1
    assert writer.ready()
    assert writer.write(DATA, 0)


def test_an_error_is_left_to_who_writes_it_again(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    assert not prompt_writer(fd).write(DATA, 0)


def test_what_was_not_written_as_a_whole_is_not_done(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda _fd, _data, _offset: 512)
    assert not prompt_writer(fd).write(DATA, 0)


def test_after_writes_that_waited_none_is_tried_for_a_while(
    fd: int, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = prompt_writer(fd)
    with monkeypatch.context() as slow:
        slow_down(slow, clock, 0.01, lambda: time.sleep(0.0001))
        assert writer.write(DATA, 0)  # the first one only makes it watch
        assert writer.write(DATA, 0)
        assert not writer.write(DATA, 0)
    clock[0] += 0.039
    assert not writer.ready()
    clock[0] += 0.002
    assert writer.ready()
    assert writer.write(DATA, 0)


def test_losing_the_processor_is_no_reason(fd: int, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    writer = prompt_writer(fd)
    slow_down(monkeypatch, clock, 0.01, lambda: None)
    monkeypatch.setattr(prompt, "_sleeps", lambda: 7)
    assert all(writer.write(DATA, 0) for _ in range(5))


def test_a_file_is_made_longer_with_some_room_and_never_shorter(fd: int) -> None:
    writer = prompt_writer(fd)
    assert writer.lengthen(10 * PAGE)
    size = os.fstat(fd).st_size
    assert size > 10 * PAGE
    assert writer.lengthen(5 * PAGE)
    assert os.fstat(fd).st_size == size


def test_after_a_cut_the_file_is_made_longer_again(fd: int) -> None:
    writer = prompt_writer(fd)
    assert writer.lengthen(10 * PAGE)
    writer.cut(2 * PAGE)
    assert os.fstat(fd).st_size == 2 * PAGE
    assert writer.lengthen(3 * PAGE)
    assert os.fstat(fd).st_size > 3 * PAGE


def test_a_file_that_cannot_be_made_longer(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    assert not prompt_writer(fd).lengthen(PAGE)
    os.close(fd)


def test_a_large_folio_is_parted_before_the_write_that_makes_it_dirty(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bytes] = []

    def part(offset: int) -> bool:
        found.append(os.pread(fd, PAGE, offset))
        return True

    monkeypatch.setattr(folios, "walks_folios", lambda _fd: True)
    writer = PromptWriter(fd, 0, Folios(fd, part))
    for page in range(3):
        assert writer.write(DATA, page * PAGE)
    assert found == [b""]
