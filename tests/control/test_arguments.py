"""Arguments are checked as QAPI has them, and refused in QEMU's words (compared with qemu-storage-daemon)."""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar, Literal

import pytest
from msgspec import UNSET, UnsetType

from nbdstream.control.arguments import Arguments, Int, parse_arguments
from nbdstream.wire.qmp import ErrorClass, QmpError


class Colour(Enum):
    RED = "red"


class Some(Arguments):
    REFUSED: ClassVar[dict[str, str]] = {"iothread": "there are none"}

    job_id: str
    speed: Int
    ready: bool = False
    names: list[str] | UnsetType = UNSET
    mode: Literal["safe", "hard"] | UnsetType = UNSET
    colour: Colour | UnsetType = UNSET
    note: str | UnsetType = UNSET


GOOD: dict[str, Any] = {"job-id": "a", "speed": 5}


def test_names_have_hyphens_and_what_is_optional_is_unset() -> None:
    some = parse_arguments(GOOD, Some)
    assert (some.job_id, some.speed, some.ready, some.names, some.note) == ("a", 5, False, UNSET, UNSET)


def test_everything_can_be_given() -> None:
    given = GOOD | {"ready": True, "names": ["x"], "mode": "hard", "colour": "red", "note": ""}
    some = parse_arguments(given, Some)
    assert (some.ready, some.names, some.mode, some.colour, some.note) == (True, ["x"], "hard", Colour.RED, "")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"job-id": None}, "Invalid parameter type for 'job-id', expected: string"),
        ({"job-id": 5}, "Invalid parameter type for 'job-id', expected: string"),
        ({"speed": "5"}, "Invalid parameter type for 'speed', expected: integer"),
        ({"speed": 1.5}, "Invalid parameter type for 'speed', expected: integer"),
        ({"speed": True}, "Invalid parameter type for 'speed', expected: integer"),
        ({"speed": 1 << 63}, "Invalid parameter type for 'speed', expected: integer"),
        ({"ready": 1}, "Invalid parameter type for 'ready', expected: boolean"),
        ({"names": "x"}, "Invalid parameter type for 'names', expected: array"),
        ({"names": [5]}, "Invalid parameter type for 'names', expected: array"),
        ({"names": None}, "Invalid parameter type for 'names', expected: array"),
        ({"note": None}, "Invalid parameter type for 'note', expected: string"),
        ({"mode": "x"}, "Parameter 'mode' does not accept value 'x'"),
        ({"mode": 5}, "Invalid parameter type for 'mode', expected: string"),
        ({"colour": "blue"}, "Parameter 'colour' does not accept value 'blue'"),
        ({"job_id": "a"}, "Parameter 'job_id' is unexpected"),
        ({"other": 1}, "Parameter 'other' is unexpected"),
        ({"iothread": 1}, "Parameter 'iothread' is not supported: there are none"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(QmpError) as caught:
        parse_arguments(GOOD | change, Some)
    assert str(caught.value) == text
    assert caught.value.error_class is ErrorClass.GENERIC


@pytest.mark.parametrize("member", ["job-id", "speed"])
def test_what_is_missing_is_named(member: str) -> None:
    with pytest.raises(QmpError, match=f"^Parameter '{member}' is missing$"):
        parse_arguments({key: value for key, value in GOOD.items() if key != member}, Some)


def test_what_takes_nothing_takes_nothing() -> None:
    parse_arguments({}, Arguments)
    with pytest.raises(QmpError, match="unexpected"):
        parse_arguments({"a": 1}, Arguments)
