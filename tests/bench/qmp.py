"""QEMU's block-stream, driven over QMP in a storage daemon: as much of a QMP client as that takes."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any

from tests.bench.process import BenchError

if TYPE_CHECKING:
    from collections.abc import Sequence

NODE = "overlay"
JOB = "stream"
CONNECT_SECONDS = 30.0
JOB_SECONDS = 900.0


class StorageDaemon:
    """A qemu-storage-daemon with a QED image as its node ``overlay``, and as much of a QMP client as that takes."""

    def __init__(self, command: Sequence[str], overlay: str, monitor: str, *options: str) -> None:
        """Start ``command`` with more ``options``; ``monitor`` is a path for its QMP socket. Raises BenchError."""
        self._resources = contextlib.ExitStack()
        self._log = self._resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed with the others
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(monitor)  # we listen and the daemon connects, so there is nothing to poll for
            listener.listen(1)
            listener.settimeout(CONNECT_SECONDS)
            self._process = subprocess.Popen(
                [*command,
                 "--chardev", f"socket,id=monitor,path={monitor}", "--monitor", "chardev=monitor",
                 "--blockdev", f"driver=file,node-name=file,filename={overlay}",
                 "--blockdev", f"driver=qed,node-name={NODE},file=file", *options],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log,
            )  # fmt: skip
            try:
                connection = self._resources.enter_context(listener.accept()[0])
                connection.settimeout(JOB_SECONDS)
                self._stream = self._resources.enter_context(connection.makefile("rwb"))
                self.receive()  # the greeting
                self.execute("qmp_capabilities")
            except BaseException as error:
                raise self.failure(error) from error

    def execute(self, command: str, **arguments: str) -> list[dict[str, Any]]:
        """Run a command and return the events that came before its answer. Raises BenchError."""
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._stream.flush()
        events = []
        while "return" not in (message := self.receive()):
            events.append(message)
        return events

    def receive(self) -> dict[str, Any]:
        """Return the next message. Raises BenchError if it is an error, or there is none."""
        line = self._stream.readline()
        if not line:
            raise BenchError("the storage daemon closed its monitor")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise BenchError(message["error"]["desc"])
        return message

    def begin_stream(self) -> list[dict[str, Any]]:
        """Have the image's backing file streamed into it; return the events that came before the answer."""
        return self.execute("block-stream", **{"job-id": JOB, "device": NODE})

    def quit(self) -> None:
        """Have the daemon close the image, and end. Raises BenchError."""
        try:
            self.execute("quit")
            code = self._process.wait(JOB_SECONDS)
        except (OSError, subprocess.TimeoutExpired, BenchError) as error:
            raise self.failure(error) from error
        if code:
            raise self.failure(f"exit code {code}")
        self.close()

    def failure(self, problem: object) -> BenchError:
        """End the daemon, and return the error that tells what was wrong and what it said."""
        self._end()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip()
        self.close()
        return BenchError(f"block-stream: {problem}: {said}")

    def close(self) -> None:
        """End the daemon, however; nothing happens if it has ended."""
        self._end()
        self._resources.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


def block_stream(command: Sequence[str], overlay: str, monitor: str) -> None:
    """Stream the QED image ``overlay`` until it no longer has a backing file, with QEMU's own block job.

    ``command`` is the qemu-storage-daemon to run, ``monitor`` a path for its QMP socket. Returns when the daemon has
    ended and closed the image. Raises BenchError.
    """
    daemon = StorageDaemon(command, overlay, monitor)
    try:
        events = daemon.begin_stream()
        while (
            completed := next((each for each in events if each.get("event") == "BLOCK_JOB_COMPLETED"), None)
        ) is None:
            events = [daemon.receive()]
        if "error" in completed["data"]:
            raise BenchError(completed["data"]["error"])
    except (OSError, BenchError) as error:
        raise daemon.failure(error) from error
    daemon.quit()
