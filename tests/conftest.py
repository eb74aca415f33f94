"""Settings of every test run: seeds that can be repeated, soak tests apart, no silent skips.

``NBDSTREAM_SEED=N`` repeats the random choices of a run, which are printed at its start; ``NBDSTREAM_NO_SKIP=1``
(set by ``scripts/test``) makes a failure of every skipped test.
"""

from __future__ import annotations

import os
import random
import zlib
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.support.records import forget_records

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

SESSION_SEED = int(os.environ.get("NBDSTREAM_SEED") or random.SystemRandom().randrange(1 << 32))
NO_SKIP = os.environ.get("NBDSTREAM_NO_SKIP") == "1"

# No deadline: the machine that runs the tests is shared, and a slow example is not a wrong one.
hypothesis.settings.register_profile(
    "nbdstream", print_blob=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("nbdstream")

# With one of these set pytest shows the whole difference of what an assertion compared, a line a byte: that of two
# clusters takes it longer than a test may last, so that a failure would be told as a timeout and end the run.
for variable in ("CI", "BUILD_NUMBER"):
    os.environ.pop(variable, None)


def pytest_report_header() -> str:
    return f"seed: {SESSION_SEED} (NBDSTREAM_SEED={SESSION_SEED} repeats it)"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number for this test's random choices: the same in every run with the same session seed."""
    value = zlib.crc32(f"{SESSION_SEED} {request.node.nodeid}".encode())
    print(f"seed of this test: {value} (session seed {SESSION_SEED})")
    return value


@pytest.fixture(autouse=True)
def no_records_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove what owners that were killed left in memory of the images in this test's directory."""
    directory = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if directory:
        forget_records(directory)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the soak tests out, unless they were asked for by ``-m``."""
    if config.option.markexpr:
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and here that is a failure: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if NO_SKIP and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, and here that is a failure: {report.longrepr}"
    return report
