"""When the server lets requests gather, with the time in the test's hand and a real socket that is read or not."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, cast

import pytest

from nbdstream.server.gathering import Gathering

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST = 20_000
MANY = 9, 9 * 4096
REPLIES = bytes(100_000)


class Clock:
    """It goes on by a microsecond with each look."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1000
        return self.now


class Transport:
    def __init__(self, own: socket.socket | None) -> None:
        self._own = own

    def get_extra_info(self, name: str) -> socket.socket | None:
        assert name == "socket"
        return self._own


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def clock() -> Clock:
    return Clock()


def gathering(own: socket.socket | None, clock: Clock, longest: int = 50_000) -> Gathering:
    return Gathering(cast("Any", Transport(own)), longest, clock=clock)


def test_a_client_with_much_to_read_is_waited_for_as_long_as_it_may_be(
    ends: tuple[socket.socket, socket.socket], clock: Clock
) -> None:
    ends[0].send(REPLIES)
    gathering(ends[0], clock).wait(*MANY)
    assert LONGEST <= clock.now <= LONGEST + 2000


def test_it_is_not_waited_for_when_it_has_read(ends: tuple[socket.socket, socket.socket], clock: Clock) -> None:
    ends[0].send(REPLIES)
    ends[1].recv(len(REPLIES), socket.MSG_WAITALL)
    gathering(ends[0], clock).wait(*MANY)
    assert clock.now <= 2000


def test_a_client_with_few_requests_in_flight_is_not_waited_for(
    ends: tuple[socket.socket, socket.socket], clock: Clock
) -> None:
    ends[0].send(REPLIES)
    gathering(ends[0], clock).wait(8, 8 * 4096)
    assert clock.now == 0


@pytest.mark.parametrize("read", [0, 9 * 65536])
def test_a_client_that_writes_or_reads_much_at_a_time_is_not_waited_for(
    ends: tuple[socket.socket, socket.socket], clock: Clock, read: int
) -> None:
    ends[0].send(REPLIES)
    gathering(ends[0], clock).wait(9, read)
    assert clock.now == 0


def test_a_client_that_had_many_is_believed_to_have_them_for_a_while(
    ends: tuple[socket.socket, socket.socket], clock: Clock
) -> None:
    ends[0].send(REPLIES)
    own = gathering(ends[0], clock)
    own.wait(*MANY)
    for _ in range(63):
        clock.now = 0
        own.wait(2, 2 * 4096)
        assert clock.now >= LONGEST
    clock.now = 0
    own.wait(2, 2 * 4096)
    assert clock.now == 0


def test_a_socket_that_does_not_tell_is_asked_once(clock: Clock) -> None:
    with open("/dev/null") as silent:
        own = gathering(cast("Any", silent), clock)
        own.wait(*MANY)
        clock.now = 0
        own.wait(*MANY)
    assert clock.now == 0


@pytest.mark.parametrize("has_socket", [True, False])
def test_nobody_is_waited_for_without_polling_or_a_socket(
    ends: tuple[socket.socket, socket.socket], clock: Clock, has_socket: bool
) -> None:
    ends[0].send(REPLIES)
    gathering(ends[0] if has_socket else None, clock, 0 if has_socket else 50_000).wait(*MANY)
    assert clock.now == 0
