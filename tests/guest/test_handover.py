"""A Linux guest that moves to another host while it runs, by QEMU's own migration, and its disk behind it."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Any

from tests.guest.test_guest import make_image
from tests.support.guest import Guest, logged_disk, nbd_disk, overlay_without_writes
from tests.support.monitor import ask
from tests.support.processes import Command, nbdstream, wait_until

if TYPE_CHECKING:
    from pathlib import Path

# It writes a line at a time, durably, before the move, on the way and after it; then it looks at all that there is.
WRITE_ON = """
mount -t ext4 /dev/vda /mnt || fail mount
cd /mnt
head -n 20 /manifest >/first
sha256sum -c -s /first || fail digests before the move
for number in $(seq 1 60); do
    echo $number | dd of=lines oflag=append conv=notrunc,fsync 2>/dev/null || fail to write line $number
    say wrote $number
    usleep 20000
done
seq 1 60 | cmp -s - lines || fail lines
sha256sum -c -s /manifest || fail digests after the move
dd if=/dev/urandom of=overwritten bs=1000 seek=50 count=300 conv=notrunc 2>/dev/null || fail overwrite
cd / && umount /mnt && sync || fail umount
"""


def wrote(guest: Guest) -> list[int]:
    """The numbers of the lines that a guest has said it wrote."""
    return [int(event.text.split()[1]) for event in guest.events if event.text.startswith("wrote")]


def migrated(control: Path) -> bool:
    status = ask(str(control), "query-migrate").get("status")
    assert status not in ("failed", "cancelled")
    return bool(status == "completed")


def test_a_guest_moves_while_it_runs_and_its_disk_follows(tmp_path: Path, seed: int) -> None:
    image, manifest = make_image(tmp_path, seed)
    overlay, socket, log = tmp_path / "disk.qed", tmp_path / "guest.sock", tmp_path / "writes.log"
    here, there, way = tmp_path / "here.qmp", tmp_path / "there.qmp", tmp_path / "migration.sock"
    source, destination = tmp_path / "source", tmp_path / "destination"
    files = {"manifest": manifest}

    raw = {"driver": "raw", "file": {"driver": "file", "filename": str(image)}}
    with Guest(raw, WRITE_ON, files, control=here) as old:
        offer = Command("offer", str(image), "--listen", "127.0.0.1:0", "--state", str(source))
        wait_until((source / "offer").exists, "the offer")
        receive = Command(
            *("receive", f"@{source}/offer", str(overlay), "-U", str(socket), "--state", str(destination)),
            *("--rate", "4M"),
        )
        with offer, receive:
            wait_until(lambda: handover(source, "status")["state"] == "PREPARED", "both to be prepared")
            disk = logged_disk(nbd_disk(socket), log)
            with Guest(disk, WRITE_ON, files, control=there, incoming=way) as new:
                old.wait_for("wrote")
                ask(str(here), "migrate", uri=f"unix:{way}")
                wait_until(lambda: migrated(here), "the guest's memory to move")
                stood_still = time.monotonic()
                handover(source, "fence")
                wait_until(lambda: handover(destination, "status")["state"] == "HYDRATING", "the disk to be owned")
                ask(str(there), "cont")
                print(f"from the migration's end to cont: {1000 * (time.monotonic() - stood_still):.0f} ms")
                assert handover(destination, "status")["remote"] > 1 << 20
                new.wait(90)
                old.kill()
                lines = wrote(old) + wrote(new)
                assert lines == list(range(1, 61))
                assert wrote(old)
                assert wrote(new)
            assert offer.wait() == 0
            wait_until(lambda: handover(destination, "status")["state"] == "RELEASED", "the release")
            assert receive.stop() == 0
    (kept,) = tmp_path.glob("disk.img.handed-over-*")
    unwritten = tmp_path / "unwritten.img"
    assert overlay_without_writes(overlay, [log], kept, unwritten) > 1 << 16
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", kept, unwritten], check=True)
    assert "RELEASED" in nbdstream("handover", "status", "--state", str(source)).stdout


def handover(state: Path, command: str) -> dict[str, Any]:
    """Say something to a side, as a driver of migrations does: no process is started for it."""
    return dict(ask(f"{state}/control", f"x-handover-{command}"))
