"""Telling systemd how a service is doing: sd_notify(3), for Type=notify units. Elsewhere nothing is sent."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def ready(text: str) -> None:
    """Say that the service can be used from now on, and what it does."""
    _send(f"READY=1\nSTATUS={_one_line(text)}")


def status(text: str) -> None:
    """Say what the service does now: the line that ``systemctl status`` shows."""
    _send(f"STATUS={_one_line(text)}")


def stopping() -> None:
    """Say that the service is about to end."""
    _send("STOPPING=1")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _send(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify_socket:
            notify_socket.connect(address)
            notify_socket.send(message.encode())
    except OSError as error:
        log.warning("systemd could not be notified: %s", error.strerror)
