"""The handshake, server side: fixed newstyle and its options, as bytes in and bytes out.

::

    GREETING --client flags--> OPTIONS --EXPORT_NAME or GO--> TRANSMISSION
        |                         |
        +-------------------------+--ABORT--> CLOSED         (anything that cannot be followed: ProtocolError)
                                  +--STARTTLS--> STARTTLS, and inside TLS the OPTIONS of :meth:`Negotiation.secured`

An unknown option is answered ERR_UNSUP, a malformed one ERR_INVALID, and the stream stays in step in both cases.
What is kept is bounded by the largest option that is accepted; larger ones are skipped as they arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Final

from nbdstream.errors import ProtocolError
from nbdstream.wire.export import Agreement, ExportInfo, find_export
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

Permit = Callable[[ExportInfo], bool]
"""Whether a client, being who it is now, may know of an export and open it."""


class Tls(Enum):
    """What the server does about TLS (proto.md, "Server-side requirements")."""

    OFF = auto()
    """NOTLS."""
    OFFERED = auto()
    """SELECTIVETLS. What is not permitted in plain text needs TLS, and is hidden until then."""
    REQUIRED = auto()
    """FORCEDTLS."""
    ACTIVE = auto()
    """All of this is encrypted already."""


class Phase(Enum):
    """Where the handshake stands."""

    GREETING = auto()
    OPTIONS = auto()
    TRANSMISSION = auto()
    """Over: :attr:`Negotiation.agreement` holds, and what :meth:`Negotiation.rest` returns belongs to it."""
    CLOSED = auto()
    """Over: send what there is to send and close."""
    STARTTLS = auto()
    """Stop reading, then send what there is to send, begin TLS, and go on with :meth:`Negotiation.secured`."""


class Negotiation:
    """The handshake of one connection."""

    def __init__(
        self,
        exports: Sequence[ExportInfo],
        *,
        admit: Admit = lambda _export: None,
        permit: Permit = lambda _export: True,
        tls: Tls = Tls.OFF,
        maximum_option: int = MAXIMUM_OPTION,
        maximum_options: int = MAXIMUM_OPTIONS,
    ) -> None:
        self.phase = Phase.GREETING
        self.agreement: Agreement | None = None
        self._exports = exports
        self._admit = admit
        self._permit = permit
        self._tls = tls
        self._maximum_option = maximum_option
        self._maximum_options = maximum_options
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._output = bytearray(GREETING.pack(NBDMAGIC, IHAVEOPT, flags))
        self._input = bytearray()
        self._skip = 0
        self._skipped_option = 0
        self._options = 0
        self._client_flags = ClientFlag(0)
        self._structured = False
        self._extended = False
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
        if self.phase is Phase.STARTTLS and self._input:
            # Whoever is between us could have put it there, to be taken for a part of what is encrypted.
            raise ProtocolError("plain text behind STARTTLS")
        return self.phase

    def secured(self) -> Negotiation:
        """Return the haggling that begins anew inside TLS; of what was said in plain text only the client flags hold."""
        secured = Negotiation(
            self._exports,
            admit=self._admit,
            permit=self._permit,
            tls=Tls.ACTIVE,
            maximum_option=self._maximum_option,
            maximum_options=self._maximum_options,
        )
        secured.phase = Phase.OPTIONS
        secured._client_flags = self._client_flags
        secured._options = self._options
        secured._output.clear()  # it has been greeted
        return secured

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
        if length <= self._maximum_option and len(self._input) < OPTION.size + length:
            return False
        self._options += 1
        if self._options > self._maximum_options:
            msg = f"more than {self._maximum_options} options"
            raise ProtocolError(msg)
        if not self._client_flags & ClientFlag.FIXED_NEWSTYLE and option != Opt.EXPORT_NAME:
            raise ProtocolError("an option other than EXPORT_NAME without fixed newstyle")
        self._take(OPTION.size)
        if length > self._maximum_option:
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
        self._answer(self._skipped_option, None)
        return True

    def _answer(self, option: int, data: bytes | None) -> None:
        """Answer an option; its data are None if they were too long to be kept."""
        try:
            if self._tls is Tls.REQUIRED and option not in (Opt.STARTTLS, Opt.ABORT):
                raise OptionError(Rep.ERR_TLS_REQD, "this server wants TLS first")
            if option == Opt.ABORT:
                self._reply(option, Rep.ACK)
                self.phase = Phase.CLOSED
            elif data is None:
                raise OptionError(Rep.ERR_TOO_BIG, "the option's data are too long")
            else:
                self._perform(option, data)
        except OptionError as error:
            # proto.md: EXPORT_NAME has no way to report an error but to close.
            if option == Opt.EXPORT_NAME:
                raise ProtocolError(error.text) from None
            self._reply(option, error.reply, error.text.encode())

    def _perform(self, option: int, data: bytes) -> None:
        match option:
            case Opt.EXPORT_NAME:
                self._export_name(data)
            case Opt.LIST:
                self._list(data)
            case Opt.STARTTLS:
                self._start_tls(data)
            case Opt.INFO | Opt.GO:
                self._info(Opt(option), data)
            case Opt.STRUCTURED_REPLY:
                self._structured_reply(data)
            case Opt.LIST_META_CONTEXT:
                self._list_meta_context(data)
            case Opt.SET_META_CONTEXT:
                self._set_meta_context(data)
            case Opt.EXTENDED_HEADERS:
                parse_nothing(data)
                self._extended = True
                self._reply(option, Rep.ACK)
            case _:
                raise OptionError(Rep.ERR_UNSUP, "this server does not know the option")

    def _export_name(self, data: bytes) -> None:
        if self._extended:
            raise OptionError(Rep.ERR_INVALID, "EXPORT_NAME after extended headers")
        export = self._open(parse_export_name(data), Opt.EXPORT_NAME)
        self._output += EXPORT_NAME_REPLY.pack(export.size, self._flags(export))
        if not self._client_flags & ClientFlag.NO_ZEROES:
            self._output += EXPORT_NAME_PADDING
        self._agree(export)

    def _list(self, data: bytes) -> None:
        parse_nothing(data)
        for export in filter(self._permit, self._exports):
            self._reply(Opt.LIST, Rep.SERVER, _counted(export.name) + export.description.encode())
        self._reply(Opt.LIST, Rep.ACK)

    def _start_tls(self, data: bytes) -> None:
        parse_nothing(data)
        if self._tls is Tls.OFF:
            raise OptionError(Rep.ERR_POLICY, "this server is not set up for TLS")
        if self._tls is Tls.ACTIVE:
            raise OptionError(Rep.ERR_INVALID, "TLS is there already")
        self._reply(Opt.STARTTLS, Rep.ACK)
        self.phase = Phase.STARTTLS

    def _structured_reply(self, data: bytes) -> None:
        parse_nothing(data)
        if self._extended:
            raise OptionError(Rep.ERR_EXT_HEADER_REQD, "extended headers were negotiated, there is no way back")
        self._structured = True
        self._reply(Opt.STRUCTURED_REPLY, Rep.ACK)

    def _info(self, option: Opt, data: bytes) -> None:
        request = parse_info(data)
        export = self._open(request.name, option) if option == Opt.GO else self._find(request.name, option)
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
        available = self._find(request.name, Opt.LIST_META_CONTEXT).contexts
        # No query at all asks for everything.
        names = match_contexts(available, request.queries, wildcards=True) if request.queries else available
        for name in names:
            self._reply(Opt.LIST_META_CONTEXT, Rep.META_CONTEXT, bytes(4) + name.encode())
        self._reply(Opt.LIST_META_CONTEXT, Rep.ACK)

    def _set_meta_context(self, data: bytes) -> None:
        # The earlier set is replaced even if this fails.
        self._contexts_export, self._contexts = None, {}
        request = parse_meta(data)
        if not (self._structured or self._extended):
            raise OptionError(Rep.ERR_INVALID, "negotiate structured replies or extended headers first")
        export = self._find(request.name, Opt.SET_META_CONTEXT)
        names = match_contexts(export.contexts, request.queries, wildcards=False)
        self._contexts_export, self._contexts = export, dict(enumerate(names, start=1))
        for number, name in self._contexts.items():
            self._reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, number.to_bytes(4, "big") + name.encode())
        self._reply(Opt.SET_META_CONTEXT, Rep.ACK)

    def _find(self, name: str, option: Opt) -> ExportInfo:
        export = find_export(self._exports, name)
        if export and self._permit(export):
            return export
        if self._tls is Tls.OFFERED:
            # No other option may be answered ERR_TLS_REQD. What does not exist is answered like what is hidden.
            if option in (Opt.INFO, Opt.GO, Opt.EXPORT_NAME) and not all(map(self._permit, self._exports)):
                raise OptionError(Rep.ERR_TLS_REQD, "the export needs TLS, or there is none of that name")
        elif export:
            raise OptionError(Rep.ERR_POLICY, "this client may not open the export")
        raise OptionError(Rep.ERR_UNKNOWN, "there is no export of that name")

    def _open(self, name: str, option: Opt) -> ExportInfo:
        export = self._find(name, option)
        refusal = self._admit(export)
        if refusal is not None:
            raise OptionError(Rep.ERR_POLICY, refusal)
        return export

    def _agree(self, export: ExportInfo) -> None:
        self.agreement = self._agreement(export)
        self.phase = Phase.TRANSMISSION

    def _flags(self, export: ExportInfo) -> int:
        return self._agreement(export).flags

    def _agreement(self, export: ExportInfo) -> Agreement:
        contexts = self._contexts if self._contexts_export is export else {}
        return Agreement(export, structured=self._structured, extended=self._extended, contexts=contexts)

    def _reply(self, option: int, reply: Rep, data: bytes = b"") -> None:
        self._output += OPTION_REPLY.pack(REP_MAGIC, option, reply, len(data)) + data

    def _take(self, length: int) -> bytes:
        taken = bytes(self._input[:length])
        del self._input[:length]
        return taken


def _counted(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "big") + data


def _typed(kind: Info, text: str) -> bytes:
    return kind.to_bytes(2, "big") + text.encode()
