"""Both sides of a hand-over as the commands they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.handover.hosts import Hosts
from tests.handover.links import Loopback

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Both sides, prepared."""
    with Hosts(tmp_path, Loopback()) as made:
        made.start("source")
        made.start("destination")
        made.until("source", "PREPARED")
        yield made
