"""Damaged and hostile QED images, to us and to QEMU: what it refuses, we refuse; what both read is the same.

``DIFFERENCES`` lists the others, and docs/qed.md explains each under the same name.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.check import check
from nbdstream.block.qed.image import QedImage
from nbdstream.errors import ImageError
from tests.support import qed
from tests.support.mutations import CLUSTER, INTERESTING, mutated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

DOCUMENT = Path(__file__).parents[2] / "docs" / "qed.md"
CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus" / "image"

_REFUSED, _CLEAN, _CORRUPT = "refused", "clean or leaks", "corrupt"


class Seen(NamedTuple):
    """What somebody makes of an image."""

    opens: bool
    """To read. Where it does not, nothing is read."""
    check: str
    corruptions: int
    """How many a check counts."""
    reads: dict[int, bytes | None]
    """Cluster of the disk to what it reads as; None where that is an error."""


class Case(NamedTuple):
    """An image, and what both make of it."""

    image: bytes
    ours: Seen
    theirs: Seen

    @property
    def header_size(self) -> int:
        """In clusters (qed_spec)."""
        return int.from_bytes(self.image[12:16], "little")

    @property
    def we_refuse_to_open(self) -> bool:
        """Whether only QEMU opens it."""
        return self.theirs.opens and not self.ours.opens


DIFFERENCES: dict[str, Callable[[Case], bool]] = {
    # name: whether it explains what is not the same in a case
    "no header cluster": lambda case: case.we_refuse_to_open and case.header_size == 0,
}


def ours(path: str) -> Seen:
    status, corruptions = _our_check(path)
    reads = asyncio.run(_our_reads(path))
    return Seen(reads is not None, status, corruptions, reads or {})


def _our_check(path: str) -> tuple[str, int]:
    with open(path, "rb") as file:
        try:
            found = check(file.fileno())
        except (ImageError, OSError):
            return _REFUSED, 0
    return _CORRUPT if found.corruptions else _CLEAN, found.corruptions


async def _our_reads(path: str) -> dict[int, bytes | None] | None:
    try:
        device = Overlay(await QedImage.open(path))
    except ImageError:
        return None
    reads: dict[int, bytes | None] = {}
    for cluster in clusters_of(device.size):
        try:
            buffers = await device.read(cluster * CLUSTER, CLUSTER)
        except OSError:
            reads[cluster] = None
        else:
            reads[cluster] = b"".join(bytes(buffer) for buffer in buffers)
    await device.close()
    return reads


def clusters_of(size: int) -> Iterable[int]:
    return [cluster for cluster in INTERESTING if (cluster + 1) * CLUSTER <= size]


def theirs(path: str, image: bytes) -> Seen:
    name = qed.without_backing(path)
    size = struct.unpack_from("<Q", image, 48)[0] if len(image) >= 56 else 0
    commands = [f"read -v {cluster * CLUSTER} {CLUSTER}" for cluster in clusters_of(size)]
    result = subprocess.run(
        ["qemu-io", "-r", name], input="\n".join([*commands, "quit", ""]), capture_output=True, text=True, check=False
    )
    status, corruptions = _their_check(name)
    if "can't open" in result.stderr:
        return Seen(opens=False, check=status, corruptions=corruptions, reads={})
    return Seen(True, status, corruptions, dict.fromkeys(clusters_of(size)) | _dumped(result.stdout))


def _dumped(text: str) -> dict[int, bytes | None]:
    """Return what qemu-io's ``read -v`` has shown, by cluster."""
    found: dict[int, bytes | None] = {}
    data = ""
    for line in text.splitlines():
        if dump := re.search(r"[0-9a-f]{8}:  ((?:[0-9a-f]{2} ){16})", line):
            data += dump[1]
        elif done := re.search(r"\bread \d+/\d+ bytes at offset (\d+)", line):
            found[int(done[1]) // CLUSTER] = bytes.fromhex(data)
            data = ""
    return found


def _their_check(name: str) -> tuple[str, int]:
    result = qed.qemu_img("check", "--output=json", name, check=False)
    if result.returncode == 1:
        return _REFUSED, 0
    corruptions: int = json.loads(result.stdout).get("corruptions", 0)
    return _CORRUPT if corruptions else _CLEAN, corruptions


def compare(directory: Path, seed: bytes) -> Case:
    path = directory / "image"
    image = mutated(seed)
    path.write_bytes(image)
    return Case(image, ours(str(path)), theirs(str(path), image))


def compare_all(directory: Path, seeds: Iterable[bytes]) -> Counter[str]:
    """Return how many images there were, and how many of each difference. Raises AssertionError for any other."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        case = compare(directory, seed)
        counts["images"] += 1
        if case.ours == case.theirs:
            counts["the same"] += 1
            continue
        explained = [name for name, explains in DIFFERENCES.items() if explains(case)]
        assert explained, f"{seed.hex(' ', 4)}: ours {case.ours}, theirs {case.theirs}"
        counts[explained[0]] += 1
    return counts


def random_seeds(chance: random.Random, count: int) -> Iterable[bytes]:
    return (chance.randbytes(4 * chance.choice([1, 1, 2, 3])) for _ in range(count))


def test_what_was_made_by_hand_is_the_same_to_both(tmp_path: Path) -> None:
    print(compare_all(tmp_path, [path.read_bytes() for path in sorted(CORPUS.iterdir())]))


def test_random_damage_is_the_same_to_both(tmp_path: Path, seed: int) -> None:
    print(compare_all(tmp_path, random_seeds(random.Random(seed), 120)))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_much_random_damage_is_the_same_to_both(tmp_path: Path, seed: int) -> None:
    print(compare_all(tmp_path, random_seeds(random.Random(seed), 5000)))


def test_every_difference_is_explained() -> None:
    text = DOCUMENT.read_text()
    for name in DIFFERENCES:
        assert f"| {name} |" in text, f"{DOCUMENT} does not explain {name!r}"
