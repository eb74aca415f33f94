from __future__ import annotations

import struct

from nbdstream.wire.nbd import SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, Cmd, Err, ReplyType
from nbdstream.wire.replies import SimpleReplies, StructuredReplies

COOKIE = 0x0123456789ABCDEF


def simple(error: int = 0) -> bytes:
    return struct.pack("!IIQ", SIMPLE_REPLY_MAGIC, error, COOKIE)


def chunk(kind: int, payload: bytes, *, done: bool = True, announced: int | None = None) -> bytes:
    length = len(payload) if announced is None else announced
    return struct.pack("!IHHQI", STRUCTURED_REPLY_MAGIC, done, kind, COOKIE, length) + payload


def test_simple_replies() -> None:
    replies = SimpleReplies()
    assert replies.read_header(COOKIE, 512, 4096) == simple()
    assert replies.done(Cmd.READ, COOKIE) == simple()
    assert replies.error(COOKIE, Err.EPERM, "text has no place here") == simple(1)


def test_a_structured_read_is_one_data_chunk() -> None:
    header = StructuredReplies().read_header(COOKIE, 512, 4096)
    assert header == chunk(ReplyType.OFFSET_DATA, struct.pack("!Q", 512), announced=4096 + 8)


def test_success_without_payload_is_a_simple_reply_but_for_a_read() -> None:
    assert StructuredReplies().done(Cmd.WRITE, COOKIE) == simple()
    assert StructuredReplies().done(Cmd.READ, COOKIE) == chunk(ReplyType.NONE, b"")


def test_a_structured_error_carries_its_text() -> None:
    expected = struct.pack("!IH", Err.EINVAL, 3) + b"why"
    assert StructuredReplies().error(COOKIE, Err.EINVAL, "why") == chunk(ReplyType.ERROR, expected)


def test_an_error_text_is_cut_to_4096_bytes_of_whole_characters() -> None:
    reply = StructuredReplies().error(COOKIE, Err.EIO, "x" + "ä" * 4000)
    text = reply[26:]
    assert len(text) == 4095
    assert text.decode() == "x" + "ä" * 2047


def test_block_status_has_one_chunk_for_each_context_the_last_of_them_done() -> None:
    reply = StructuredReplies().block_status(COOKIE, {1: [(512, 3), (1024, 0)], 2: [(1536, 1)]})
    first = struct.pack("!IIIII", 1, 512, 3, 1024, 0)
    second = struct.pack("!III", 2, 1536, 1)
    assert reply == chunk(ReplyType.BLOCK_STATUS, first, done=False) + chunk(ReplyType.BLOCK_STATUS, second)
