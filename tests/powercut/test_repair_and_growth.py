"""Power cuts while an image is repaired, or its disk made larger: what could be read still can be."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support.crash import Image, Recording
from tests.support.mutations import CLUSTER, mutated, readable
from tests.support.processes import nbdstream
from tests.support.qed import qemu_check
from tests.support.strace import Traced

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_TABLES = range(4, 13)
"""The kinds of change that damage tables (tests.support.mutations)."""
_RESUMED = 40
"""Of so many states one is repaired again."""


def recorded(path: Path, *arguments: str) -> Recording:
    """Run a command on an image to its end."""
    command = Traced(str(path), f"{path}.strace", *arguments)
    assert command.wait() == 0, command
    return command.recording()


def states(recording: Recording, chance: random.Random, count: int, look: Callable[[bytes], None]) -> int:
    """Look at the states that a power cut could leave; all in which writes are whole, if these are not too many."""
    moments = sorted({moment for event in recording.events for moment in (event.begin, event.end)})
    seen: set[bytes] = set()
    for moment in moments:
        if recording.pending(moment) <= 6:
            seen.update(recording.every_power_cut(moment))
    seen.update(recording.power_cut(chance.choice(moments), chance) for _ in range(count))
    for state in seen:
        look(state)
    return len(seen)


def damaged_image(path: Path, chance: random.Random) -> bytes:
    """Make an image with some wrong entries, and some leaks."""
    changes = [(chance.choice(_TABLES), *chance.randbytes(3)) for _ in range(chance.randint(1, 4))]
    content = mutated(bytes(byte for change in [*changes, (14, 0, 0, 8 * chance.randint(0, 5))] for byte in change))
    path.write_bytes(content)
    return content


def cut_repairs(directory: Path, chance: random.Random, images: int, *, count: int) -> str:
    total = again = 0
    path, crashed = directory / "image", directory / "crashed"
    for _ in range(images):
        before = readable(damaged_image(path, chance))
        recording = recorded(path, "check", "-r", "all", str(path))

        def look(state: bytes, before: dict[int, bytes] = before) -> None:
            nonlocal total, again
            found = readable(state)
            for cluster, data in before.items():
                assert found.get(cluster, bytes(CLUSTER)) == data, f"cluster {cluster} is lost"
            total += 1
            if total % _RESUMED == 0:
                crashed.write_bytes(state)
                nbdstream("check", "-r", "all", str(crashed))
                assert qemu_check(str(crashed)).status == 0
                look(crashed.read_bytes())
                again += 1

        states(recording, chance, count, look)
        assert qemu_check(str(path)).status == 0
    return f"{images} images, {total} states, {again} repaired again"


def test_no_power_cut_hurts_a_repair(tmp_path: Path, seed: int) -> None:
    print(cut_repairs(tmp_path, random.Random(seed), 8, count=30))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_no_power_cut_of_many_hurts_a_repair(tmp_path: Path, seed: int) -> None:
    print(cut_repairs(tmp_path, random.Random(seed), 150, count=100))


@pytest.mark.parametrize("backing", [None, 30 * CLUSTER])
def test_no_power_cut_hurts_a_disk_that_grows(tmp_path: Path, seed: int, backing: int | None) -> None:
    """The last cluster has data behind the old end of the disk; the backing file, if there is one, is longer."""
    chance = random.Random(seed)
    path, below = tmp_path / "image", tmp_path / "below"
    image = bytearray(mutated(b""))
    old, new = 8 * CLUSTER - 1024, 40 * CLUSTER
    struct.pack_into("<Q", image, 48, old)
    options = []
    if backing:
        below.write_bytes(b"\xbb" * backing)
        name = str(below).encode()
        struct.pack_into("<Q", image, 16, 1 | 4)
        struct.pack_into("<II", image, 56, 64, len(name))
        image[64 : 64 + len(name)] = name
        options = ["--backing-format", "raw"]
    path.write_bytes(image)
    before = readable(image)

    def look(state: bytes) -> None:
        parsed = Image(state)
        (size,) = struct.unpack_from("<Q", state, 48)
        assert size in (old, new)
        for cluster in range(size // CLUSTER):
            data = parsed.read(cluster)
            if cluster < 7:
                assert data == before[cluster]
            elif cluster == 7:
                assert data
                assert data[:-1024] == before[7][:-1024]
                assert not any(data[-1024:]), "what was behind the old end shows"
            else:
                assert not any(data if data is not None else b"\xbb" * (bool(backing) and cluster < 30)), cluster

    recording = recorded(path, "resize", *options, str(path), str(new))
    print(f"{states(recording, chance, 200, look)} states")
    assert struct.unpack_from("<Q", path.read_bytes(), 48) == (new,)
