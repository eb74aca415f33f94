from __future__ import annotations

import os
import subprocess
import tempfile
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.files import Run, open_image, punch_hole, runs, zero_range
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KiB = 1 << 10
MiB = 1 << 20


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file with data in 1 MiB + 64 KiB .. 2 MiB and a hole before and behind that."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 3 * MiB)
    os.pwrite(fd, b"x" * (MiB - 64 * KiB), MiB + 64 * KiB)
    yield fd
    os.close(fd)


@pytest.fixture
def fd_without_zero_range() -> Iterator[int]:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:  # tmpfs makes holes but knows no ZERO_RANGE
        file.write(b"x" * MiB)
        file.flush()
        yield file.fileno()


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk"
    image.write_bytes(b"x" * MiB)
    name = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True).stdout
    yield name.strip()
    subprocess.run(["losetup", "--detach", name.strip()], check=True)


def allocated(fd: int) -> int:
    os.fsync(fd)
    return os.fstat(fd).st_blocks * 512


def test_runs_tell_data_from_holes(fd: int) -> None:
    assert list(runs(fd, 0, 3 * MiB)) == [
        Run(0, MiB + 64 * KiB, data=False),
        Run(MiB + 64 * KiB, 2 * MiB, data=True),
        Run(2 * MiB, 3 * MiB, data=False),
    ]


def test_runs_are_cut_to_what_was_asked(fd: int) -> None:
    assert list(runs(fd, 2 * MiB - 1, 2 * MiB + 1)) == [
        Run(2 * MiB - 1, 2 * MiB, data=True),
        Run(2 * MiB, 2 * MiB + 1, data=False),
    ]
    assert list(runs(fd, 5, 6)) == [Run(5, 6, data=False)]
    assert list(runs(fd, 2 * MiB - 6, 2 * MiB - 5)) == [Run(2 * MiB - 6, 2 * MiB - 5, data=True)]


def test_what_lies_behind_the_end_of_the_file_is_no_hole(fd: int) -> None:
    behind = Run(3 * MiB, 4 * MiB, data=True)
    assert list(runs(fd, 2 * MiB, 4 * MiB)) == [Run(2 * MiB, 3 * MiB, data=False), behind]
    assert list(runs(fd, 3 * MiB, 4 * MiB)) == [behind]
    os.ftruncate(fd, 2 * MiB)
    assert list(runs(fd, 2 * MiB - 1, 4 * MiB)) == [
        Run(2 * MiB - 1, 2 * MiB, data=True),
        Run(2 * MiB, 4 * MiB, data=True),
    ]


def test_a_block_device_is_all_data(block_device: str) -> None:
    fd = open_image(block_device, writable=False)
    assert list(runs(fd, 100, MiB)) == [Run(100, MiB, data=True)]
    os.close(fd)


@pytest.mark.parametrize("may_unmap", [True, False])
def test_zero_range_zeroes_exactly_the_range(fd: int, *, may_unmap: bool) -> None:
    assert zero_range(fd, MiB + 64 * KiB + 7, 100_000, may_unmap=may_unmap)
    data = os.pread(fd, 3 * MiB, 0)
    assert data == bytes(MiB + 64 * KiB) + b"x" * 7 + bytes(100_000) + b"x" * (MiB - 64 * KiB - 100_007) + bytes(MiB)


def test_zero_range_makes_a_hole_only_where_that_is_allowed(fd: int) -> None:
    before = allocated(fd)
    zero_range(fd, MiB + 64 * KiB, 512 * KiB, may_unmap=False)
    assert allocated(fd) >= before
    zero_range(fd, MiB + 64 * KiB, 512 * KiB, may_unmap=True)
    assert allocated(fd) == before - 512 * KiB


def test_where_zeroes_can_only_be_written_nothing_is_changed(fd_without_zero_range: int) -> None:
    assert not zero_range(fd_without_zero_range, 0, MiB, may_unmap=False)
    assert os.pread(fd_without_zero_range, MiB, 0) == b"x" * MiB


@pytest.mark.parametrize("may_unmap", [True, False])
def test_whole_blocks_of_a_block_device_can_be_zeroed(block_device: str, *, may_unmap: bool) -> None:
    fd = open_image(block_device, writable=True)
    assert zero_range(fd, 4 * KiB, 64 * KiB, may_unmap=may_unmap)
    assert not zero_range(fd, 100 * KiB + 100, 1000, may_unmap=may_unmap)
    assert os.pread(fd, MiB, 0) == b"x" * (4 * KiB) + bytes(64 * KiB) + b"x" * (MiB - 68 * KiB)
    os.close(fd)


def test_punch_hole_gives_space_back(fd: int) -> None:
    before = allocated(fd)
    punch_hole(fd, MiB + 64 * KiB, 128 * KiB)
    assert allocated(fd) == before - 128 * KiB


def test_errors_of_the_file_are_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        punch_hole(fd, 0, 4096)
    os.close(fd)


def test_only_files_and_block_devices_are_images(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing cannot be opened: No such file or directory$"):
        open_image(str(tmp_path / "missing"), writable=False)
    with pytest.raises(ImageError, match=r" is a directory, not an image$"):
        open_image(str(tmp_path), writable=False)
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/null"):
        with pytest.raises(ImageError, match=r" is neither a regular file nor a block device$"):
            open_image(path, writable=False)


def test_a_file_that_may_not_be_opened_is_one_clear_line(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.touch(0o600)
    tmp_path.chmod(0o755)
    # Root may do everything: ask as somebody else, in a process of its own.
    script = f"""
import os, sys
sys.path[:0] = {[os.getcwd()]!r}
from nbdstream.block.files import open_image
os.setuid(65534)
try:
    open_image("private", writable=False)
except Exception as error:
    print(error)
"""
    result = subprocess.run(
        ["/usr/bin/python3", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == "private cannot be opened: Permission denied\n"


def test_a_read_only_image_is_opened_for_reading_only(fd: int, tmp_path: Path) -> None:
    opened = open_image(str(tmp_path / "file"), writable=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(opened, b"x", 0)
    os.close(opened)
