"""Large folios are parted where something small is written, as long as there are any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nbdstream.block import folios as folios_module
from nbdstream.block import prompt
from nbdstream.block.folios import PIECE_SHIFT, Folios, walks_folios
from nbdstream.block.prompt import PromptWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 1 << PIECE_SHIFT


class Disk:
    """Writes at a time that stands still, and which folios were asked to be parted for them."""

    def __init__(self, fd: int) -> None:
        self.now = 100.0
        self.large = True
        self.asked: list[int] = []
        self.folios = Folios(fd, self.part)
        self._writer = PromptWriter(fd, 0, self.folios)

    def monotonic(self) -> float:
        return self.now

    def part(self, offset: int) -> bool:
        self.asked.append(offset)
        return self.large

    def write(self, offset: int) -> None:
        assert self._writer.write(bytes(4096), offset)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(folios_module, "walks_folios", lambda _fd: True)
    with (tmp_path / "disk").open("wb") as file:
        disk = Disk(file.fileno())
        monkeypatch.setattr(prompt, "time", disk)
        yield disk


def test_each_piece_is_parted_once(disk: Disk) -> None:
    for offset in (0, 4096, PIECE - 4096, 5 * PIECE + 8192, 5 * PIECE, 4096):
        disk.write(offset)
    assert disk.asked == [0, 5 * PIECE + 8192]


def test_what_could_not_be_parted_is_tried_again_later(disk: Disk) -> None:
    disk.large = False
    disk.write(0)
    disk.now += 29
    disk.write(0)
    assert disk.asked == [0]
    disk.now += 2
    disk.write(4096)
    assert disk.asked == [0, 4096]


def test_where_all_lies_in_single_pages_no_more_is_tried_for_a_while(disk: Disk) -> None:
    disk.large = False
    for piece in range(1000):
        disk.write(piece * PIECE)
    assert len(disk.asked) == 64
    disk.now += 31
    disk.large = True
    for piece in range(1000):
        disk.write(piece * PIECE)
    assert len(disk.asked) == 64 + 1000


def test_some_in_vain_are_no_reason_to_give_up(disk: Disk) -> None:
    for piece in range(1000):
        disk.large = piece % 60 == 0
        disk.write(piece * PIECE)
    assert len(disk.asked) == 1000


def test_the_pieces_that_are_known_are_bounded(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folios_module, "_MOST_KNOWN", 10)
    for piece in range(100):
        disk.write(piece * PIECE)
        assert len(disk.folios.known) <= 10
    disk.write(99 * PIECE)
    assert len(disk.asked) == 100


def test_on_other_file_systems_nothing_is_parted() -> None:
    with Path("/proc/self/status").open("rb") as file:
        folios = Folios(file.fileno(), lambda _offset: True)
    assert folios.until > sys.float_info.max
    assert not folios.trying


def test_which_file_system_it_is_the_kernel_says(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/proc"), Path("/dev/shm")):
        told = subprocess.run(["stat", "-f", "-c", "%t", path], check=True, capture_output=True, text=True).stdout
        fd = os.open(path, os.O_RDONLY)
        assert walks_folios(fd) == (int(told, 16) == 0xEF53)
        os.close(fd)
