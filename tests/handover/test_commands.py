"""The commands, as an operator uses them."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest

from tests.handover.hosts import HOOKS, Hosts
from tests.support.processes import nbdstream

if TYPE_CHECKING:
    from pathlib import Path


def handover(hosts: Hosts, verb: str, *arguments: str, side: str = "source", status: int = 0) -> str:
    """Run ``nbdstream handover`` for a side, and return what it prints."""
    result = nbdstream("handover", verb, *arguments, "--state", hosts.state_directory(side), status=status)
    return result.stdout or result.stderr


def test_a_disk_changes_its_owner(hosts: Hosts) -> None:
    hosts.let(*HOOKS)
    said = handover(hosts, "fence")
    assert re.match(r"source: (ACCEPTED|RELEASING|RELEASED), epoch 2, ", said)
    assert re.search(r"\ntook, in milliseconds: journal FENCING [\d.]+, on-fence hook [\d.]+, fence [\d.]+, ", said)
    hosts.end_at_destination()


def test_a_fence_that_is_called_off_says_so(hosts: Hosts) -> None:
    hosts.kill("destination")
    hosts.until_alone("source")
    assert "the destination is not connected and prepared: the guest goes on" in handover(hosts, "fence", status=1)
    assert hosts.owner() == "source"


def test_an_override_needs_evidence_and_gives_the_disk_back(hosts: Hosts) -> None:
    hosts.fence()
    hosts.link.stall()
    hosts.let("fence")
    hosts.until("source", "GRANTED")
    hosts.kill("destination")
    hosts.link.cut()
    hosts.until("source", "IN-DOUBT")
    assert "the following arguments are required: --evidence" in handover(hosts, "override", status=2)
    hosts.let("resume")
    handover(hosts, "override", "--evidence", "the destination was switched off")
    assert hosts.wait("source") == 4
    assert hosts.owner() == "source"


def test_the_manifest_can_be_carried_by_hand(hosts: Hosts) -> None:
    hosts.let("fence", "accept")
    hosts.say("source", "fence")
    hosts.ran("release")
    hosts.until("destination", "INDEPENDENT")
    hosts.kill("source")
    hosts.kill("destination")
    # The journal as it would be had the link been cut before the destination was independent.
    journal = hosts.directory / "source" / "journal"
    lines = [line for line in journal.read_text().splitlines(keepends=True) if '"releasing"' not in line]
    journal.write_text("".join(lines))
    hosts.let("release")
    hosts.start("source")
    handover(hosts, "release", f"{hosts.overlay}.manifest")
    assert hosts.wait("source") == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["offer", "x.img", "--listen", "192.0.2.1:0", "--state", "s"], "needs --tls-certificates"),
        (["offer", "x.img", "--listen", "nowhere", "--state", "s"], "is not ADDR:PORT"),
        (["receive", "nonsense", "o.qed", "-U", "s", "--state", "s"], "that is no offer"),
        (["receive", "@missing", "o.qed", "-U", "s", "--state", "s"], "missing cannot be read"),
        (["receive", "x", "a.qed", "b.qed", "-U", "s", "--state", "s"], "2 overlays need as many sockets"),
        (["handover", "status", "--state", "none"], "none holds no hand-over"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.img").write_bytes(bytes(512))
    result = nbdstream(*arguments, status=None)
    assert result.returncode in (1, 2)
    assert re.search(reason, result.stderr)
    assert "Traceback" not in result.stderr
    assert not os.path.exists(tmp_path / "s" / "journal")
