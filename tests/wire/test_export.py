from __future__ import annotations

from dataclasses import replace

import pytest

from nbdstream.wire.export import Agreement, ExportInfo, find_export
from nbdstream.wire.nbd import TransmissionFlag

DISK = ExportInfo("disk", 1 << 20, TransmissionFlag.HAS_FLAGS)


def test_the_empty_name_is_the_first_export() -> None:
    other = replace(DISK, name="other")
    assert find_export([DISK, other], "", DISK.name) is DISK
    assert find_export([DISK, other], "other", "") is other
    assert find_export([DISK, other], "none", DISK.name) is None
    assert find_export([], "", "gone") is None


def test_an_export_that_bears_the_empty_name_is_found_by_it() -> None:
    unnamed = replace(DISK, name="")
    assert find_export([DISK, unnamed], "", DISK.name) is unnamed


def test_df_is_offered_with_structured_replies_only() -> None:
    assert not Agreement(DISK, structured=False).flags & TransmissionFlag.SEND_DF
    assert Agreement(DISK, structured=True).flags & TransmissionFlag.SEND_DF


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "x" * 4097},
        {"name": "a\0b"},
        {"name": "\udcff"},
        {"description": "x" * 4097},
        {"size": 1 << 63},
        {"size": -1},
        {"minimum_block": 3},
        {"minimum_block": 1 << 17, "preferred_block": 1 << 17},
        {"preferred_block": 256},
        {"preferred_block": 6000},
        {"maximum_payload": 1024},
        {"minimum_block": 4096, "maximum_payload": 8191},
    ],
)
def test_what_a_client_would_not_understand_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        replace(DISK, **wrong)  # type: ignore[arg-type]
