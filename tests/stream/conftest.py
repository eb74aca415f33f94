"""A source of a few clusters, served and not; records of images that tests leave unclosed do not stay in memory."""

from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed import record
from nbdstream.stream import source as source_module
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, some_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def records_of_their_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "DIRECTORY", str(tmp_path_factory.mktemp("records")))


@pytest.fixture
def directory() -> Iterator[str]:
    """A directory with a short name, as unix sockets need it."""
    path = tempfile.mkdtemp(prefix="nbdstream-")
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def disk() -> SourceDisk:
    """40 clusters."""
    return SourceDisk(some_bytes(40 * CLUSTER))


@pytest.fixture
async def server(directory: str, disk: SourceDisk) -> AsyncIterator[SourceServer]:
    """It runs."""
    server = SourceServer(f"{directory}/source", disk)
    await server.start()
    yield server
    disk.gate.set()
    await server.stop()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "overlay.qed")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is gone is looked for again soon."""
    monkeypatch.setattr(source_module, "_FIRST_PAUSE_SECONDS", 0.01)
