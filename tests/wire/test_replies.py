from __future__ import annotations

import struct
from typing import Protocol

import pytest

from nbdstream.wire.nbd import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    Err,
    ReplyType,
)
from nbdstream.wire.replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies

COOKIE = 0x0123456789ABCDEF
OFFSET = 0xFEDCBA9876543210
"""Of the request."""


def simple(error: int = 0) -> bytes:
    return struct.pack("!IIQ", SIMPLE_REPLY_MAGIC, error, COOKIE)


def structured(kind: int, payload: bytes, *, done: bool = True, announced: int | None = None) -> bytes:
    length = len(payload) if announced is None else announced
    return struct.pack("!IHHQI", STRUCTURED_REPLY_MAGIC, done, kind, COOKIE, length) + payload


def extended(kind: int, payload: bytes, *, done: bool = True, announced: int | None = None) -> bytes:
    length = len(payload) if announced is None else announced
    return struct.pack("!IHHQQQ", EXTENDED_REPLY_MAGIC, done, kind, COOKIE, OFFSET, length) + payload


class Chunk(Protocol):
    """A chunk of one kind of reply, spelt out."""

    def __call__(self, kind: int, payload: bytes, *, done: bool = True, announced: int | None = None) -> bytes: ...


BOTH = pytest.mark.parametrize(("replies", "chunk"), [(StructuredReplies(), structured), (ExtendedReplies(), extended)])


def test_simple_replies() -> None:
    replies = SimpleReplies()
    assert replies.read_header(COOKIE, OFFSET, 4096) == simple()
    assert replies.done(Cmd.READ, COOKIE, OFFSET) == simple()
    assert replies.error(COOKIE, OFFSET, Err.EPERM, "text has no place here") == simple(1)
    assert not replies.sparse


@BOTH
def test_a_read_is_one_data_chunk(replies: Replies, chunk: Chunk) -> None:
    header = replies.read_header(COOKIE, OFFSET, 4096)
    assert header == chunk(ReplyType.OFFSET_DATA, struct.pack("!Q", OFFSET), announced=4096 + 8)


@BOTH
def test_a_read_in_parts_says_where_each_begins_and_the_last_is_done(replies: Replies, chunk: Chunk) -> None:
    first = replies.read_chunk(COOKIE, OFFSET, OFFSET + 512, 4096, hole=False, last=False)
    assert first == chunk(ReplyType.OFFSET_DATA, struct.pack("!Q", OFFSET + 512), done=False, announced=4096 + 8)
    last = replies.read_chunk(COOKIE, OFFSET, OFFSET + 4608, 1024, hole=True, last=True)
    assert last == chunk(ReplyType.OFFSET_HOLE, struct.pack("!QI", OFFSET + 4608, 1024))


def test_success_without_payload_is_a_simple_reply_but_for_a_read() -> None:
    assert StructuredReplies().done(Cmd.WRITE, COOKIE, OFFSET) == simple()
    assert StructuredReplies().done(Cmd.READ, COOKIE, OFFSET) == structured(ReplyType.NONE, b"")


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE, Cmd.FLUSH])
def test_no_extended_reply_is_a_simple_one(command: Cmd) -> None:
    assert ExtendedReplies().done(command, COOKIE, OFFSET) == extended(ReplyType.NONE, b"")


@BOTH
def test_an_error_carries_its_text(replies: Replies, chunk: Chunk) -> None:
    expected = struct.pack("!IH", Err.EINVAL, 3) + b"why"
    assert replies.error(COOKIE, OFFSET, Err.EINVAL, "why") == chunk(ReplyType.ERROR, expected)


def test_an_error_text_is_cut_to_4096_bytes_of_whole_characters() -> None:
    reply = StructuredReplies().error(COOKIE, OFFSET, Err.EIO, "x" + "ä" * 4000)
    text = reply[26:]
    assert len(text) == 4095
    assert text.decode() == "x" + "ä" * 2047


def test_block_status_has_one_chunk_for_each_context_the_last_of_them_done() -> None:
    reply = StructuredReplies().block_status(COOKIE, OFFSET, {1: [(512, 3), (1024, 0)], 2: [(1536, 1)]})
    first = structured(ReplyType.BLOCK_STATUS, struct.pack("!IIIII", 1, 512, 3, 1024, 0), done=False)
    assert reply == first + structured(ReplyType.BLOCK_STATUS, struct.pack("!III", 2, 1536, 1))


def test_extended_block_status_counts_its_extents_and_has_64_bits_for_each() -> None:
    reply = ExtendedReplies().block_status(COOKIE, OFFSET, {1: [(1 << 40, 3), (1024, 0)], 2: [(1 << 40, 1)]})
    first = extended(ReplyType.BLOCK_STATUS_EXT, struct.pack("!IIQQQQ", 1, 2, 1 << 40, 3, 1024, 0), done=False)
    assert reply == first + extended(ReplyType.BLOCK_STATUS_EXT, struct.pack("!IIQQ", 2, 1, 1 << 40, 1))
