"""Progress: a bar for people and lines for programs, and the last word is the last state."""

from __future__ import annotations

import asyncio
import json

import pytest

from nbdstream.cli import progress as progress_module
from nbdstream.cli.progress import Reporter, bar, json_lines
from nbdstream.stream.events import Progress

SIZE = 1 << 30


async def report(reporter: Reporter, *positions: int) -> None:
    """Show these positions one after the other; the last of them only when the reporter is told to stop."""
    remaining = list(positions)
    last = asyncio.Event()

    def look() -> Progress:
        position = remaining[0]
        if len(remaining) > 2:
            del remaining[0]
        else:
            last.set()
        return Progress(position, SIZE, 1000.4, position // 2, SIZE // 2)

    running = asyncio.ensure_future(reporter(look))
    await last.wait()
    await asyncio.sleep(0)
    del remaining[0]
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_BAR_SECONDS", 0.001)
    monkeypatch.setattr(progress_module, "_LINE_SECONDS", 0.001)


async def test_lines_are_json_with_what_there_is_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    await report(json_lines, 0, SIZE // 2, SIZE)
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0] == {"position": 0, "length": SIZE, "rate": 1000, "fetched": 0, "allocated": SIZE // 2}
    assert lines[-1]["position"] == SIZE
    assert err == ""


async def test_the_bar_shows_percent_and_ends_with_the_last_state(capsys: pytest.CaptureFixture[str]) -> None:
    await report(bar, 0, SIZE // 4, SIZE // 2, SIZE)
    out, err = capsys.readouterr()
    assert "  0% |" in err
    assert err.rstrip().split("\r")[-1].startswith("100% |")
    assert "left]" in err
    assert out == ""


async def test_a_bar_of_a_resumed_disk_begins_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    await report(bar, SIZE // 2, SIZE // 2, SIZE)
    assert "  0%" not in capsys.readouterr().err


async def test_a_bar_of_an_empty_disk_does_not_divide_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    running = asyncio.ensure_future(bar(lambda: Progress(0, 0, 0.0, 0, 0)))
    await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
