"""What the documentation says of the tests is true, and it leaves out nothing of the protocol."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from nbdstream.server.contexts import BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, REMOTE
from nbdstream.wire import nbd

TESTS = Path(__file__).parent
DOCUMENTS = sorted((TESTS.parent / "docs").glob("*.md"))
STREAMING = (TESTS.parent / "docs/streaming.md").read_text()
PROTOCOL = (TESTS.parent / "docs/protocol.md").read_text()

_REFERENCE = re.compile(r"`([a-z0-9_/]+)::(test_[a-z0-9_]+)`")

NAMES = [
    *(f"NBD_FLAG_{flag.name}" for flag in nbd.HandshakeFlag),
    *(f"NBD_FLAG_C_{flag.name}" for flag in nbd.ClientFlag),
    *(f"NBD_FLAG_{flag.name}" for flag in nbd.TransmissionFlag),
    *(f"NBD_OPT_{option.name}" for option in nbd.Opt),
    *(f"NBD_REP_{reply.name}" for reply in nbd.Rep),
    *(f"NBD_INFO_{info.name}" for info in nbd.Info),
    *(f"NBD_CMD_{command.name}" for command in nbd.Cmd),
    *(f"NBD_CMD_FLAG_{flag.name}" for flag in nbd.CmdFlag),
    *(f"NBD_REPLY_FLAG_{flag.name}" for flag in nbd.ReplyFlag),
    *(f"NBD_REPLY_TYPE_{kind.name}" for kind in nbd.ReplyType),
    *(f"NBD_{error.name}" for error in nbd.Err),
    *(context.name for context in (BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, REMOTE)),
]


def functions(path: Path) -> set[str]:
    """Return the names of the functions in a file."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    for file, name in _REFERENCE.findall(document.read_text()):
        assert name in functions(TESTS / f"{file}.py"), f"{file}::{name}"


def test_each_of_the_eight_questions_is_answered_with_a_test() -> None:
    rows = [line for line in STREAMING.splitlines() if line.startswith("| ") and line.count(" | ") == 2]
    questions = [row for row in rows if "?" in row.partition(" | ")[0]]
    assert len(questions) == 8
    for row in questions:
        assert _REFERENCE.search(row.rpartition(" | ")[2]), f"no test: {row}"


def test_everything_in_the_protocol_has_a_row_with_a_test() -> None:
    rows = [line for line in PROTOCOL.splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    for row in rows:
        assert _REFERENCE.search(row.rpartition(" | ")[2]), f"no test: {row}"
    named = {row.split("`")[1] for row in rows if row.startswith("| `")}
    assert not set(NAMES) - named
