"""Overlays that we write, seen by QEMU: at any time, before, during and after the stream.

A reader that looks at a file which somebody else changes sees several moments at once. So the streamer stands still
(SIGSTOP) while QEMU looks, at moments that nobody chose.
"""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.client import NbdClient
from tests.support.harness import CommandPair, Pairs, make_image
from tests.support.processes import nbdstream
from tests.support.qed import content, qemu_check, qemu_compare, qemu_img, without_backing
from tests.support.workload import DiskModel, Workload, examine

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
SIZE = 32 * MIB
LOOKS = 6


@pytest.fixture
def pair(pairs: Pairs, seed: int) -> CommandPair:
    pair = pairs.commands(direct=True)
    make_image(pair.image, SIZE, random.Random(seed))
    pair.start_source()
    return pair


@contextmanager
def standing_still(pair: CommandPair) -> Iterator[None]:
    assert pair.streamer
    pair.streamer.pause()
    try:
        yield
    finally:
        pair.streamer.resume()


def test_qemu_accepts_the_overlay_at_any_time(pair: CommandPair, seed: int) -> None:
    rng = random.Random(seed)
    with open(pair.image, "rb") as file:
        model = DiskModel(file.read())
    pair.start_streamer(rate=8 * MIB)
    with Workload(pair.guest_socket, model, seed) as work:
        for _ in range(LOOKS):
            work.wait_for(rng.randrange(200))
            with standing_still(pair):
                info = json.loads(qemu_img("info", "-U", "--output=json", pair.overlay).stdout)
                assert info["virtual-size"] == SIZE
                check = qemu_img("check", "-U", "--output=json", without_backing(pair.overlay), check=False)
                report = json.loads(check.stdout)
                assert check.returncode in (0, 3)
                assert not report.get("corruptions")
                assert not report["check-errors"]
    assert not work.faults


def test_the_overlay_compares_equal_to_its_source_at_any_time(pair: CommandPair, seed: int) -> None:
    rng = random.Random(seed)
    pair.start_streamer(rate=8 * MIB)
    with NbdClient(pair.guest_socket) as guest:
        for _ in range(LOOKS):
            guest.read(rng.randrange(SIZE - MIB), MIB)
            with standing_still(pair):
                assert "identical" in qemu_img("compare", "-U", pair.overlay, "-F", "raw", pair.image).stdout


def test_what_was_stopped_early_is_an_overlay_that_qemu_uses(pair: CommandPair, seed: int) -> None:
    pair.start_streamer(rate=4 * MIB)
    with NbdClient(pair.guest_socket) as guest:
        guest.write(5 * MIB + 1000, b"guest" * 20_000)
    assert not pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    with open(pair.image, "rb") as file:
        model = bytearray(file.read())
    model[5 * MIB + 1000 : 5 * MIB + 101_000] = b"guest" * 20_000
    assert content(pair.overlay) == model, "QEMU reads the rest from the source"


def test_an_independent_overlay_is_a_plain_image(pair: CommandPair) -> None:
    nbdstream("stream", pair.uri, pair.overlay)
    pair.kill_source()
    info = json.loads(qemu_img("info", "--output=json", pair.overlay).stdout)
    assert info["format"] == "qed"
    assert "backing-filename" not in info
    assert qemu_check(pair.overlay).status == 0
    assert qemu_compare(pair.overlay, pair.image)


@pytest.mark.parametrize("size", [512, 65536, 5 * MIB - 512, 4 * MIB + 65536 + 1536, MIB + 100])
def test_a_source_of_any_size_becomes_an_image(pairs: Pairs, seed: int, size: int) -> None:
    pair = pairs.commands(direct=True)
    make_image(pair.image, size, random.Random(seed), [(0, size)])
    pair.start_source()
    nbdstream("stream", pair.uri, pair.overlay)
    with open(pair.image, "rb") as file:
        assert content(pair.overlay) == file.read() + bytes(-size % 512)
    assert qemu_check(pair.overlay).status == 0


GEOMETRIES = [(4096, 2), (4096, 16), (65536, 2), (1 << 20, 4), (2 << 20, 8)]


@pytest.mark.parametrize(("cluster_size", "table_size"), GEOMETRIES)
def test_an_overlay_of_any_geometry_is_streamed_and_written(
    pair: CommandPair, seed: int, cluster_size: int, table_size: int
) -> None:
    geometry = ["--cluster-size", str(cluster_size), "--table-size", str(table_size)]
    nbdstream("create", pair.overlay, "--backing", pair.uri, *geometry)
    with open(pair.image, "rb") as file:
        model = DiskModel(file.read())
    pair.start_streamer(rate=16 * MIB)
    with Workload(pair.guest_socket, model, seed, cluster_size=cluster_size) as work:
        work.wait_for(200)
    pair.wait_until_independent()
    assert not work.faults
    assert not examine(pair.guest_socket, model)
    assert pair.stop_streamer()
    assert qemu_check(pair.overlay).status == 0
    assert content(pair.overlay) == model.contents()


def test_nothing_that_reads_as_zero_is_transferred(pairs: Pairs, seed: int) -> None:
    pair = pairs.commands(direct=True)
    make_image(pair.image, 512 * MIB, random.Random(seed), [(100 * MIB, 3 * MIB), (400 * MIB, MIB)])
    pair.start_source()
    with pair.begin_streamer() as streamer:
        streamer.wait_until_independent()
        assert streamer.wait_for_progress("fetched", 4 * MIB)["fetched"] == 4 * MIB
        assert pair.stop_streamer()
    assert qemu_compare(pair.overlay, pair.image)
