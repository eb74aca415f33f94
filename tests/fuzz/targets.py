"""What is fuzzed: the negotiation and the transmission core, by bytes alone, and what must hold whatever the bytes are.

Each target takes one input and raises AssertionError where the core breaks its word:

- it raises nothing but ProtocolError;
- it keeps no more than one option, and of requests nothing at all;
- it comes to the same result however the bytes are cut into portions.

An input's first byte chooses the server and the agreement, its second one of the ways to cut; what follows is what the
client sends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from nbdstream.errors import ProtocolError
from nbdstream.wire.export import Agreement, ExportInfo
from nbdstream.wire.nbd import OPTION, OPTION_REPLY, REP_MAGIC, TransmissionFlag
from nbdstream.wire.negotiation import MAXIMUM_OPTION, Negotiation, Phase
from nbdstream.wire.transmission import Request, Transmission

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
_EXPORTS: Final = [
    _DISK,
    ExportInfo("größe", 4096, _FLAGS | TransmissionFlag.READ_ONLY, minimum_block=512),
    ExportInfo("empty", 0, _FLAGS),
]

# A reply is a fixed number of messages with a name, a description or a context's name in each of them.
_LONGEST_ANSWER: Final = 4096
_KEPT_AT_MOST: Final = MAXIMUM_OPTION + OPTION.size

_HEAD: Final = 2
"""Bytes of an input that the client does not send."""


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
    """Bytes that are neither part of a request nor thrown away: an incomplete header or payload."""
    finished: bool
    error: str | None


def negotiation(data: bytes) -> None:
    """Option haggling, from the client flags on."""
    if len(data) < _HEAD:
        return
    whole, *others = [_haggle(portions, admits=not data[0] & 1) for portions in _ways_to_cut(data[1], data[_HEAD:])]
    for other in others:
        assert other == whole, f"{other} is not {whole}"
    _check_replies(whole.sent)
    assert (whole.phase is Phase.TRANSMISSION) == (whole.agreement is not None)


def requests(data: bytes) -> None:
    """The transmission phase, from its first request on."""
    if len(data) < _HEAD:
        return
    agreement = _agreement(data[0])
    whole, *others = [_ask(portions, agreement) for portions in _ways_to_cut(data[1], data[_HEAD:])]
    for other in others:
        assert other == whole, f"{other} is not {whole}"
    for request in whole.requests:
        _check_request(request, agreement)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {"negotiation": negotiation, "requests": requests}


def _ways_to_cut(seed: int, stream: bytes) -> Iterator[Iterator[bytes]]:
    """Give the stream whole, byte by byte, and in portions that grow and shrink with ``seed``."""
    yield iter([stream])
    yield (stream[at : at + 1] for at in range(len(stream)))
    yield _uneven(seed, stream)


def _uneven(seed: int, stream: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(stream):
        seed = (seed * 137 + 57) & 0xFFFF
        length = 1 + (seed >> 8) % 48
        yield stream[at : at + length]
        at += length


# -- negotiation --------------------------------------------------------------------------------------------


def _haggle(portions: Iterator[bytes], *, admits: bool) -> _Haggled:
    core = Negotiation(_EXPORTS, admit=lambda _export: None if admits else "full")
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
    at = 18
    while at + 8 <= len(sent) and int.from_bytes(sent[at : at + 8], "big") == REP_MAGIC:
        _, _, _, length = OPTION_REPLY.unpack_from(sent, at)
        at += OPTION_REPLY.size + length
    assert len(sent) - at in (0, 10, 134), "an option's reply is torn"


# -- requests -----------------------------------------------------------------------------------------------


def _agreement(choice: int) -> Agreement:
    export = _EXPORTS[choice & 3] if choice & 3 < len(_EXPORTS) else _DISK
    structured = bool(choice & 4)
    contexts = dict(enumerate(_CONTEXTS, start=1)) if structured and choice & 8 else {}
    return Agreement(export, structured=structured, contexts=contexts)


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
            # Only the payload of a WRITE that will be done is kept, and the beginning of a header.
            assert waiting or len(kept) < 28
    except ProtocolError as raised:
        return _Asked(asked, 0, finished=False, error=str(raised))
    return _Asked(asked, len(kept) + len(payload or b""), core.finished, None)


def _check_request(request: Request, agreement: Agreement) -> None:
    """What is not refused is something that the device can be asked for."""
    command, _, _, offset, length, payload, refusal = request
    if refusal:
        assert payload is None
        return
    export = agreement.export
    assert 0 <= command <= 7
    assert command != 2, "DISC is no request to answer"
    assert offset + length <= export.size
    assert (offset | length) % export.minimum_block == 0
    assert (payload is not None) == (command == 1)
    if payload is not None:
        assert len(payload) == length <= export.maximum_payload
    if export.flags & TransmissionFlag.READ_ONLY:
        assert command not in (1, 4, 6)
