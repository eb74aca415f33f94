"""What systemd is told by a service: that it is ready only when it is, and that it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def test_serve_is_ready_when_clients_can_connect_and_ends_with_0(tmp_path: Path) -> None:
    image, nbd = tmp_path / "disk.img", tmp_path / "nbd.sock"
    image.write_bytes(bytes(1 << 20))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        with subprocess.Popen(
            [sys.executable, "-m", "nbdstream.cli", "serve", image, "-U", nbd],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.PIPE,
        ) as service:
            assert systemd.recv(1000) == f"READY=1\nSTATUS=serving {image}".encode()
            size = subprocess.run(
                ["nbdinfo", "--size", f"nbd+unix:///?socket={nbd}"], capture_output=True, text=True, check=True
            )
            assert size.stdout == "1048576\n"
            service.send_signal(signal.SIGTERM)
            assert systemd.recv(1000) == b"STOPPING=1"
            assert service.wait(60) == 0


def test_offer_is_ready_when_a_destination_can_connect_and_says_3_if_it_is_not_over(tmp_path: Path) -> None:
    image, state = tmp_path / "disk.img", tmp_path / "state"
    image.write_bytes(bytes(1 << 20))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        with subprocess.Popen(
            [sys.executable, "-m", "nbdstream.cli", "offer", image, "--listen", "127.0.0.1:0", "--state", state],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as service:
            assert systemd.recv(1000) == f"READY=1\nSTATUS=offering {image}".encode()
            offer = state / "offer"
            assert offer.stat().st_mode & 0o777 == 0o600
            service.send_signal(signal.SIGTERM)
            printed, said = service.communicate(timeout=60)
            assert service.returncode == 3
            assert printed == offer.read_text()
            assert printed.strip().rpartition("token=")[2] not in said
            assert systemd.recv(1000) == b"STOPPING=1"


def test_a_service_that_cannot_begin_is_never_ready(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        result = subprocess.run(
            [sys.executable, "-m", "nbdstream.cli", "serve", tmp_path / "missing.img", "-U", tmp_path / "nbd.sock"],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        assert result.stderr == f"nbdstream: {tmp_path}/missing.img cannot be opened: No such file or directory\n"
        try:
            told = systemd.recv(1000)
        except BlockingIOError:
            told = b""
        assert told == b""
