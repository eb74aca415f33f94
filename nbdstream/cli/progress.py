"""Showing how far a stream has come: a bar for people, lines of JSON for programs.

A reporter runs until it is cancelled, and shows the state of that moment once more then.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from nbdstream.stream.events import Progress

Reporter: TypeAlias = Callable[[Callable[[], Progress]], Coroutine[Any, Any, None]]

_BAR_SECONDS = 0.2
_LINE_SECONDS = 1.0


async def bar(look: Callable[[], Progress]) -> None:
    """Show a bar with percent, rate and time left on standard error."""
    from tqdm import tqdm  # noqa: PLC0415 - it takes a fifth of the time that the command needs to start

    progress = look()
    with tqdm(
        total=progress.length,
        initial=progress.position,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        dynamic_ncols=True,
        mininterval=0,
        file=sys.stderr,
        bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{rate_fmt}, {remaining} left]",
    ) as shown:
        try:
            while True:
                shown.update(look().position - shown.n)
                await asyncio.sleep(_BAR_SECONDS)
        finally:
            shown.update(look().position - shown.n)


async def json_lines(look: Callable[[], Progress]) -> None:
    """Print a line of JSON a second on standard output."""
    try:
        while True:
            _print(look())
            await asyncio.sleep(_LINE_SECONDS)
    finally:
        _print(look())


def _print(progress: Progress) -> None:
    sys.stdout.write(json.dumps(progress._asdict() | {"rate": round(progress.rate)}) + "\n")
    sys.stdout.flush()
