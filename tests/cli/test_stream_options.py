"""The options of ``stream`` for a source that goes away, moves or has a twin, and for a guest that must not suffer."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.support.client import READ
from tests.support.harness import CommandPair, Pairs, make_image, pairs, socket_uri
from tests.support.processes import Command, nbdstream
from tests.support.qed import qemu_check, qemu_compare, qemu_info

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["pairs"]

MIB = 1 << 20
SIZE = 4 * MIB
EIO = 5


@pytest.fixture
def pair(pairs: Pairs, seed: int) -> CommandPair:
    pair = pairs.commands(direct=True)
    make_image(pair.image, SIZE, random.Random(seed), [(0, SIZE)])
    pair.start_source()
    return pair


@pytest.fixture
def second(pair: CommandPair) -> Iterator[str]:
    """Another server of the same disk; its URI."""
    socket = pair.source_socket + "2"
    with Command("serve", pair.image, "-U", socket) as server:
        server.wait_until_serving()
        yield socket_uri(socket)


def begun(pair: CommandPair, *options: str) -> Command:
    streamer = pair.begin_streamer(*options)
    streamer.wait_until_serving()
    return streamer


def source_data(pair: CommandPair) -> bytes:
    with open(pair.image, "rb") as file:
        return file.read()


def is_whole(pair: CommandPair) -> bool:
    return qemu_check(pair.overlay).status == 0 and qemu_compare(pair.overlay, pair.image)


def test_without_a_job_nothing_is_streamed_and_what_is_read_is_kept(pair: CommandPair) -> None:
    with begun(pair, "--no-job") as streamer, pair.guest() as guest:
        assert guest.read(MIB, 4096) == source_data(pair)[MIB : MIB + 4096]
        streamer.wait_for_progress("fetched", 65536)
        assert streamer.stop() == 3
        assert streamer.progress[-1]["fetched"] == 65536


@pytest.mark.parametrize("policy", ["eio", "hold=200ms"])
def test_eio_is_what_the_operator_may_choose_for_what_is_remote(pair: CommandPair, policy: str) -> None:
    with begun(pair, "--no-job", "--on-source-loss", policy) as streamer, pair.guest() as guest:
        guest.read(0, 4096)
        pair.kill_source()
        streamer.wait_for("the source is lost")
        guest.submit(READ, MIB, 4096)
        assert guest.receive().error == EIO
        assert guest.read(0, 4096) == source_data(pair)[:4096]
        pair.start_source()
        streamer.wait_for("the source is back")
        assert guest.read(MIB, 4096) == source_data(pair)[MIB : MIB + 4096]


def test_another_server_of_the_same_disk_takes_over(pair: CommandPair, second: str) -> None:
    with begun(pair, "--also", second, "--no-job") as streamer, pair.guest() as guest:
        guest.read(0, 4096)
        pair.kill_source()
        assert guest.read(MIB, 4096) == source_data(pair)[MIB : MIB + 4096]
        assert second in streamer.wait_for("the source is back")
        streamer.wait_for("has what the overlay has")


def test_a_source_that_has_moved_is_taken_over(pair: CommandPair, second: str) -> None:
    with begun(pair, "--no-job") as streamer, pair.guest() as guest:
        guest.read(0, MIB)
        streamer.stop()
    pair.kill_source()
    assert "not of" in nbdstream("stream", second, pair.overlay, status=1).stderr
    nbdstream("stream", "--rebase", second, pair.overlay)
    assert "backing-filename" not in qemu_info(pair.overlay)
    assert is_whole(pair)


def test_a_wrong_disk_is_not_taken_over(pair: CommandPair, second: str, seed: int) -> None:
    with begun(pair, "--no-job") as streamer, pair.guest() as guest:
        guest.read(0, MIB)
        streamer.stop()
    make_image(pair.image, SIZE, random.Random(seed + 1), [(0, SIZE)])
    result = nbdstream("stream", "--rebase", second, pair.overlay, status=1)
    assert "another disk" in result.stderr
    assert result.stderr.count("\n") == 1
    assert qemu_info(pair.overlay)["backing-filename"] == pair.uri


def test_a_source_that_says_nothing_is_left_after_a_while(pair: CommandPair) -> None:
    with begun(pair, "--no-job", "--source-timeout", "0.3", "-c", "1") as streamer, pair.guest() as guest:
        assert pair.source
        pair.source.pause()
        guest.submit(READ, MIB, 4096)
        assert "no answer for 0.3 seconds" in streamer.wait_for("the source is lost")
        pair.source.resume()
        assert guest.receive().data == source_data(pair)[MIB : MIB + 4096]


def test_an_objective_for_the_guest_and_little_memory_are_no_obstacle(pair: CommandPair) -> None:
    streamer = pair.begin_streamer("--guest-latency", "500us", "--memory", "1M", "-c", "2")
    streamer.wait_until_independent()
    assert pair.stop_streamer()
    assert is_whole(pair)


@pytest.mark.parametrize(
    "option",
    [
        ["--on-source-loss", "never"],
        ["--on-source-loss", "hold="],
        ["--on-source-loss", "eio=5s"],
        ["--on-source-loss", "hold=0"],
        ["--source-timeout", "0"],
        ["--guest-latency", "fast"],
        ["--guest-latency", "0ms"],
        ["--memory", "1000"],
        ["--memory", "-1"],
    ],
)
def test_what_makes_no_sense_is_a_usage_error(pair: CommandPair, option: list[str]) -> None:
    result = nbdstream("stream", pair.uri, pair.overlay, *option, status=2)
    assert option[0] in result.stderr
