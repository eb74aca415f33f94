"""Commands under test, as processes: run to their end, or kept running and listened to.

Each of them is killed when the thread that started it ends, however that happens; so no test leaves one behind.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NBDSTREAM = str(Path(sys.executable).with_name("nbdstream"))

PATIENCE_SECONDS = 60.0
"""For whatever a process should do soon. The machine that runs the tests is shared: this is no measure of speed."""

# Some tools (mke2fs, losetup) are where only root looks; nbdsh needs the system's Python, not that of the tests.
_ENVIRONMENT = os.environ | {"PATH": f"/usr/bin:/bin:/usr/sbin:/sbin:{os.environ.get('PATH', '')}"}

_UNTIL_WE_END = ("setpriv", "--pdeathsig", "KILL", "--")


def nbdstream(*arguments: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run an nbdstream command to its end. The test fails if it ends with another status (None: any)."""
    return run(NBDSTREAM, *arguments, status=status)


def run(*command: str, status: int | None = 0, patience: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run any command to its end; see :func:`nbdstream`."""
    result = subprocess.run(
        [*_UNTIL_WE_END, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=patience,
        env=_ENVIRONMENT,
    )
    said = f"{shlex.join(command)}: status {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert status is None or result.returncode == status, said
    return result


class Process:
    """A process in the background whose lines are kept. As a context manager, it is killed at the end."""

    def __init__(self, *command: str, tell: Callable[[str], object] = lambda _line: None) -> None:
        """Start it. ``tell`` gets every line of stderr as well, in another thread."""
        self.command = command
        self.lines: list[str] = []
        """What it said on stderr."""
        self.progress: list[dict[str, Any]] = []
        """The lines of JSON that it printed on stdout."""
        self._process = subprocess.Popen(
            [*_UNTIL_WE_END, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_ENVIRONMENT,
        )
        self._said = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, keep), daemon=True)
            for stream, keep in [
                (self._process.stderr, [self.lines.append, tell]),
                (self._process.stdout, [self._read_progress]),
            ]
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_for(self, text: str) -> str:
        """Wait until it has said a line that holds ``text``, and return the line."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._said:
            while True:
                for line in self.lines:
                    if text in line:
                        return line
                left = deadline - time.monotonic()
                if left <= 0 or not self._reading:
                    raise AssertionError(f"{self} did not say {text!r}")
                self._said.wait(left)

    def wait_for_progress(self, key: str, least: int) -> dict[str, Any]:
        """Wait until ``--progress json`` has reported at least so much, and return that line."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._said:
            while not (self.progress and self.progress[-1][key] >= least):
                left = deadline - time.monotonic()
                if left <= 0 or not self._reading:
                    raise AssertionError(f"{self} reported no {key} of {least}")
                self._said.wait(left)
            return self.progress[-1]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal, and return the status with which it ends."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end, and return its status."""
        try:
            status = self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} does not end") from None
        self._close()
        return status

    def kill(self) -> None:
        """End it at once, as ``kill -9`` does; nothing if it has ended."""
        self._process.kill()
        self._process.wait()
        self._close()

    def pause(self) -> None:
        """Stop it where it is, until :meth:`resume`."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def __str__(self) -> str:
        return "\n".join([shlex.join(self.command), f"(status {self._process.poll()}) said:", *self.lines[-30:]])

    @property
    def _reading(self) -> bool:
        return any(reader.is_alive() for reader in self._readers)

    def _read(self, stream: IO[str], takers: Sequence[Callable[[str], object]]) -> None:
        for line in stream:
            with self._said:
                for take in takers:
                    take(line.rstrip())
                self._said.notify_all()
        with self._said:
            self._said.notify_all()

    def _read_progress(self, line: str) -> None:
        if line.startswith("{") and line.endswith("}"):  # a line that a kill cut off is none
            self.progress.append(json.loads(line))

    def _close(self) -> None:
        for reader in self._readers:
            reader.join()
        for stream in (self._process.stdout, self._process.stderr):
            if stream:
                stream.close()


class Command(Process):
    """An nbdstream command in the background."""

    def __init__(self, *arguments: str, tell: Callable[[str], object] = lambda _line: None) -> None:
        super().__init__(NBDSTREAM, *arguments, tell=tell)

    def wait_until_serving(self) -> str:
        """Wait until clients can connect, and return the NBD URI."""
        return self.wait_for(" at nbd").rpartition(" at ")[2]

    def wait_until_independent(self) -> None:
        """Wait until a streamer says that its overlay needs no source any more."""
        self.wait_for("is independent")


def memory(pid: int, *fields: str) -> int:
    """Return the sum of fields of /proc/PID/status that are sizes, in bytes."""
    with open(f"/proc/{pid}/status") as status:
        values = dict(line.split(":", 1) for line in status)
    return sum(int(values[field].split()[0]) << 10 for field in fields)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Ask again and again until ``condition()`` holds. ``what`` tells what was waited for."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)
