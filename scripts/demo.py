"""The main job on loopback, with a real guest: run it by scripts/demo, which sets up what it needs.

A disk image is served as a source host would; the overlay of it is served to a Linux guest, which boots at once, reads
files, checks their digests and writes some of its own, while the disk is streamed in behind it. When the overlay is
independent the source is stopped, a second guest boots from the overlay file alone and checks everything again, and
qemu-img shows that what the guests did not write equals the source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self
from urllib.parse import quote

from tests.support.guest import Guest, GuestError, logged_disk, nbd_disk, overlay_without_writes, qed_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent
NBDSTREAM = ROOT / ".venv" / "bin" / "nbdstream"
IMAGE_SIZE = 1024 * MIB
CONTENT_SIZE = 700 * MIB
SECONDS_TO_WATCH = 20
CHECKED_SIZE = 24 * MIB
LARGEST_CHECKED = MIB

READ_AND_WRITE = """
dd if=/dev/vda of=/dev/null bs=4096 count=1 2>/dev/null || fail read
say read its first block
mount -t ext4 /dev/vda /mnt || fail mount
say mounted its root file system
cd /mnt
sha256sum -c -s /manifest || fail digests
say verified $(wc -l </manifest) files of the source by their digests
mkdir guest && cd guest || fail mkdir
for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=file$i bs=64k count=$((i * 4)) 2>/dev/null || fail write; done
sha256sum file* >digests
cd / && umount /mnt && sync || fail umount
say wrote 9 files of its own and synced
"""
CHECK_ALL = """
mount -t ext4 /dev/vda /mnt || fail mount
cd /mnt
sha256sum -c -s /manifest || fail digests
say verified $(wc -l </manifest) files of the source again
cd guest
sha256sum -c -s digests || fail its own files
say verified $(wc -l <digests) files that the first guest wrote
date >second-boot
cd / && umount /mnt && sync || fail umount
"""


class DemoError(Exception):
    """A step did not do what it should; the text says which."""


class Screen:
    """What the demo says, with one progress bar kept below it on a terminal; without one, a bar now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bar = ""
        self._last_bar = 0.0
        self._terminal = sys.stdout.isatty()

    def say(self, text: str = "") -> None:
        with self._lock:
            if self._terminal:
                print(f"\r\033[K{text}\n{self._bar}", end="", flush=True)
            else:
                print(text, flush=True)

    def command(self, command: list[str], *, background: bool = False) -> None:
        shown = shlex.join([Path(command[0]).name, *command[1:]]).replace(f"{os.getcwd()}/", "")
        self.say(f"   $ {shown}{' &' if background else ''}")

    def bar(self, progress: dict[str, Any]) -> None:
        """Draw a line of the streamer's --progress json as a bar."""
        position, length = progress["position"], progress["length"]
        part = position / length if length else 1
        filled = int(part * 40)
        bar = (
            f"   {part:4.0%} |{'█' * filled}{'·' * (40 - filled)}| {position / MIB:5.0f} of {length / MIB:.0f} MiB,"
            f" {progress['rate'] / MIB:.0f} MiB/s"
        )
        with self._lock:
            if self._terminal:
                self._bar = bar
                print(f"\r\033[K{bar}", end="", flush=True)
            elif time.monotonic() - self._last_bar > 4 or position == length:
                self._last_bar = time.monotonic()
                print(bar, flush=True)

    def end_bar(self) -> None:
        with self._lock:
            if self._bar:
                print(flush=True)
                self._bar = ""


def output_of(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise DemoError(f"{shlex.join(command)} failed: {result.stderr or result.stdout}")
    return result.stdout.rstrip()


class Command:
    """An nbdstream command in the background; a context manager that ends it, whatever happens."""

    def __init__(self, screen: Screen, *arguments: str) -> None:
        command = [str(NBDSTREAM), *arguments]
        screen.command(command, background=True)
        self.name = f"nbdstream {arguments[0]}"
        self.progress: dict[str, Any] = {}
        self.progress_time = 0.0
        self._screen = screen
        self.started = time.monotonic()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_progress, args=(self._process.stdout,)),
            threading.Thread(target=self._read_errors, args=(self._process.stderr,)),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()
        if error and issubclass(error, Exception):
            self._screen.end_bar()
            self._screen.say(f"{self.name} said: {self.log()}")

    def stop(self) -> None:
        """SIGTERM, on which every command ends cleanly."""
        self._process.terminate()
        status = self._process.wait(30)
        for reader in self._readers:
            reader.join()
        if status:
            raise DemoError(f"{self.name} ended with status {status} on SIGTERM: {self.log()}")

    def check_running(self) -> None:
        if self._process.poll() is not None:
            raise DemoError(f"{self.name} ended with status {self._process.returncode}: {self.log()}")

    def log(self) -> str:
        return "\n".join(self._errors[-10:])

    def first_read(self, socket: Path) -> float:
        """Read the first block of what the command serves, as soon as it serves it; the time when it was read."""
        read = ["qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", f"nbd+unix:///?socket={quote(str(socket))}"]
        while not (socket.exists() and subprocess.run(read, capture_output=True, check=False).returncode == 0):
            self.check_running()
            if time.monotonic() > self.started + 30:
                raise DemoError(f"{self.name} does not serve: {self.log()}")
            time.sleep(0.005)
        return time.monotonic()

    def is_independent(self) -> bool:
        """Whether the command has said that its overlay is."""
        return any("is independent" in line for line in self._errors)

    def wait_until_independent(self) -> None:
        """Wait as long as the command runs and there is progress."""
        position, since = 0, time.monotonic()
        while not self.is_independent():
            self.check_running()
            if self.progress.get("position", 0) > position:
                position, since = self.progress["position"], time.monotonic()
            if time.monotonic() > since + 60:
                raise DemoError(f"{self.name} makes no progress: {self.log()}")
            time.sleep(0.02)

    def _read_progress(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith("{"):
                self.progress, self.progress_time = json.loads(line), time.monotonic()
                self._screen.bar(self.progress)

    def _read_errors(self, stream: IO[str]) -> None:
        for line in stream:
            self._errors.append(line.rstrip())


def files_of_this_machine() -> Iterator[Path]:
    for top in ("/usr/lib/x86_64-linux-gnu", "/usr/bin", "/usr/share"):
        for directory, subdirectories, names in os.walk(top):
            subdirectories.sort()
            for name in sorted(names):
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    yield path


def make_image(image: Path, tree: Path) -> bytes:
    """Make a partition-less ext4 with files of this machine; a manifest, as of sha256sum, of some of them."""
    content, checked, manifest = 0, 0, []
    for number, path in enumerate(files_of_this_machine()):
        size = path.stat().st_size
        if content + size > CONTENT_SIZE:
            break
        content += size
        name = path.relative_to("/")
        copy = tree / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:   # on another file system, or not ours
            shutil.copy(path, copy)
        if number % 4 == 0 and size <= LARGEST_CHECKED and checked + size <= CHECKED_SIZE:
            checked += size
            manifest.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n")
    output_of("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), f"{IMAGE_SIZE // MIB}M")
    shutil.rmtree(tree)
    return "".join(manifest).encode()


def demonstrate(work: Path, rate: str | None, stack: ExitStack, screen: Screen) -> None:
    image, overlay, source_socket, guest_socket = (
        work / name for name in ("disk.img", "overlay.qed", "source.sock", "guest.sock")
    )
    screen.say(f"1. A disk image: ext4, {IMAGE_SIZE // MIB} MiB, filled with files of this machine.")
    manifest = make_image(image, work / "tree")
    source_uri = f"nbd+unix:///?socket={quote(str(source_socket))}"

    screen.say("2. The source host serves it.")
    source = stack.enter_context(Command(screen, "serve", str(image), "-U", str(source_socket)))
    source.first_read(source_socket)
    extents = json.loads(output_of("nbdinfo", "--map", "--json", source_uri))
    allocated = sum(extent["length"] for extent in extents if not extent["type"] & 2)

    screen.say("3. The destination host serves an overlay of it to a guest, and fills the overlay meanwhile.")
    rate = rate or f"{allocated // MIB // SECONDS_TO_WATCH}M"
    limit = ["--rate", rate] if rate != "0" else []
    streamer = stack.enter_context(
        Command(screen, "stream", source_uri, str(overlay), "-U", str(guest_socket), *limit, "--progress", "json")
    )
    first_byte = streamer.first_read(guest_socket) - streamer.started
    logs = [work / "first.log", work / "second.log"]
    with Guest(logged_disk(nbd_disk(guest_socket), logs[0]), READ_AND_WRITE, {"manifest": manifest}) as guest:
        screen.say("   A guest boots from the overlay.")
        for word in ("read", "mounted", "verified", "wrote"):
            event = guest.wait_for(word, 300)
            fetched = streamer.progress.get("fetched", 0) / MIB
            seconds = event.time - streamer.started
            screen.say(f"   {seconds:5.1f} s: the guest {event.text} ({fetched:.0f} MiB fetched so far)")
        guest.wait()
        while_filling = not streamer.is_independent()
    streamer.wait_until_independent()
    screen.end_bar()
    if "backing-filename" in json.loads(output_of("qemu-img", "info", "-U", "--output=json", str(overlay))):
        raise DemoError("the overlay still has a backing file")
    source.stop()
    streamer.stop()
    independent = streamer.progress_time - streamer.started   # it reports no more progress from then on
    fetched = streamer.progress["fetched"]

    screen.say(f"4. After {independent:.1f} s the overlay was independent. The source and the streamer are stopped.")
    screen.say("   $ qemu-img check overlay.qed")
    screen.say(f"   {output_of('qemu-img', 'check', '-f', 'qed', str(overlay)).splitlines()[0]}")
    screen.say("   A guest boots from the overlay alone, opened by QEMU itself.")
    with Guest(logged_disk(qed_disk(overlay), logs[1]), CHECK_ALL, {"manifest": manifest}) as guest:
        guest.wait(300)
        for event in guest.events:
            if event.text.startswith("verified"):
                screen.say(f"   {event.time - guest.started:5.1f} s: the guest {event.text}")

    screen.say("5. What the guests did not write equals the source:")
    unwritten = work / "unwritten.img"
    written = overlay_without_writes(overlay, logs, image, unwritten)
    screen.say("   $ qemu-img compare disk.img unwritten.img   # the overlay, less what the guests wrote")
    screen.say(f"   {output_of('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', str(image), str(unwritten))}")

    screen.say()
    screen.say("Measured, from the start of nbdstream stream:")
    screen.say(f"  first byte for the guest   {first_byte:8.2f} s")
    limited = f" (held back by --rate {rate}, so that the guest could be watched)" if limit else ""
    screen.say(f"  independent of the source  {independent:8.2f} s{limited}")
    screen.say(f"  fetched                    {fetched / MIB:8.1f} MiB of {allocated / MIB:.1f} MiB allocated"
               f" in a disk of {IMAGE_SIZE // MIB} MiB")
    screen.say(f"  written by the guests      {written / MIB:8.1f} MiB")
    if not while_filling:
        screen.say("The overlay was independent before the first guest was done: a lower --rate shows more.")


def main() -> int:
    """Run the demo in .cache/demo, and leave nothing behind."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Show the main job on this machine.")
    parser.add_argument(
        "--rate", help=f"limit of the stream, in bytes a second; 0: none (default: it lasts {SECONDS_TO_WATCH} s)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the images in .cache/demo")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = ROOT / ".cache" / "demo"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.chdir(work)
    screen = Screen()
    try:
        with ExitStack() as stack:
            demonstrate(work, arguments.rate, stack, screen)
    except (DemoError, GuestError, subprocess.TimeoutExpired) as error:
        screen.end_bar()
        print(f"scripts/demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        screen.end_bar()
        return 130
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
