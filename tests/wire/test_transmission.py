from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.errors import ProtocolError
from nbdstream.wire.export import Agreement, ExportInfo
from nbdstream.wire.nbd import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Cmd,
    CmdFlag,
    Err,
    TransmissionFlag,
)
from nbdstream.wire.transmission import SMALL_PAYLOAD, Request, Transmission, context_ids

SIZE = 1 << 20
FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.SEND_CACHE
)
DISK = ExportInfo("disk", SIZE, FLAGS)
AGREED = Agreement(DISK, structured=True, contexts={1: "base:allocation"})
EXTENDED = Agreement(DISK, extended=True, contexts={1: "base:allocation", 2: "qemu:allocation-depth"})


def request(command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 5) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def write(offset: int, payload: bytes, *, flags: int = 0, cookie: int = 5) -> bytes:
    return request(Cmd.WRITE, offset, len(payload), flags=flags, cookie=cookie) + payload


def extended(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 5, payload: bytes | None = None
) -> bytes:
    """A request with an extended header; one with a payload says so, and how long it is."""
    if payload is not None:
        flags, length = flags | CmdFlag.PAYLOAD_LEN, len(payload)
    return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length) + (payload or b"")


def limited(length: int, *contexts: int) -> bytes:
    """The payload of a BLOCK_STATUS that is limited to some contexts."""
    return length.to_bytes(8, "big") + b"".join(number.to_bytes(4, "big") for number in contexts)


def parse(data: bytes, agreement: Agreement = AGREED) -> list[Request]:
    """Everything that the client asked for, given all at once."""
    transmission = Transmission(agreement)
    return list(map(Request._make, transmission.requests(memoryview(data), 0, len(data))))


def refusal(data: bytes, agreement: Agreement = AGREED) -> Err | None:
    """The error that one request is refused with. The stream must be in step behind it."""
    first, second = parse(data + request(Cmd.FLUSH, cookie=99), agreement)
    assert (second.command, second.cookie, second.refusal) == (Cmd.FLUSH, 99, None)
    return first.refusal.error if first.refusal else None


def extended_refusal(data: bytes, agreement: Agreement = EXTENDED) -> Err | None:
    """The error that one request with an extended header is refused with. The stream must be in step behind it."""
    first, second = parse(data + extended(Cmd.FLUSH, cookie=99), agreement)
    assert (second.command, second.cookie, second.refusal) == (Cmd.FLUSH, 99, None)
    assert first.payload is None or not first.refusal
    return first.refusal.error if first.refusal else None


def test_a_batch_gives_every_request_with_its_fields() -> None:
    data = request(Cmd.READ, 4096, 8192, cookie=1 << 63) + write(512, b"abc", flags=CmdFlag.FUA)
    data += request(Cmd.WRITE_ZEROES, 0, 4096, flags=CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO)
    assert parse(data) == [
        (Cmd.READ, 0, 1 << 63, 4096, 8192, None, None),
        (Cmd.WRITE, CmdFlag.FUA, 5, 512, 3, b"abc", None),
        (Cmd.WRITE_ZEROES, CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO, 5, 0, 4096, None, None),
    ]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (Cmd.READ, Err.EINVAL),
        (Cmd.WRITE, Err.ENOSPC),
        (Cmd.TRIM, Err.EINVAL),
        (Cmd.CACHE, Err.EINVAL),
        (Cmd.WRITE_ZEROES, Err.ENOSPC),
        (Cmd.BLOCK_STATUS, Err.EINVAL),
    ],
)
@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), ((1 << 64) - 1, 2), (1 << 63, 1)])
def test_past_the_end(command: Cmd, error: Err, offset: int, length: int) -> None:
    payload = bytes(length) if command == Cmd.WRITE else b""
    assert refusal(request(command, offset, length) + payload) == error


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES])
def test_up_to_the_end_and_nothing_at_the_end_are_allowed(command: Cmd) -> None:
    payload = b"x" if command == Cmd.WRITE else b""
    assert refusal(request(command, SIZE - 1, 1) + payload) is None
    assert refusal(request(command, SIZE, 0)) is None


@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES])
def test_a_read_only_export_refuses_what_would_change_it(command: Cmd) -> None:
    read_only = Agreement(replace(DISK, flags=FLAGS | TransmissionFlag.READ_ONLY))
    assert refusal(request(command, 0, 4) + (b"data" if command == Cmd.WRITE else b""), read_only) == Err.EPERM


ALLOWED = {
    Cmd.READ: CmdFlag.FUA | CmdFlag.DF,
    Cmd.WRITE: CmdFlag.FUA,
    Cmd.FLUSH: CmdFlag.FUA,
    Cmd.TRIM: CmdFlag.FUA,
    Cmd.CACHE: CmdFlag.FUA,
    Cmd.WRITE_ZEROES: CmdFlag.FUA | CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
    Cmd.BLOCK_STATUS: CmdFlag.FUA | CmdFlag.REQ_ONE,
}


@pytest.mark.parametrize("command", ALLOWED)
@pytest.mark.parametrize("bit", range(16))
def test_only_documented_flags_are_accepted(command: Cmd, bit: int) -> None:
    length = 0 if command == Cmd.FLUSH else 4
    data = request(command, 0, length, flags=1 << bit) + (b"data" if command == Cmd.WRITE else b"")
    assert refusal(data) == (None if ALLOWED[command] & (1 << bit) else Err.EINVAL)


@pytest.mark.parametrize(
    ("agreement", "command", "flag"),
    [
        (Agreement(DISK), Cmd.READ, CmdFlag.DF),
        (Agreement(replace(DISK, flags=FLAGS & ~TransmissionFlag.SEND_FUA)), Cmd.READ, CmdFlag.FUA),
        (Agreement(replace(DISK, flags=FLAGS & ~TransmissionFlag.SEND_FAST_ZERO)), Cmd.WRITE_ZEROES, CmdFlag.FAST_ZERO),
    ],
)
def test_a_flag_that_was_not_advertised_is_refused(agreement: Agreement, command: Cmd, flag: CmdFlag) -> None:
    assert refusal(request(command, 0, 4, flags=flag), agreement) == Err.EINVAL


@pytest.mark.parametrize("command", [Cmd.RESIZE, 9, 0x1234, 0xFFFF])
def test_an_unknown_command_is_refused_and_has_no_payload(command: int) -> None:
    assert refusal(request(command, 0, 4096)) == Err.EINVAL


def test_a_flush_has_no_offset_and_no_length() -> None:
    assert refusal(request(Cmd.FLUSH)) is None
    assert refusal(request(Cmd.FLUSH, 512)) == Err.EINVAL
    assert refusal(request(Cmd.FLUSH, 0, 512)) == Err.EINVAL


def test_block_status_needs_a_context_and_a_length() -> None:
    assert refusal(request(Cmd.BLOCK_STATUS, 0, 512)) is None
    assert refusal(request(Cmd.BLOCK_STATUS, 0, 0)) == Err.EINVAL
    assert refusal(request(Cmd.BLOCK_STATUS, 0, 512), Agreement(DISK, structured=True)) == Err.EINVAL


def test_commands_without_payload_may_be_longer_than_the_maximum_payload() -> None:
    agreement = Agreement(replace(DISK, size=1 << 40))
    for command in (Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES):
        assert refusal(request(command, 0, 0xFFFFFFFF), agreement) is None


def test_payloads_up_to_64_mib_are_accepted_and_longer_ones_refused() -> None:
    big = replace(DISK, size=1 << 40)
    most = 64 << 20
    assert refusal(request(Cmd.READ, 0, most), Agreement(big)) is None
    assert refusal(request(Cmd.READ, 0, most + 1), Agreement(big)) == Err.EINVAL
    assert refusal(request(Cmd.READ, 0, most + 1), Agreement(big, structured=True)) == Err.EOVERFLOW
    transmission = Transmission(Agreement(big))
    data = memoryview(request(Cmd.WRITE, 0, most))
    assert list(transmission.requests(data, 0, len(data))) == []
    assert transmission.awaiting is not None
    transmission = Transmission(Agreement(big))
    data = memoryview(request(Cmd.WRITE, 0, most + 1))
    assert list(transmission.requests(data, 0, len(data))) == []
    assert transmission.awaiting is None


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE, Cmd.TRIM])
def test_the_minimum_block_is_enforced(command: Cmd) -> None:
    agreement = Agreement(replace(DISK, minimum_block=512))
    for offset, length, error in ((512, 512, None), (512, 100, Err.EINVAL), (100, 512, Err.EINVAL)):
        payload = bytes(length) if command == Cmd.WRITE else b""
        assert refusal(request(command, offset, length) + payload, agreement) == error


def test_a_refused_write_comes_out_when_its_payload_has_been_consumed() -> None:
    transmission = Transmission(AGREED)
    data = memoryview(write(SIZE, b"x" * 100) + request(Cmd.FLUSH, cookie=6))
    assert list(transmission.requests(data, 0, 100)) == []
    assert transmission.position == 100
    first, second = transmission.requests(data, 100, len(data))
    assert (first[2], second[2]) == (5, 6)
    assert first[6] is not None


def test_a_long_write_whose_payload_is_not_all_there_is_awaited() -> None:
    transmission = Transmission(AGREED)
    length = SMALL_PAYLOAD + 512
    data = memoryview(request(Cmd.READ, 0, 1) + write(512, bytes(length)))
    assert len(list(transmission.requests(data, 0, len(data) - 1))) == 1
    assert transmission.awaiting == (Cmd.WRITE, 0, 5, 512, length, None, None)
    assert transmission.position == 2 * REQUEST.size


def test_a_small_write_whose_payload_is_not_all_there_is_given_later() -> None:
    transmission = Transmission(AGREED)
    data = memoryview(request(Cmd.READ, 0, 1) + write(512, b"x" * 100))
    assert len(list(transmission.requests(data, 0, len(data) - 1))) == 1
    assert transmission.awaiting is None
    assert transmission.position == REQUEST.size
    (fields,) = transmission.requests(data, REQUEST.size, len(data))
    assert fields == (Cmd.WRITE, 0, 5, 512, 100, b"x" * 100, None)


def test_the_batch_can_be_broken_off_and_taken_up_again() -> None:
    transmission = Transmission(AGREED)
    data = memoryview(b"".join(request(Cmd.READ, 0, 1, cookie=cookie) for cookie in range(5)))
    for fields in transmission.requests(data, 0, len(data)):
        if fields[2] == 2:
            break
    assert transmission.position == 3 * REQUEST.size
    assert [fields[2] for fields in transmission.requests(data, transmission.position, len(data))] == [3, 4]


def test_nothing_is_read_behind_disc() -> None:
    transmission = Transmission(AGREED)
    data = memoryview(request(Cmd.DISC) + b"garbage" * 10)
    assert list(transmission.requests(data, 0, len(data))) == []
    assert transmission.finished


def test_everything_but_disc_is_refused_while_shutting_down() -> None:
    transmission = Transmission(AGREED)
    transmission.shut_down()
    data = memoryview(
        request(Cmd.READ, 0, 1) + write(0, b"data") + request(Cmd.FLUSH) + request(77) + request(Cmd.DISC)
    )
    refusals = [fields[6] for fields in transmission.requests(data, 0, len(data))]
    assert [refused.error if refused else None for refused in refusals] == [Err.ESHUTDOWN] * 4
    assert transmission.finished


def test_a_wrong_magic_number_ends_the_connection() -> None:
    with pytest.raises(ProtocolError):
        parse(bytes(REQUEST.size))


# -- extended headers -----------------------------------------------------------------------------------------


def test_extended_requests_have_lengths_of_64_bits() -> None:
    agreement = replace(EXTENDED, export=replace(DISK, size=1 << 62))
    data = extended(Cmd.READ, 4096, 8192) + extended(Cmd.WRITE, 512, flags=CmdFlag.FUA, payload=b"abc")
    data += extended(Cmd.WRITE_ZEROES, 0, 1 << 62, flags=CmdFlag.NO_HOLE) + extended(Cmd.BLOCK_STATUS, 1, 1 << 61)
    assert parse(data, agreement) == [
        (Cmd.READ, 0, 5, 4096, 8192, None, None),
        (Cmd.WRITE, CmdFlag.FUA | CmdFlag.PAYLOAD_LEN, 5, 512, 3, b"abc", None),
        (Cmd.WRITE_ZEROES, CmdFlag.NO_HOLE, 5, 0, 1 << 62, None, None),
        (Cmd.BLOCK_STATUS, 0, 5, 1, 1 << 61, None, None),
    ]


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS])
@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (1, (1 << 64) - 1), ((1 << 64) - 1, (1 << 64) - 1)])
def test_extended_bounds_do_not_wrap_around(command: Cmd, offset: int, length: int) -> None:
    expected = Err.ENOSPC if command == Cmd.WRITE_ZEROES else Err.EINVAL
    assert extended_refusal(extended(command, offset, length)) == expected


@pytest.mark.parametrize(("data", "agreement"), [(request(Cmd.FLUSH), EXTENDED), (extended(Cmd.FLUSH), AGREED)])
def test_the_headers_that_were_not_negotiated_end_the_connection(data: bytes, agreement: Agreement) -> None:
    with pytest.raises(ProtocolError):
        parse(data + bytes(100), agreement)


def test_a_write_without_the_payload_flag_is_taken_as_qemu_means_it() -> None:
    data = extended(Cmd.WRITE, 512, 4) + b"data"
    assert extended_refusal(data) is None
    assert parse(data, EXTENDED) == [(Cmd.WRITE, 0, 5, 512, 4, b"data", None)]
    assert extended_refusal(extended(Cmd.WRITE, SIZE, 4) + b"data") == Err.ENOSPC


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.RESIZE, 99])
@pytest.mark.parametrize("length", [0, 1, 5000])
def test_an_unexpected_payload_is_consumed_and_refused(command: int, length: int) -> None:
    assert extended_refusal(extended(command, payload=b"x" * length)) == Err.EINVAL


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE, Cmd.BLOCK_STATUS, 99])
def test_a_payload_above_the_maximum_ends_the_connection(command: int) -> None:
    most = DISK.maximum_payload
    assert parse(extended(command, 0, most, flags=CmdFlag.PAYLOAD_LEN), EXTENDED) == []
    with pytest.raises(ProtocolError):
        parse(extended(command, 0, most + 1, flags=CmdFlag.PAYLOAD_LEN), EXTENDED)


def test_the_payload_flag_means_nothing_without_extended_headers() -> None:
    assert refusal(write(0, b"data", flags=CmdFlag.PAYLOAD_LEN)) == Err.EINVAL
    assert refusal(request(Cmd.BLOCK_STATUS, 0, 512, flags=CmdFlag.PAYLOAD_LEN)) == Err.EINVAL


def test_a_read_above_the_maximum_payload_is_refused_with_eoverflow() -> None:
    big = replace(EXTENDED, export=replace(DISK, size=1 << 62))
    assert extended_refusal(extended(Cmd.READ, 0, DISK.maximum_payload), big) is None
    assert extended_refusal(extended(Cmd.READ, 0, DISK.maximum_payload + 1), big) == Err.EOVERFLOW


def test_block_status_can_be_limited_to_some_contexts() -> None:
    (found,) = parse(extended(Cmd.BLOCK_STATUS, 512, flags=CmdFlag.REQ_ONE, payload=limited(4096, 2)), EXTENDED)
    assert found == (Cmd.BLOCK_STATUS, CmdFlag.REQ_ONE, 5, 512, 4096, b"\0\0\0\2", None)
    assert context_ids(b"\0\0\0\2\0\0\1\0") == (2, 256)


@pytest.mark.parametrize(
    "payload",
    [
        limited(512),
        limited(512, 1, 1),
        limited(512, 3),
        limited(512, 1, 3),
        limited(512, 1, 2, 1),
        limited(512, *range(1000)),
        limited(512, 1)[:-1],
        limited(0, 1),
        limited(SIZE + 1, 1),
        limited((1 << 64) - 1, 1),
        b"",
        b"x",
    ],
)
def test_a_wrong_limit_of_block_status_is_consumed_and_refused(payload: bytes) -> None:
    assert extended_refusal(extended(Cmd.BLOCK_STATUS, 0, payload=payload)) == Err.EINVAL


def test_block_status_cannot_be_limited_where_no_context_was_negotiated() -> None:
    agreement = Agreement(DISK, extended=True)
    assert extended_refusal(extended(Cmd.BLOCK_STATUS, 0, payload=limited(512, 1)), agreement) == Err.EINVAL


def test_extended_requests_are_refused_in_step_while_shutting_down() -> None:
    transmission = Transmission(EXTENDED)
    transmission.shut_down()
    data = memoryview(
        extended(Cmd.READ, 0, 1)
        + extended(Cmd.WRITE, payload=b"data")
        + extended(Cmd.BLOCK_STATUS, payload=limited(512, 1))
        + extended(Cmd.DISC)
    )
    refusals = [fields[6] for fields in transmission.requests(data, 0, len(data))]
    assert [refused.error if refused else None for refused in refusals] == [Err.ESHUTDOWN] * 3
    assert transmission.finished


# -- any portions, any bytes -------------------------------------------------------------------------------


def play(pieces: list[bytes], agreement: Agreement = AGREED) -> tuple[list[Request], bool, bool]:
    """Receive in these portions, as a connection does: the requests, whether it ended with DISC, whether it broke."""
    transmission = Transmission(agreement)
    found: list[Request] = []
    left = b""
    try:
        for piece in pieces:
            data = left + piece
            left = _take(transmission, data, found)
    except ProtocolError:
        return found, transmission.finished, True
    return found, transmission.finished, False


def _take(transmission: Transmission, data: bytes, found: list[Request]) -> bytes:
    """Take what is complete in ``data``, return the rest."""
    while True:
        if transmission.awaiting:
            wanted = transmission.awaiting
            if len(data) < wanted.length:
                return data
            transmission.awaiting = None
            found.append(wanted._replace(payload=data[: wanted.length]))
            data = data[wanted.length :]
        found += map(Request._make, transmission.requests(memoryview(data), 0, len(data)))
        data = data[transmission.position :]
        if not transmission.awaiting or len(data) < transmission.awaiting.length:
            return b"" if transmission.finished else data


REQUESTS = st.one_of(
    st.builds(
        request,
        st.sampled_from([0, 0, 0, 2, 3, 4, 5, 6, 7, 8, 99]),
        st.sampled_from([0, 512, SIZE - 512, SIZE, 1 << 63]),
        st.sampled_from([0, 1, 512, 0xFFFFFFFF]),
        flags=st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32]),
        cookie=st.integers(0, (1 << 64) - 1),
    ),
    st.builds(write, st.sampled_from([0, 512, SIZE]), st.binary(max_size=60), flags=st.sampled_from([0, 0, 1, 2])),
)


EXTENDED_REQUESTS = st.one_of(
    st.builds(
        extended,
        st.sampled_from([0, 0, 0, 2, 3, 4, 5, 6, 7, 8, 99]),
        st.sampled_from([0, 512, SIZE - 512, SIZE, 1 << 63]),
        st.sampled_from([0, 1, 512, 1 << 40, (1 << 64) - 1]),
        flags=st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 64]),
        cookie=st.integers(0, (1 << 64) - 1),
    ),
    st.builds(
        extended,
        st.sampled_from([0, 1, 1, 1, 3, 7, 99]),
        st.sampled_from([0, 512, SIZE]),
        flags=st.sampled_from([0, 0, 1, 2]),
        payload=st.one_of(st.binary(max_size=60), st.builds(limited, st.sampled_from([0, 1, 512]), st.integers(0, 3))),
    ),
)


@given(stream=st.lists(EXTENDED_REQUESTS, max_size=12).map(b"".join), cuts=st.lists(st.integers(0, 500), max_size=10))
def test_the_portions_make_no_difference_to_extended_requests(stream: bytes, cuts: list[int]) -> None:
    whole = play([stream], EXTENDED)
    assert play([stream[at : at + 1] for at in range(len(stream))], EXTENDED) == whole
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert play([stream[a:b] for a, b in itertools.pairwise(edges)], EXTENDED) == whole


@given(stream=st.lists(REQUESTS, max_size=12).map(b"".join), cuts=st.lists(st.integers(0, 500), max_size=10))
def test_the_portions_in_which_bytes_arrive_make_no_difference(stream: bytes, cuts: list[int]) -> None:
    whole = play([stream])
    assert play([stream[at : at + 1] for at in range(len(stream))]) == whole
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert play([stream[a:b] for a, b in itertools.pairwise(edges)]) == whole


@given(
    pieces=st.lists(
        st.one_of(st.binary(max_size=60), st.binary(min_size=24, max_size=24).map(b"\x25\x60\x95\x13".__add__)),
        max_size=20,
    )
)
def test_garbage_ends_in_requests_or_a_protocol_error(pieces: list[bytes]) -> None:
    for found in play(pieces)[0]:
        if not found.refusal and found.command != Cmd.FLUSH:
            assert found.offset + found.length <= SIZE
