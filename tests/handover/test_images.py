"""The kinds of images that can be offered, by the commands, and those that cannot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.monitor import ask
from tests.support.processes import Command, nbdstream, run, wait_until
from tests.support.qed import content

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(5).randbytes(SIZE))
    return path


@pytest.fixture
def loop_device(disk: Path) -> Iterator[str]:
    device = run("losetup", "--find", "--show", str(disk)).stdout.strip()
    yield device
    run("losetup", "--detach", device)


def hand_over(directory: Path, image: str, *options: str) -> tuple[str, dict[str, Any], bytes]:
    """Hand an image over; return the source's status before, as text and for programs, and the disk that arrived."""
    source, overlay = directory / "source", directory / "overlay.qed"
    offer = ["offer", image, "--listen", "127.0.0.1:0", "--state", str(source), *options]
    receive = ["receive", f"@{source}/offer", str(overlay), "-U", str(directory / "guest.sock")]
    with Command(*offer) as offering:
        wait_until((source / "offer").exists, "the offer")
        with Command(*receive, "--state", str(directory / "destination")) as receiving:
            control = f"{source}/control"
            wait_until(lambda: ask(control, "x-handover-status")["state"] == "PREPARED", "both to be prepared")
            said, status = (
                nbdstream("handover", "status", "--state", str(source)).stdout,
                ask(control, "x-handover-status"),
            )
            nbdstream("handover", "fence", "--state", str(source))
            assert offering.wait() == 0
            assert receiving.stop() == 0
    return said, status, content(str(overlay))


def test_a_qed_image(disk: Path, tmp_path: Path) -> None:
    image = str(tmp_path / "disk.qed")
    run("qemu-img", "convert", "-O", "qed", str(disk), image)
    _, _, arrived = hand_over(tmp_path, image, "-f", "qed")
    assert arrived == disk.read_bytes()
    assert list(tmp_path.glob("disk.qed.handed-over-*"))


def test_a_qed_image_without_a_word_about_its_format_is_refused(disk: Path, tmp_path: Path) -> None:
    image = str(tmp_path / "disk.qed")
    run("qemu-img", "convert", "-O", "qed", str(disk), image)
    offer = ["offer", image, "--listen", "127.0.0.1:0", "--state", str(tmp_path / "source")]
    assert "looks like a QED image: say -f qed, or -f raw to offer its raw bytes" in nbdstream(*offer, status=1).stderr


def test_an_image_with_a_backing_file_is_refused(disk: Path, tmp_path: Path) -> None:
    image = str(tmp_path / "disk.qed")
    run("qemu-img", "create", "-q", "-f", "qed", "-b", str(disk), "-F", "raw", image)
    offer = ["offer", image, "-f", "qed", "--listen", "127.0.0.1:0", "--state", str(tmp_path / "source")]
    said = nbdstream(*offer, status=1).stderr
    assert said == f"nbdstream: {image} has the backing file {disk}: only a whole image can be offered\n"
    assert not (tmp_path / "source/journal").exists()


@pytest.mark.parametrize("on_release", ["keep", "remove"])
def test_a_block_device_keeps_its_name_and_the_status_says_so(
    loop_device: str, disk: Path, tmp_path: Path, on_release: str
) -> None:
    before = disk.read_bytes()
    said, status, arrived = hand_over(tmp_path, loop_device, "--on-release", on_release)
    assert f": {loop_device}; a block device: nothing but its locks keeps others from it\n" in said
    assert status["disks"][0]["unguarded"]
    assert arrived == before == Path(loop_device).read_bytes()


def test_a_writer_of_a_block_device_without_locks_is_named(loop_device: str, tmp_path: Path) -> None:
    offer = ["offer", loop_device, "--listen", "127.0.0.1:0", "--state", str(tmp_path / "source")]
    with open(loop_device, "r+b"):
        assert f"{loop_device} is open for writing by " in nbdstream(*offer, status=1).stderr
