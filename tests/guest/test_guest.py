"""A Linux guest that runs on an overlay while its disk is streamed in, and afterwards on the overlay alone."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from tests.support.guest import Guest, logged_disk, nbd_disk, overlay_without_writes, qed_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

NBDSTREAM = str(Path(sys.executable).with_name("nbdstream"))

READ_AND_WRITE = """
mount -t ext4 /dev/vda /mnt || fail mount
cd /mnt
sha256sum -c -s /manifest || fail digests
dd if=/dev/urandom of=overwritten bs=1000 seek=50 count=300 conv=notrunc 2>/dev/null || fail overwrite
dd if=/dev/urandom of=new bs=64k count=16 2>/dev/null || fail write
sha256sum overwritten new >own-manifest
cd / && umount /mnt && sync || fail umount
"""
CHECK_ALL = """
mount -t ext4 -o ro /dev/vda /mnt || fail mount
cd /mnt
sha256sum -c -s /manifest || fail digests
sha256sum -c -s own-manifest || fail digests of its own files
cd / && umount /mnt || fail umount
"""


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """An nbdstream command that serves a socket, once it serves it."""
    socket = Path(arguments[arguments.index("-U") + 1])
    process = subprocess.Popen([NBDSTREAM, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        for line in process.stderr:
            if str(socket) in line:
                break
        else:
            pytest.fail(f"{arguments} does not serve")
        yield process
    finally:
        process.kill()
        process.communicate()


def make_image(directory: Path, seed: int) -> tuple[Path, bytes]:
    """An ext4 image of 256 MiB with 20 MiB of files, and a manifest of all but one of them."""
    generator = random.Random(seed)
    tree, image = directory / "tree", directory / "disk.img"
    tree.mkdir()
    manifest = b""
    for number in range(80):
        content = generator.randbytes(generator.randrange(512 << 10))
        (tree / f"file{number}").write_bytes(content)
        manifest += f"{hashlib.sha256(content).hexdigest()}  file{number}\n".encode()
    (tree / "overwritten").write_bytes(generator.randbytes(512 << 10))
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, "256M"], check=True)
    return image, manifest


def backing_file(overlay: Path) -> str | None:
    info = subprocess.run(["qemu-img", "info", "-U", "--output=json", overlay], check=True, capture_output=True)
    name: str | None = json.loads(info.stdout).get("backing-filename")
    return name


def test_a_guest_runs_on_the_overlay_while_it_is_filled_and_then_on_it_alone(tmp_path: Path, seed: int) -> None:
    image, manifest = make_image(tmp_path, seed)
    overlay, log = tmp_path / "overlay.qed", tmp_path / "writes.log"
    source, guest_socket = tmp_path / "source.sock", tmp_path / "guest.sock"
    source_uri = f"nbd+unix:///?socket={quote(str(source))}"

    with running("serve", image, "-U", source):
        # At this rate the hydrator needs minutes: most of what the guest reads is remote.
        with running("stream", source_uri, overlay, "-U", guest_socket, "--rate", "64k") as streamer:
            with Guest(logged_disk(nbd_disk(guest_socket), log), READ_AND_WRITE, {"manifest": manifest}) as guest:
                guest.wait(90)
            assert backing_file(overlay) == source_uri
            streamer.terminate()
            assert streamer.wait(30) == 3, "stopped before independent"
        subprocess.run([NBDSTREAM, "stream", source_uri, overlay], check=True, timeout=60)
    assert backing_file(overlay) is None
    subprocess.run(["qemu-img", "check", "-q", "-f", "qed", overlay], check=True)

    with Guest(qed_disk(overlay), CHECK_ALL, {"manifest": manifest}) as guest:
        guest.wait(90)
    unwritten = tmp_path / "unwritten.img"
    assert overlay_without_writes(overlay, [log], image, unwritten) > 1 << 20
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", image, unwritten], check=True)
