"""QEMU's block-stream, driven over QMP in a storage daemon: as much of a QMP client as that takes."""

from __future__ import annotations

import json
import socket
import subprocess
from typing import TYPE_CHECKING, Any

from tests.bench.process import BenchError

if TYPE_CHECKING:
    from collections.abc import Sequence

NODE = "overlay"
JOB = "stream"
CONNECT_SECONDS = 30.0
JOB_SECONDS = 900.0


def block_stream(command: Sequence[str], overlay: str, monitor: str) -> None:
    """Stream the QED image ``overlay`` until it no longer has a backing file, with QEMU's own block job.

    ``command`` is the qemu-storage-daemon to run, ``monitor`` a path for its QMP socket. Returns when the daemon has
    ended and closed the image. Raises BenchError.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(monitor)  # we listen and the daemon connects, so there is nothing to poll for
        listener.listen(1)
        listener.settimeout(CONNECT_SECONDS)
        daemon = subprocess.Popen(
            [*command,
             "--chardev", f"socket,id=monitor,path={monitor}", "--monitor", "chardev=monitor",
             "--blockdev", f"driver=file,node-name=file,filename={overlay}",
             "--blockdev", f"driver=qed,node-name={NODE},file=file"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        problem: Exception | None = None
        try:
            _run_job(listener)
            daemon.wait(JOB_SECONDS)
        except (OSError, subprocess.TimeoutExpired, BenchError) as error:
            problem = error
        finally:
            daemon.kill()  # nothing to kill if all went well
            said = daemon.communicate()[1].decode(errors="replace").strip()
    if problem or daemon.returncode:
        msg = f"block-stream: {problem or f'exit code {daemon.returncode}'}: {said}"
        raise BenchError(msg) from problem


def _run_job(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    connection.settimeout(JOB_SECONDS)
    with connection, connection.makefile("rwb") as stream:

        def receive() -> dict[str, Any]:
            line = stream.readline()
            if not line:
                raise BenchError("the storage daemon closed its monitor")
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise BenchError(message["error"]["desc"])
            return message

        def execute(command: str, **arguments: str) -> list[dict[str, Any]]:
            """Run a command and return the events that came before its answer."""
            stream.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            stream.flush()
            events = []
            while "return" not in (message := receive()):
                events.append(message)
            return events

        receive()  # the greeting
        execute("qmp_capabilities")
        early = execute("block-stream", **{"job-id": JOB, "device": NODE})
        completed = next((event for event in early if event["event"] == "BLOCK_JOB_COMPLETED"), None)
        while completed is None:
            message = receive()
            if message.get("event") == "BLOCK_JOB_COMPLETED":
                completed = message
        if "error" in completed["data"]:
            raise BenchError(completed["data"]["error"])
        execute("quit")
