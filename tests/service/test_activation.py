"""Sockets that a process is started with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from nbdstream.errors import ListenError
from nbdstream.service.activation import activated_sockets

if TYPE_CHECKING:
    from collections.abc import Callable

REPORT = """
import os, sys
os.environ["LISTEN_PID"] = os.environ["LISTEN_PID"].replace("self", str(os.getpid()))
from nbdstream.errors import ListenError
from nbdstream.service.activation import activated_sockets
try:
    sockets = activated_sockets()
except ListenError as error:
    sys.exit(str(error))
left = [name for name in os.environ if name.startswith("LISTEN_")]
print([(each.fileno(), each.get_inheritable()) for each in sockets], left, activated_sockets())
"""


def started_with(descriptors: list[int], **variables: str) -> str:
    """Start a process with descriptors from 3 on, and return what it says of them."""

    def arrange() -> None:
        # Out of the way first: a target may be the number of another's source.
        copies = [os.dup2(fd, 100 + number) for number, fd in enumerate(descriptors)]
        for number, fd in enumerate(copies):
            os.dup2(fd, 3 + number)

    result = subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "LISTEN_PID": "self", **variables},
        preexec_fn=arrange,
        close_fds=False,
        capture_output=True,
        text=True,
        check=False,
    )
    return (result.stdout or result.stderr).strip()


@pytest.fixture
def listener() -> Callable[[], int]:
    """Make listening sockets; they go with the test's process."""

    def make() -> int:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("")  # an abstract name of the kernel's choice
        sock.listen()
        return sock.detach()

    return make


def test_the_sockets_are_taken_once_and_not_inherited(listener: Callable[[], int]) -> None:
    said = started_with([listener(), listener()], LISTEN_FDS="2", LISTEN_FDNAMES="nbd:control")
    assert said == "[(3, False), (4, False)] [] []"


def test_names_are_not_needed(listener: Callable[[], int]) -> None:
    assert started_with([listener()], LISTEN_FDS="1") == "[(3, False)] [] []"


def test_sockets_that_are_meant_for_another_process_are_left_alone(listener: Callable[[], int]) -> None:
    assert started_with([listener()], LISTEN_FDS="1", LISTEN_PID="1") == "[] [] []"


def test_a_process_that_was_started_without_sockets_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert activated_sockets() == []


@pytest.mark.parametrize("count", ["", "-1", "x", "1x"])
def test_a_wrong_number_is_one_clear_line(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    with pytest.raises(ListenError, match=f"^LISTEN_FDS='{count}' is not a number of sockets$"):
        activated_sockets()


def test_what_cannot_be_listened_on_is_refused() -> None:
    with open(os.devnull) as file:
        assert "descriptor 3, which LISTEN_FDS announces, is no socket" in started_with([file.fileno()], LISTEN_FDS="1")
    one, other = socket.socketpair()
    with one, other:
        said = started_with([one.fileno()], LISTEN_FDS="1")
    assert said == ("descriptor 3, which LISTEN_FDS announces, is not listening (with Accept=yes, say --stdio)")
