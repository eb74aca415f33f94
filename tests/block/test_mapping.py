from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import threading
import weakref
from typing import TYPE_CHECKING, cast

import pytest
import uvloop

from nbdstream.block.locks import Sharing, take_locks
from nbdstream.block.mapping import Mapping

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

MiB = 1 << 20


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
async def mapping(fd: int) -> AsyncIterator[Mapping]:
    mapping = Mapping(fd, 1 << 40)
    yield mapping
    mapping.close()


async def settle() -> None:
    """Let the loop run what other threads, or finalizers, have put to it."""
    for _ in range(3):
        await asyncio.sleep(0)


class Calls:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


async def test_a_view_shows_the_file(fd: int, mapping: Mapping) -> None:
    os.pwrite(fd, b"0123456789", 4096)
    view = mapping.view(4098, 3)
    assert (bytes(view), view.format, view.itemsize, view.readonly) == (b"234", "B", 1, False)


async def test_a_view_follows_later_writes_and_growth(fd: int, mapping: Mapping) -> None:
    os.pwrite(fd, b"old", 0)
    old, new = mapping.view(0, 3), mapping.view(5 * MiB, 3)
    os.pwrite(fd, b"new", 0)
    os.pwrite(fd, b"end", 5 * MiB)
    assert (bytes(old), bytes(new)) == (b"new", b"end")


async def test_a_view_out_of_reach_is_refused(mapping: Mapping) -> None:
    assert len(mapping.view((1 << 40) - 1, 1)) == 1
    with pytest.raises(ValueError, match="out of the mapping's reach"):
        mapping.view((1 << 40) - 1, 2)


async def test_a_reach_of_64_tebibytes_is_possible_and_one_beyond_the_address_space_an_error(fd: int) -> None:
    large = Mapping(fd, 64 << 40)
    large.close()
    with pytest.raises(OSError, match="Cannot allocate memory") as caught:
        Mapping(fd, 1 << 47)
    assert caught.value.errno == errno.ENOMEM


async def test_the_mapping_outlives_its_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"still here")
    with open(tmp_path / "file", "rb") as file:
        mapping = Mapping(file.fileno(), 4096)
    assert bytes(mapping.view(0, 10)) == b"still here"
    mapping.close()


async def test_a_mapping_does_not_keep_the_locks_of_the_image(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    (tmp_path / "file").touch()
    with open(path, "r+b") as file:
        take_locks(file.fileno(), Sharing.WRITER, path)
        mapping = Mapping(file.fileno(), MiB)
    with open(path, "r+b") as file:
        take_locks(file.fileno(), Sharing.WRITER, path)
    mapping.close()


async def test_every_slice_and_cast_of_a_view_refers_to_its_generation(mapping: Mapping) -> None:
    view = mapping.view(0, 100)
    assert view.obj is mapping.generation
    assert view[5:50].obj is view[5:50].cast("c").obj is memoryview(view).obj is mapping.generation


async def test_retire_calls_back_when_the_last_view_dies(mapping: Mapping) -> None:
    calls = Calls()
    views = [mapping.view(0, 100), mapping.view(50, 100)]
    part = views[0][10:20]
    mapping.retire(calls)
    for _ in range(2):
        views.pop()
        await settle()
        assert calls.count == 0
    del part
    assert calls.count == 0  # soon, but never in the middle of something else
    await settle()
    assert calls.count == 1


async def test_retire_without_any_view_calls_back_soon(mapping: Mapping) -> None:
    calls = Calls()
    mapping.retire(calls)
    assert calls.count == 0
    await settle()
    assert calls.count == 1


async def test_a_view_of_the_new_generation_does_not_hold_up_the_old_one(mapping: Mapping) -> None:
    calls = Calls()
    mapping.retire(calls)
    view = mapping.view(0, 1)
    await settle()
    assert calls.count == 1
    del view


async def test_a_reference_to_the_generation_counts_as_a_view(mapping: Mapping) -> None:
    calls = Calls()
    held = mapping.generation
    mapping.retire(calls)
    await settle()
    assert calls.count == 0
    del held
    await settle()
    assert calls.count == 1


async def test_an_older_view_holds_up_every_younger_generation(mapping: Mapping) -> None:
    calls = Calls()
    view = mapping.view(0, 1)
    mapping.retire(Calls())
    mapping.retire(calls)
    await settle()
    assert calls.count == 0
    del view
    await settle()
    assert calls.count == 1


async def test_a_view_held_through_very_many_generations_lets_go_of_all_of_them(mapping: Mapping) -> None:
    calls = Calls()
    view = mapping.view(0, 1)
    for _ in range(100_000):
        mapping.retire(calls)
    del view
    await settle()
    assert calls.count == 100_000


async def test_a_view_that_dies_in_another_thread_calls_back_on_the_loop(mapping: Mapping) -> None:
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    held = [mapping.view(0, 1)]
    mapping.retire(lambda: told.set_result(threading.get_ident()))
    thread = threading.Thread(target=held.clear)
    thread.start()
    assert await told == threading.get_ident()
    thread.join()


async def test_closing_unmaps_at_once_when_no_view_lives(fd: int) -> None:
    mapping = Mapping(fd, MiB)
    pages = weakref.ref(mapping._pages)
    mapping.close()
    mapping.close()
    assert pages() is None


async def test_closing_leaves_views_alive(fd: int) -> None:
    os.pwrite(fd, b"alive", 0)
    mapping = Mapping(fd, MiB)
    pages = weakref.ref(mapping._pages)
    view = mapping.view(0, 5)
    mapping.close()
    assert bytes(view) == b"alive"
    del view
    assert pages() is None


async def test_a_closed_mapping_gives_no_views(mapping: Mapping) -> None:
    mapping.close()
    with pytest.raises(ValueError, match="reach"):
        mapping.view(0, 1)


async def test_a_retired_generation_of_a_loop_that_is_gone_dies_in_silence(fd: int) -> None:
    def other_loop() -> memoryview:
        async def main() -> memoryview:
            mapping = Mapping(fd, MiB)
            view = mapping.view(0, 1)
            mapping.retire(Calls())
            return view

        return asyncio.run(main())

    view = await asyncio.to_thread(other_loop)
    del view
    gc.collect()


async def test_sending_a_view_beyond_the_end_of_the_file_is_an_error_and_no_signal(mapping: Mapping) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(OSError, match="Bad address") as caught:
        ours.send(mapping.view(MiB, 4096))
    assert caught.value.errno == errno.EFAULT


def test_uvloop_holds_queued_views_until_they_are_sent(fd: int) -> None:
    os.pwrite(fd, b"x" * (4 * MiB), 0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        mapping = Mapping(fd, 4 * MiB)
        retired = asyncio.Event()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        cast("asyncio.WriteTransport", transport).writelines([mapping.view(i * MiB, MiB) for i in range(4)])
        mapping.retire(retired.set)
        received = 0
        while received < 2 * MiB:  # more than the socket buffers hold is still to come
            await settle()
            assert not retired.is_set()
            received += len(await loop.sock_recv(theirs, 2 * MiB - received))
        while received < 4 * MiB:
            received += len(await loop.sock_recv(theirs, MiB))
        await retired.wait()
        transport.close()
        theirs.close()
        mapping.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_parting_a_folio_changes_nothing_in_the_file_and_its_views(fd: int, mapping: Mapping) -> None:
    data = os.urandom(4 * MiB)
    os.pwrite(fd, data, 0)
    os.fdatasync(fd)
    view = mapping.view(MiB, 2 * MiB)
    for offset in (0, MiB + 5, 4 * MiB - 1):
        mapping.part_folio(offset)
    assert bytes(view) == data[MiB : 3 * MiB]
    assert os.pread(fd, 5 * MiB, 0) == data


async def test_what_is_not_in_memory_is_not_read_to_be_parted(fd: int, mapping: Mapping) -> None:
    os.pwrite(fd, bytes(range(256)) * (4 * MiB // 256), 0)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert mapping.view_now(2 * MiB, 4096) is None
    assert not mapping.part_folio(2 * MiB)
    assert mapping.view_now(2 * MiB, 4096) is None


async def test_behind_the_file_and_behind_the_mapping_nothing_is_parted(fd: int, mapping: Mapping) -> None:
    assert not mapping.part_folio(MiB)
    assert not mapping.part_folio(1 << 40)
    mapping.close()
    assert not mapping.part_folio(0)
