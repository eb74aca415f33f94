"""A source's locks die with it: what is found by the next process, and what the status says of it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from nbdstream.handover.journal import SourceSetup, read_journal
from tests.support.processes import Process, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.handover.hosts import Hosts


def test_a_source_that_finds_a_writer_keeps_its_export_closed_and_says_who_that_is(
    hosts: Hosts, tmp_path: Path
) -> None:
    hosts.fence()
    hosts.link.stall()
    hosts.let("fence")
    hosts.until("source", "GRANTED")
    hosts.kill("source")
    (hidden,) = tmp_path.glob("disk.img.handed-over-*")
    with Process("qemu-nbd", "-f", "raw", "-t", "-k", str(tmp_path / "w.sock"), str(hidden)) as writer:
        wait_until((tmp_path / "w.sock").exists, "a writer")
        hosts.start("source")
        wait_until(lambda: hosts.status("source")["problem"], "the source to find it")
        told = hosts.told("source")
        assert told.startswith("source: IN-DOUBT, epoch 2, not connected\nthe guest stays stopped here")
        assert f"problem: fence: {hidden} is in use by qemu-nbd (process {writer.pid})\n" in told
        assert not is_open(hosts)
    hosts.say("source", "retry")
    wait_until(lambda: is_open(hosts), "the export")
    assert "problem" not in hosts.told("source")
    hosts.end_at_destination()


def test_a_guest_that_was_started_behind_a_dead_fence_is_stopped_again(hosts: Hosts, tmp_path: Path) -> None:
    hosts.fence()
    hosts.kill("destination")
    hosts.until_alone("source")
    hosts.let("fence")
    hosts.until("source", "FENCED")
    assert hosts.owner() == ""
    hosts.kill("source")
    (tmp_path / "stopped").unlink()  # as an autostart would
    wait_until((tmp_path / "running").exists, "the guest to run")
    assert hosts.owner() == "source"
    hosts.start("source")
    hosts.until("source", "FENCED")
    assert hosts.owner() == ""
    hosts.start("destination")
    hosts.end_at_destination()


def is_open(hosts: Hosts) -> bool:
    """Whether the source's NBD server can be reached."""
    setup = read_journal(hosts.state_directory("source")).setup
    assert isinstance(setup, SourceSetup)
    try:
        socket.create_connection((setup.host, setup.nbd_port)).close()
    except ConnectionRefusedError:
        return False
    return True
