"""Each side killed in every state and started again, the link cut in every state: one side takes its guest's writes.

Or neither does, and the status says why, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.handover.hosts import HOOKS, Hosts
from tests.handover.links import Loopback, Wire
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def joining(hosts: Hosts) -> None:
    hosts.start("source")
    hosts.link.cut()
    hosts.start("destination")


def preparing(hosts: Hosts) -> None:
    hosts.start("source")
    hosts.link.hold_data()
    hosts.start("destination")
    hosts.until("destination", "PREPARING")


def prepared(hosts: Hosts) -> None:
    hosts.start("source")
    hosts.start("destination")
    hosts.until("source", "PREPARED")


def fencing(hosts: Hosts) -> None:
    prepared(hosts)
    hosts.fence()


def fenced(hosts: Hosts) -> None:
    fencing(hosts)
    hosts.kill("destination")
    hosts.until_alone("source")
    hosts.let("fence")
    hosts.until("source", "FENCED")
    hosts.link.cut()
    hosts.start("destination")


def granted(hosts: Hosts) -> None:
    fencing(hosts)
    hosts.link.stall()
    hosts.let("fence")
    hosts.until("source", "GRANTED")


def in_doubt(hosts: Hosts) -> None:
    granted(hosts)
    hosts.kill("source")
    hosts.start("source")
    hosts.until("source", "IN-DOUBT")


def accepted(hosts: Hosts) -> None:
    fencing(hosts)
    hosts.let("fence")
    hosts.ran("accept")
    hosts.until("source", "ACCEPTED")


def hydrating(hosts: Hosts) -> None:
    fencing(hosts)
    hosts.link.hold_data()
    hosts.let("fence", "accept")
    hosts.until("destination", "HYDRATING")
    hosts.until("source", "ACCEPTED")


def independent(hosts: Hosts) -> None:
    hosts.let("accept", "fence")
    fencing(hosts)
    hosts.ran("release")


def released(hosts: Hosts) -> None:
    """The source has let go, and the destination does not know."""
    independent(hosts)
    hosts.link.cut()
    hosts.let("release")
    hosts.until("source", "RELEASED")


def resuming(hosts: Hosts) -> None:
    fenced(hosts)
    hosts.say("source", "decline")
    hosts.ran("resume")


def declined(hosts: Hosts) -> None:
    """The destination has declined, and the source does not know."""
    prepared(hosts)
    hosts.link.stall()
    hosts.say("destination", "decline")
    hosts.until("destination", "DECLINED")


def declined_after_the_grant(hosts: Hosts) -> None:
    granted(hosts)
    hosts.say("destination", "decline")
    hosts.until("destination", "DECLINED")


class Situation(NamedTuple):
    """Where the two sides stand, and which of them is the owner."""

    reach: Callable[[Hosts], None]
    source: str
    destination: str
    owner: str
    why: str = ""
    """What the source's status says where nobody is the owner."""
    ends_at_source: bool = False


GIVEN_UP = "the guest stays stopped here, for the destination may own the disks: restore the link"

LINKS = ("loopback", "two hosts")

SITUATIONS = [
    Situation(joining, "OFFERED", "JOINING", "source"),
    Situation(preparing, "OFFERED", "PREPARING", "source"),
    Situation(prepared, "PREPARED", "PREPARED", "source"),
    Situation(fencing, "FENCING", "PREPARED", "source"),  # its guest stands still, and would be let in
    Situation(fenced, "FENCED", "PREPARED", "", "waiting for the destination, and if it does not come the guest is"),
    Situation(granted, "GRANTED", "PREPARED", "", "the destination is asked to accept"),
    Situation(in_doubt, "IN-DOUBT", "PREPARED", "", GIVEN_UP),
    Situation(accepted, "ACCEPTED", "ACCEPTED", "destination"),
    Situation(hydrating, "ACCEPTED", "HYDRATING", "destination"),
    Situation(independent, "RELEASING", "INDEPENDENT", "destination"),
    Situation(released, "RELEASED", "INDEPENDENT", "destination"),
    Situation(resuming, "RESUMING", "PREPARED", "source", ends_at_source=True),
    Situation(declined, "PREPARED", "DECLINED", "source", ends_at_source=True),
    Situation(declined_after_the_grant, "GRANTED", "DECLINED", "", "asked to accept", ends_at_source=True),
]


def everywhere(first: str, second: str) -> pytest.MarkDecorator:
    """Every situation on both links; by default on one of them, which is the first or the second by turns."""
    cases = [
        pytest.param(
            situation, link, marks=() if link == (first, second)[turn % 2] else pytest.mark.soak,
            id=f"{situation.reach.__name__} on {link}",
        )
        for turn, situation in enumerate(SITUATIONS)
        for link in LINKS
    ]  # fmt: skip
    return pytest.mark.parametrize(("situation", "hosts"), cases, indirect=["hosts"])


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def hosts(request: pytest.FixtureRequest, authority: Authority, tmp_path: Path) -> Iterator[Hosts]:
    if request.param == "loopback":
        made = Hosts(tmp_path, Loopback())
    else:
        server = authority.server(tmp_path / "server", Wire.name)
        client = authority.client(tmp_path / "client", "destination")
        options = {"source": ["--tls-certificates", server], "destination": ["--tls-certificates", client]}
        made = Hosts(tmp_path, Wire(), options)
    with made:
        yield made


def end(hosts: Hosts, situation: Situation) -> None:
    if situation.ends_at_source:
        hosts.end_at_source()
    else:
        hosts.end_at_destination()


def begin(hosts: Hosts, situation: Situation) -> None:
    situation.reach(hosts)
    assert hosts.states() == (situation.source, situation.destination)
    assert hosts.owner() == situation.owner
    assert not situation.why or situation.why in hosts.told("source")


@pytest.mark.parametrize("side", ["source", "destination"])
@everywhere("loopback", "loopback")
def test_a_side_that_is_killed_goes_on(situation: Situation, side: str, hosts: Hosts) -> None:
    begin(hosts, situation)
    hosts.kill(side)
    command = "offer" if side == "source" else "receive"
    over = getattr(situation, side) in ("DECLINED", "RELEASED")
    again = " any more" if over else ": start it again with the same command line"
    assert f"'nbdstream {command}' does not run{again}. " in hosts.told(side)
    locks_are_gone = side == "source" and situation.source == "FENCED"
    without = "source" if locks_are_gone else "" if side == situation.owner == "destination" else situation.owner
    assert hosts.owner() == without
    hosts.start(side)
    end(hosts, situation)


@everywhere(*LINKS)
def test_a_link_that_is_cut_takes_the_disk_from_nobody(situation: Situation, hosts: Hosts) -> None:
    begin(hosts, situation)
    hosts.link.cut()
    hosts.let(*HOOKS)
    assert hosts.owner() == situation.owner
    end(hosts, situation)


@pytest.mark.parametrize("hosts", ["loopback"], indirect=True)
def test_a_destination_that_is_killed_when_all_is_done_serves_the_disk_as_before(hosts: Hosts) -> None:
    released(hosts)
    hosts.end_of_source()
    hosts.kill("destination")
    assert hosts.owner() == ""
    hosts.start("destination")
    hosts.end_at_destination()
