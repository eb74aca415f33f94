from __future__ import annotations

import asyncio
import errno
import gc
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.block import worker as worker_module
from nbdstream.block.worker import Worker, give_way, pread_exact, pwrite_all, pwritev_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker("test")
    yield worker
    await worker.close()


def fail(error: BaseException) -> None:
    raise error


async def test_run_returns_what_the_call_returned_in_the_thread(worker: Worker) -> None:
    assert await worker.run(threading.get_ident) != threading.get_ident()


async def test_run_raises_what_the_call_raised(worker: Worker) -> None:
    with pytest.raises(OSError, match="broken"):
        await worker.run(fail, OSError(errno.EIO, "broken"))


async def test_calls_and_completions_keep_the_order_of_submission(worker: Worker) -> None:
    called: list[int] = []
    told: list[int | None] = []

    def call(number: int) -> int:
        called.append(number)
        return number

    for number in range(1000):
        worker.submit(lambda result, _error: told.append(result), call, number)
        if number % 100 == 0:
            await asyncio.sleep(0)
    await worker.run(int)
    assert called == told == list(range(1000))


async def test_done_gets_the_error_of_its_own_call(worker: Worker) -> None:
    told: list[tuple[object, BaseException | None]] = []
    error = OSError(errno.ENOSPC, "full")
    worker.submit(lambda *answer: told.append(answer), int, "7")
    worker.submit(lambda *answer: told.append(answer), fail, error)
    await worker.run(int)
    assert told == [(7, None), (None, error)]


async def test_done_is_told_on_the_loop_and_never_before_submit_returns(worker: Worker) -> None:
    told: list[int] = []
    worker.submit(lambda _result, _error: told.append(threading.get_ident()), int)
    assert not told
    await worker.run(int)
    assert told == [threading.get_ident()]


async def test_a_failing_completion_is_logged_and_spares_the_others(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int | None] = []

    def bad(_result: int | None, _error: BaseException | None) -> None:
        raise ValueError("no good")

    worker.submit(bad, int)
    worker.submit(lambda result, _error: told.append(result), int, "2")
    await worker.run(int)
    assert told == [2]
    assert "no good" in caplog.text


async def test_what_one_iteration_submits_comes_back_in_one_hop(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_BATCH_SECONDS", 3600)
    hops: list[object] = []
    loop = asyncio.get_running_loop()
    wake = loop.call_soon_threadsafe

    def counting(callback: Callable[..., object], *args: Any, **kwargs: Any) -> asyncio.Handle:
        hops.append(callback)
        return wake(callback, *args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
    for _ in range(99):
        worker.submit(lambda _result, _error: None, int)
    await worker.run(int)
    assert len(hops) == 1


async def test_the_first_of_many_calls_is_told_before_the_last_is_made(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_BATCH_SECONDS", 3600)
    told = threading.Event()
    worker.submit(lambda _result, _error: told.set(), int)
    for _ in range(255):
        worker.submit(lambda _result, _error: None, int)
    assert await worker.run(told.wait, 60)


async def test_a_slow_call_sends_back_what_is_finished(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_BATCH_SECONDS", -1)
    told = threading.Event()
    worker.submit(lambda _result, _error: told.set(), int)
    assert await worker.run(told.wait, 60)


async def test_a_cancelled_run_still_makes_its_call(worker: Worker) -> None:
    called = threading.Event()
    waiting = asyncio.ensure_future(worker.run(called.set))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await worker.run(int)
    assert called.is_set()


async def test_nothing_of_a_finished_call_is_kept(worker: Worker) -> None:
    class Payload:
        pass

    payload = Payload()
    gone = weakref.ref(payload)
    await worker.run(id, payload)
    await worker.run(int)  # the batch of the first is behind us
    del payload
    gc.collect()
    assert gone() is None


async def test_close_waits_for_everything_submitted_and_ends_the_thread() -> None:
    worker = Worker("closing")
    told: list[int | None] = []
    for number in range(10):
        worker.submit(lambda result, _error: told.append(result), int, number)
    await asyncio.gather(worker.close(), worker.close())
    await worker.close()
    assert told == list(range(10))
    assert "closing" not in [thread.name for thread in threading.enumerate()]


async def test_a_closed_worker_takes_nothing_more(worker: Worker) -> None:
    await worker.close()
    with pytest.raises(RuntimeError, match="worker test is closed"):
        worker.submit(lambda _result, _error: None, int)


def test_pwrite_all_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: really_pwrite(fd, data[:3], offset))
    with open(tmp_path / "file", "w+b") as file:
        pwrite_all(file.fileno(), memoryview(b"0123456789"), 5)
        assert file.read() == bytes(5) + b"0123456789"


def test_pwrite_all_raises_what_the_kernel_answers(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open(tmp_path / "file", "rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        pwrite_all(file.fileno(), b"data", 0)


def test_pwritev_all_writes_more_buffers_than_the_kernel_takes_at_once(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        pwritev_all(file.fileno(), [b"%05d" % number for number in range(3000)], 7)
        assert file.read() == bytes(7) + b"".join(b"%05d" % number for number in range(3000))


def test_pwritev_all_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: os.pwrite(fd, buffers[0][:1], offset))
    with open(tmp_path / "file", "w+b") as file:
        pwritev_all(file.fileno(), [b"01234", bytearray(b"56"), memoryview(b"789")], 2)
        assert file.read() == bytes(2) + b"0123456789"


def test_pread_exact_goes_on_after_a_short_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: really_pread(fd, min(length, 3), offset))
    (tmp_path / "file").write_bytes(b"0123456789")
    with open(tmp_path / "file", "rb") as file:
        assert pread_exact(file.fileno(), 8, 1) == b"12345678"


def test_pread_exact_is_an_error_where_the_file_ends_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with open(tmp_path / "file", "rb") as file, pytest.raises(OSError, match="ends before 12") as caught:
        pread_exact(file.fileno(), 8, 4)
    assert caught.value.errno == errno.EIO


def test_a_thread_gives_way_and_no_other_does() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found: list[int] = []

    def serve() -> None:
        for _ in range(5):  # there is an end to it
            give_way()
            found.append(priority())

    before = priority()
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert priority() == before
    assert found == [min(before + 5 * step, 19) for step in range(1, 6)]
