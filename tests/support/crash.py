"""Power cuts and kills, simulated: every write to a file is recorded, and what a crash could leave is made from that.

A sector of 512 bytes is on the disk or not, whatever became of its neighbours and of what was written before or
after it, until an fdatasync that began after it was written has returned. What a kill leaves is all that was written,
and the record of links in memory (nbdstream.block.qed.record).

The images are looked at by code of this module's own, which shares nothing with what it is used to test.
"""

from __future__ import annotations

import itertools
import os
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbdstream.block.qed.opening import read_header
from nbdstream.block.qed.record import AUTOCLEAR_RECORD, Link, Record, read_record

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import pytest

SECTOR = 512
_GARBAGE = b"\xdb" * SECTOR


@dataclass(frozen=True)
class Event:
    """A system call on the recorded file. Moments (``begin``, ``end``) are numbers that only grow."""

    kind: str
    """write, truncate or sync."""
    begin: int
    end: int
    offset: int = 0
    data: bytes = b""

    @property
    def reach(self) -> int:
        """Where a write ends; the length that a truncate leaves."""
        return self.offset + len(self.data)


class Recording:
    """What was done to one file, and the states that follow from it."""

    def __init__(self, initial: bytes, events: Iterable[Event] = ()) -> None:
        """``initial`` is what was in the file, and durable, before."""
        self.initial = initial
        self.events = list(events)

    @property
    def end(self) -> int:
        """The moment behind everything."""
        return max((event.end for event in self.events), default=0)

    def killed(self, moment: int) -> bytes:
        """What the file is when the process is killed: all that was written until then."""
        disk = _Disk(self.initial)
        for event in self._changes(moment):
            if event.end <= moment:
                disk.apply(event)
        return disk.content()

    def power_cut(self, moment: int, chance: random.Random) -> bytes:
        """A state that the file could be in after a power cut.

        The writes that no barrier covers are there or not, sector by sector, or each as a whole.
        """
        disk, pending = self._durable(moment)
        sizes = [len(disk.bytes)]
        for event in pending:
            sizes.append(event.reach if event.kind == "truncate" else max(sizes[-1], event.reach))
        size = chance.choice([*sizes, max(sizes)])
        disk.grow(max(sizes), _GARBAGE if chance.random() < 0.5 else bytes(SECTOR))
        whole = chance.random() < 0.5
        probability = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        for event in pending:
            if whole:
                probability = float(chance.random() < 0.5)
            disk.apply_sectors(event, lambda: chance.random() < probability)  # noqa: B023 - called at once
        return bytes(disk.bytes[:size])

    def every_power_cut(self, moment: int) -> Iterator[bytes]:
        """The states after a power cut in which every write is there or not as a whole."""
        disk, pending = self._durable(moment)
        for chosen in itertools.product((False, True), repeat=len(pending)):
            state = _Disk(bytes(disk.bytes))
            for event, wanted in zip(pending, chosen, strict=True):
                if wanted:
                    state.apply(event)
            yield state.content()

    def pending(self, moment: int) -> int:
        """How many changes no barrier covers yet."""
        return len(self._durable(moment)[1])

    def _changes(self, moment: int) -> list[Event]:
        """The writes and truncations that had begun, in the order of their ends."""
        changes = [event for event in self.events if event.kind != "sync" and event.begin <= moment]
        return sorted(changes, key=lambda event: event.end)

    def _durable(self, moment: int) -> tuple[_Disk, list[Event]]:
        """What is surely on the disk, and the changes that may be."""
        covered = max((sync.begin for sync in self.events if sync.kind == "sync" and sync.end <= moment), default=0)
        disk = _Disk(self.initial)
        pending = []
        for event in self._changes(moment):
            if event.end < covered:
                disk.apply(event)
            else:
                pending.append(event)
        return disk, pending


class Recorder(Recording):
    """Records what this process does to one file, from all of its threads."""

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with open(path, "rb") as file:
            super().__init__(file.read())
        self._path = path
        self._identity = self._of(os.stat(path))
        self._noted: list[tuple[int, list[Link]]] = [(0, [])]
        self._clock = itertools.count(1)
        self._wrap(monkeypatch, "pwrite", self._written)
        self._wrap(monkeypatch, "pwritev", self._written_in_pieces)
        self._wrap(monkeypatch, "ftruncate", self._truncated)
        self._wrap(monkeypatch, "fdatasync", self._synced)
        self._wrap(monkeypatch, "fsync", self._synced)
        for name in ("note", "begin_epoch", "clear", "close"):
            self._wrap_record(monkeypatch, name)

    def now(self) -> int:
        """A moment: what happened before has a smaller number, what happens later a larger one."""
        return next(self._clock)

    @staticmethod
    def _of(stat: os.stat_result) -> tuple[int, int]:
        return stat.st_dev, stat.st_ino

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str, note: Callable[..., None]) -> None:
        call: Callable[..., Any] = getattr(os, name)

        def recorded(fd: int, *args: Any) -> Any:
            if self._of(os.fstat(fd)) != self._identity:
                return call(fd, *args)
            begin = self.now()
            result = call(fd, *args)
            note(begin, result, *args)
            return result

        monkeypatch.setattr(os, name, recorded)

    def _wrap_record(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        call: Callable[..., Any] = getattr(Record, name)

        def recorded(record: Record, *args: Any) -> Any:
            result = call(record, *args)
            self._noted.append((self.now(), self._read_record()))
            return result

        monkeypatch.setattr(Record, name, recorded)

    def _read_record(self) -> list[Link]:
        """What whoever opens the file after a kill finds noted."""
        _, extension, _ = read_header(self._path)
        if extension is None:
            return []
        with open(self._path, "rb") as file:
            return read_record(file.fileno(), extension.image_uuid)

    def _written(self, begin: int, count: int, data: bytes, offset: int) -> None:
        self.events.append(Event("write", begin, self.now(), offset, bytes(data)[:count]))

    def _written_in_pieces(self, begin: int, count: int, pieces: Sequence[bytes], offset: int) -> None:
        self._written(begin, count, b"".join(map(bytes, pieces)), offset)

    def _truncated(self, begin: int, _: None, length: int) -> None:
        self.events.append(Event("truncate", begin, self.now(), length))

    def _synced(self, begin: int, _: None) -> None:
        self.events.append(Event("sync", begin, self.now()))

    def noted(self, moment: int) -> list[Link]:
        """What the record in memory says at a moment."""
        return self._noted[bisect_right([when for when, _ in self._noted], moment) - 1][1]


class _Disk:
    """The contents of a file, in the making."""

    def __init__(self, content: bytes) -> None:
        self.bytes = bytearray(content)

    def grow(self, size: int, filling: bytes = bytes(SECTOR)) -> None:
        missing = size - len(self.bytes)
        if missing > 0:
            self.bytes += (filling * (missing // SECTOR + 1))[:missing]

    def apply(self, event: Event) -> None:
        if event.kind == "truncate":
            del self.bytes[event.offset :]
        self.grow(event.reach)
        self.bytes[event.offset : event.reach] = event.data

    def apply_sectors(self, event: Event, wanted: Callable[[], bool]) -> None:
        """Apply some of an event, sector by sector. The length stays as it is."""
        if event.kind == "truncate":
            length = len(self.bytes) - event.offset
            if length > 0 and wanted():
                self.bytes[event.offset :] = bytes(length)
            return
        position = event.offset
        while position < event.reach:
            end = min(position - position % SECTOR + SECTOR, event.reach)
            if wanted():
                self.bytes[position:end] = event.data[position - event.offset : end - event.offset]
            position = end

    def content(self) -> bytes:
        return bytes(self.bytes)


class DamagedError(AssertionError):
    """A crash left an image that is damaged, or lost what it must not lose."""


class Image:
    """A QED image in memory, with links that are in it only when they were replayed.

    Validated entry by entry: raises DamagedError where one cannot be right.
    """

    def __init__(self, content: bytes, noted: Sequence[Link] = ()) -> None:
        self._content = content
        table_size: int
        header_size: int
        l1_place: int
        fields = struct.unpack_from("<4sIIIQQQQQ", content)
        self.cluster_size, table_size, header_size, features, _, autoclear_features, l1_place, _ = fields[1:]
        self.has_backing = bool(features & 1)
        if noted and not autoclear_features & AUTOCLEAR_RECORD:
            raise DamagedError("there is a record, and the header does not say so")
        self._table_bytes: int = table_size * self.cluster_size
        self.entries: int = self._table_bytes // 8
        self._used = set(range(header_size))
        self.mapped: dict[int, int] = {}
        """Cluster to L2 entry, for all that are not unallocated."""
        for index, place in enumerate(self._table(l1_place, "the L1 table")):
            if place:
                entries = enumerate(self._table(place, f"L2 table {index}"), index * self.entries)
                self.mapped.update((cluster, entry) for cluster, entry in entries if entry)
        self.mapped.update(noted)
        for cluster, entry in self.mapped.items():
            if entry != 1:
                self._take(entry, self.cluster_size, f"cluster {cluster}")

    @property
    def unused(self) -> int:
        """How many clusters of the file nothing leads to."""
        clusters: int = len(self._content) // self.cluster_size
        return clusters - len(self._used)

    def _table(self, place: int, what: str) -> Sequence[int]:
        self._take(place, self._table_bytes, what)
        return struct.unpack_from(f"<{self.entries}Q", self._content, place)

    def _take(self, place: int, length: int, what: str) -> None:
        if place % self.cluster_size or place + length > len(self._content):
            raise DamagedError(f"{what} is said to be at {place:#x}, where the file has no such place")
        for number in range(place // self.cluster_size, (place + length) // self.cluster_size):
            if number in self._used:
                raise DamagedError(f"{what} is at {place:#x}, which is used already")
            self._used.add(number)

    def read(self, cluster: int) -> bytes | None:
        """What a cluster of the disk reads as; None if it is unallocated."""
        entry = self.mapped.get(cluster, 0)
        if entry <= 1:
            return bytes(self.cluster_size) if entry else None
        return self._content[entry : entry + self.cluster_size]


@dataclass
class Written:
    """A write into one sector."""

    begun: int
    value: bytes
    answered: int | None = None
    durable: int | None = None


@dataclass
class Model:
    """What may be read from a disk after a crash, sector by sector. Nobody writes a sector twice at the same time."""

    below: bytes
    """What is read where nothing was written."""
    history: dict[int, list[Written]] = field(default_factory=dict)
    flushes: list[tuple[int, int]] = field(default_factory=list)
    """When it began and when it was answered."""

    def begin(self, moment: int, offset: int, data: bytes) -> list[Written]:
        """Take note of a write that is about to begin; the result is for :meth:`answered`."""
        written = []
        for position in range(0, len(data), SECTOR):
            entry = Written(moment, data[position : position + SECTOR])
            self.history.setdefault((offset + position) // SECTOR, []).append(entry)
            written.append(entry)
        return written

    @staticmethod
    def answered(moment: int, written: list[Written], *, durable: bool = False) -> None:
        """Take note that a write was answered; ``durable`` if it was asked to be (FUA)."""
        for entry in written:
            entry.answered = moment
            entry.durable = moment if durable else None

    def check_power_cut(self, content: bytes, moment: int) -> None:
        """Raise DamagedError unless this may be there: what was flushed, or newer."""
        begins = [began for began, answered in self.flushes if answered <= moment]
        self._check(Image(content), moment, answered_before=max(begins, default=0))

    def check_killed(self, recorder: Recorder, moment: int) -> None:
        """Raise DamagedError unless what a kill leaves is what was answered, or newer."""
        image = Image(recorder.killed(moment), recorder.noted(moment))
        self._check(image, moment, answered_before=moment)

    def _check(self, image: Image, moment: int, *, answered_before: int) -> None:
        size = image.cluster_size
        written = {sector * SECTOR // size for sector in self.history}
        clusters = image.mapped.keys() | written
        if not image.has_backing:
            clusters = clusters | set(range(-(-len(self.below) // size)))
        for cluster in clusters:
            found = image.read(cluster)
            below = self.below[cluster * size : (cluster + 1) * size].ljust(size, b"\0")
            if found is None:
                found = below if image.has_backing else bytes(size)
            if cluster in written:
                self._check_sectors(cluster, found, below, moment, answered_before)
            elif found != below:
                raise DamagedError(f"at {moment}: cluster {cluster}, not written, reads {found[:16]!r}...")

    def _check_sectors(self, cluster: int, found: bytes, below: bytes, moment: int, answered_before: int) -> None:
        first = cluster * len(found) // SECTOR
        for position in range(0, len(found), SECTOR):
            part = slice(position, position + SECTOR)
            history = self.history.get(first + position // SECTOR, ())
            if found[part] not in _allowed(below[part], history, moment, answered_before):
                sector = first + position // SECTOR
                raise DamagedError(f"at {moment}: sector {sector} reads {found[part][:16]!r}...")


def _allowed(below: bytes, history: Sequence[Written], moment: int, answered_before: int) -> list[bytes]:
    values = [below]
    for entry in history:
        if entry.begun > moment:
            break
        promised = entry.answered is not None and entry.answered <= answered_before
        if promised or (entry.durable is not None and entry.durable <= moment):
            values.clear()  # it is there, or something newer is
        values.append(entry.value)
    return values


def check_order(recorder: Recorder) -> int:
    """Raise DamagedError if a link was written before a barrier behind what it leads to; return how many links were.

    A write is taken for links if it goes to the L1 table or an L2 table that the L1 table leads to. Nothing may be
    written twice in the recorded time but tables.
    """
    changes = [event for event in recorder.events if event.kind == "write"]
    barriers = [event for event in recorder.events if event.kind == "sync"]
    _, cluster_size, table_size, *_, l1_place, _ = struct.unpack_from("<4sIIIQQQQQ", recorder.initial)
    table_bytes = table_size * cluster_size
    tables = {l1_place: table_bytes}  # place of a table to the length of what its entries lead to
    for (entry,) in struct.iter_unpack("<Q", recorder.initial[l1_place : l1_place + table_bytes]):
        if entry:
            tables[entry] = cluster_size
    disk = _Disk(recorder.initial)
    links = 0
    for change in sorted(changes, key=lambda event: event.begin):
        table = next((place for place in tables if place <= change.offset < place + table_bytes), None)
        before = bytes(disk.bytes[change.offset : change.reach])
        disk.apply(change)
        if table is None:
            continue
        length = tables[table]
        entries = zip(struct.iter_unpack("<Q", before), struct.iter_unpack("<Q", change.data), strict=True)
        for place in [new for (old,), (new,) in entries if new != old and new > 1]:
            links += 1
            if table == l1_place:
                tables[place] = cluster_size
            _check_link(change, place, length, changes, barriers)
            if table == l1_place:  # what a new table leads to must be as durable as itself
                for (entry,) in struct.iter_unpack("<Q", disk.bytes[place : place + table_bytes]):
                    if entry > 1:
                        links += 1
                        _check_link(change, entry, cluster_size, changes, barriers)
    return links


def _check_link(link: Event, place: int, length: int, changes: list[Event], barriers: list[Event]) -> None:
    data = [event for event in changes if event.offset < place + length and event.reach > place and event is not link]
    written = [event for event in data if event.begin < link.begin]
    if not written:
        raise DamagedError(f"the link to {place:#x} was written before what is there")
    last = max(event.end for event in written)
    if not any(last < barrier.begin and barrier.end < link.begin for barrier in barriers):
        raise DamagedError(f"no barrier between what is at {place:#x} and the link to it")
