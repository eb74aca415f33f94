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
    run(["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", *options,
         "--output-format=json", f"--output={report}"])  # fmt: skip
    with open(report) as file:
        text = file.read()
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]  # fio's notes come before the JSON
    if job["error"] or not job["read"]["total_ios"] + job["write"]["total_ios"]:
        msg = f"fio did nothing with {uri}: error {job['error']}"
        raise BenchError(msg)
    return job


def latencies(side: dict[str, Any]) -> dict[str, float]:
    """Return the percentiles of one side of a job (``read``, ``write``), in microseconds, by name."""
    percentiles = side["clat_ns"]["percentile"]
    return {f"p{name}_us": percentiles[f"{name}.000000"] / 1000 for name in (50, 99)}
