from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.locks import Sharing, _flock, take_locks
from nbdstream.errors import ImageError, ImageLockedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WRITER, READER, BYSTANDER = Sharing.WRITER, Sharing.READER, Sharing.BYSTANDER

# What QEMU's tools hold open, as "format options", and which of us they refuse (in either order).
QEMU_REFUSES = {
    "qed": {WRITER, READER},
    "qed -r": {WRITER},
    "qed -r -U": set(),
    "raw": {WRITER, READER},
    "raw -r": set(),
    "raw -r -U": set(),
}
MATRIX = [(qemu, ours) for qemu in QEMU_REFUSES for ours in Sharing]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("images")
    paths = {form: str(folder / f"image.{form}") for form in ("raw", "qed")}
    for form, path in paths.items():
        subprocess.run(["qemu-img", "create", "-q", "-f", form, path, "1M"], check=True)
    return paths


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def qemu_io(path: str, options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have qemu-io hold the image open, from its prompt on."""
    with subprocess.Popen(
        ["qemu-io", "-f", *options.split(), path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.read(9) == b"qemu-io> "
        yield process
        process.stdin.close()


@pytest.mark.parametrize(("qemu", "ours"), MATRIX)
def test_we_refuse_what_qemu_has_open(images: dict[str, str], qemu: str, ours: Sharing) -> None:
    path = images[qemu[:3]]
    with opened(path) as fd, qemu_io(path, qemu) as process:
        if ours in QEMU_REFUSES[qemu]:
            with pytest.raises(ImageLockedError, match=rf"in use by qemu-io \(process {process.pid}\)$"):
                take_locks(fd, ours, path)
        else:
            take_locks(fd, ours, path)


@pytest.mark.parametrize(("qemu", "ours"), MATRIX)
def test_qemu_refuses_what_we_have_open(images: dict[str, str], qemu: str, ours: Sharing) -> None:
    path = images[qemu[:3]]
    with opened(path) as fd:
        take_locks(fd, ours, path)
        result = subprocess.run(
            ["qemu-io", "-f", *qemu.split(), "-c", "quit", path], capture_output=True, text=True, check=False
        )
    assert bool(result.returncode) is (ours in QEMU_REFUSES[qemu])
    assert ("lock" in result.stderr) is (ours in QEMU_REFUSES[qemu])


@pytest.mark.parametrize("first", Sharing)
@pytest.mark.parametrize("second", Sharing)
def test_two_of_us(images: dict[str, str], first: Sharing, second: Sharing) -> None:
    path = images["qed"]
    refused = {first, second} in ({WRITER}, {WRITER, READER})
    with opened(path) as held, opened(path) as fd:
        take_locks(held, first, path)
        expectation = pytest.raises(ImageLockedError) if refused else contextlib.nullcontext()
        with expectation:
            take_locks(fd, second, path)


def test_qemu_img_takes_no_raw_image_that_we_write(images: dict[str, str]) -> None:
    with opened(images["raw"]) as fd:
        take_locks(fd, WRITER, images["raw"])
        resize = ["qemu-img", "resize", "-q", "-f", "raw", images["raw"], "2M"]
        assert subprocess.run(resize, capture_output=True, check=False).returncode


@pytest.mark.parametrize("ours", Sharing)
def test_a_refused_attempt_leaves_no_lock(images: dict[str, str], ours: Sharing) -> None:
    path = images["raw"]
    with opened(path) as held, opened(path) as fd:
        fcntl.fcntl(held, fcntl.F_OFD_SETLK, lock_of(200, fcntl.F_RDLCK))
        with pytest.raises(ImageLockedError):
            take_locks(fd, ours, path)
        assert held_bytes(fd) == set()


@pytest.mark.parametrize(
    ("ours", "bytes_"), [(WRITER, {100, 101, 103, 201, 203}), (READER, {100, 201, 203}), (BYSTANDER, {100})]
)
def test_the_bytes_are_qemus(images: dict[str, str], ours: Sharing, bytes_: set[int]) -> None:
    with opened(images["raw"]) as fd:
        take_locks(fd, ours, images["raw"])
        assert held_bytes(fd) == bytes_


def test_an_exclusive_lock_of_a_stranger_is_respected(images: dict[str, str]) -> None:
    with opened(images["raw"]) as held, opened(images["raw"]) as fd:
        fcntl.fcntl(held, fcntl.F_OFD_SETLK, lock_of(100, fcntl.F_WRLCK))
        with pytest.raises(ImageLockedError, match="in use by another process"):
            take_locks(fd, BYSTANDER, images["raw"])


def test_closing_the_file_lets_go(images: dict[str, str]) -> None:
    with opened(images["raw"]) as fd:
        take_locks(fd, WRITER, images["raw"])
    with opened(images["raw"]) as fd:
        take_locks(fd, WRITER, images["raw"])


def test_what_cannot_be_locked_is_one_clear_line(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "write-only", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(ImageError, match=r"^image\.raw cannot be locked: Bad file descriptor$"):
        take_locks(fd, READER, "image.raw")
    os.close(fd)


def lock_of(byte: int, kind: int) -> bytes:
    return _flock.pack(kind, os.SEEK_SET, byte, 1, 0)


def held_bytes(fd: int) -> set[int]:
    with open(f"/proc/self/fdinfo/{fd}") as fdinfo:
        ranges = re.findall(r"^lock:.* (\d+) (\d+)$", fdinfo.read(), re.MULTILINE)
    return {byte for first, last in ranges for byte in range(int(first), int(last) + 1)}
