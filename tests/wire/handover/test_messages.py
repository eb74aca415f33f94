from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.errors import ProtocolError
from nbdstream.wire.handover.messages import (
    FROM_DESTINATION,
    FROM_SOURCE,
    MAXIMUM_DISKS,
    MAXIMUM_LINE,
    VERSION,
    Accepted,
    Channel,
    Declined,
    Disk,
    FromDestination,
    Grant,
    Hello,
    Independent,
    Manifest,
    Offer,
    Over,
    Prepared,
    Refused,
    Released,
    UnknownVersionError,
    manifest_problem,
    plain,
)

if TYPE_CHECKING:
    from nbdstream.wire.handover.messages import Message

UUID: Final = "01234567-89ab-cdef-0123-456789abcdef"
KEY: Final[dict[str, Any]] = {"group": "a" * 32, "destination": "d" * 32, "epoch": 4}
DISK: Final = Disk(UUID, 1 << 30, "disk")
MANIFEST: Final = Manifest(UUID, 5, 1 << 30, 1 << 16, 1 << 13, 1 << 10, (1 << 14) - (1 << 13) - (1 << 10), 1, 2)
HELLO: Final = Hello(**KEY, version=VERSION, token="b" * 32)

FROM_EACH: Final[list[Message]] = [
    HELLO,
    Prepared(**KEY, disks=(DISK,)),
    Accepted(**KEY, remote=1 << 40),
    Declined(**KEY),
    Independent(**KEY, manifests=(MANIFEST,)),
    Offer(**KEY, disks=(DISK,), port=10809),
    Grant(**KEY),
    Over(**KEY),
    Released(**KEY),
]


def _line(**changes: Any) -> bytes:
    """A hello, less what is None."""
    fields = msgspec.to_builtins(HELLO) | changes
    return json.dumps({key: value for key, value in fields.items() if value is not None}).encode() + b"\n"


@pytest.mark.parametrize("message", FROM_EACH, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent_a_byte_at_a_time(message: Message) -> None:
    decoder: Any = FROM_DESTINATION if isinstance(message, FromDestination) else FROM_SOURCE
    here, there = Channel(decoder), Channel(decoder)
    data = here.send(message) + here.send(message)
    arrived = [each for at in range(len(data)) for each in there.receive(data[at : at + 1])]
    assert arrived == [message, msgspec.structs.replace(message, seq=1)]


def test_a_message_is_one_object_on_one_line() -> None:
    line = Channel(FROM_SOURCE).send(Grant(**KEY))
    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    assert json.loads(line) == {"message": "grant", "seq": 0, **KEY}


def test_what_one_side_says_is_not_taken_from_the_other() -> None:
    with pytest.raises(ProtocolError, match="grant"):
        Channel(FROM_DESTINATION).receive(Channel(FROM_SOURCE).send(Grant(**KEY)))


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b"\xff\n",
        b"[" * 50_000 + b"\n",
        b'{"a":' * 10_000 + b"\n",
        _line(message="farewell"),
        _line(colour="red"),
        _line(group=None),
        _line(group="A" * 32),
        _line(group="a" * 31),
        _line(group="a" * 32 + "\n"),
        _line(epoch=-1),
        _line(epoch=1.5),
        _line(epoch="1"),
        _line(epoch=1 << 63),
        _line(version="1"),
        _line(token=None),
    ],
    ids=lambda line: repr(line[:60]),
)
def test_a_malformed_message_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="none of version 1"):
        Channel(FROM_DESTINATION).receive(line)


@pytest.mark.parametrize("line", [_line(version=2, colour="red", token=None), b'{"version": 0}\n'])
def test_a_hello_of_another_version_is_refused_by_its_version_whatever_else_is_in_it(line: bytes) -> None:
    with pytest.raises(UnknownVersionError, match=r"version \d is not known here: this is version 1"):
        Channel(FROM_DESTINATION).receive(line)


def test_a_message_is_bounded_whether_it_ends_or_not() -> None:
    channel = Channel(FROM_DESTINATION)
    channel.receive(b" " * MAXIMUM_LINE)
    with pytest.raises(ProtocolError, match="longer than 65536 bytes"):
        channel.receive(b" ")
    with pytest.raises(ProtocolError, match="longer than 65536 bytes"):
        Channel(FROM_DESTINATION).receive(b" " * (MAXIMUM_LINE + 1) + b"\n")


def test_the_longest_messages_fit() -> None:
    most = (1 << 63) - 1
    disks = (Disk(UUID, most, "x" * 256),) * MAXIMUM_DISKS
    manifests = (Manifest(UUID, most, most, 1 << 30, most, most, most, most, most),) * MAXIMUM_DISKS
    for message in (Prepared(**KEY, disks=disks), Independent(**KEY, manifests=manifests)):
        assert Channel(FROM_DESTINATION).receive(Channel(FROM_DESTINATION).send(message)) == [message]


def test_more_disks_than_a_machine_has_are_refused() -> None:
    disks = (DISK,) * (MAXIMUM_DISKS + 1)
    with pytest.raises(ProtocolError):
        Channel(FROM_DESTINATION).receive(Channel(FROM_DESTINATION).send(Prepared(**KEY, disks=disks)))


def test_a_message_put_in_twice_or_taken_out_is_noticed() -> None:
    sender = Channel(FROM_SOURCE)
    first, second, third = (sender.send(Grant(**KEY)) for _ in range(3))
    with pytest.raises(ProtocolError, match="message 0 came where 1 was due"):
        Channel(FROM_SOURCE).receive(first + first)
    with pytest.raises(ProtocolError, match="message 2 came where 1 was due"):
        Channel(FROM_SOURCE).receive(first + third)
    with pytest.raises(ProtocolError, match="message 1 came where 0 was due"):
        Channel(FROM_SOURCE).receive(second)


def test_a_refusal_has_a_reason_and_our_version() -> None:
    line = Channel(FROM_DESTINATION).send(Refused("no such offer"))
    assert json.loads(line) == {"message": "refused", "reason": "no such offer", "version": VERSION}


def test_text_from_a_stranger_is_one_plain_line() -> None:
    assert plain("all\x1b[2Jgone\n\nnow é") == "all [2Jgone now  "
    assert len(plain("x" * 5000)) == 1000


@given(st.binary())
def test_whatever_arrives_nothing_but_a_protocol_error_comes_of_it(data: bytes) -> None:
    for decoder in (FROM_DESTINATION, FROM_SOURCE):
        with suppress(ProtocolError):
            Channel(decoder).receive(data + b"\n")


# -- manifests ------------------------------------------------------------------------------------------------------


def test_a_manifest_that_adds_up_is_right() -> None:
    assert manifest_problem((DISK,), 5, (MANIFEST,)) is None


def test_the_last_cluster_of_a_disk_may_be_partial() -> None:
    disk = Disk(UUID, (1 << 30) + 1, "disk")
    manifest = msgspec.structs.replace(MANIFEST, size=disk.size, data=MANIFEST.data + 1)
    assert manifest_problem((disk,), 5, (manifest,)) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"uuid": UUID[::-1]}, "they are of other disks"),
        ({"epoch": 4}, "epoch 4, not 5"),
        ({"size": 512}, "512 bytes, not 1073741824"),
        ({"data": MANIFEST.data - 1}, "16383 clusters of 65536 bytes are not 1073741824 bytes"),
        ({"zero": MANIFEST.zero + 1}, "16385 clusters"),
        ({"cluster_size": 1 << 17}, "16384 clusters of 131072 bytes"),
    ],
)
def test_a_manifest_that_is_not_of_this_disk_or_does_not_add_up_is_wrong(change: dict[str, Any], problem: str) -> None:
    found = manifest_problem((DISK,), 5, (msgspec.structs.replace(MANIFEST, **change),))
    assert found is not None
    assert problem in found


def test_manifests_of_some_of_the_disks_are_wrong() -> None:
    assert manifest_problem((DISK, Disk(UUID[::-1], 512, "other")), 5, (MANIFEST,)) == "they are of other disks"
