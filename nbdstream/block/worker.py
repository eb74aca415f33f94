"""A thread for the calls that may block, fed a batch a hop.

Waking a thread, and waking the loop again, costs far more than a small ``pwrite``. So what one
iteration of the loop submits goes over together, and what the thread has finished comes back together.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdstream.block.device import Buffer

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_Done: TypeAlias = "Callable[[Any, BaseException | None], None]"
_Job: TypeAlias = "tuple[_Done, Callable[..., Any], tuple[Any, ...]]"
_Finished: TypeAlias = "tuple[_Done, Any, BaseException | None]"

# The first of a long batch is not held up for its last: what is finished goes back after this many
# calls, or when a call ends this many seconds after the batch began.
_BATCH_CALLS = 256
_BATCH_SECONDS = 0.001

_GIVE_WAY_NICE = 5
"""Three shares of a processor for what a guest waits for, one for bulk data. With 10 it takes half as long again."""
_MOST_NICE = 19

_IOV_MAX = 1024  # what one system call takes (UIO_MAXIOV)


class Worker:
    """One thread that runs calls in the order in which they were submitted.

    Its methods belong to the loop's thread. It must be closed: at exit the interpreter does not wait for its thread.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Start the thread. ``loop`` (the running one by default) is where completions are told."""
        self._loop = loop or asyncio.get_running_loop()
        self._pending: list[_Job] = []
        self._batches: SimpleQueue[list[_Job] | None] = SimpleQueue()
        self._closing: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, done: Callable[[T | None, BaseException | None], None], call: Callable[[*Ts], T], *args: *Ts
    ) -> None:
        """Have ``call(*args)`` run in the thread, and then ``done(result, error)`` on the loop.

        ``done`` is called in the order of submission, and never before this returns.
        """
        if self._closing:
            raise RuntimeError(f"worker {self._thread.name} is closed")
        self._enqueue(done, call, args)

    async def run(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return what ``call(*args)`` returns in the thread. A cancelled wait does not stop the call."""
        answer: asyncio.Future[T] = self._loop.create_future()
        self.submit(settling(answer), call, *args)
        return await answer

    async def close(self) -> None:
        """Wait until everything submitted is done and told, then end the thread. Twice does no harm."""
        if not self._closing:
            self._closing = self._loop.create_task(self._drain())
        await asyncio.shield(self._closing)

    async def _drain(self) -> None:
        told = asyncio.Event()
        self._enqueue(lambda _result, _error: told.set(), int, ())  # calls run in order: this is the last
        await told.wait()
        self._batches.put(None)
        self._thread.join()  # it has nothing left to do

    def _enqueue(self, done: _Done, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if not self._pending:
            self._loop.call_soon(self._hand_over)
        self._pending.append((done, call, args))

    def _hand_over(self) -> None:
        batch, self._pending = self._pending, []
        self._batches.put(batch)

    def _serve(self) -> None:
        """Run batches until told to stop (in the thread)."""
        while (batch := self._batches.get()) is not None:
            finished: list[_Finished] = []
            deadline = time.monotonic() + _BATCH_SECONDS
            for done, call, args in batch:
                finished.append(_perform(done, call, args))
                if len(finished) >= _BATCH_CALLS or time.monotonic() > deadline:
                    self._loop.call_soon_threadsafe(_tell, finished)
                    finished = []
                    deadline = time.monotonic() + _BATCH_SECONDS
            if finished:
                self._loop.call_soon_threadsafe(_tell, finished)
            del batch, finished, done, call, args  # buffers must not wait here for the next batch


def _perform(done: _Done, call: Callable[..., Any], args: tuple[Any, ...]) -> _Finished:
    try:
        return done, call(*args), None
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the submitter's
        return done, None, error


def _tell(finished: list[_Finished]) -> None:
    """Deliver completions (on the loop)."""
    for done, result, error in finished:
        try:
            done(result, error)
        except Exception:  # the others of the batch are not to blame
            log.exception("a completion failed")


def give_way() -> None:
    """Let this thread, which receives bulk data, have a processor behind those that a guest waits for (setpriority(2)).

    Where the processors have all that they can do, this halves how long a guest's requests take.
    """
    thread = threading.get_native_id()
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, min(nice + _GIVE_WAY_NICE, _MOST_NICE))


def settling(answer: asyncio.Future[T]) -> Callable[[Any, BaseException | None], None]:
    """Return a ``done(result, error)`` that settles a future, unless whoever waited has gone."""

    def done(result: Any, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    return done


def as_os_error(error: BaseException | None) -> OSError | None:
    """Return an error of a call as what a device tells of it: anything unexpected is EIO."""
    if error is None or isinstance(error, OSError):
        return error
    return OSError(errno.EIO, str(error))


def pwrite_all(fd: int, data: Buffer, offset: int) -> None:
    """Write all of ``data`` at ``offset``. Raises OSError."""
    written = os.pwrite(fd, data, offset)
    if written == len(data):
        return
    rest = memoryview(data)
    while written < len(rest):
        count = os.pwrite(fd, rest[written:], offset + written)
        if not count:
            raise OSError(errno.EIO, "nothing was written")
        written += count


def pread_exact(fd: int, length: int, offset: int) -> bytes:
    """Return ``length`` bytes from ``offset``. Raises OSError, EIO where the file ends before."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, f"the file ends before {offset + length}")
        data += more
    return data


def pwritev_all(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write buffers one behind the other at ``offset``. Raises OSError."""
    for start in range(0, len(buffers), _IOV_MAX):
        some = buffers[start : start + _IOV_MAX]
        length = sum(len(buffer) for buffer in some)
        if os.pwritev(fd, some, offset) != length:  # a short write: once more, one by one
            position = offset
            for buffer in some:
                pwrite_all(fd, buffer, position)
                position += len(buffer)
        offset += length
