"""A guest's I/O on the overlay while it is filled: fio, and a real file system through nbdfuse and a loop mount."""

from __future__ import annotations

import hashlib
import os
import random
import re
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.harness import CommandPair, Pairs, make_image, socket_uri
from tests.support.processes import Process, run, wait_until
from tests.support.qed import content, qemu_check

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
SIZE = 64 * MIB

WRITTEN = (8 * MIB, 16 * MIB)
"""Offset and length of what fio writes once, and verifies when the overlay is independent."""
CHANGED = (40 * MIB, 8 * MIB)
"""What it reads and writes all the time, verifying as it goes."""


def fio(uri: str, *jobs: list[str], patience: float = 60.0) -> None:
    common = [
        "--ioengine=nbd",
        f"--uri={uri}",
        "--bs=4k",
        "--iodepth=16",
        "--randseed=7",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ]
    run("fio", *common, *(word for job in jobs for word in job), patience=patience)


def job(name: str, how: str, area: tuple[int, int], *options: str) -> list[str]:
    offset, length = area
    return [f"--name={name}", f"--rw={how}", f"--offset={offset}", f"--size={length}", *options]


def test_fio_verifies_what_it_writes_while_the_overlay_is_filled(pairs: Pairs, seed: int) -> None:
    pair = pairs.commands(direct=True)
    make_image(pair.image, SIZE, random.Random(seed), [(0, 30 * MIB), (34 * MIB, 30 * MIB)])
    pair.start(rate=12 * MIB)
    written = ["--verify=crc32c", "--verify_state_save=0"]
    fio(
        pair.guest_uri,
        job("written", "randwrite", WRITTEN, *written, "--do_verify=0"),
        job("changed", "randrw", CHANGED, "--verify=crc32c", "--verify_backlog=64", "--loops=3", "--fsync=50"),
        job("read", "randread", (0, SIZE), "--number_ios=8000"),
    )
    pair.wait_until_independent()
    fio(pair.guest_uri, job("written", "randwrite", WRITTEN, *written, "--verify_only=1"))
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    with open(pair.image, "rb") as file:
        source = file.read()
    found = content(pair.overlay)
    changed = sorted([WRITTEN, CHANGED])
    for (start, length), (following, _) in zip([(0, 0), *changed], [*changed, (SIZE, 0)], strict=True):
        assert found[start + length : following] == source[start + length : following]
    start, length = WRITTEN
    blocks = range(start, start + length, 4096)
    assert all(found[place : place + 4096] != source[place : place + 4096] for place in blocks)


@contextmanager
def mounted(uri: str, directory: Path) -> Iterator[Path]:
    """Mount the file system on an export, through nbdfuse and a loop device."""
    fuse, disk, tree = directory / "fuse", directory / "fuse" / "nbd", directory / "tree"
    for path in (fuse, tree):
        path.mkdir(exist_ok=True)
    with Process("nbdfuse", str(fuse), uri) as process, ExitStack() as stack:
        stack.callback(process.wait)  # it ends when it is unmounted
        wait_until(lambda: disk.exists() or not process.running, "nbdfuse")
        assert process.running, process
        stack.callback(run, "umount", str(fuse))
        run("mount", "-t", "ext4", "-o", "loop", str(disk), str(tree))
        stack.callback(run, "umount", str(tree))
        yield tree


@contextmanager
def logging_writes(uri: str, directory: Path) -> Iterator[tuple[str, Path]]:
    """An export of the same disk through nbdkit, which logs what is written, and the log."""
    socket, log = directory / "logged.sock", directory / "writes.log"
    command = ["nbdkit", "-f", "-U", str(socket), "--filter=log", "nbd", f"uri={uri}", f"logfile={log}"]
    with Process(*command) as process:
        wait_until(lambda: socket.exists() or not process.running, "nbdkit")
        assert process.running, process
        yield socket_uri(str(socket)), log
        assert process.stop() == 0


def writes_in(log: Path) -> Iterator[tuple[int, int]]:
    """Return offset and length of everything that may have changed."""
    for line in log.read_text().splitlines():
        found = re.search(r" (Write|Zero|Trim) id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", line)
        if found:
            yield int(found[2], 16), int(found[3], 16)


def make_file_system(directory: Path, image: str, rng: random.Random) -> dict[str, str]:
    """Make an ext4 image full of files; return their digests by name."""
    tree = directory / "files"
    tree.mkdir()
    digests = {}
    for number in range(150):
        data = rng.randbytes(rng.randrange(300 << 10))
        (tree / f"file{number}").write_bytes(data)
        digests[f"file{number}"] = hashlib.sha256(data).hexdigest()
    run("mke2fs", "-q", "-t", "ext4", "-d", str(tree), image, f"{SIZE >> 20}M")
    return digests


def check_digests(tree: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        assert hashlib.sha256((tree / name).read_bytes()).hexdigest() == digest, name


def use(tree: Path, digests: dict[str, str], rng: random.Random) -> None:
    """Read, write, overwrite, cut and remove files; keep the digests true."""
    names = sorted(digests)
    rng.shuffle(names)
    check_digests(tree, {name: digests[name] for name in names[:60]})
    for number in range(40):
        data = rng.randbytes(rng.randrange(200 << 10))
        (tree / f"new{number}").write_bytes(data)
        digests[f"new{number}"] = hashlib.sha256(data).hexdigest()
    for name in names[60:80]:
        content = bytearray((tree / name).read_bytes())
        start = rng.randrange(len(content) + 1)
        content[start : start + 5000] = rng.randbytes(5000)
        with (tree / name).open("r+b") as file:
            file.seek(start)
            file.write(content[start : start + 5000])
        digests[name] = hashlib.sha256(content).hexdigest()
    for name in names[80:100]:
        (tree / name).unlink()
        del digests[name]
    os.sync()
    check_digests(tree, digests)


@pytest.mark.timeout(180)
def test_a_file_system_is_used_while_the_overlay_is_filled(pairs: Pairs, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    pair: CommandPair = pairs.commands(direct=True)
    digests = make_file_system(tmp_path, pair.image, rng)
    pair.start(rate=6 * MIB)
    with logging_writes(pair.guest_uri, tmp_path) as (uri, log):
        with mounted(uri, tmp_path) as tree:
            use(tree, digests, rng)
        writes = list(writes_in(log))
    pair.kill_streamer()
    pair.start_streamer()
    pair.wait_until_independent()
    pair.kill_source()
    with mounted(pair.guest_uri, tmp_path) as tree:
        check_digests(tree, digests)
    assert pair.stop_streamer()
    assert_rest_is_the_source(pair, writes, tmp_path)


def assert_rest_is_the_source(pair: CommandPair, writes: list[tuple[int, int]], directory: Path) -> None:
    """Whatever was not written equals the source. (The second mount may have written the superblock's times.)"""
    assert sum(length for _, length in writes) > MIB
    assert qemu_check(pair.overlay).corruptions == 0
    found = bytearray(content(pair.overlay))
    with open(pair.image, "rb") as file:
        source = file.read()
    fsck = directory / "found.img"
    fsck.write_bytes(found)
    run("e2fsck", "-f", "-n", str(fsck))
    for offset, length in [*writes, (0, 4096)]:
        found[offset : offset + length] = source[offset : offset + length]
    assert found == source
