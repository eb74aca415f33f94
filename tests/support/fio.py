"""fio as a guest that verifies: every block that it reads holds a checksum of itself, and where it belongs.

The source's disk is written by fio, too (:func:`fill`), so what comes from there is verified as well as what the guest
wrote. The two are told apart by the kind of their checksums.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Self

from tests.support.processes import Process, run

BLOCK = 4096
_COMMON = [f"--bs={BLOCK}", "--randseed=7", "--verify_state_save=0"]


class Area(NamedTuple):
    """A part of the disk, in bytes."""

    offset: int
    length: int

    @property
    def options(self) -> list[str]:
        return [f"--offset={self.offset}", f"--size={self.length}"]


def fill(path: str, size: int) -> None:
    """Make the disk of a source."""
    area = Area(0, size).options
    run("fio", "--name=fill", "--ioengine=sync", f"--filename={path}", "--create_on_open=1", "--rw=write",
        *_COMMON, *area, "--verify=crc32c", "--do_verify=0", "--end_fsync=1")  # fmt: skip


class Fio:
    """fio at work on a disk, as soon as this exists. As a context manager it is killed at the end."""

    def __init__(self, uri: str, report: str, *jobs: list[str], rate: int = 0) -> None:
        """``rate`` limits each job to so many requests a second."""
        self._report = report
        pace = [f"--rate_iops={rate}"] if rate else []
        self._process = Process(
            "fio", "--ioengine=nbd", f"--uri={uri}", "--iodepth=4", "--thread", *_COMMON, *pace,
            "--output-format=json", f"--output={report}", *(word for job in jobs for word in job),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()

    @property
    def running(self) -> bool:
        """Whether it still works."""
        return self._process.running

    def finish(self) -> list[dict[str, Any]]:
        """Wait until it has done everything without an error and without a wrong byte; return what it tells of its
        jobs."""
        status, jobs = self._process.wait(), self.told()
        assert status == 0, (self._process.lines, [(job["jobname"], job["error"]) for job in jobs])
        assert all(job["read"]["total_ios"] for job in jobs)
        return jobs

    def told(self) -> list[dict[str, Any]]:
        """Wait until it has ended, and return what it tells of its jobs."""
        self._process.wait()
        with open(self._report) as file:
            text = file.read()
        jobs: list[dict[str, Any]] = json.loads(text[text.index("{") :])["jobs"]  # fio's notes come first
        return jobs


def reading(area: Area, *options: str, own: bool = False) -> list[str]:
    """A job that reads and verifies what the source has, or what the guest wrote."""
    return ["--name=read", "--rw=randread", *area.options, _verify(own=own), *options]


def writing(area: Area, *options: str) -> list[str]:
    """A job that writes blocks all over an area, reads them again and verifies them."""
    return ["--name=write", "--rw=randwrite", *area.options, _verify(own=True), "--fsync=32", *options]


def _verify(*, own: bool) -> str:
    return f"--verify={'md5' if own else 'crc32c'}"
