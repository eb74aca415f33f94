from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from nbdstream.service import notify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket at which systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        address = str(tmp_path / "notify")
        listener.bind(address if request.param == "path" else f"\0{address}")
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address if request.param == "path" else f"@{address}")
        yield listener


def test_ready_says_what_is_ready(systemd: socket.socket) -> None:
    notify.ready("serving disk.img")
    assert systemd.recv(1000) == b"READY=1\nSTATUS=serving disk.img"


def test_a_status_is_one_line_whatever_a_file_is_called(systemd: socket.socket) -> None:
    notify.status("serving disk\nSTOPPING=1")
    assert systemd.recv(1000) == b"STATUS=serving disk STOPPING=1"


def test_stopping(systemd: socket.socket) -> None:
    notify.stopping()
    assert systemd.recv(1000) == b"STOPPING=1"


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234"])
def test_without_a_socket_that_we_know_nothing_is_sent(
    address: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.ready("serving")
    assert not caplog.records


def test_a_systemd_that_is_gone_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify.stopping()
    assert [record.getMessage() for record in caplog.records] == [
        "systemd could not be notified: No such file or directory"
    ]
