from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
ARTIFACTS = ("crash-", "oom-", "timeout-", "leak-")


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_breaks_nothing(target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert inputs
    for path in inputs:
        try:
            TARGETS[target](path.read_bytes())
        except AssertionError as error:
            raise AssertionError(f"{path}: {error}") from None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.soak)])
def test_a_fuzzer_finds_nothing(target: str, seconds: int, seed: int, tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    choices = random.Random(seed)
    command = [
        # By way of a shell, since a process begins with the largest size that its parent ever had (getrusage(2)).
        *("sh", "-c", '"$@"; exit "$?"', "sh"),
        *(sys.executable, "-m", "tests.fuzz", target, f"-max_total_time={seconds}", "-rss_limit_mb=256", "-timeout=10"),
        *(f"-seed={choices.randrange(1, 1 << 31)}", f"-artifact_prefix={found}/", str(found), str(CORPUS / target)),
    ]
    root = Path(__file__).parents[2]
    fuzzer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds + 60, check=False)
    broken = {path.name: path.read_bytes() for path in found.iterdir() if path.name.startswith(ARTIFACTS)}
    assert fuzzer.returncode == 0, f"{broken}\n{fuzzer.stdout[-2000:]}\n{fuzzer.stderr[-6000:]}"
    assert "DONE" in fuzzer.stderr
