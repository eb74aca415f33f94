from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Final

import pytest

from nbdstream.handover.journal import (
    Contents,
    DestinationSetup,
    Entry,
    Journal,
    JournalError,
    OfferedImage,
    SourceSetup,
    read_journal,
)
from nbdstream.wire.handover.messages import Disk
from nbdstream.wire.handover.vocabulary import DestinationRecord, Phase, SourceRecord

if TYPE_CHECKING:
    from pathlib import Path

DISK: Final = Disk("01234567-89ab-cdef-0123-456789abcdef", 512, "disk")
SETUP: Final = SourceSetup(
    1, "a" * 32, "b" * 32, (OfferedImage("/disk.img", "raw", 1, 2, DISK),), "127.0.0.1", 1, 2, tls=False, expires=3
)
OFFERED: Final = SourceRecord(Phase.OFFERED, 1)
FENCING: Final = SourceRecord(Phase.FENCING, 1, "d" * 32)


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path / "state")


def begin(directory: str) -> Journal:
    """Return a journal of an offer."""
    journal = Journal.open(directory)
    journal.begin(Contents(SETUP, [Entry(time.time(), OFFERED, "offered")]))
    return journal


def records(directory: str) -> list[SourceRecord]:
    """Return what a restart finds."""
    journal = Journal.open(directory)
    try:
        found = journal.read_source()
        assert found
        return [entry.record for entry in found.entries]
    finally:
        journal.close()


def test_a_new_directory_is_private_and_holds_nothing(directory: str) -> None:
    journal = Journal.open(directory)
    assert os.stat(directory).st_mode & 0o777 == 0o700
    assert journal.read_source() is None
    journal.close()


def test_a_restart_finds_what_was_written(directory: str) -> None:
    journal = begin(directory)
    journal.append(FENCING, "why")
    journal.close()
    assert records(directory) == [OFFERED, FENCING]
    assert os.stat(f"{directory}/journal").st_mode & 0o777 == 0o600


def test_one_process_has_a_directory(directory: str) -> None:
    journal = begin(directory)
    with pytest.raises(JournalError, match="in use by another process"):
        Journal.open(directory)
    journal.close()
    Journal.open(directory).close()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_a_crash_cut_short_is_dropped_and_the_next_is_whole(cut: int, directory: str) -> None:
    journal = begin(directory)
    journal.append(FENCING, "")
    journal.close()
    os.truncate(f"{directory}/journal", os.path.getsize(f"{directory}/journal") - cut)
    journal = Journal.open(directory)
    found = journal.read_source()
    assert found
    assert found.record == OFFERED
    journal.begin(found)
    journal.append(FENCING, "again")
    journal.close()
    assert records(directory) == [OFFERED, FENCING]


def test_blocks_of_zeroes_that_a_crash_left_at_the_end_are_dropped(directory: str) -> None:
    begin(directory).close()
    with open(f"{directory}/journal", "ab") as file:
        file.write(bytes(100) + b"\n")
    assert records(directory) == [OFFERED]


def test_a_line_that_is_wrong_in_the_middle_is_an_error(directory: str) -> None:
    journal = begin(directory)
    journal.append(FENCING, "")
    journal.append(OFFERED, "")
    journal.close()
    with open(f"{directory}/journal", "r+b") as file:
        data = file.read().replace(b'"fencing"', b'"granted"')
        file.seek(0)
        file.write(data)
    with pytest.raises(JournalError, match="damaged"):
        records(directory)


@pytest.mark.parametrize("data", [b"", b"\n", b"hello\n", b"00000000 {}\n"])
def test_what_is_no_journal_is_an_error(data: bytes, directory: str) -> None:
    os.mkdir(directory)
    with open(f"{directory}/journal", "wb") as file:
        file.write(data)
    with pytest.raises(JournalError, match=r"is damaged|is no journal"):
        records(directory)


def test_the_journal_of_the_other_side_is_an_error(directory: str) -> None:
    begin(directory).close()
    journal = Journal.open(directory)
    with pytest.raises(JournalError, match="the other side"):
        journal.read_destination()
    journal.close()


def test_either_side_can_be_looked_at_while_it_runs(directory: str) -> None:
    journal = begin(directory)
    assert read_journal(directory).record == OFFERED
    journal.close()
    with pytest.raises(JournalError, match="holds no hand-over"):
        read_journal(f"{directory}/nothing")


def test_a_destination_has_one_too(directory: str) -> None:
    record = DestinationRecord(Phase.PREPARED, 1, (DISK,), 10809)
    journal = Journal.open(directory)
    journal.begin(Contents(DestinationSetup(1, "handover://", "d" * 32, ("/o.qed",)), [Entry(time.time(), record)]))
    journal.append(record, "again")
    journal.close()
    assert read_journal(directory).record == record


def test_a_disk_that_is_full_ends_it(directory: str) -> None:
    journal = begin(directory)
    os.close(journal._fd)
    journal._fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(JournalError, match="cannot be written: No space left on device"):
        journal.append(FENCING, "")
    journal.close()


def test_what_is_being_appended_is_whole_before_it_is_closed(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begin(directory)
    begun, go_on = threading.Event(), threading.Event()
    fdatasync = os.fdatasync

    def slow(fd: int) -> None:
        begun.set()
        go_on.wait(10)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    appending = threading.Thread(target=journal.append, args=(FENCING, ""))
    appending.start()
    assert begun.wait(10)
    closing = threading.Thread(target=journal.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    go_on.set()
    closing.join()
    appending.join()
    assert records(directory) == [OFFERED, FENCING]


def test_behind_its_end_nothing_is_appended_to_whatever_file_that_may_be(directory: str, tmp_path: Path) -> None:
    journal = begin(directory)
    journal.close()
    with (tmp_path / "another").open("wb"), (tmp_path / "one more").open("wb"):
        with pytest.raises(JournalError):
            journal.append(FENCING, "")
        assert records(directory) == [OFFERED]
        assert not any((tmp_path / name).stat().st_size for name in ("another", "one more"))
