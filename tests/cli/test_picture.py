"""A disk as text: the map's cells, the lines of a status, and nothing that moves a terminal's cursor."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nbdstream.cli.picture import MOST_CELLS, Style, columns_for, describe, frame

PLAIN = Style(colour=False, unicode=False)

LATENCY = {"requests": 0, "p50": 0.0, "p99": 0.0}
STATUS: dict[str, Any] = {
    "running": True,
    "status": "running",
    "device": "disk0",
    "path": "/images/overlay.qed",
    "source": "nbd://host/disk",
    "length": 1 << 30,
    "position": 256 << 20,
    "fetched": 200 << 20,
    "allocated": 1 << 30,
    "fetch-rate": 64 << 20,
    "read-rate": 1 << 20,
    "write-rate": 0,
    "waiting": 3,
    "latency": {"requests": 100, "p50": 0.00015, "p99": 0.0021},
    "remote-latency": LATENCY,
    "amounts": {},
    "job": {"device": "disk0", "status": "running", "speed": 0},
}


def part(**amounts: int) -> dict[str, int]:
    return {"local": 0, "zero": 0, "remote": 0, "in-flight": 0, "written": 0} | {
        name.replace("_", "-"): value for name, value in amounts.items()
    }


@pytest.mark.parametrize(
    ("amounts", "glyph"),
    [
        (part(local=8), "#"),
        (part(zero=8), "0"),
        (part(local=4, zero=4), "#"),
        (part(remote=8), "."),
        (part(remote=4, local=4), "+"),
        (part(remote=4, zero=4), "+"),
        (part(remote=8, in_flight=1), ">"),
        (part(local=8, written=1), "W"),
        (part(zero=8, written=8), "W"),
    ],
)
def test_a_cell_shows_what_its_part_consists_of(amounts: dict[str, int], glyph: str) -> None:
    assert frame(STATUS, [amounts], 80, PLAIN)[0] == glyph


def test_a_frame_has_the_map_its_meaning_and_the_status() -> None:
    columns = [part(local=8)] * 3 + [part(remote=8)] * 4
    assert frame(STATUS, columns, 80, PLAIN) == [
        "###....",
        "# local  W written by the guest  0 zero  + partly remote  > in flight  . remote",
        *describe(STATUS),
    ]


def test_a_map_is_folded_at_the_width() -> None:
    assert frame(STATUS, [part(local=8)] * 45, 20, PLAIN)[:3] == ["#" * 20, "#" * 20, "#" * 5]


@pytest.mark.parametrize("width", [1, 10, 20, 79, 80, 200, 511, 512, 1000])
@pytest.mark.parametrize("style", [PLAIN, Style(colour=True, unicode=True)])
def test_no_line_is_wider_than_the_terminal(width: int, style: Style) -> None:
    lines = frame(STATUS, [part(local=8)] * columns_for(width), width, style)
    assert max(len(re.sub(r"\033\[[0-9;]*m", "", line)) for line in lines) <= width


@pytest.mark.parametrize("width", [1, 10, 79, 80, 100, 200, 511, 512, 1000])
def test_a_map_has_full_rows_and_no_more_cells_than_there_are(width: int) -> None:
    columns = columns_for(width)
    assert 1 <= columns <= MOST_CELLS
    assert width > MOST_CELLS or columns % width == 0


def test_a_run_of_one_colour_has_one_escape_sequence() -> None:
    line = frame(STATUS, [part(local=8)] * 50 + [part(remote=8)] * 50, 100, Style(colour=True, unicode=True))[0]
    assert line.count("\033[") == 3
    assert line.endswith("\033[0m")


def test_a_status_is_described() -> None:
    assert describe(STATUS) == [
        "disk:    disk0, /images/overlay.qed",
        "state:   running",
        "local:   256 MiB of 1 GiB (25%) need the source no more",
        "source:  nbd://host/disk",
        "job:     disk0, running, no limit",
        "fetched: 200 MiB, now 64 MiB/s, 0:00:12 left",
        "guest:   reads 1 MiB/s, writes 0 bytes/s, 3 requests wait for the source",
        "latency: 0.15 ms (99%: 2.10 ms); of what is remote -",
    ]


def test_a_degraded_disk_says_why_and_since_when() -> None:
    lines = describe(STATUS | {"status": "degraded", "reason": "it is gone", "since": 0.0, "fetch-rate": 0})
    assert re.fullmatch(r"state:   degraded since \d\d:\d\d:\d\d: it is gone", lines[1])
    assert "? left" in lines[5]


def test_a_full_disk_is_told() -> None:
    assert re.search(r"running; its disk is full since \d\d:\d\d:\d\d$", describe(STATUS | {"full-since": 0.0})[1])


def test_an_independent_disk_has_no_source_and_no_time_left() -> None:
    status = {name: value for name, value in STATUS.items() if name not in ("source", "job")}
    lines = describe(status | {"status": "independent", "position": 1 << 30})
    assert "left" not in "\n".join(lines)
    assert "job:     none" in lines


def test_while_nothing_streams_nobody_knows_what_is_left() -> None:
    paused = STATUS | {"job": {"device": "disk0", "status": "paused", "speed": 0}}
    assert "left" not in "\n".join(describe(paused))


def test_an_empty_disk_can_be_described() -> None:
    assert "(100%)" in describe(STATUS | {"length": 0, "position": 0})[2]


def test_nothing_in_a_name_moves_the_cursor() -> None:
    lines = describe(
        STATUS | {"path": "a\033[2Jb\n", "source": "nbd://\x9bx", "status": "degraded", "since": 0.0, "reason": "\r"}
    )
    assert all(line.isprintable() for line in lines)
    assert "a?[2Jb?" in lines[0]
