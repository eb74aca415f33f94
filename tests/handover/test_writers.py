from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.block.locks import Sharing, take_locks
from nbdstream.errors import ImageLockedError
from nbdstream.handover.writers import careless_writers
from tests.support.processes import Process, run, wait_until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return str(path)


def qemu(image: str, *options: str, share: bool = False) -> Process:
    """Start a QEMU whose guest could write the image, and never runs."""
    return Process(
        *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-blockdev"),
        ",".join(["driver=file", f"filename={image}", "node-name=d", *options]),
        *("-device", "virtio-blk-pci,drive=d" + (",share-rw=on" if share else "")),
    )


def test_nobody_is_careless_where_nobody_is(image: str) -> None:
    assert careless_writers(image) == []


def test_a_reader_is_not_careless(image: str) -> None:
    with open(image, "rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as reader:
        assert careless_writers(image) == []
        reader.kill()


def test_a_process_that_writes_without_locks_is_named(image: str) -> None:
    with open(image, "ab") as file, subprocess.Popen(["sleep", "60"], stdout=file) as writer:
        assert careless_writers(image) == [f"sleep (process {writer.pid})"]
        writer.kill()


def test_we_are_not_careless_ourselves(image: str) -> None:
    with open(image, "r+b"):
        assert careless_writers(image) == []


def test_a_qemu_with_its_usual_locks_is_not_careless(image: str) -> None:
    with qemu(image):
        wait_until(lambda: written(image), "QEMU has the image open for writing")
        assert careless_writers(image) == []


@pytest.mark.parametrize("options", [{"share": True}, {"locking": "off"}], ids=["share-rw=on", "locking=off"])
def test_a_qemu_without_the_locks_that_keep_others_out_is_named(options: dict[str, Any], image: str) -> None:
    extra = ["locking=off"] if "locking" in options else []
    with qemu(image, *extra, share="share" in options) as process:
        expected = [f"qemu-system-x86 (process {process.pid})"]
        wait_until(lambda: careless_writers(image) == expected, "QEMU is named")


def test_a_loop_device_is_named_while_it_can_be_written(image: str) -> None:
    device = run("losetup", "--find", "--show", image).stdout.strip()
    try:
        assert careless_writers(image) == [f"the loop device {device}"]
    finally:
        run("losetup", "--detach", device)


def written(image: str) -> bool:
    """Whether another process has the image locked as a writer does."""
    with open(image, "rb") as file:
        try:
            take_locks(file.fileno(), Sharing.READER, image)
        except ImageLockedError:
            return True
    return False
