"""The benchmark measures everybody, and its arithmetic is right. How fast anybody is, is not tested here."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.bench import peers
from tests.bench.guest import WITH_OBJECTIVE
from tests.bench.process import BenchError
from tests.bench.qed import OUR_RAW
from tests.bench.qmp import block_stream
from tests.bench.results import Floor, Section, Workload

if TYPE_CHECKING:
    from pathlib import Path

BENCH = f"{peers.ROOT}/scripts/bench"
SERVERS = {"nbdstream", "nbdkit", "qemu-nbd"}
QED_SERVERS = {"nbdstream", "qemu-nbd"}
MOVERS = {"nbdstream", "block-stream", "qemu-img convert", "nbdcopy", "cp"}


def test_quick_run_measures_everybody(tmp_path: Path) -> None:
    done = subprocess.run([BENCH, "--quick", "--output", str(tmp_path)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads((tmp_path / "bench.json").read_text())["sections"]
    far = {"nbdstream", "block-stream"}
    measured = {"reads": SERVERS, "tls": SERVERS, "stream": MOVERS, "wan": far, "qed": QED_SERVERS}
    measured["guest"] = far | {WITH_OBJECTIVE}
    measured["slow-disk"] = measured["guest"]
    measured["outage"] = {"nbdstream"}
    for name, competitors in measured.items():
        assert sections[name]["problems"] == {}
        for workload in sections[name]["workloads"].values():
            medians = {key: result["median"] for key, result in workload["results"].items()}
            assert set(medians) - {OUR_RAW} == competitors
            assert min(medians.values()) > 0
        assert all(floor["measured"] > 0 for floor in sections[name]["floors"])
    assert sorted(os.listdir(tmp_path)) == ["bench.json", "bench.md"]


def test_a_command_that_fails_is_named_and_makes_the_run_fail(tmp_path: Path) -> None:
    done = subprocess.run(
        [BENCH, "stream", "--quick", "--ours", "/bin/false", "--only", "nbdstream,cp", "--output", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    section = json.loads((tmp_path / "bench.json").read_text())["sections"]["stream"]
    assert set(section["problems"]) == {"nbdstream"}
    assert [set(workload["results"]) for workload in section["workloads"].values()] == [{"cp"}]


def test_another_nbdstream_is_measured_in_turn_with_ours(tmp_path: Path) -> None:
    ours = f"{peers.ROOT}/.venv/bin/nbdstream"
    subprocess.run(
        [BENCH, "reads", "--quick", "--against", ours, "--only", "nbdstream,against", "--output", str(tmp_path)],
        capture_output=True, check=True,
    )  # fmt: skip

    section = json.loads((tmp_path / "bench.json").read_text())["sections"]["reads"]
    assert [set(workload["results"]) for workload in section["workloads"].values()] == [{"nbdstream", "against"}] * 6
    assert {floor["workload"] for floor in section["floors"] if floor["peer"] == "against"} == {*section["workloads"]}


def test_block_stream_tells_what_the_daemon_said(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qed"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", str(overlay), "1M"], check=True)

    with pytest.raises(BenchError, match="Image not in QED format"):
        block_stream(["qemu-storage-daemon"], str(overlay), str(tmp_path / "qmp"))


@pytest.fixture
def section() -> Section:
    competitors = [peers.Competitor(key, key) for key in ("nbdstream", "a", "b")]
    workloads = [Workload("reads", "reads/s"), Workload("copy", "s")]
    return Section("section", "A section", competitors, workloads, (Floor("copy", "a", 3),))


def test_everybody_is_first_in_turn_and_follows_another(section: Section) -> None:
    assert ["".join(one.key[0] for one in section.turn(number)) for number in range(4)] == ["nab", "anb", "bna", "nba"]


def test_who_failed_has_no_turn_and_no_figures(section: Section) -> None:
    section.add(section.workloads[0], section.competitors[1], 1.0)
    section.fail(section.competitors[1], "why")

    assert [competitor.key for competitor in section.turn(0)] == ["nbdstream", "b"]
    assert section.samples == {}


def test_ratio_says_how_many_times_as_fast_we_are(section: Section) -> None:
    reads, copy = section.workloads
    ours, peer = section.competitors[:2]
    for ours_is, peer_is in ((10.0, 5.0), (30.0, 10.0), (2.0, 4.0)):
        section.add(reads, ours, ours_is)
        section.add(reads, peer, peer_is)
        section.add(copy, ours, ours_is)
        section.add(copy, peer, 6 * peer_is)

    assert section.ratio(reads, "a") == pytest.approx(2)
    assert section.ratio(copy, "a") == pytest.approx(3)
    assert section.ratio(copy, "b") is None
    assert section.floor_ratios()[0][1] == pytest.approx(3)
