"""A source of a few clusters, served and not."""

from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, some_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


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
