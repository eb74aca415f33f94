"""For images that tests leave unclosed."""

from __future__ import annotations

import pytest

from nbdstream.block.qed import record


@pytest.fixture
def own_records(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have records that are left behind removed with the test's other files."""
    monkeypatch.setattr(record, "DIRECTORY", str(tmp_path_factory.mktemp("records")))
