"""The options for the server's limits."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from nbdstream.cli.limits import LIMIT_OPTIONS, add_limits, limits
from nbdstream.server.limits import Limits

DOCUMENT = Path(__file__).parents[2] / "docs/limits.md"


def parse(*arguments: str) -> Limits:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_limits(parser)
    return limits(parser.parse_args(arguments))


def test_every_limit_has_an_option_and_its_reason_in_the_documentation() -> None:
    assert sorted(option.field for option in LIMIT_OPTIONS) == sorted(
        field.name for field in dataclasses.fields(Limits)
    )
    text = DOCUMENT.read_text()
    for option in LIMIT_OPTIONS:
        assert f"\n| `{option.name}` |" in text


def test_without_options_the_limits_are_the_defaults() -> None:
    assert parse() == Limits()


def test_options_set_the_limits_of_their_names() -> None:
    found = parse("--handshake-timeout", "2.5", "--max-bytes-in-flight", "8M", "--max-connections", "7")
    assert found == Limits(handshake_time=2.5, bytes_in_flight=8 << 20, connections=7)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--handshake-timeout", "0"],
        ["--handshake-timeout", "nan"],
        ["--handshake-timeout", "inf"],
        ["--linger-timeout", "soon"],
        ["--max-connections", "0"],
        ["--max-handshakes", "-1"],
        ["--max-requests", "1.5"],
        ["--max-bytes-in-flight", "100"],
        ["--max-reply-backlog", "x"],
    ],
)
def test_a_limit_that_would_keep_everybody_out_is_refused(arguments: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        parse(*arguments)
