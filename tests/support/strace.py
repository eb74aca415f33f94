"""What a process does to one file, seen from outside: strace prints the system calls of all its threads.

Moments are nanoseconds since the epoch (``time.time_ns``), so those of a client of the process compare with them. A
call begins no earlier than strace says, and ends no later: what one thread does because it knows of another's call
stands in the right order. (What reaches a file by a mapping is not seen: a mapping that can be written to is an error.)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from tests.support.crash import Event, Recording
from tests.support.processes import NBDSTREAM, Command, Process, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHANGES = ("write", "writev", "pwrite64", "pwritev", "pwritev2", "ftruncate", "truncate", "fallocate")
_SYNCS = ("fdatasync", "fsync")
_OTHERS = ("sync_file_range", "copy_file_range", "sendfile", "splice", "mmap", "unlink", "rename")
_NOTHING = ("sync_file_range",)
"""It begins the write-back, and promises nothing."""

_LONGEST = 64 << 20
_NEVER = 1 << 63

_LINE = re.compile(r"(\d+) +(\d+)\.(\d{9}) (.*)", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)[^<]*(?:<(\d+)\.(\d{9})>)?$", re.DOTALL)
_BUFFER = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)", re.DOTALL)
_UNFINISHED = "<unfinished ...>"


class Traced(Command):
    """A command that runs under strace. Its signals and its status are the command's own."""

    def __init__(self, path: str, log: str, *arguments: str, program: Sequence[str] = ()) -> None:
        """Have strace write to ``log`` what becomes of the file ``path``, which exists."""
        with open(path, "rb") as file:
            self._initial = file.read()
        self._path = path
        self._log = log
        calls = ",".join([*_CHANGES, *_SYNCS, *_OTHERS])
        clock = ("--absolute-timestamps=format:unix,precision:ns", "--syscall-times=ns")
        strace = ("strace", "-D", "-f", "--seccomp-bpf", "-o", log, "-P", path, "-xx", "-s", str(_LONGEST), *clock)
        Process.__init__(self, *strace, "-e", f"trace={calls}", *(program or (NBDSTREAM,)), *arguments)

    def recording(self) -> Recording:
        """Return what it did. It must have ended."""
        assert not self.running
        wait_until(self._is_complete, "strace to end")
        with open(self._log) as log, open(self._path, "rb") as file:
            recording = Recording(self._initial, parse(log.read()))
            assert recording.killed(recording.end) == file.read(), "not everything was seen"
        return recording

    def _is_complete(self) -> bool:
        with open(self._log) as log:
            return any(line.startswith(f"{self.pid} ") and " +++ " in line for line in log.readlines()[-50:])


class _Begun(NamedTuple):
    moment: int
    text: str


def parse(log: str) -> list[Event]:
    """Return what strace's log tells of one file. Raises AssertionError for what it does not know."""
    events: list[Event] = []
    unfinished: dict[str, _Begun] = {}
    for line in log.splitlines():
        match = _LINE.fullmatch(line)
        assert match, line[:200]
        thread, seconds, nanoseconds, text = match.groups()
        moment = int(seconds) * 10**9 + int(nanoseconds)
        if text.startswith(("+++", "---")):
            continue
        if text.endswith(_UNFINISHED):
            unfinished[thread] = _Begun(moment, text.removesuffix(_UNFINISHED))
            continue
        begin = moment
        if resumed := _RESUMED.fullmatch(text):
            begin, before = unfinished.pop(thread)
            text = before + resumed[1]
        call = _CALL.fullmatch(text)
        if call is None:  # "= ?": it ended with its thread
            unfinished[thread] = _Begun(begin, text.rpartition(")")[0])
            continue
        name, arguments, result, took_seconds, took_nanoseconds = call.groups()
        took = int(took_seconds or 0) * 10**9 + int(took_nanoseconds or 0)
        events += _event(name, arguments, int(result), begin, begin + took)
    for begin, text in unfinished.values():
        name, _, arguments = text.partition("(")
        events += _event(name, arguments, _written(name, arguments), begin, _NEVER)
    return events


def _event(name: str, arguments: str, result: int, begin: int, end: int) -> list[Event]:
    if result < 0 or name in _NOTHING:
        return []
    if name in _SYNCS:
        return [Event("sync", begin, end)] if end != _NEVER else []
    numbers = [int(part) for part in _BUFFER.sub("", arguments).split(",") if part.strip().isdecimal()]
    if name in ("ftruncate", "truncate"):
        return [Event("truncate", begin, end, numbers[-1])]
    if name == "mmap":
        assert "PROT_WRITE" not in arguments or "MAP_PRIVATE" in arguments, "the file can be changed unseen"
        return []
    assert name in ("pwrite64", "pwritev", "pwritev2"), f"{name} is not expected: {arguments[-100:]}"
    if name == "pwritev2":
        flags = arguments.rpartition(", ")[2].strip()
        assert flags in ("0", "RWF_NOWAIT"), f"{flags} are not expected"
        if flags == "0":
            del numbers[-1]
    return [Event("write", begin, end, numbers[-1], _data(arguments)[:result])]


def _data(arguments: str) -> bytes:
    buffers = _BUFFER.findall(arguments)
    assert not any(cut for _, cut in buffers), "a write is longer than what strace prints"
    return b"".join(bytes.fromhex(text.replace("\\x", "")) for text, _ in buffers)


def _written(name: str, arguments: str) -> int:
    """Return how much a call that never ended may have written."""
    return len(_data(arguments)) if name.startswith("pwrite") else 0
