"""The record: what was answered to a guest survives a kill -9, though no barrier has passed; a power cut voids it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import create_file, open_file, read_header
from nbdstream.block.qed.record import DIRECTORY, Record, read_record, record_path
from nbdstream.block.qed.repair import repair
from nbdstream.errors import ImageError
from tests.support.crash import Image
from tests.support.memory import MemoryDevice
from tests.support.qed import qemu_check, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

CLUSTER = 65536
SIZE = 64 * CLUSTER
BELOW = b"\x11" * SIZE

_OWNER = """
import asyncio, os, signal, sys
from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from tests.support.memory import MemoryDevice

async def main():
    # No barrier ever ends: nothing is linked but by whoever opens the image next.
    os.fdatasync = lambda fd: __import__("time").sleep(3600) if armed else None
    armed = False
    image = await QedImage.open(sys.argv[1], writable=True)
    overlay = Overlay(image, MemoryDevice(b"\\x11" * image.size))
    await overlay.discard(63 * 65536, 65536)  # which makes the table
    armed = True
    await asyncio.gather(*(overlay.write(i * 65536 + 5, bytes([i]) * 10) for i in range(40)))
    await overlay.discard(50 * 65536, 65536)
    await overlay.write(3 * 65536 + 8, b"again")
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def killed_owner(path: Path) -> None:
    create_file(str(path), SIZE, cluster_size=CLUSTER, table_size=4, backing_name="nbd://nowhere")
    ended = subprocess.run([sys.executable, "-c", _OWNER, str(path)], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL


def expected() -> bytes:
    model = bytearray(BELOW)
    for i in range(40):
        model[i * CLUSTER + 5 : i * CLUSTER + 15] = bytes([i]) * 10
    model[50 * CLUSTER : 51 * CLUSTER] = bytes(CLUSTER)
    model[3 * CLUSTER + 8 : 3 * CLUSTER + 13] = b"again"
    return bytes(model[: 63 * CLUSTER]) + bytes(CLUSTER)


async def contents(path: Path, *, writable: bool = True) -> bytes:
    image = await QedImage.open(str(path), writable=writable)
    overlay = Overlay(image, MemoryDevice(BELOW))
    data = b"".join(bytes(buffer) for buffer in await overlay.read(0, SIZE))
    await overlay.close()
    return data


def records(path: Path) -> list[str]:
    """The records of one image."""
    extension = read_header(str(path))[1]
    assert extension
    return [f"{DIRECTORY}/{name}" for name in os.listdir(DIRECTORY) if str(extension.image_uuid) in name]


async def test_the_next_owner_links_what_a_killed_one_had_answered(tmp_path: Path) -> None:
    killed_owner(tmp_path / "o")
    assert await contents(tmp_path / "o") == expected()
    assert not qemu_check(str(tmp_path / "o")).corruptions
    assert not records(tmp_path / "o")


async def test_without_its_record_the_image_is_what_a_power_cut_leaves(tmp_path: Path) -> None:
    killed_owner(tmp_path / "o")
    for path in records(tmp_path / "o"):
        os.unlink(path)
    assert await contents(tmp_path / "o") == BELOW[: 63 * CLUSTER] + bytes(CLUSTER)


async def test_a_record_is_void_once_qemu_has_written_to_the_image(tmp_path: Path) -> None:
    killed_owner(tmp_path / "o")
    image = '{"driver":"qed","backing":null,"file":{"driver":"file","filename":"%s"}}' % (tmp_path / "o")
    qemu_io(f"json:{image}", "write -P 0x22 0 64k")
    assert (await contents(tmp_path / "o"))[: 2 * CLUSTER] == b"\x22" * CLUSTER + b"\x11" * CLUSTER
    assert not records(tmp_path / "o")


async def test_for_reading_an_image_with_a_record_is_what_its_guest_wrote(tmp_path: Path) -> None:
    killed_owner(tmp_path / "o")
    before = (tmp_path / "o").read_bytes()
    assert await contents(tmp_path / "o", writable=False) == expected()
    assert (tmp_path / "o").read_bytes() == before
    assert await contents(tmp_path / "o") == expected()


async def test_a_closed_image_leaves_no_record(tmp_path: Path) -> None:
    create_file(str(tmp_path / "o"), SIZE, cluster_size=CLUSTER, table_size=4, backing_name=None)
    image = await QedImage.open(str(tmp_path / "o"), writable=True)
    assert len(records(tmp_path / "o")) == 1
    await Overlay(image).write(0, b"x")
    await image.close()
    assert not records(tmp_path / "o")
    assert read_header(str(tmp_path / "o"))[0].autoclear_features


def test_somebody_elses_record_is_not_believed(tmp_path: Path) -> None:
    with open(tmp_path / "image", "w+b") as image:
        uuid = uuid4()
        record = Record.create(image.fileno(), uuid)
        assert record
        path = next(f"{DIRECTORY}/{name}" for name in os.listdir(DIRECTORY) if str(uuid) in name)
        os.chmod(path, 0o666)
        with pytest.raises(ImageError, match="belongs to"):
            read_record(image.fileno(), uuid)
        record.close()


def test_a_fifo_in_the_place_of_a_record_is_refused_at_once(image: BinaryIO) -> None:
    path = record_path(image.fileno(), uuid := uuid4())
    os.mkfifo(path, 0o600)
    try:
        with pytest.raises(ImageError, match=f"{path}, is no file"):
            read_record(image.fileno(), uuid)
    finally:
        os.unlink(path)


link = st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 60))


@given(st.lists(st.one_of(link, st.sampled_from(["begin", "done"])), max_size=60))
def test_what_is_read_is_what_was_noted_and_not_cleared(steps: list[tuple[int, int] | str]) -> None:
    uuid = UUID(int=1)
    with open(__file__, "rb") as image:
        record = Record.create(image.fileno(), uuid)
        assert record
        old: list[tuple[int, int]] = []
        new: list[tuple[int, int]] = []
        running: int | None = None
        for step in steps:
            if isinstance(step, tuple):
                record.note(*step)
                new.append(step)
            elif step == "begin" and running is None:
                running = record.begin_epoch()
                old, new = new, []
            elif step == "done" and running is not None:
                record.clear(running)
                running, old = None, []
        assert read_record(image.fileno(), uuid) == old + new
        record.close()


# -- a directory that is everybody's ------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Iterator[BinaryIO]:
    with open(tmp_path / "image", "w+b") as file:
        yield file


def path_of(uuid: UUID) -> str:
    return next(f"{DIRECTORY}/{name}" for name in os.listdir(DIRECTORY) if str(uuid) in name)


def test_a_record_that_was_removed_is_made_again_with_all_that_is_noted(
    image: BinaryIO, caplog: pytest.LogCaptureFixture
) -> None:
    uuid = uuid4()
    record = Record.create(image.fileno(), uuid)
    assert record
    record.note(1, 10)
    os.unlink(path_of(uuid))
    half = record.begin_epoch()
    record.note(2, 20)
    assert read_record(image.fileno(), uuid) == [(1, 10), (2, 20)]
    assert "was removed and is made again" in caplog.text
    record.clear(half)
    assert read_record(image.fileno(), uuid) == [(2, 20)]
    record.close()
    assert not [name for name in os.listdir(DIRECTORY) if str(uuid) in name]


def test_where_it_cannot_be_made_again_nothing_more_is_noted(
    image: BinaryIO, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uuid = uuid4()
    record = Record.create(image.fileno(), uuid)
    assert record
    os.unlink(path_of(uuid))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    record.clear(record.begin_epoch())
    assert record.gone
    assert "cannot be made again" in caplog.text
    record.close()


async def test_writes_whose_record_is_gone_wait_for_their_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_file(str(tmp_path / "o"), SIZE, cluster_size=CLUSTER, table_size=4, backing_name=None)
    image = await QedImage.open(str(tmp_path / "o"), writable=True)
    overlay = Overlay(image)
    await overlay.write(0, b"x" * CLUSTER)
    await overlay.flush()
    os.unlink(*records(tmp_path / "o"))
    monkeypatch.setattr(os, "link", lambda *_args, **_kwargs: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    await overlay.write(CLUSTER, b"y" * CLUSTER)
    await image.linked()  # here it is found out
    await overlay.write(2 * CLUSTER, b"z" * CLUSTER)
    assert not image.unlinked
    await overlay.close()
    assert not qemu_check(str(tmp_path / "o")).status


def test_what_killed_owners_leave_shrinks_to_what_it_notes(image: BinaryIO, tmp_path: Path) -> None:
    left_over = uuid4()
    record = Record.create(image.fileno(), left_over)
    assert record
    record.note(1, 10)
    record.note(2, 20)
    path = path_of(left_over)
    in_use = os.stat(path).st_blocks
    other = Record.create(image.fileno(), UUID(int=7))
    assert other
    assert os.stat(path).st_blocks == in_use, "it has an owner"
    record._memory.close()  # as a kill does
    os.close(record._fd)
    other.close()
    other = Record.create(image.fileno(), UUID(int=7))
    assert other
    assert os.stat(path).st_blocks <= 24 < in_use
    assert read_record(image.fileno(), left_over) == [(1, 10), (2, 20)]
    other.close()
    os.unlink(path)


# -- what is in it is not believed ----------------------------------------------------------------------------------


class Left:
    """What a killed owner left, which can be put back as it was: the image and its record."""

    def __init__(self, path: Path) -> None:
        killed_owner(path)
        (self.record,) = records(path)
        self._path = path
        self._image = path.read_bytes()
        self.noted = Path(self.record).read_bytes()

    def put_back(self, record: bytes) -> None:
        with open(self._path, "r+b") as file:  # the same inode
            file.write(self._image)
            file.truncate(len(self._image))
        with open(os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(record)


@pytest.fixture
def left(tmp_path: Path) -> Left:
    return Left(tmp_path / "o")


HEADS = [*range(80), *range(4096, 4096 + 42 * 24), *range(4096 + (24 << 16), 4096 + (24 << 16) + 48)]
"""Where a record says something: its header, and the links in its halves."""


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.sampled_from(HEADS), st.binary(min_size=1, max_size=32)), max_size=4),
       length=st.one_of(st.none(), st.integers(0, 5 << 20)))  # fmt: skip
def test_a_damaged_record_is_refused_or_links_only_what_was_noted(
    left: Left, tmp_path: Path, changes: list[tuple[int, bytes]], length: int | None
) -> None:
    damaged = bytearray(left.noted)
    for place, data in changes:
        damaged[place : place + len(data)] = data
    left.put_back(bytes(damaged) if length is None else bytes(damaged[:length]).ljust(length, b"\xff"))
    try:
        found = asyncio.run(contents(tmp_path / "o"))
    except ImageError:
        os.unlink(left.record)
        found = asyncio.run(contents(tmp_path / "o"))
    whole = expected()
    for start in range(0, SIZE, CLUSTER):
        part = slice(start, start + CLUSTER)
        assert (found[part] in (whole[part], BELOW[part])) is True, f"cluster {start // CLUSTER}"


PLACES = ["header", "L1 table", "L2 table", "end of the L2 table", "other cluster", "other link"]


class Noted:
    """An image with data in its first two clusters, and room for two more; and whoever opens it finds a record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        create_file(str(path), SIZE, cluster_size=CLUSTER, table_size=4, backing_name="nbd://nowhere")
        asyncio.run(self._fill())
        opened = open_file(str(path), lambda _fd: None, writable=True)
        assert opened.record
        self._record, self._fd = opened.record, opened.fd
        os.truncate(path, opened.space.end + 2 * CLUSTER)
        self.room = [opened.space.end, opened.space.end + CLUSTER]
        l1, l2 = opened.header.l1_table_offset, opened.tables.l1[0]
        self.data = Image(path.read_bytes()).mapped
        in_use = [CLUSTER, l1, l2, l2 + 3 * CLUSTER, self.data[1], self.room[0]]
        self.places = dict(zip(PLACES, in_use, strict=True))

    async def _fill(self) -> None:
        overlay = Overlay(await QedImage.open(str(self._path), writable=True), MemoryDevice(BELOW))
        await overlay.write(0, b"0" * CLUSTER + b"1" * CLUSTER)
        await overlay.close()

    def killed(self, *links: tuple[int, int]) -> Path:
        """Leave the image as an owner does that is killed when these links are noted."""
        for link in links:
            self._record.note(*link)
        self._record._memory.close()
        os.close(self._record._fd)
        os.close(self._fd)
        return self._path


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    return Noted(tmp_path / "o")


def reopened(path: Path) -> None:
    asyncio.run(contents(path))


def repaired(path: Path) -> None:
    with path.open("r+b") as file:
        repair(file.fileno())


@pytest.mark.parametrize("command", [reopened, repaired])
@pytest.mark.parametrize("place", PLACES)
def test_a_record_that_leads_to_what_is_in_use_is_refused_before_anything_is_written(
    noted: Noted, place: str, command: Callable[[Path], None]
) -> None:
    path = noted.killed((7, noted.room[0]), (6, noted.places[place]))
    before = path.read_bytes()
    (record,) = records(path)
    with pytest.raises(ImageError, match=f"record of its last owner, {record}, is damaged: it says that cluster"):
        command(path)
    assert (path.read_bytes() == before) is True
    assert records(path) == [record]


@pytest.mark.parametrize("command", [reopened, repaired])
def test_a_record_of_what_is_linked_already_is_no_mistake(noted: Noted, command: Callable[[Path], None]) -> None:
    path = noted.killed((7, noted.room[1]), (1, noted.data[1]), (7, noted.room[0]))
    command(path)
    assert Image(path.read_bytes()).mapped == noted.data | {7: noted.room[0]}
