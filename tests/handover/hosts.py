"""Two hosts, by the commands that run on them: a source and a destination, with hooks that wait for a word."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from nbdstream.handover.journal import SourceSetup, read_journal
from tests.handover.guests import BLOCK, BLOCKS, DestinationGuest, SourceGuest
from tests.support.monitor import ask
from tests.support.processes import Process, nbdstream, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.handover.links import Link

SIZE: Final = 4 << 20
HOOKS: Final = ("fence", "resume", "release", "accept")
_PHASE_OF_SOURCE: Final = {"PREPARED": "OFFERED", "FENCED": "FENCING", "IN-DOUBT": "GRANTED"}
"""What a source's journal says where the source knows more."""


class Hosts:
    """A hand-over of one disk. As a context manager all of it is ended at the end."""

    def __init__(self, directory: Path, link: Link, options: Mapping[str, Sequence[str]] | None = None) -> None:
        """``options`` are more of them for a side."""
        self.directory = directory
        self.link = link
        self.image = directory / "disk.img"
        self.overlay = directory / "disk.qed"
        self.socket = str(directory / "guest.sock")
        self.before = random.Random(1).randbytes(SIZE)
        self.image.write_bytes(self.before)
        self._options = options or {}
        self._processes: dict[str, Process] = {}
        self._stack = ExitStack()
        self.guests: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._stack.callback(self.link.close)
        source = self._stack.enter_context(SourceGuest(self.image))
        self.guests = {"source": source, "destination": self._stack.enter_context(DestinationGuest(self.socket))}
        wait_until(source.takes_a_write, "the guest to run")
        return self

    def __exit__(self, *_: object) -> None:
        self.let(*HOOKS)  # hooks outlive whoever began them
        for process in self._processes.values():
            process.kill()
        self._stack.close()

    # -- hooks --------------------------------------------------------------------------------------------------

    def _hook(self, name: str, command: str = ":") -> str:
        """A hook that does something, and then waits until it may end: see :meth:`let`."""
        path = self.directory / name
        return f"touch {path}.ran; {command}; until test -e {path}; do sleep 0.02; done"

    def let(self, *names: str) -> None:
        """Let hooks end."""
        for name in names:
            (self.directory / name).touch()

    def ran(self, name: str) -> None:
        """Wait until a hook has begun."""
        wait_until((self.directory / f"{name}.ran").exists, f"the {name} hook")

    # -- processes ----------------------------------------------------------------------------------------------

    def state_directory(self, side: str) -> str:
        return str(self.directory / side)

    def start(self, side: str) -> None:
        """Start a side, with the same command line as ever."""
        command = self._offer() if side == "source" else self._receive()
        self._processes[side] = Process(*self.link.on(side, *command, "--state", self.state_directory(side)))
        wait_until(lambda: self.answers(side) or not self._processes[side].running, f"{side} to answer")
        if side == "source":
            setup = read_journal(self.state_directory(side)).setup
            assert isinstance(setup, SourceSetup)
            self.link.open(setup.port, setup.nbd_port)

    def _offer(self) -> list[str]:
        guest = self.guests["source"]
        hooks = ["--on-fence", self._hook("fence", guest.fence_hook), "--on-release", self._hook("release")]
        hooks += ["--on-resume", f"{self._hook('resume')}; {guest.resume_hook}"]
        options = [*hooks, *self._options.get("source", ())]
        return ["offer", str(self.image), "--listen", f"{self.link.listens}:0", *options]

    def _receive(self) -> list[str]:
        offer = Path(self.state_directory("source"), "offer").read_text()
        told = self.directory / "told"
        told.write_text(offer.replace(f"//{self.link.listens}:", f"//{self.link.name}:"))
        options = ["--on-accept", self._hook("accept"), *self._options.get("destination", ())]
        return ["receive", f"@{told}", str(self.overlay), "-U", self.socket, *options]

    def answers(self, side: str) -> bool:
        """Whether there is a process of a side that can be asked, and for a source, its offer."""
        try:
            ask(f"{self.state_directory(side)}/control", "query-version")
        except OSError:
            return False
        return side == "destination" or Path(self.state_directory(side), "offer").exists()

    def kill(self, side: str) -> None:
        self._processes[side].kill()

    def wait(self, side: str) -> int:
        """Return the status with which a side ends."""
        return self._processes[side].wait()

    def stop(self, side: str) -> int:
        return self._processes[side].stop()

    # -- what is said -------------------------------------------------------------------------------------------

    def say(self, side: str, command: str, **arguments: object) -> None:
        """Give a command, as a driver of migrations does."""
        ask(f"{self.state_directory(side)}/control", f"x-handover-{command}", **arguments)

    def fence(self) -> None:
        """Begin the change of owner: the guest stands still, and its hook waits until it may end."""
        self.say("source", "fence")
        self.ran("fence")
        wait_until(self.guests["source"].stands_still, "the guest to stand still")

    def told(self, side: str) -> str:
        """Return what an operator sees of a side."""
        return nbdstream("handover", "status", "--state", self.state_directory(side)).stdout

    def status(self, side: str) -> dict[str, Any]:
        """Return what a program sees of a side."""
        try:
            return dict(ask(f"{self.state_directory(side)}/control", "x-handover-status"))
        except OSError:  # there is no process
            said = nbdstream("handover", "status", "--state", self.state_directory(side), "--json").stdout
            return dict(json.loads(said))

    def states(self) -> tuple[str, str]:
        return self.status("source")["state"], self.status("destination")["state"]

    def until(self, side: str, *states: str) -> None:
        """Wait until a side shows one of these states, and has it in its journal: that is some milliseconds behind."""
        wait_until(lambda: self.status(side)["state"] in states, f"{side} to be {states}, not {self.states()}")
        wait_until(lambda: self._is_written(side), f"{side}'s journal to say what it shows")

    def _is_written(self, side: str) -> bool:
        shown = self.status(side)["state"]
        phase = _PHASE_OF_SOURCE.get(shown, shown) if side == "source" else shown
        return bool(read_journal(self.state_directory(side)).record.phase.upper() == phase)

    def until_alone(self, side: str) -> None:
        """Wait until a side knows that the other is not there."""
        wait_until(lambda: not self.status(side)["connected"], f"{side} to be alone")

    # -- who owns the disk --------------------------------------------------------------------------------------

    def owner(self) -> str:
        """Return which host takes its guest's writes: never both of them; empty if neither does."""
        takes = {"source": self.guests["source"].could_run(), "destination": self.guests["destination"].takes_a_write()}
        assert not all(takes.values()), "two owners"
        return next((side for side, does in takes.items() if does), "")

    def check(self, disk: bytes) -> None:
        """Find on the disk everything that the guests were told is written, and what was there before."""
        for guest in self.guests.values():
            guest.check(disk, self.before)
        rest = 2 * BLOCKS * BLOCK
        assert disk[rest:] == self.before[rest:]

    def end_at_destination(self) -> None:
        """Let all go its way, and see that the destination ends as the owner, with all that was written."""
        self.link.mend()
        self.let(*HOOKS)
        self.until("source", "PREPARED", "FENCING", "FENCED", "GRANTED", "ACCEPTED", "RELEASING", "RELEASED")
        if self.status("source")["state"] == "PREPARED":
            self.say("source", "fence")
        self.end_of_source()
        assert self.owner() == "destination"
        assert self.stop("destination") == 0
        raw = f"{self.overlay}.raw"
        run("qemu-img", "convert", "-f", "qed", "-O", "raw", str(self.overlay), raw)
        self.check(Path(raw).read_bytes())

    def end_of_source(self) -> None:
        """Let the source come to its end, and the destination know."""
        self.link.mend()
        self.let("release")
        assert self.wait("source") == 0
        if self.status("destination")["state"] == "INDEPENDENT":  # what the source said of its end was lost
            self.start("source")
            assert self.wait("source") == 0
        self.until("destination", "RELEASED")

    def end_at_source(self) -> None:
        """Let all go its way, and see that the source ends as the owner, and nothing is left of the destination."""
        self.link.mend()
        self.let(*HOOKS)
        assert self.wait("source") == 4
        wait_until(self._destination_is_over, "the end of the destination")
        assert self.stop("destination") in (0, 3)
        assert self.owner() == "source"
        assert not self.overlay.exists()
        self.guests["source"].__exit__()
        self.check(self.image.read_bytes())

    def _destination_is_over(self) -> bool:
        """Whether it has ended; or has nobody to tell, since the source heard of its end from one that was killed."""
        status = self.status("destination")
        assert status["state"] in ("DECLINED", "PREPARED", "PREPARING", "JOINING")
        return not self._processes["destination"].running or (
            status["state"] == "DECLINED" and "is not there" in status["problem"]
        )
