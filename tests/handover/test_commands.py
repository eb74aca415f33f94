"""The commands, as an operator uses them: each side killed in every state, and the link between two hosts cut."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support.client import LostError, NbdClient
from tests.support.processes import NBDSTREAM, Command, Process, nbdstream, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE: Final = 4 << 20
EPERM: Final = 1


class Hosts:
    """Two hosts that are one: a source and a destination by their commands, with hooks that wait for a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = directory / "disk.img"
        self.image.write_bytes(random.Random(1).randbytes(SIZE))
        self.overlay = directory / "disk.qed"
        self.socket = str(directory / "guest.sock")
        self.offer_file = directory / "offer"
        self.offer_file.touch()
        self.offer = ""
        self.fencing: Process | None = None
        self.source: Process | None = None
        self.destination: Process | None = None
        self.rate: list[str] = []

    def hook(self, name: str) -> str:
        """A hook that waits until it may end: see :meth:`let`."""
        path = self.directory / name
        return f"echo $NBDSTREAM_STATE >> {path}.ran; until test -e {path}; do sleep 0.02; done"

    def let(self, *names: str) -> None:
        """Let hooks end."""
        for name in names:
            (self.directory / name).touch()

    def ran(self, name: str) -> bool:
        """Whether a hook was begun."""
        return (self.directory / f"{name}.ran").exists()

    def start_source(self, *options: str) -> None:
        self.source = Process(
            *("sh", "-c", f'exec "$0" "$@" > {self.offer_file}', NBDSTREAM),
            *("offer", str(self.image), "--listen", "127.0.0.1:0", "--state", str(self.directory / "source")),
            *(
                "--on-fence",
                self.hook("fence"),
                "--on-resume",
                self.hook("resume"),
                "--on-release",
                self.hook("release"),
            ),
            *options,
        )
        wait_until(lambda: self.offer_file.read_text().endswith("\n"), "the offer")
        self.offer = self.offer_file.read_text().strip()

    def start_destination(self) -> None:
        self.destination = Command(
            *("receive", f"@{self.offer_file}", str(self.overlay), "-U", self.socket),
            *("--state", str(self.directory / "destination"), "--on-accept", self.hook("accept"), *self.rate),
        )

    def kill(self, side: str) -> None:
        getattr(self, side).kill()

    def restart(self, side: str) -> None:
        """Start a side that was killed, with the same command line."""
        self.kill(side)
        if side == "source":
            self.offer_file.write_text("")
            before = self.offer
            self.start_source()
            assert self.offer == before
        else:
            self.start_destination()

    def status(self, side: str) -> dict[str, Any]:
        said = nbdstream("handover", "status", "--state", str(self.directory / side), "--json").stdout
        return dict(json.loads(said))

    def state(self, side: str) -> str:
        return str(self.status(side)["state"])

    def until(self, side: str, *states: str) -> None:
        wait_until(lambda: self.state(side) in states, f"{side} to be {states}")

    def fence(self) -> None:
        """Begin the change of owner, and do not wait for what comes of it."""
        self.fencing = Command("handover", "fence", "--state", str(self.directory / "source"))
        wait_until(lambda: self.ran("fence"), "the fence hook")

    def write(self, data: bytes) -> int | None:
        """Write as the destination's guest: the error number, or None if nobody is there."""
        try:
            with NbdClient(self.socket) as guest:
                guest.submit(1, 0, len(data), data)
                return guest.receive().error
        except LostError:
            return None

    def close(self) -> None:
        self.let("fence", "resume", "release", "accept")  # hooks outlive whoever began them
        for process in (self.source, self.destination, self.fencing):
            if process:
                process.kill()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.close()


def prepared(hosts: Hosts) -> None:
    hosts.start_source()
    hosts.start_destination()
    hosts.until("source", "PREPARED")


def fencing(hosts: Hosts) -> None:
    prepared(hosts)
    hosts.fence()
    assert hosts.state("source") == "FENCING"


def fenced(hosts: Hosts) -> None:
    fencing(hosts)
    hosts.kill("destination")
    hosts.let("fence")
    hosts.until("source", "FENCED")


def granted(hosts: Hosts) -> None:
    fencing(hosts)
    assert hosts.destination
    hosts.destination.pause()
    hosts.let("fence")
    hosts.until("source", "GRANTED", "IN-DOUBT")


def accepted(hosts: Hosts) -> None:
    fencing(hosts)
    hosts.let("fence")
    wait_until(lambda: hosts.ran("accept"), "the accept hook")
    hosts.until("source", "ACCEPTED")


def hydrating(hosts: Hosts) -> None:
    hosts.rate = ["--rate", "2M"]
    hosts.let("accept")
    fencing(hosts)
    hosts.let("fence")
    hosts.until("destination", "HYDRATING")


def releasing(hosts: Hosts) -> None:
    hosts.let("accept", "fence")
    prepared(hosts)
    hosts.fence()
    wait_until(lambda: hosts.ran("release"), "the release action")
    hosts.until("destination", "INDEPENDENT")


def resuming(hosts: Hosts) -> None:
    fenced(hosts)
    nbdstream("handover", "decline", "--state", str(hosts.directory / "source"))
    wait_until(lambda: hosts.ran("resume"), "the resume hook")


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("reach", [prepared, fencing, fenced, granted, accepted, hydrating, releasing])
def test_a_side_that_is_killed_goes_on_and_one_side_serves_writes(
    reach: Callable[[Hosts], None], side: str, hosts: Hosts
) -> None:
    reach(hosts)
    owned = reach in (accepted, hydrating, releasing)
    if hosts.destination and reach is not granted and reach is not fenced:
        assert hosts.write(b"x") == (0 if owned else EPERM)
    hosts.restart(side)
    if hosts.destination and reach is fenced:
        hosts.restart("destination")
    if hosts.destination and side == "source" and reach is granted:
        assert hosts.state("source") == "IN-DOUBT"
        hosts.destination.resume()
    hosts.let("fence", "accept", "release")
    if reach is prepared:
        hosts.until("source", "PREPARED")
        hosts.fence()
    hosts.until("destination", "INDEPENDENT", "RELEASED")
    assert hosts.source
    assert hosts.source.wait() == 0
    assert hosts.write(b"guest") == 0
    assert hosts.state("destination") == "RELEASED"
    assert hosts.destination
    assert hosts.destination.stop() == 0
    hidden = next(hosts.directory.glob("disk.img.handed-over-*"))
    expected = b"guest" + hidden.read_bytes()[5:]
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", str(hosts.overlay), f"{hosts.overlay}.raw")
    assert Path(f"{hosts.overlay}.raw").read_bytes() == expected


def test_a_source_that_is_killed_while_it_resumes_its_guest_resumes_it(hosts: Hosts) -> None:
    resuming(hosts)
    hosts.restart("source")
    assert hosts.state("source") == "RESUMING"
    hosts.let("resume")
    hosts.start_destination()
    assert hosts.source
    assert hosts.source.wait() == 4
    assert hosts.destination
    assert hosts.destination.wait() == 0
    assert hosts.image.exists()
    assert not hosts.overlay.exists()


def test_status_says_of_a_side_that_does_not_run_what_to_do(hosts: Hosts) -> None:
    granted(hosts)
    hosts.kill("source")
    said = nbdstream("handover", "status", "--state", str(hosts.directory / "source")).stdout
    assert said.startswith("source: GRANTED, epoch 2, not connected\n'nbdstream offer' does not run: start it again")


def test_an_override_needs_evidence_and_gives_the_disk_back(hosts: Hosts) -> None:
    granted(hosts)
    hosts.kill("destination")
    hosts.until("source", "IN-DOUBT")
    state = str(hosts.directory / "source")
    assert (
        "the following arguments are required: --evidence"
        in nbdstream("handover", "override", "--state", state, status=2).stderr
    )
    hosts.let("resume")
    nbdstream("handover", "override", "--state", state, "--evidence", "the destination was switched off")
    assert hosts.source
    assert hosts.source.wait() == 4
    assert hosts.image.exists()


def test_the_manifest_can_be_carried_by_hand(hosts: Hosts) -> None:
    releasing(hosts)
    hosts.kill("source")
    hosts.kill("destination")
    # The journal as it would be had the link been cut before the destination was independent.
    journal = hosts.directory / "source" / "journal"
    lines = [line for line in journal.read_text().splitlines(keepends=True) if '"releasing"' not in line]
    journal.write_text("".join(lines))
    hosts.let("release")
    hosts.restart("source")
    state = str(hosts.directory / "source")
    nbdstream("handover", "release", f"{hosts.overlay}.manifest", "--state", state)
    assert hosts.source
    assert hosts.source.wait() == 0


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
