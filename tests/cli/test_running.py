"""Running a command: exit codes, one line for an error, and what signals do."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.cli import running
from nbdstream.cli.arguments import UsageError
from nbdstream.errors import NbdstreamError, SourceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process is not set up for a command."""
    monkeypatch.setattr(running, "set_up_logging", lambda **_: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda _seconds: None)


def command(work: Callable[[], Awaitable[int]], *, debug: bool = False) -> int:
    async def run(_options: argparse.Namespace) -> int:
        return await work()

    return running.run(argparse.Namespace(run=run, debug=debug))


def failing(error: BaseException) -> Callable[[], Awaitable[int]]:
    async def fail() -> int:
        raise error

    return fail


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_exit_code_is_the_commands(code: int) -> None:
    async def work() -> int:
        return code

    assert command(work) == code


def test_a_command_runs_on_uvloop() -> None:
    async def work() -> int:
        return 0 if type(asyncio.get_running_loop()).__module__.startswith("uvloop") else 1

    assert command(work) == 0


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (NbdstreamError("it\n  did not   work"), 1, "nbdstream: it did not work\n"),
        (SourceError("nobody is there"), 1, "nbdstream: nobody is there\n"),
        (UsageError("not both"), 2, "nbdstream: not both\n"),
        (PermissionError(13, "Permission denied", "/some/file"), 1, "nbdstream: /some/file: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "nbdstream: No space left on device\n"),
        (OSError("odd"), 1, "nbdstream: odd\n"),
    ],
)
def test_an_error_is_one_line(error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(failing(error)) == code
    assert capsys.readouterr() == ("", line)


def test_with_debug_an_error_shows_where_it_came_from() -> None:
    with pytest.raises(SourceError, match="nobody"):
        command(failing(SourceError("nobody is there")), debug=True)


def test_a_mistake_of_ours_is_not_made_to_look_like_the_users() -> None:
    with pytest.raises(ZeroDivisionError):
        command(failing(ZeroDivisionError()))


def test_a_reader_of_the_output_that_goes_is_a_failure_without_words(capfd: pytest.CaptureFixture[str]) -> None:
    assert command(failing(BrokenPipeError(32, "Broken pipe"))) == 1
    assert capfd.readouterr().err == ""


def test_an_interrupt_has_its_own_code() -> None:
    assert command(failing(KeyboardInterrupt())) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_sets_the_event(number: signal.Signals) -> None:
    with running.stop_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        await stop.wait()


async def test_a_second_sigterm_does_nothing_more() -> None:
    with running.stop_signals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.01)
        assert stop.is_set()


async def test_a_second_sigint_interrupts() -> None:
    seen: list[int] = []
    with running.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        await stop.wait()
        before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.01)
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


async def test_behind_the_block_signals_do_what_they_did() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with running.stop_signals():
        pass
    assert signal.getsignal(signal.SIGTERM) == before


async def test_work_that_ends_by_itself_has_come_to_its_end() -> None:
    assert await running.either(asyncio.Event(), asyncio.sleep(0)) is True


async def test_work_that_is_stopped_is_cancelled_and_waited_for() -> None:
    stop, ended = asyncio.Event(), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.append(1)

    asyncio.get_running_loop().call_soon(stop.set)
    assert await running.either(stop, work()) is False
    assert ended


async def test_what_the_work_raises_is_raised() -> None:
    async def work() -> Any:
        raise SourceError("nobody")

    with pytest.raises(SourceError, match="nobody"):
        await running.either(asyncio.Event(), work())
