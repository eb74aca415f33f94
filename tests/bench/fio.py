"""fio, whose NBD engine is the client of everybody."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.bench.process import BenchError, run

if TYPE_CHECKING:
    from collections.abc import Sequence


def fio(uri: str, options: Sequence[str], scratch: str) -> dict[str, Any]:
    """Run one job against an export and return what fio tells of it. Raises BenchError."""
    report = f"{scratch}/fio.json"
    run(fio_argv(uri, options, report))
    return read_report(report, uri)


def fio_argv(uri: str, options: Sequence[str], report: str) -> list[str]:
    """Return the command that runs one job; ``report`` is the file that it writes."""
    return ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", *options,
            "--output-format=json", f"--output={report}"]  # fmt: skip


def read_report(report: str, uri: str) -> dict[str, Any]:
    """Return what fio told of its one job. Raises BenchError if it did nothing, or failed."""
    with open(report) as file:
        text = file.read()
    if "{" not in text:
        raise BenchError(f"fio did not even begin with {uri}")
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]  # fio's notes come before the JSON
    if job["error"] or not job["read"]["total_ios"] + job["write"]["total_ios"]:
        msg = f"fio did nothing with {uri}: error {job['error']}"
        raise BenchError(msg)
    return job


def latencies(side: dict[str, Any], kind: str = "clat_ns") -> dict[str, float]:
    """Return the percentiles of one side of a job (``read``, ``write``, ``sync``), in microseconds, by name."""
    percentiles = side[kind]["percentile"]
    return {f"p{share:g}_us": percentiles[f"{share:.6f}"] / 1000 for share in (50, 99, 99.9)}
