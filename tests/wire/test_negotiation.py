from __future__ import annotations

import itertools
import struct
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdstream.errors import ProtocolError
from nbdstream.wire.export import ExportInfo
from nbdstream.wire.nbd import (
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    Info,
    Opt,
    Rep,
    TransmissionFlag,
)
from nbdstream.wire.negotiation import ABSURD_OPTION, MAXIMUM_OPTION, MAXIMUM_OPTIONS, Negotiation, Phase, Tls

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
DISK = ExportInfo("disk", 123456789, FLAGS, "a disk", contexts=("base:allocation", "qemu:allocation-depth"))
OTHER = ExportInfo("other", 4096, FLAGS | TransmissionFlag.READ_ONLY, minimum_block=512)
EXPORTS = [DISK, OTHER]


def counted(text: str) -> bytes:
    return struct.pack("!I", len(text.encode())) + text.encode()


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION.pack(IHAVEOPT, number, len(data)) + data


def info_data(name: str, *items: int) -> bytes:
    return counted(name) + struct.pack(f"!H{len(items)}H", len(items), *items)


def meta_data(name: str, *queries: str) -> bytes:
    return counted(name) + struct.pack("!I", len(queries)) + b"".join(map(counted, queries))


def haggling(flags: int = 3) -> Negotiation:
    negotiation = Negotiation(EXPORTS)
    negotiation.receive(struct.pack("!I", flags))
    negotiation.data_to_send()
    return negotiation


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """Split option replies into (option, type, data)."""
    found = []
    while data:
        magic, number, kind, length = OPTION_REPLY.unpack_from(data)
        assert magic == REP_MAGIC
        found.append((number, kind, data[OPTION_REPLY.size : OPTION_REPLY.size + length]))
        data = data[OPTION_REPLY.size + length :]
    return found


def ask(negotiation: Negotiation, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    negotiation.receive(option(number, data))
    answered = replies(negotiation.data_to_send())
    assert {echoed for echoed, _, _ in answered} == {number}
    return [(kind, data) for _, kind, data in answered]


def kinds(answer: list[tuple[int, bytes]]) -> list[int]:
    return [kind for kind, _ in answer]


def test_the_greeting_offers_fixed_newstyle_without_zeroes_and_nothing_else() -> None:
    assert Negotiation(EXPORTS).data_to_send() == GREETING.pack(NBDMAGIC, IHAVEOPT, 3)


@pytest.mark.parametrize("flags", [4, 0x80000003, 0x100])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    with pytest.raises(ProtocolError):
        Negotiation(EXPORTS).receive(struct.pack("!I", flags))


def test_without_fixed_newstyle_there_is_only_export_name() -> None:
    with pytest.raises(ProtocolError):
        haggling(0).receive(option(Opt.LIST))
    assert haggling(0).receive(option(Opt.EXPORT_NAME, b"disk")) is Phase.TRANSMISSION


def test_export_name_is_answered_with_124_zeroes_unless_the_client_declined_them() -> None:
    for flags, padding in ((1, 124), (3, 0)):
        negotiation = haggling(flags)
        assert negotiation.receive(option(Opt.EXPORT_NAME, b"disk")) is Phase.TRANSMISSION
        assert negotiation.data_to_send() == struct.pack("!QH", DISK.size, FLAGS) + bytes(padding)
        assert negotiation.agreement is not None
        assert negotiation.agreement.export is DISK


@pytest.mark.parametrize("name", [b"none", b"\0", b"\xff", b"x" * 4097, b"x" * (MAXIMUM_OPTION + 1)])
def test_export_name_that_fails_ends_the_connection_without_a_reply(name: bytes) -> None:
    negotiation = haggling()
    with pytest.raises(ProtocolError):
        negotiation.receive(option(Opt.EXPORT_NAME, name))
    assert negotiation.data_to_send() == b""


def test_abort_is_acknowledged_whatever_it_carries() -> None:
    negotiation = haggling()
    assert kinds(ask(negotiation, Opt.ABORT, b"bye")) == [Rep.ACK]
    assert negotiation.phase is Phase.CLOSED


def test_nothing_is_answered_behind_abort() -> None:
    negotiation = haggling()
    negotiation.receive(option(Opt.ABORT) + option(Opt.LIST))
    assert len(replies(negotiation.data_to_send())) == 1


def test_list_has_one_reply_for_each_export() -> None:
    assert ask(haggling(), Opt.LIST) == [
        (Rep.SERVER, counted("disk") + b"a disk"),
        (Rep.SERVER, counted("other")),
        (Rep.ACK, b""),
    ]


@pytest.mark.parametrize("number", [Opt.LIST, Opt.STRUCTURED_REPLY, Opt.STARTTLS, Opt.EXTENDED_HEADERS])
def test_options_that_take_no_data_refuse_them(number: Opt) -> None:
    assert kinds(ask(haggling(), number, b"x")) == [Rep.ERR_INVALID]


@pytest.mark.parametrize("number", [0, Opt.PEEK_EXPORT, 12, 0xFFFFFFFF])
def test_an_unknown_option_is_answered_and_the_stream_stays_in_step(number: int) -> None:
    negotiation = haggling()
    assert kinds(ask(negotiation, number, b"whatever" * 100)) == [Rep.ERR_UNSUP]
    assert kinds(ask(negotiation, Opt.LIST))[-1] == Rep.ACK


def test_starttls_is_against_the_policy_of_a_server_without_tls() -> None:
    assert kinds(ask(haggling(), Opt.STARTTLS)) == [Rep.ERR_POLICY]


def test_info_tells_size_and_flags_and_stays_in_haggling() -> None:
    negotiation = haggling()
    answer = ask(negotiation, Opt.INFO, info_data("disk"))
    assert answer == [(Rep.INFO, struct.pack("!HQH", Info.EXPORT, DISK.size, FLAGS)), (Rep.ACK, b"")]
    assert negotiation.phase is Phase.OPTIONS


def test_go_tells_what_was_asked_for_and_enters_transmission() -> None:
    negotiation = haggling()
    answer = ask(negotiation, Opt.GO, info_data("", Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 99))
    assert answer == [
        (Rep.INFO, struct.pack("!HQH", Info.EXPORT, DISK.size, FLAGS)),
        (Rep.INFO, struct.pack("!H", Info.NAME) + b"disk"),
        (Rep.INFO, struct.pack("!H", Info.DESCRIPTION) + b"a disk"),
        (Rep.INFO, struct.pack("!HIII", Info.BLOCK_SIZE, 1, 4096, 64 << 20)),
        (Rep.ACK, b""),
    ]
    assert negotiation.phase is Phase.TRANSMISSION


def test_a_minimum_block_is_told_even_if_nobody_asks() -> None:
    answer = ask(haggling(), Opt.INFO, info_data("other"))
    assert (Rep.INFO, struct.pack("!HIII", Info.BLOCK_SIZE, 512, 4096, 64 << 20)) in answer


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_an_unknown_export_is_refused_and_another_can_be_tried(number: Opt) -> None:
    negotiation = haggling()
    assert kinds(ask(negotiation, number, info_data("none"))) == [Rep.ERR_UNKNOWN]
    assert kinds(ask(negotiation, Opt.GO, info_data("disk")))[-1] == Rep.ACK


def test_an_export_that_admits_nobody_can_be_looked_at_but_not_opened() -> None:
    negotiation = Negotiation(EXPORTS, admit=lambda export: "full" if export is DISK else None)
    negotiation.receive(struct.pack("!I", 3))
    negotiation.data_to_send()
    assert kinds(ask(negotiation, Opt.INFO, info_data("disk")))[-1] == Rep.ACK
    assert ask(negotiation, Opt.GO, info_data("disk")) == [(Rep.ERR_POLICY, b"full")]
    with pytest.raises(ProtocolError, match="full"):
        negotiation.receive(option(Opt.EXPORT_NAME, b"disk"))


def test_structured_replies_bring_df() -> None:
    negotiation = haggling()
    assert kinds(ask(negotiation, Opt.STRUCTURED_REPLY)) == [Rep.ACK]
    _, told, flags = struct.unpack("!HQH", ask(negotiation, Opt.INFO, info_data("disk"))[0][1])
    assert told == DISK.size
    assert flags == FLAGS | TransmissionFlag.SEND_DF


def test_listing_contexts_gives_all_of_them_or_those_asked_for_with_id_0() -> None:
    negotiation = haggling()
    base, depth = ((Rep.META_CONTEXT, bytes(4) + name.encode()) for name in DISK.contexts)
    ack = (Rep.ACK, b"")
    assert ask(negotiation, Opt.LIST_META_CONTEXT, meta_data("disk")) == [base, depth, ack]
    assert ask(negotiation, Opt.LIST_META_CONTEXT, meta_data("disk", "base:")) == [base, ack]
    assert ask(negotiation, Opt.LIST_META_CONTEXT, meta_data("disk", "x-none:", "qemu:allocation-depth")) == [
        depth,
        ack,
    ]
    assert kinds(ask(negotiation, Opt.LIST_META_CONTEXT, meta_data("none"))) == [Rep.ERR_UNKNOWN]


def select(negotiation: Negotiation, *queries: str, name: str = "disk") -> list[tuple[int, bytes]]:
    return ask(negotiation, Opt.SET_META_CONTEXT, meta_data(name, *queries))


def structured() -> Negotiation:
    negotiation = haggling()
    ask(negotiation, Opt.STRUCTURED_REPLY)
    return negotiation


def contexts_after_go(negotiation: Negotiation, name: str = "disk") -> list[str]:
    ask(negotiation, Opt.GO, info_data(name))
    assert negotiation.agreement is not None
    return list(negotiation.agreement.contexts.values())


def test_selecting_contexts_needs_structured_replies() -> None:
    assert kinds(select(haggling(), "base:allocation")) == [Rep.ERR_INVALID]


def test_selected_contexts_have_ids_of_their_own_and_are_selected_once() -> None:
    negotiation = structured()
    answer = select(negotiation, *["qemu:allocation-depth", "base:allocation"] * 2, "base:")
    ids = {data[4:].decode(): data[:4] for kind, data in answer if kind == Rep.META_CONTEXT}
    assert kinds(answer) == [Rep.META_CONTEXT] * 2 + [Rep.ACK]
    assert set(ids) == set(DISK.contexts)
    assert len(set(ids.values())) == 2
    assert set(contexts_after_go(negotiation)) == set(DISK.contexts)


def test_selecting_nothing_or_failing_replaces_what_was_selected() -> None:
    for again in (meta_data("disk"), meta_data("none", "base:allocation"), b"\xff" * 9):
        negotiation = structured()
        select(negotiation, "base:allocation")
        ask(negotiation, Opt.SET_META_CONTEXT, again)
        assert contexts_after_go(negotiation) == []


def test_selected_contexts_are_void_for_another_export_and_hold_for_the_default_name() -> None:
    negotiation = structured()
    select(negotiation, "base:allocation")
    assert contexts_after_go(negotiation, "other") == []
    negotiation = structured()
    select(negotiation, "base:allocation")
    assert contexts_after_go(negotiation, "") == ["base:allocation"]


# -- extended headers -----------------------------------------------------------------------------------------


def extended() -> Negotiation:
    negotiation = haggling()
    assert ask(negotiation, Opt.EXTENDED_HEADERS) == [(Rep.ACK, b"")]
    return negotiation


def told_flags(negotiation: Negotiation, number: Opt = Opt.INFO, name: str = "disk") -> TransmissionFlag:
    _, _, flags = struct.unpack("!HQH", ask(negotiation, number, info_data(name))[0][1])
    return TransmissionFlag(flags)


def test_extended_headers_are_agreed_with_or_without_structured_replies_before() -> None:
    for first in ([], [Opt.STRUCTURED_REPLY]):
        negotiation = haggling()
        for number in [*first, Opt.EXTENDED_HEADERS, Opt.EXTENDED_HEADERS]:
            assert kinds(ask(negotiation, number)) == [Rep.ACK]
        ask(negotiation, Opt.GO, info_data("disk"))
        assert negotiation.agreement is not None
        assert negotiation.agreement.extended


def test_extended_headers_bring_df_and_with_contexts_the_payload_of_block_status() -> None:
    negotiation = extended()
    assert told_flags(negotiation) == FLAGS | TransmissionFlag.SEND_DF
    assert kinds(select(negotiation, "base:allocation"))[-1] == Rep.ACK
    assert told_flags(negotiation, name="other") & TransmissionFlag.BLOCK_STATUS_PAYLOAD == 0
    both = FLAGS | TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD
    assert told_flags(negotiation) == both
    assert told_flags(negotiation, Opt.GO) == both


def test_there_is_no_way_back_from_extended_headers_to_structured_replies() -> None:
    negotiation = extended()
    assert kinds(ask(negotiation, Opt.STRUCTURED_REPLY)) == [Rep.ERR_EXT_HEADER_REQD]
    assert kinds(ask(negotiation, Opt.STRUCTURED_REPLY, b"x")) == [Rep.ERR_INVALID]


def test_export_name_behind_extended_headers_ends_the_connection() -> None:
    with pytest.raises(ProtocolError):
        extended().receive(option(Opt.EXPORT_NAME, b"disk"))


# -- TLS ------------------------------------------------------------------------------------------------------

PRIVATE = replace(OTHER, name="private")
BOTH = [DISK, PRIVATE]


def guarded(mode: Tls, *, everything: bool = False) -> Negotiation:
    """A server that shows the private export to some clients only; ``everything``: to this one."""
    negotiation = Negotiation(BOTH, tls=mode, permit=lambda export: everything or export is DISK)
    negotiation.receive(struct.pack("!I", 3))
    negotiation.data_to_send()
    return negotiation


def upgraded(negotiation: Negotiation) -> Negotiation:
    assert ask(negotiation, Opt.STARTTLS) == [(Rep.ACK, b"")]
    negotiation.secure()
    return negotiation


OTHERS = [*(number for number in Opt if number not in (Opt.EXPORT_NAME, Opt.ABORT, Opt.STARTTLS)), 99]


@pytest.mark.parametrize("number", OTHERS)
@pytest.mark.parametrize("data", [b"", b"x", bytes(MAXIMUM_OPTION + 1), info_data("disk"), info_data("none")])
def test_where_tls_is_required_every_other_option_is_told_so(number: int, data: bytes) -> None:
    negotiation = guarded(Tls.REQUIRED)
    assert kinds(ask(negotiation, number, data)) == [Rep.ERR_TLS_REQD]
    assert kinds(ask(negotiation, Opt.STARTTLS)) == [Rep.ACK]


def test_where_tls_is_required_abort_is_still_acknowledged() -> None:
    assert kinds(ask(guarded(Tls.REQUIRED), Opt.ABORT)) == [Rep.ACK]


@pytest.mark.parametrize("flags", [0, 3])
def test_where_tls_is_required_export_name_ends_the_connection(flags: int) -> None:
    negotiation = Negotiation(EXPORTS, tls=Tls.REQUIRED)
    negotiation.receive(struct.pack("!I", flags))
    with pytest.raises(ProtocolError):
        negotiation.receive(option(Opt.EXPORT_NAME, b"disk"))


@pytest.mark.parametrize("mode", [Tls.OFFERED, Tls.REQUIRED])
def test_starttls_is_acknowledged_and_haggling_waits_for_tls(mode: Tls) -> None:
    negotiation = guarded(mode)
    assert kinds(ask(negotiation, Opt.STARTTLS, b"x")) == [Rep.ERR_INVALID]
    assert kinds(ask(negotiation, Opt.INFO, info_data("disk")))[-1] in (Rep.ACK, Rep.ERR_TLS_REQD)
    assert negotiation.receive(option(Opt.STARTTLS)) is Phase.STARTTLS
    assert replies(negotiation.data_to_send()) == [(Opt.STARTTLS, Rep.ACK, b"")]


@pytest.mark.parametrize("pieces", [(0, 32), (0, 16, 32), (0, 31, 32)])
def test_plain_text_behind_starttls_ends_the_connection(pieces: tuple[int, ...]) -> None:
    negotiation = guarded(Tls.OFFERED)
    stream = option(Opt.STARTTLS) + option(Opt.STRUCTURED_REPLY)
    portions = [stream[start:end] for start, end in itertools.pairwise(pieces)]
    with pytest.raises(ProtocolError, match="plain text"):
        list(map(negotiation.receive, portions))


def test_nothing_that_was_said_in_plain_text_holds_inside_tls() -> None:
    negotiation = guarded(Tls.OFFERED)
    ask(negotiation, Opt.STRUCTURED_REPLY)
    select(negotiation, "base:allocation")
    ask(negotiation, Opt.EXTENDED_HEADERS)
    secured = upgraded(negotiation)
    assert secured.data_to_send() == b""
    assert secured.phase is Phase.OPTIONS
    assert kinds(select(secured, "base:allocation")) == [Rep.ERR_INVALID]
    ask(secured, Opt.GO, info_data("disk"))
    assert secured.agreement is not None
    assert (secured.agreement.structured, secured.agreement.extended, secured.agreement.contexts) == (False, False, {})


def test_inside_tls_options_go_on_being_counted() -> None:
    negotiation = Negotiation(EXPORTS, tls=Tls.REQUIRED, maximum_options=3)
    negotiation.receive(struct.pack("!I", 1))
    negotiation.data_to_send()
    ask(negotiation, Opt.LIST)
    secured = upgraded(negotiation)
    ask(secured, Opt.LIST)
    with pytest.raises(ProtocolError, match="more than 3"):
        secured.receive(option(Opt.LIST))


def test_inside_tls_the_client_flags_hold() -> None:
    negotiation = Negotiation(EXPORTS, tls=Tls.REQUIRED)
    negotiation.receive(struct.pack("!I", 1))
    negotiation.data_to_send()
    secured = upgraded(negotiation)
    secured.receive(option(Opt.EXPORT_NAME, b"disk"))
    assert len(secured.data_to_send()) == 134


def test_tls_inside_tls_is_refused() -> None:
    negotiation = guarded(Tls.OFFERED)
    ask(negotiation, Opt.STARTTLS)
    negotiation.secure()
    assert kinds(ask(negotiation, Opt.STARTTLS)) == [Rep.ERR_INVALID]


def test_where_tls_is_offered_what_is_not_permitted_is_hidden_and_needs_it() -> None:
    negotiation = guarded(Tls.OFFERED)
    assert kinds(ask(negotiation, Opt.LIST)) == [Rep.SERVER, Rep.ACK]
    for name in ("private", "none"):
        assert kinds(ask(negotiation, Opt.INFO, info_data(name))) == [Rep.ERR_TLS_REQD]
        assert kinds(ask(negotiation, Opt.GO, info_data(name))) == [Rep.ERR_TLS_REQD]
        assert kinds(ask(negotiation, Opt.LIST_META_CONTEXT, meta_data(name))) == [Rep.ERR_UNKNOWN]
    with pytest.raises(ProtocolError):
        negotiation.receive(option(Opt.EXPORT_NAME, b"private"))
    assert kinds(ask(guarded(Tls.OFFERED), Opt.GO, info_data("disk")))[-1] == Rep.ACK


def test_where_tls_is_offered_and_nothing_is_hidden_an_unknown_export_is_called_unknown() -> None:
    assert kinds(ask(guarded(Tls.OFFERED, everything=True), Opt.INFO, info_data("none"))) == [Rep.ERR_UNKNOWN]


def test_inside_tls_what_is_not_permitted_is_hidden_and_against_the_policy() -> None:
    negotiation = guarded(Tls.REQUIRED)
    secured = upgraded(negotiation)
    assert kinds(ask(secured, Opt.LIST)) == [Rep.SERVER, Rep.ACK]
    for number, data in (
        (Opt.INFO, info_data("private")),
        (Opt.GO, info_data("private")),
        (Opt.LIST_META_CONTEXT, meta_data("private")),
    ):
        assert kinds(ask(secured, number, data)) == [Rep.ERR_POLICY]
    assert kinds(ask(secured, Opt.GO, info_data("none"))) == [Rep.ERR_UNKNOWN]
    with pytest.raises(ProtocolError):
        secured.receive(option(Opt.EXPORT_NAME, b"private"))


# -- what is too much, and what comes behind --------------------------------------------------------------------


def test_an_option_that_is_too_long_is_skipped_and_answered() -> None:
    negotiation = haggling()
    assert kinds(ask(negotiation, Opt.INFO, bytes(MAXIMUM_OPTION + 1))) == [Rep.ERR_TOO_BIG]
    assert kinds(ask(negotiation, Opt.LIST))[-1] == Rep.ACK


def test_an_option_that_is_being_skipped_is_not_kept() -> None:
    negotiation = haggling()
    negotiation.receive(OPTION.pack(IHAVEOPT, Opt.INFO, ABSURD_OPTION))
    for _ in range(100):
        negotiation.receive(bytes(64 << 10))
        assert len(negotiation._input) == 0


@pytest.mark.parametrize(
    "data", [b"x" * 16, OPTION.pack(IHAVEOPT, 99, ABSURD_OPTION + 1), option(99) * (MAXIMUM_OPTIONS + 1)]
)
def test_what_cannot_be_followed_ends_the_connection(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        haggling().receive(data)


def test_what_follows_go_is_left_for_the_transmission_phase() -> None:
    negotiation = haggling()
    negotiation.receive(option(Opt.GO, info_data("disk")) + b"request")
    assert negotiation.receive(b"s") is Phase.TRANSMISSION
    assert negotiation.rest() == b"requests"


OPTIONS = st.one_of(
    st.builds(option, st.integers(0, 12), st.binary(max_size=40)),
    st.builds(option, st.sampled_from([2, 3, 5, 5, 8, 11])),
    st.builds(
        lambda number, name, items: option(number, info_data(name, *items)),
        st.sampled_from([6, 6, 6, 7]),
        st.sampled_from(["", "disk", "other", "none"]),
        st.lists(st.integers(0, 4), max_size=4),
    ),
    st.builds(
        lambda number, name, queries: option(number, meta_data(name, *queries)),
        st.sampled_from([9, 10]),
        st.sampled_from(["", "disk", "none"]),
        st.lists(st.sampled_from(["base:", "base:allocation", "qemu:", "x:y", "bad"]), max_size=4),
    ),
    st.binary(max_size=20),
)
STREAMS = st.builds(
    lambda flags, options: struct.pack("!I", flags) + b"".join(options),
    st.sampled_from([0, 1, 2, 3, 3, 3, 4]),
    st.lists(OPTIONS, max_size=8),
)


def outcome(pieces: list[bytes], mode: Tls = Tls.OFF) -> tuple[bytes, Phase, object, bytes, bool]:
    negotiation = Negotiation(EXPORTS, tls=mode, permit=lambda export: export is DISK)
    sent = b""
    broken = False
    try:
        for piece in pieces:
            negotiation.receive(piece)
            sent += negotiation.data_to_send()
    except ProtocolError:
        broken = True
        sent += negotiation.data_to_send()
    rest = negotiation.rest() if negotiation.phase is Phase.TRANSMISSION else b""
    return sent, negotiation.phase, negotiation.agreement, rest, broken


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 400), max_size=10), mode=st.sampled_from(Tls))
@example(stream=struct.pack("!I", 3) + option(Opt.GO, info_data("disk")) + b"more", cuts=[3, 21], mode=Tls.OFF)
def test_the_portions_in_which_bytes_arrive_make_no_difference(stream: bytes, cuts: list[int], mode: Tls) -> None:
    whole = outcome([stream], mode)
    assert outcome([stream[at : at + 1] for at in range(len(stream))], mode) == whole
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert outcome([stream[a:b] for a, b in itertools.pairwise(edges)], mode) == whole


@given(pieces=st.lists(st.binary(max_size=100), max_size=20))
def test_garbage_ends_in_an_answer_or_a_protocol_error(pieces: list[bytes]) -> None:
    outcome([struct.pack("!I", 3), *pieces])


def test_every_reply_fits_what_the_client_can_take() -> None:
    long = replace(DISK, name="n" * 4096, description="d" * 4096)
    negotiation = Negotiation([long])
    negotiation.receive(struct.pack("!I", 3))
    negotiation.data_to_send()
    assert ask(negotiation, Opt.LIST)[0] == (Rep.SERVER, counted(long.name) + long.description.encode())
