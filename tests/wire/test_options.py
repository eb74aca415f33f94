from __future__ import annotations

import struct

import pytest

from nbdstream.wire.nbd import Rep
from nbdstream.wire.options import OptionError, match_contexts, parse_export_name, parse_info, parse_meta, parse_nothing


def counted(data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + data


def refusal(parse: object, data: bytes) -> Rep:
    assert callable(parse)
    with pytest.raises(OptionError) as caught:
        parse(data)
    return caught.value.reply


def test_info_gives_the_name_and_the_items() -> None:
    name, items = parse_info(counted("disk-ä".encode()) + struct.pack("!HHH", 2, 3, 77))
    assert name == "disk-ä"
    assert sorted(items) == [3, 77]


def test_meta_gives_the_name_and_the_queries() -> None:
    request = parse_meta(counted(b"disk") + struct.pack("!I", 2) + counted(b"base:") + counted(b"x:y"))
    assert request == ("disk", ["base:", "x:y"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        counted(b"disk"),
        counted(b"disk") + b"\0",
        struct.pack("!I", 5) + b"disk" + struct.pack("!H", 0)[:1],
        struct.pack("!I", 0xFFFFFFFF) + b"disk" + struct.pack("!H", 0),
        counted(b"disk") + struct.pack("!HH", 2, 3),
        counted(b"disk") + struct.pack("!HH", 0, 3),
        counted(b"x" * 4097) + struct.pack("!H", 0),
        counted(b"a\0b") + struct.pack("!H", 0),
        counted(b"\xff") + struct.pack("!H", 0),
    ],
)
def test_info_without_an_exact_fit_is_invalid(data: bytes) -> None:
    assert refusal(parse_info, data) == Rep.ERR_INVALID


@pytest.mark.parametrize(
    "data",
    [
        b"",
        counted(b"disk"),
        counted(b"disk") + struct.pack("!I", 1),
        counted(b"disk") + struct.pack("!I", 0xFFFFFFFF) + counted(b"base:"),
        counted(b"disk") + struct.pack("!I", 1) + counted(b"base:") + b"x",
        counted(b"disk") + struct.pack("!I", 1) + struct.pack("!I", 6) + b"base:",
        counted(b"disk") + struct.pack("!I", 1) + counted(b"base:" + b"x" * 4092),
    ],
)
def test_meta_without_an_exact_fit_is_invalid(data: bytes) -> None:
    assert refusal(parse_meta, data) == Rep.ERR_INVALID


def test_a_name_of_4096_bytes_is_accepted() -> None:
    assert parse_export_name(b"x" * 4096) == "x" * 4096


def test_data_where_there_must_be_none_are_invalid() -> None:
    parse_nothing(b"")
    assert refusal(parse_nothing, b"x") == Rep.ERR_INVALID


AVAILABLE = ("base:allocation", "qemu:allocation-depth")


def test_a_query_selects_a_context_once_however_often_it_is_sent() -> None:
    assert match_contexts(AVAILABLE, ["base:allocation"] * 3, wildcards=False) == ["base:allocation"]


def test_a_namespace_alone_is_a_wildcard_where_wildcards_are_known() -> None:
    assert match_contexts(AVAILABLE, ["qemu:"], wildcards=True) == ["qemu:allocation-depth"]
    assert match_contexts(AVAILABLE, ["qemu:"], wildcards=False) == []


def test_unknown_namespaces_and_leaves_are_ignored() -> None:
    assert match_contexts(AVAILABLE, ["x-other:", "base:other"], wildcards=True) == []


@pytest.mark.parametrize("query", ["", "base", ":allocation"])
def test_a_query_without_a_namespace_is_invalid(query: str) -> None:
    with pytest.raises(OptionError) as caught:
        match_contexts(AVAILABLE, [query], wildcards=True)
    assert caught.value.reply == Rep.ERR_INVALID
