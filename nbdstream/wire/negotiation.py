"""The handshake, server side: fixed newstyle and its options, as bytes in and bytes out.

::

    GREETING --client flags--> OPTIONS --EXPORT_NAME or GO--> TRANSMISSION
        |                         |
        +-------------------------+--ABORT--> CLOSED         (anything that cannot be followed: ProtocolError)

An unknown option is answered ERR_UNSUP, a malformed one ERR_INVALID, and the stream stays in step in both cases.
What is kept is bounded by the largest option that is accepted; larger ones are skipped as they arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Final

from nbdstream.errors import ProtocolError
from nbdstream.wire.export import Agreement, ExportInfo, find_export, transmission_flags
from nbdstream.wire.nbd import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Info,
    Opt,
    Rep,
)
from nbdstream.wire.options import (
    OptionError,
    match_contexts,
    parse_export_name,
    parse_info,
    parse_meta,
    parse_nothing,
)

MAXIMUM_OPTION: Final = 256 << 10
"""Bytes of data with one option. The largest sensible one (a name and every information type) has 135,172."""

ABSURD_OPTION: Final = 32 << 20
"""Bytes. Beyond MAXIMUM_OPTION an option is skipped and answered; beyond this it is an attack, as QEMU has it."""

MAXIMUM_OPTIONS: Final = 1024
"""Options on one connection. Real clients send fewer than ten for an export."""

# An int: the complement of a flag knows its own class's bits only.
_KNOWN_CLIENT_FLAGS: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)

Admit = Callable[[ExportInfo], str | None]
"""Asked when a client wants to open an export: None to let it in, or why not."""


class Phase(Enum):
    """Where the handshake stands."""

    GREETING = auto()
    OPTIONS = auto()
    TRANSMISSION = auto()
    """Over: :attr:`Negotiation.agreement` holds, and what :meth:`Negotiation.rest` returns belongs to it."""
    CLOSED = auto()
    """Over: send what there is to send and close."""


class Negotiation:
    """The handshake of one connection."""

    def __init__(self, exports: Sequence[ExportInfo], *, admit: Admit = lambda _export: None) -> None:
        self.phase = Phase.GREETING
        self.agreement: Agreement | None = None
        self._exports = exports
        self._admit = admit
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._output = bytearray(GREETING.pack(NBDMAGIC, IHAVEOPT, flags))
        self._input = bytearray()
        self._skip = 0
        self._skipped_option = 0
        self._options = 0
        self._client_flags = ClientFlag(0)
        self._structured = False
        self._contexts_export: ExportInfo | None = None
        self._contexts: dict[int, str] = {}

    def data_to_send(self) -> bytes:
        """Return what has to go to the client now; every byte is returned once."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def rest(self) -> bytes:
        """Return what the client sent behind the handshake."""
        rest = bytes(self._input)
        self._input.clear()
        return rest

    def receive(self, data: bytes | bytearray | memoryview) -> Phase:
        """Take bytes from the client, in any portions, and return where that leads.

        Raises ProtocolError if the connection has to be closed without a further word.
        """
        self._input += data
        while self._step():
            pass
        return self.phase

    def _step(self) -> bool:
        """Take one message if it is there; return whether there may be another."""
        if self.phase is Phase.GREETING:
            return self._take_client_flags()
        if self.phase is Phase.OPTIONS:
            return self._skip_option() if self._skip else self._take_option()
        return False

    def _take_client_flags(self) -> bool:
        if len(self._input) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack(self._take(CLIENT_FLAGS.size))
        if flags & ~_KNOWN_CLIENT_FLAGS:
            msg = f"unknown client flags {flags:#x}"
            raise ProtocolError(msg)
        self._client_flags = ClientFlag(flags)
        self.phase = Phase.OPTIONS
        return True

    def _take_option(self) -> bool:
        if len(self._input) < OPTION.size:
            return False
        magic, option, length = OPTION.unpack_from(self._input)
        if magic != IHAVEOPT:
            raise ProtocolError("an option without its magic number")
        if length > ABSURD_OPTION:
            msg = f"an option with {length} bytes of data"
            raise ProtocolError(msg)
        if length <= MAXIMUM_OPTION and len(self._input) < OPTION.size + length:
            return False
        self._options += 1
        if self._options > MAXIMUM_OPTIONS:
            msg = f"more than {MAXIMUM_OPTIONS} options"
            raise ProtocolError(msg)
        if not self._client_flags & ClientFlag.FIXED_NEWSTYLE and option != Opt.EXPORT_NAME:
            raise ProtocolError("an option other than EXPORT_NAME without fixed newstyle")
        self._take(OPTION.size)
        if length > MAXIMUM_OPTION:
            self._skip, self._skipped_option = length, option
        else:
            self._answer(option, self._take(length))
        return True

    def _skip_option(self) -> bool:
        skipped = min(self._skip, len(self._input))
        del self._input[:skipped]
        self._skip -= skipped
        if self._skip:
            return False
        if self._skipped_option == Opt.EXPORT_NAME:
            raise ProtocolError("an export name that is too long")
        self._reply_error(self._skipped_option, OptionError(Rep.ERR_TOO_BIG, "the option's data are too long"))
        return True

    def _answer(self, option: int, data: bytes) -> None:
        try:
            match option:
                case Opt.EXPORT_NAME:
                    self._export_name(data)
                case Opt.ABORT:
                    self._reply(option, Rep.ACK)
                    self.phase = Phase.CLOSED
                case Opt.LIST:
                    self._list(data)
                case Opt.STARTTLS:
                    parse_nothing(data)
                    raise OptionError(Rep.ERR_POLICY, "this server is not set up for TLS")
                case Opt.INFO | Opt.GO:
                    self._info(option, data)
                case Opt.STRUCTURED_REPLY:
                    parse_nothing(data)
                    self._structured = True
                    self._reply(option, Rep.ACK)
                case Opt.LIST_META_CONTEXT:
                    self._list_meta_context(data)
                case Opt.SET_META_CONTEXT:
                    self._set_meta_context(data)
                case _:
                    raise OptionError(Rep.ERR_UNSUP, "this server does not know the option")
        except OptionError as error:
            # proto.md: EXPORT_NAME has no way to report an error but to close.
            if option == Opt.EXPORT_NAME:
                raise ProtocolError(error.text) from None
            self._reply_error(option, error)

    def _export_name(self, data: bytes) -> None:
        export = self._open(parse_export_name(data))
        self._output += EXPORT_NAME_REPLY.pack(export.size, self._flags(export))
        if not self._client_flags & ClientFlag.NO_ZEROES:
            self._output += EXPORT_NAME_PADDING
        self._agree(export)

    def _list(self, data: bytes) -> None:
        parse_nothing(data)
        for export in self._exports:
            self._reply(Opt.LIST, Rep.SERVER, _counted(export.name) + export.description.encode())
        self._reply(Opt.LIST, Rep.ACK)

    def _info(self, option: int, data: bytes) -> None:
        request = parse_info(data)
        export = self._open(request.name) if option == Opt.GO else self._find(request.name)
        self._reply(option, Rep.INFO, INFO_EXPORT.pack(Info.EXPORT, export.size, self._flags(export)))
        if Info.NAME in request.items:
            self._reply(option, Rep.INFO, _typed(Info.NAME, export.name))
        if Info.DESCRIPTION in request.items and export.description:
            self._reply(option, Rep.INFO, _typed(Info.DESCRIPTION, export.description))
        # A minimum block is a limit that has to be told to those, too, that did not ask.
        if Info.BLOCK_SIZE in request.items or export.minimum_block > 1:
            sizes = export.minimum_block, export.preferred_block, export.maximum_payload
            self._reply(option, Rep.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        self._reply(option, Rep.ACK)
        if option == Opt.GO:
            self._agree(export)

    def _list_meta_context(self, data: bytes) -> None:
        request = parse_meta(data)
        available = self._find(request.name).contexts
        # No query at all asks for everything.
        names = match_contexts(available, request.queries, wildcards=True) if request.queries else available
        for name in names:
            self._reply(Opt.LIST_META_CONTEXT, Rep.META_CONTEXT, bytes(4) + name.encode())
        self._reply(Opt.LIST_META_CONTEXT, Rep.ACK)

    def _set_meta_context(self, data: bytes) -> None:
        # The earlier set is replaced even if this fails.
        self._contexts_export, self._contexts = None, {}
        request = parse_meta(data)
        if not self._structured:
            raise OptionError(Rep.ERR_INVALID, "negotiate structured replies first")
        export = self._find(request.name)
        names = match_contexts(export.contexts, request.queries, wildcards=False)
        self._contexts_export, self._contexts = export, dict(enumerate(names, start=1))
        for number, name in self._contexts.items():
            self._reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, number.to_bytes(4, "big") + name.encode())
        self._reply(Opt.SET_META_CONTEXT, Rep.ACK)

    def _find(self, name: str) -> ExportInfo:
        export = find_export(self._exports, name)
        if not export:
            raise OptionError(Rep.ERR_UNKNOWN, "there is no export of that name")
        return export

    def _open(self, name: str) -> ExportInfo:
        export = self._find(name)
        refusal = self._admit(export)
        if refusal is not None:
            raise OptionError(Rep.ERR_POLICY, refusal)
        return export

    def _agree(self, export: ExportInfo) -> None:
        contexts = self._contexts if self._contexts_export is export else {}
        self.agreement = Agreement(export, structured=self._structured, contexts=contexts)
        self.phase = Phase.TRANSMISSION

    def _flags(self, export: ExportInfo) -> int:
        return transmission_flags(export, structured=self._structured)

    def _reply(self, option: int, reply: Rep, data: bytes = b"") -> None:
        self._output += OPTION_REPLY.pack(REP_MAGIC, option, reply, len(data)) + data

    def _reply_error(self, option: int, error: OptionError) -> None:
        self._reply(option, error.reply, error.text.encode())

    def _take(self, length: int) -> bytes:
        taken = bytes(self._input[:length])
        del self._input[:length]
        return taken


def _counted(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "big") + data


def _typed(kind: Info, text: str) -> bytes:
    return kind.to_bytes(2, "big") + text.encode()
