"""A disk that is full is a pause: the guest goes on as far as it can, and all goes on when there is room."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import pytest

from tests.support.client import WRITE
from tests.support.harness import CommandPair, Filler, Pairs, make_image, small_filesystem
from tests.support.qed import content, qemu_check, qemu_compare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.client import NbdClient

MIB = 1 << 20
SIZE = 24 * MIB


@pytest.fixture
def pair(pairs: Pairs, tmp_path: Path, seed: int) -> Iterator[CommandPair]:
    """An overlay on a file system of 40 MiB, of a source that fills 24 of them."""
    pair = pairs.commands(direct=True)
    make_image(pair.image, SIZE, random.Random(seed), [(0, SIZE)])
    pair.start_source()
    with small_filesystem(str(tmp_path), 40 * MIB) as small:
        pair.overlay = f"{small}/overlay.qed"
        yield pair
        if pair.streamer:
            pair.streamer.kill()


def source_of(pair: CommandPair) -> bytes:
    with open(pair.image, "rb") as file:
        return file.read()


def fill(tmp_path: Path, leave: int) -> Filler:
    return Filler(str(tmp_path / "small"), leave=leave)


def fill_by_writing(guest: NbdClient, model: bytearray) -> int:
    """Write into one new cluster after the other until there is no room; return which one there was none for."""
    for cluster in range(SIZE >> 16):
        data = bytes([cluster % 255 + 1]) * 65536
        cookie = guest.submit(WRITE, cluster << 16, len(data), data)
        reply = guest.receive()
        assert reply.cookie == cookie
        if reply.error:
            assert reply.error == errno.ENOSPC
            return cluster
        model[cluster << 16 : (cluster + 1) << 16] = data
    raise AssertionError("there was room for everything")


def test_the_stream_pauses_and_goes_on_when_there_is_room(pair: CommandPair, tmp_path: Path) -> None:
    pair.start_streamer(rate=1024)
    pair.stop_streamer()
    filler = fill(tmp_path, 8 * MIB)
    pair.start_streamer()
    assert pair.streamer
    pair.streamer.wait_for("the disk is full")
    with pair.guest() as guest:
        assert guest.read(0, SIZE // 2) == source_of(pair)[: SIZE // 2]
        assert guest.read(SIZE // 2, SIZE // 2) == source_of(pair)[SIZE // 2 :], "passed through"
        filler.remove()
        pair.wait_until_independent()
        assert guest.read(0, SIZE // 2) == source_of(pair)[: SIZE // 2]
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    assert qemu_compare(pair.overlay, pair.image)


def test_a_write_that_finds_no_room_fails_and_changes_nothing(pair: CommandPair, tmp_path: Path) -> None:
    model = bytearray(source_of(pair))
    pair.start_streamer(rate=1024)
    filler = fill(tmp_path, 3 * MIB)
    with pair.guest() as guest:
        full = fill_by_writing(guest, model) << 16
        guest.write(0, b"local" * 1000)  # which needs no room
        model[:5000] = b"local" * 1000
        guest.flush()
        assert guest.read(full, 65536) == model[full : full + 65536]
        with pytest.raises(OSError, match="No space") as failed:
            guest.write(full + 1000, b"part")
        assert failed.value.errno == errno.ENOSPC
        assert guest.read(full, 65536) == model[full : full + 65536]
        filler.remove()
        guest.write(full, b"!" * 65536)
        model[full : full + 65536] = b"!" * 65536
        guest.flush()
    pair.stop_streamer()
    pair.start_streamer()
    pair.wait_until_independent()
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    assert content(pair.overlay) == model


def test_a_kill_on_a_full_disk_loses_nothing(pair: CommandPair, tmp_path: Path) -> None:
    model = bytearray(source_of(pair))
    pair.start_streamer(rate=1024)
    filler = fill(tmp_path, 3 * MIB)
    with pair.guest() as guest:
        fill_by_writing(guest, model)
    pair.kill_streamer()
    assert qemu_check(pair.overlay).corruptions == 0
    pair.begin_streamer(rate=1024)
    assert pair.streamer
    pair.streamer.wait_until_serving()
    with pair.guest() as guest:
        assert guest.read(0, 2 * MIB) == model[: 2 * MIB]
        filler.remove()
        guest.write(SIZE - 65536, b"?" * 65536)
        model[SIZE - 65536 :] = b"?" * 65536
    pair.stop_streamer()
    pair.start_streamer()
    pair.wait_until_independent()
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    assert content(pair.overlay) == model
