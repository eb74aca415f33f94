"""What is fuzzed: the NBD cores and the hand-over's messages, by bytes alone, and what must hold whatever they are.

(The control socket: see :mod:`tests.fuzz.qmp`; images: see :mod:`tests.fuzz.images`.)

Each target takes one input and raises AssertionError where the core breaks its word:

- it raises nothing but ProtocolError;
- it keeps no more than one option, and of requests nothing at all;
- it comes to the same result however the bytes are cut into portions.

An input's first byte chooses the server or the agreement, its second one of the ways to cut; what follows is what the
peer sends: each target tells which bits choose what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nbdstream.errors import ProtocolError
from nbdstream.wire.export import Agreement, ExportInfo
from nbdstream.wire.handover.messages import FROM_DESTINATION, FROM_SOURCE, MAXIMUM_LINE, Channel
from nbdstream.wire.nbd import (
    EXTENDED_REQUEST,
    IHAVEOPT,
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    REQUEST,
    STATUS_PAYLOAD,
    Cmd,
    Opt,
    TransmissionFlag,
)
from nbdstream.wire.negotiation import MAXIMUM_OPTION, Negotiation, Phase, Tls
from nbdstream.wire.transmission import SMALL_PAYLOAD, Request, Transmission, context_ids
from tests.fuzz.images import image
from tests.fuzz.portions import ways_to_cut
from tests.fuzz.qmp import qmp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FLAGS: Final = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
_WRITABLE: Final = (
    TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_FAST_ZERO
)
_CONTEXTS: Final = ("base:allocation", "qemu:allocation-depth")
_DISK: Final = ExportInfo("disk", 1 << 20, _FLAGS | _WRITABLE, "a disk", contexts=_CONTEXTS)
_SMALL: Final = ExportInfo("größe", 4096, _FLAGS | TransmissionFlag.READ_ONLY, "a secret", minimum_block=512)
_EXPORTS: Final = [
    _DISK,
    _SMALL,
    ExportInfo("empty", 0, _FLAGS),
]

# A reply is a fixed number of messages with a name, a description or a context's name in each of them.
_LONGEST_ANSWER: Final = 4096
_KEPT_AT_MOST: Final = MAXIMUM_OPTION + OPTION.size

_HEAD: Final = 2
"""Bytes of an input that the client does not send."""

_NOBODY, _TLS, _HIDDEN = 1, 6, 8
_TLS_REQUIRED: Final = 4
_TLS_MODES: Final = {0: Tls.OFF, 2: Tls.OFFERED, _TLS_REQUIRED: Tls.REQUIRED}


class _Haggled(NamedTuple):
    """What a negotiation came to."""

    sent: bytes
    phase: Phase
    agreement: Agreement | None
    rest: bytes
    error: str | None


class _Asked(NamedTuple):
    """What a transmission phase came to."""

    requests: list[Request]
    left: int
    """Bytes of a request that is not complete, whether they are kept or thrown away."""
    finished: bool
    error: str | None


def negotiation(data: bytes) -> None:
    """Option haggling, from the client flags on.

    Bit 0: nobody is admitted. Bits 1 and 2: TLS is off, offered, required, or active (then the client flags are
    behind). Bit 3: one of the exports is not for this client.
    """
    if len(data) < _HEAD:
        return
    whole, *others = [_haggle(portions, data[0]) for portions in ways_to_cut(data[1], data[_HEAD:])]
    for other in others:
        assert other == whole, f"{other} is not {whole}"
    _check_replies(whole.sent)
    assert (whole.phase is Phase.TRANSMISSION) == (whole.agreement is not None)
    if whole.agreement:
        assert not data[0] & _NOBODY, "somebody was let in"
        assert data[0] & _TLS != _TLS_REQUIRED, "an export was opened in plain text"
        assert not (data[0] & _HIDDEN and whole.agreement.export is _SMALL), "the export is for others"
    if data[0] & _HIDDEN:
        assert _SMALL.description.encode() not in whole.sent, "the export is for others to know"


def requests(data: bytes) -> None:
    """The transmission phase, from its first request on.

    Bits 0 and 1: the export. Bit 2: structured replies. Bit 3: contexts, if there may be any. Bit 4: extended headers.
    """
    if len(data) < _HEAD:
        return
    agreement = _agreement(data[0])
    whole, *others = [_ask(portions, agreement) for portions in ways_to_cut(data[1], data[_HEAD:])]
    for other in others:
        assert other == whole, f"{other} is not {whole}"
    for request in whole.requests:
        _check_request(request, agreement)
    if not (agreement.extended or whole.finished or whole.error):
        # Every byte belongs to one request, and to no other.
        assert sum(map(_bytes_of, whole.requests)) + whole.left == len(data) - _HEAD


def handover(data: bytes) -> None:
    """The hand-over's messages. Bit 0: what a destination hears; else what a source hears."""
    if len(data) < _HEAD:
        return
    decoder: Any = FROM_SOURCE if data[0] & 1 else FROM_DESTINATION
    whole, *others = [_converse(portions, decoder) for portions in ways_to_cut(data[1], data[_HEAD:])]
    for other in others:
        assert other == whole, f"{other} is not {whole}"
    messages, error = whole
    assert error is None or (error.isprintable() and len(error) <= _LONGEST_ANSWER)
    sender, hearer = Channel(decoder), Channel(decoder)
    for message in messages:
        assert hearer.receive(sender.send(message)) == [message]


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "negotiation": negotiation,
    "requests": requests,
    "image": image,
    "handover": handover,
    "qmp": qmp,
}


# -- negotiation --------------------------------------------------------------------------------------------


def _negotiation(choice: int) -> Negotiation:
    core = Negotiation(
        _EXPORTS,
        admit=lambda _export: "full" if choice & _NOBODY else None,
        permit=lambda export: not (choice & _HIDDEN and export is _SMALL),
        tls=_TLS_MODES.get(choice & _TLS, Tls.OFFERED),
    )
    if choice & _TLS not in _TLS_MODES:
        core.receive(b"\0\0\0\3" + OPTION.pack(IHAVEOPT, Opt.STRUCTURED_REPLY, 0))
        phase = core.receive(OPTION.pack(IHAVEOPT, Opt.STARTTLS, 0))
        assert phase is Phase.STARTTLS
        core.data_to_send()
        core.secure()
        assert not core.data_to_send()
    return core


def _haggle(portions: Iterator[bytes], choice: int) -> _Haggled:
    core = _negotiation(choice)
    sent = bytearray(core.data_to_send())
    error = None
    received = 0
    try:
        for portion in portions:
            received += len(portion)
            core.receive(portion)
            sent += core.data_to_send()
            if core.phase is Phase.OPTIONS:
                assert len(core._input) <= _KEPT_AT_MOST
    except ProtocolError as raised:
        error = str(raised)
    # What was answered before the error is sent by nobody: the connection is aborted. It must be the same still.
    sent += core.data_to_send()
    assert len(sent) <= _LONGEST_ANSWER * (1 + received // OPTION.size)
    rest = core.rest() if core.phase is Phase.TRANSMISSION and not error else b""
    return _Haggled(bytes(sent), core.phase, core.agreement, rest, error)


def _check_replies(sent: bytes) -> None:
    """Every reply is complete and none is longer than a client has to take, up to the answer to EXPORT_NAME."""
    at = 18 if sent.startswith(b"NBDMAGIC") else 0
    while at + 8 <= len(sent) and int.from_bytes(sent[at : at + 8], "big") == REP_MAGIC:
        _, _, _, length = OPTION_REPLY.unpack_from(sent, at)
        at += OPTION_REPLY.size + length
    assert len(sent) - at in (0, 10, 134), "an option's reply is torn"


_LONGEST_HEAD: Final = EXTENDED_REQUEST.size + STATUS_PAYLOAD.size + 4 * len(_CONTEXTS)

# -- requests -----------------------------------------------------------------------------------------------


def _agreement(choice: int) -> Agreement:
    export = _EXPORTS[choice & 3] if choice & 3 < len(_EXPORTS) else _DISK
    structured = bool(choice & 4)
    extended = bool(choice & 16)
    contexts = dict(enumerate(_CONTEXTS, start=1)) if (structured or extended) and choice & 8 else {}
    return Agreement(export, structured=structured, extended=extended, contexts=contexts)


def _ask(portions: Iterator[bytes], agreement: Agreement) -> _Asked:
    """Feed the core as a connection does: what it has not consumed is kept and given again, with what comes then."""
    core = Transmission(agreement)
    asked: list[Request] = []
    kept = b""
    payload: bytearray | None = None
    waiting: Request | None = None
    try:
        for portion in portions:
            kept += portion
            while True:
                if waiting and payload is not None:
                    missing = waiting.length - len(payload)
                    payload += kept[:missing]
                    kept = kept[missing:]
                    if len(payload) < waiting.length:
                        break
                    asked.append(waiting._replace(payload=bytes(payload)))
                    waiting = payload = None
                asked += map(Request._make, core.requests(memoryview(kept), 0, len(kept)))
                assert 0 <= core.position <= len(kept)
                kept = b"" if core.finished else kept[core.position :]
                waiting, core.awaiting = core.awaiting, None
                if not waiting:
                    break
                payload = bytearray()
            # Only the payload of a WRITE that will be done is kept (a small one with its header), the beginning of a
            # header, or a list of contexts.
            assert waiting or len(kept) < _LONGEST_HEAD + SMALL_PAYLOAD
    except ProtocolError as raised:
        return _Asked(asked, 0, finished=False, error=str(raised))
    left = len(kept)
    if waiting and payload is not None:
        left += REQUEST.size + len(payload)
    if core._skipped:
        left += REQUEST.size + Request._make(core._skipped).length - core._skip
    return _Asked(asked, left, core.finished, None)


def _bytes_of(request: Request) -> int:
    """How much of a stream a request with a compact header is."""
    return REQUEST.size + (request.length if request.command == Cmd.WRITE else 0)


def _check_request(request: Request, agreement: Agreement) -> None:
    """What is not refused is something that the device can be asked for."""
    command, _, _, offset, length, payload, refusal = request
    if refusal:
        assert payload is None
        return
    export = agreement.export
    assert command in set(Cmd) - {Cmd.DISC, Cmd.RESIZE}
    assert offset + length <= export.size
    assert (offset | length) % export.minimum_block == 0
    if command == Cmd.WRITE:
        assert payload is not None
        assert len(payload) == length <= export.maximum_payload
    elif command == Cmd.BLOCK_STATUS and payload is not None:
        numbers = context_ids(payload)
        assert agreement.extended
        assert numbers
        assert sorted(set(numbers)) == sorted(numbers)
        assert set(numbers) <= set(agreement.contexts)
    else:
        assert payload is None
    assert not (export.flags & TransmissionFlag.READ_ONLY and command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES))
    assert command != Cmd.BLOCK_STATUS or (length and agreement.contexts)
    assert command != Cmd.READ or length <= export.maximum_payload


# -- hand-over ----------------------------------------------------------------------------------------------


def _converse(portions: Iterator[bytes], decoder: Any) -> tuple[list[Any], str | None]:
    """Return the messages that were heard before the first error, one at a time, and the error."""
    channel = Channel(decoder)
    heard: list[Any] = []
    try:
        for portion in portions:
            for line in portion.splitlines(keepends=True):
                heard += channel.receive(line)
            assert len(channel._input) <= MAXIMUM_LINE
    except ProtocolError as error:
        return heard, str(error)
    return heard, None
