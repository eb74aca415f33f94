"""Option payloads: what a client sends with LIST, INFO, GO and the META_CONTEXT options, read with an exact fit.

A length is believed only after it was compared with the bytes that are there (the class of CVE-2022-26495 and of
qemu-nbd's abort on bytes behind the queries).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.wire.nbd import MAX_STRING, Rep

if TYPE_CHECKING:
    from collections.abc import Sequence

_U16 = struct.Struct("!H")
_U32 = struct.Struct("!I")


class OptionError(Exception):
    """The option is answered with an error reply, and haggling goes on."""

    def __init__(self, reply: Rep, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class InfoRequest(NamedTuple):
    """The payload of INFO and GO."""

    name: str
    items: frozenset[int]
    """The information types asked for, known to us or not."""


class MetaRequest(NamedTuple):
    """The payload of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: list[str]


def parse_nothing(data: bytes) -> None:
    """Refuse a payload where there must be none."""
    if data:
        raise OptionError(Rep.ERR_INVALID, "this option takes no data")


def parse_export_name(data: bytes) -> str:
    """Return the payload of EXPORT_NAME, which is the name and nothing else."""
    return _text(data)


def parse_info(data: bytes) -> InfoRequest:
    """Return the payload of INFO and GO."""
    reader = _Reader(data)
    name = reader.string()
    items = [reader.u16() for _ in range(reader.u16())]
    reader.end()
    return InfoRequest(name, frozenset(items))


def parse_meta(data: bytes) -> MetaRequest:
    """Return the payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    reader = _Reader(data)
    name = reader.string()
    # No list is made from the count itself: each query is read before the next is thought of.
    queries = [reader.string() for _ in range(reader.u32())]
    reader.end()
    return MetaRequest(name, queries)


def match_contexts(available: Sequence[str], queries: Sequence[str], *, wildcards: bool) -> list[str]:
    """Return the available contexts that the queries ask for, each of them once.

    ``wildcards`` lets ``namespace:`` stand for all of a namespace, as LIST has it and SET has not.
    """
    for query in queries:
        if query.find(":") < 1:
            raise OptionError(Rep.ERR_INVALID, "a query must begin with a namespace and a colon")
    wanted = set(queries)
    return [name for name in available if name in wanted or (wildcards and name[: name.index(":") + 1] in wanted)]


class _Reader:
    """Reads the fields of a payload one after the other, never past its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def u16(self) -> int:
        return int(_U16.unpack(self._take(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self._take(4))[0])

    def string(self) -> str:
        return _text(self._take(self.u32()))

    def end(self) -> None:
        if self._at != len(self._data):
            raise OptionError(Rep.ERR_INVALID, "the option's data go on behind its last field")

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise OptionError(Rep.ERR_INVALID, "a length in the option's data reaches past their end")
        taken = self._data[self._at : end]
        self._at = end
        return taken


def _text(data: bytes) -> str:
    if len(data) > MAX_STRING:
        raise OptionError(Rep.ERR_INVALID, f"a string is longer than {MAX_STRING} bytes")
    if b"\0" in data:
        raise OptionError(Rep.ERR_INVALID, "a string holds a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OptionError(Rep.ERR_INVALID, "a string is not UTF-8") from None
