"""The commands as a person or a script uses them: what they print, and with which status they end."""

from __future__ import annotations

import json
import random
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.harness import CommandPair, make_image, socket_uri
from tests.support.processes import Command, nbdstream, run
from tests.support.qed import RawImage, content, create, qemu_check, qemu_compare, qemu_info, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.client import NbdClient

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def pair(tmp_path: Path, seed: int) -> Iterator[CommandPair]:
    """A source that is served already: data, then a hole, then data."""
    with CommandPair(str(tmp_path), direct=True) as pair:
        make_image(pair.image, SIZE, random.Random(seed), [(0, 2 * MIB), (6 * MIB, 2 * MIB)])
        pair.start_source()
        yield pair


def source_data(pair: CommandPair) -> bytes:
    with open(pair.image, "rb") as file:
        return file.read()


# -- create -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", MIB), ("512", 512), ("64k", 65536), ("3M", 3 * MIB), ("2G", 2 << 30), ("1T", 1 << 40), ("100", 512)],
)
def test_create_takes_sizes_with_suffixes(tmp_path: Path, text: str, size: int) -> None:
    path = str(tmp_path / "disk.qed")
    nbdstream("create", path, "--size", text)
    assert qemu_info(path)["virtual-size"] == size
    assert qemu_check(path).status == 0


def test_create_makes_the_geometry_that_was_asked_for(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.qed")
    nbdstream("create", path, "--size", "1G", "--cluster-size", "4k", "--table-size", "16")
    image = RawImage(path)
    assert (image.cluster_size, image.table_size) == (4096, 16)
    qemu_io(path, "write -P 7 500M 64k", "read -P 7 500M 64k")


def test_create_makes_an_overlay_of_a_source(pair: CommandPair) -> None:
    nbdstream("create", pair.overlay, "--backing", pair.uri)
    info = qemu_info(pair.overlay)
    assert info["virtual-size"] == SIZE
    assert info["backing-filename"] == pair.uri
    assert info["backing-filename-format"] == "raw"
    assert content(pair.overlay) == source_data(pair)


# -- info, map, check -------------------------------------------------------------------------------------------


def test_info_tells_what_a_header_says(pair: CommandPair) -> None:
    nbdstream("create", pair.overlay, "--backing", pair.uri, "--cluster-size", "128k")
    pair.kill_source()
    facts = json.loads(nbdstream("info", pair.overlay, "--json").stdout)
    assert facts["format"] == "qed"
    assert facts["virtual-size"] == SIZE
    assert facts["cluster-size"] == 131072
    assert facts["backing-filename"] == pair.uri
    assert facts["backing-filename-format"] == "raw"
    text = nbdstream("info", pair.overlay).stdout
    assert f"virtual-size: 8 MiB ({SIZE} bytes)" in text
    assert f"backing-filename: {pair.uri}" in text


def test_info_tells_of_a_raw_image(pair: CommandPair) -> None:
    facts = json.loads(nbdstream("info", pair.image, "--json").stdout)
    assert (facts["format"], facts["virtual-size"], facts["actual-size"]) == ("raw", SIZE, 4 * MIB)


def test_info_tells_of_an_export(pair: CommandPair) -> None:
    facts = json.loads(nbdstream("info", pair.uri, "--json").stdout)
    assert facts["export-size"] == SIZE
    assert facts["is_read_only"] is True
    assert facts["contexts"] == ["base:allocation"]


def test_info_remembers_the_source_of_an_independent_overlay(pair: CommandPair) -> None:
    nbdstream("stream", pair.uri, pair.overlay)
    facts = json.loads(nbdstream("info", pair.overlay, "--json").stdout)
    assert "backing-filename" not in facts
    assert facts["origin"] == pair.uri


def test_map_shows_what_is_local_and_what_is_not(pair: CommandPair) -> None:
    nbdstream("create", pair.overlay, "--backing", pair.uri)
    qemu_io(pair.overlay, "write 1M 1M", "write -z 4M 1M")
    pair.kill_source()
    lines = [line.split() for line in nbdstream("map", "-f", "qed", pair.overlay).stdout.splitlines()]
    assert [(int(offset), int(length), text) for offset, length, _, text in lines] == [
        (0, MIB, "backing"),
        (MIB, MIB, "data"),
        (2 * MIB, 2 * MIB, "backing"),
        (4 * MIB, MIB, "hole,zero"),
        (5 * MIB, 3 * MIB, "backing"),
    ]


@pytest.mark.parametrize("what", ["image", "uri"])
def test_map_shows_holes_of_raw_images_and_exports(pair: CommandPair, what: str) -> None:
    extents = json.loads(nbdstream("map", pair.image if what == "image" else pair.uri, "--json").stdout)
    assert [(extent["offset"], extent["length"], extent["description"]) for extent in extents] == [
        (0, 2 * MIB, "data"),
        (2 * MIB, 4 * MIB, "hole,zero"),
        (6 * MIB, 2 * MIB, "data"),
    ]


def test_check_agrees_with_qemu(tmp_path: Path) -> None:
    path = create(str(tmp_path / "disk.qed"), SIZE)
    qemu_io(path, "write 0 1M")
    assert "no errors" in nbdstream("check", path).stdout
    RawImage(path).extend(65536)
    report = json.loads(nbdstream("check", path, "--json", status=3).stdout)
    assert (report["leaks"], report["corruptions"]) == (1, 0) == (qemu_check(path).leaks, qemu_check(path).corruptions)
    image = RawImage(path)
    image.put(image.l2_offset(3), image.get(image.l2_offset(4)))
    assert "corruption" in nbdstream("check", path, status=2).stdout
    assert qemu_check(path).status == 2


# -- stream -----------------------------------------------------------------------------------------------------


def test_stream_ends_with_0_when_the_overlay_is_independent(pair: CommandPair) -> None:
    result = nbdstream("stream", pair.uri, pair.overlay)
    assert f"{pair.overlay} is independent" in result.stderr
    assert f"fetched {4 * MIB} bytes" in result.stderr
    assert qemu_check(pair.overlay).status == 0
    assert qemu_compare(pair.overlay, pair.image)


def test_stream_of_an_independent_overlay_ends_at_once_without_the_source(pair: CommandPair) -> None:
    nbdstream("stream", pair.uri, pair.overlay)
    pair.kill_source()
    assert "independent" in nbdstream("stream", pair.uri, pair.overlay).stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("serving", [True, False])
def test_stream_ends_with_3_when_it_is_stopped_early(
    pair: CommandPair, number: signal.Signals, *, serving: bool
) -> None:
    options = ["-U", pair.guest_socket] if serving else []
    with Command("stream", pair.uri, pair.overlay, "--rate", "64k", "--progress", "json", *options) as command:
        command.wait_for_progress("length", SIZE)
        assert command.stop(number) == 3
        assert "the same command resumes it" in command.lines[-1]
    assert qemu_info(pair.overlay)["backing-filename"] == pair.uri
    assert qemu_check(pair.overlay).status == 0
    nbdstream("stream", pair.uri, pair.overlay)
    assert qemu_compare(pair.overlay, pair.image)


def test_stream_serves_the_guest_before_anything_was_fetched(pair: CommandPair) -> None:
    with pair.begin_streamer(rate=1024) as streamer, streamer_client(pair) as guest:
        assert guest.read(7 * MIB, 4096) == source_data(pair)[7 * MIB : 7 * MIB + 4096]
        guest.write(7 * MIB, b"new!" * 1024)
        assert guest.read(7 * MIB, 4096) == b"new!" * 1024
        assert guest.read(7 * MIB + 4096, 4096) == source_data(pair)[7 * MIB + 4096 : 7 * MIB + 8192]
        assert streamer.progress[-1]["fetched"] < 2 * MIB


def streamer_client(pair: CommandPair) -> NbdClient:
    assert pair.streamer
    pair.streamer.wait_until_serving()
    return pair.guest()


def test_stream_goes_on_serving_after_independence_until_it_is_stopped(pair: CommandPair) -> None:
    with pair.begin_streamer() as streamer, streamer_client(pair) as guest:
        streamer.wait_until_independent()
        pair.kill_source()
        guest.write(3 * MIB, b"more" * 1024)
        assert guest.read(0, MIB) == source_data(pair)[:MIB]
        assert streamer.stop() == 0
    assert content(pair.overlay)[3 * MIB : 3 * MIB + 4096] == b"more" * 1024


def test_an_independent_overlay_is_served_without_its_source(pair: CommandPair) -> None:
    nbdstream("stream", pair.uri, pair.overlay)
    pair.kill_source()
    with pair.begin_streamer() as streamer, streamer_client(pair) as guest:
        assert guest.read(0, SIZE) == source_data(pair)
        guest.write(0, b"x" * 5000)
        assert streamer.stop() == 0
    assert qemu_check(pair.overlay).status == 0


def test_a_resume_serves_what_is_local_while_the_source_is_away_and_waits_for_it(pair: CommandPair) -> None:
    with pair.begin_streamer(rate=1024) as streamer, streamer_client(pair) as guest:
        guest.write(6 * MIB, b"kept" * 16384)
        assert streamer.stop() == 3
    pair.kill_source()
    with pair.begin_streamer() as streamer, streamer_client(pair) as guest:
        assert any("waits" in line for line in streamer.lines)
        assert guest.read(6 * MIB, 65536) == b"kept" * 16384
        guest.write(5 * MIB, bytes(65536))
        guest.flush()
        pair.start_source()
        streamer.wait_until_independent()
        assert guest.read(MIB, MIB) == source_data(pair)[MIB : 2 * MIB]
        assert streamer.stop() == 0


def test_a_resume_without_a_guest_needs_its_source(pair: CommandPair) -> None:
    nbdstream("create", pair.overlay, "--backing", pair.uri)
    pair.kill_source()
    assert pair.source_socket in nbdstream("stream", pair.uri, pair.overlay, status=1).stderr


def test_progress_is_lines_of_json(pair: CommandPair) -> None:
    lines = nbdstream("stream", pair.uri, pair.overlay, "--progress", "json").stdout.splitlines()
    last = json.loads(lines[-1])
    assert last["position"] == last["length"] == SIZE
    assert last["fetched"] == 4 * MIB
    assert last["rate"] >= 0


@pytest.mark.parametrize("option", [["-p"], ["--progress", "bar"]])
def test_progress_is_a_bar_for_people(pair: CommandPair, option: list[str]) -> None:
    said = nbdstream("stream", pair.uri, pair.overlay, *option).stderr
    assert "100% |" in said
    assert "8.00M/8.00M" in said


# -- serve ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_logs_its_uri_and_ends_with_0(tmp_path: Path, number: signal.Signals) -> None:
    disk = str(tmp_path / "disk.img")
    make_image(disk, SIZE, random.Random(1))
    with Command("serve", disk, "-p", "0", "-x", "my disk") as command:
        uri = command.wait_until_serving()
        assert run("nbdinfo", "--size", uri).stdout == f"{SIZE}\n"
        assert command.stop(number) == 0


@pytest.mark.parametrize("option", ["-U", "-k", "--unix", "--socket"])
def test_serve_listens_on_a_unix_socket_that_is_private(tmp_path: Path, option: str) -> None:
    disk, nbd = tmp_path / "disk.img", tmp_path / "nbd.sock"
    make_image(str(disk), SIZE, random.Random(1))
    with Command("serve", str(disk), option, str(nbd)) as command:
        assert command.wait_until_serving() == socket_uri(str(nbd))
        assert nbd.stat().st_mode & 0o777 == 0o600
        assert command.stop() == 0
    assert not nbd.exists()


def test_python_m_is_the_command() -> None:
    assert "usage: nbdstream" in run(sys.executable, "-m", "nbdstream.cli", "--help").stdout


@pytest.mark.parametrize("command", ["serve", "stream", "create", "info", "map", "check", "resize"])
def test_every_command_tells_how_it_is_used(command: str) -> None:
    assert f"usage: nbdstream {command}" in nbdstream(command, "--help").stdout


# -- check -r, resize -------------------------------------------------------------------------------------------


def test_check_repairs_and_lists_what_it_gives_up(tmp_path: Path) -> None:
    path = create(str(tmp_path / "disk.qed"), SIZE)
    qemu_io(path, "write -P 1 0 1M")
    image = RawImage(path)
    image.put(image.l2_offset(3), 1 << 40)
    image.put(image.l2_offset(20), image.get(image.l2_offset(4)))
    image.extend(65536)
    assert nbdstream("check", path, "-r", "leaks", status=2).stdout.count("entry 0x") == 2
    said = nbdstream("check", path, "--repair", "all").stdout
    assert f"given up, since nothing could be read there:\n{3 << 16:>12} {1 << 16:>12}\n" in said
    assert f"copied, since something else had the same place: it may be wrong:\n{20 << 16:>12} {1 << 16:>12}\n" in said
    assert "2 corruptions were repaired" in said
    assert "leaked clusters were given back" in said
    assert "no errors are left" in said
    assert qemu_check(path).status == 0
    assert "no errors were found" in nbdstream("check", path, "-r", "all").stdout


def test_check_tells_scripts_what_it_repaired(tmp_path: Path) -> None:
    path = create(str(tmp_path / "disk.qed"), SIZE)
    qemu_io(path, "write -P 1 0 1M")
    image = RawImage(path)
    image.put(image.l2_offset(3), 1 << 40)
    image.extend(65536)
    report = json.loads(nbdstream("check", path, "-r", "all", "--json").stdout)
    assert (report["corruptions"], report["corruptions-fixed"]) == (0, 1)
    assert (report["leaks"], report["leaks-fixed"]) == (0, 2)
    assert (report["lost-bytes"], report["lost"]) == (65536, [{"offset": 3 << 16, "length": 65536}])
    assert (report["copied-bytes"], report["copied"]) == (0, [])


@pytest.mark.parametrize("command", [["check", "-r", "leaks"], ["check", "-r", "all"], ["resize"]])
def test_what_somebody_has_open_is_not_repaired_nor_resized(pair: CommandPair, command: list[str]) -> None:
    size = ["+1M"] if command == ["resize"] else []
    with pair.begin_streamer(rate=1024) as streamer:
        streamer.wait_until_serving()
        assert "in use by" in nbdstream(*command, pair.overlay, *size, status=1).stderr


@pytest.mark.parametrize(("text", "size"), [("9M", 9 * MIB), ("+1M", 9 * MIB), ("+1", SIZE + 512), ("8M", SIZE)])
def test_resize_takes_a_size_or_a_growth(tmp_path: Path, text: str, size: int) -> None:
    path = str(tmp_path / "disk.qed")
    nbdstream("create", path, "--size", "8M")
    qemu_io(path, "write -P 1 7M 1M")
    nbdstream("resize", path, text)
    assert qemu_info(path)["virtual-size"] == size
    assert content(path) == (b"\1" * MIB).rjust(SIZE, b"\0").ljust(size, b"\0")
    assert qemu_check(path).status == 0


def test_resize_never_makes_a_disk_smaller(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.qed")
    nbdstream("create", path, "--size", "8M")
    assert "only grow" in nbdstream("resize", path, "7M", status=1).stderr
    assert qemu_info(path)["virtual-size"] == SIZE


def test_an_overlay_that_has_grown_is_streamed_to_its_end(pair: CommandPair) -> None:
    nbdstream("create", pair.overlay, "--backing", pair.uri)
    nbdstream("resize", pair.overlay, "+3M")
    nbdstream("stream", pair.uri, pair.overlay)
    assert qemu_check(pair.overlay).status == 0
    assert content(pair.overlay) == source_data(pair) + bytes(3 * MIB)
