from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.block.remote.peers import Servers

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def servers() -> Iterator[Servers]:
    running = Servers()
    yield running
    running.kill()
    shutil.rmtree(running.directory)
