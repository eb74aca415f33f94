"""The rules that tests/conftest.py sets for every run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SUITE = """
import pytest

def test_passes(seed):
    print("drew", seed)

@pytest.mark.skipif(True, reason="not today")
def test_is_skipped():
    pass

@pytest.mark.xfail(reason="known")
def test_is_known_to_fail():
    assert False

@pytest.mark.soak
def test_runs_for_hours():
    pass
"""


def run_pytest(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NBDSTREAM_", "PYTEST_"))}
    pytest_command = [sys.executable, "-m", "pytest", "-s", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*pytest_command, "-p", "no:asyncio", "-c", os.devnull, f"--rootdir={directory}", "-o", "markers=soak: long",
         *arguments, str(directory)],
        cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False,
    )


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "test_suite.py").write_text(SUITE)
    return tmp_path


def test_a_skip_is_a_failure_only_where_asked_for(suite: Path) -> None:
    lenient = run_pytest(suite)
    assert lenient.returncode == 0, lenient.stdout
    assert "1 passed, 1 skipped, 1 deselected, 1 xfailed" in lenient.stdout
    strict = run_pytest(suite, NBDSTREAM_NO_SKIP="1")
    assert strict.returncode == 1
    assert "not today" in strict.stdout
    assert "1 passed, 1 deselected, 1 xfailed, 1 error" in strict.stdout


def test_a_skipped_module_is_a_failure_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text("import pytest\npytest.importorskip('no_such_module_here')\n")
    assert run_pytest(tmp_path, NBDSTREAM_NO_SKIP="1").returncode not in (0, 5)


def test_soak_tests_run_when_asked_for(suite: Path) -> None:
    result = run_pytest(suite, "-m", "soak")
    assert "1 passed, 3 deselected" in result.stdout


def test_a_seed_is_told_and_repeats_the_run(suite: Path) -> None:
    runs = [run_pytest(suite, "-k", "passes", NBDSTREAM_SEED="42").stdout for _ in range(2)]
    drawn = [[line for line in run.splitlines() if "drew" in line] for run in runs]
    assert drawn[0]
    assert drawn[0] == drawn[1]
    assert "NBDSTREAM_SEED=42 repeats it" in runs[0]
