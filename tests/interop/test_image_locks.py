"""Image locks, command by command: what another QEMU would let us do beside it, and what we let it do."""

from __future__ import annotations

import random
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.harness import CommandPair, Pairs, make_image
from tests.support.processes import nbdstream
from tests.support.qed import create, qemu_img, qemu_io, without_backing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20

READING = [["check"], ["map", "-f", "qed"]]
WRITING = [["check", "-r", "leaks"], ["check", "-r", "all"], ["resize"]]


@contextmanager
def held_by_qemu(path: str, *options: str) -> Iterator[None]:
    """Have qemu-io hold an image open, from its prompt on."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qed", *options, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.read(9) == b"qemu-io> "
        yield
        process.communicate()


def run(command: list[str], path: str, *, status: int) -> str:
    result = nbdstream(*command, path, *(["+1M"] if command == ["resize"] else []), status=status)
    return result.stderr


@pytest.fixture
def image(tmp_path: Path) -> str:
    return create(str(tmp_path / "image"), MIB)


@pytest.mark.parametrize("command", [*READING, *WRITING])
def test_what_a_qemu_writes_is_left_alone(image: str, command: list[str]) -> None:
    with held_by_qemu(image):
        assert "is in use by qemu-io" in run(command, image, status=1)
    run(command, image, status=0)


@pytest.mark.parametrize("command", [*READING, *WRITING])
def test_what_a_qemu_reads_is_only_read(image: str, command: list[str]) -> None:
    with held_by_qemu(image, "-r"):
        said = run(command, image, status=0 if command in READING else 1)
        assert (command in READING) or "is in use by qemu-io" in said


def test_what_a_qemu_has_open_is_told_of_by_info_and_not_made_anew(image: str) -> None:
    with held_by_qemu(image):
        assert "virtual-size" in nbdstream("info", image).stdout
        assert "exists" in nbdstream("create", image, "--size", "1M", status=1).stderr


def test_a_qemu_that_has_the_overlay_is_not_streamed_into(pairs: Pairs, seed: int) -> None:
    pair = source(pairs, seed)
    nbdstream("create", pair.overlay, "--backing", pair.uri)
    with held_by_qemu(pair.overlay):
        assert "is in use by qemu-io" in nbdstream("stream", pair.uri, pair.overlay, status=1).stderr


def source(pairs: Pairs, seed: int) -> CommandPair:
    pair = pairs.commands(direct=True)
    make_image(pair.image, 4 * MIB, random.Random(seed), [(0, 4 * MIB)])
    pair.start_source()
    return pair


def qemu_refuses(path: str) -> bool:
    """Whether qemu-io and qemu-img may neither write nor read the image; ``info -U`` always may."""
    qemu_img("info", "-U", path)
    tries = [
        qemu_io(path, "write 0 512", check=False),
        qemu_io(without_backing(path), "read 0 512", read_only=True, check=False),
        qemu_img("check", "-r", "all", path, check=False),
        qemu_img("rebase", "-u", "-b", "", path, check=False),
    ]
    refused = ["Is another process using the image" in result.stderr for result in tries]
    assert all(refused) or not any(refused)
    return all(refused)


def test_a_qemu_is_kept_out_as_long_as_we_own_the_overlay(pairs: Pairs, seed: int) -> None:
    """While it is streamed, when it is independent and still served, and not a moment longer."""
    pair = source(pairs, seed)
    with pair.begin_streamer(rate=256 << 10) as streamer:
        streamer.wait_until_serving()
        assert qemu_refuses(pair.overlay)
        assert pair.stop_streamer() is False
    with pair.begin_streamer() as streamer:
        streamer.wait_until_independent()
        assert qemu_refuses(pair.overlay)
        assert pair.stop_streamer()
    qemu_io(pair.overlay, "write 0 512")
