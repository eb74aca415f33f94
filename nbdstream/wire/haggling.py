"""Option haggling, server side: what each option is answered, and what the client and the server have agreed on so far.

The bytes come from :mod:`nbdstream.wire.negotiation`, one complete option at a time. Inside TLS haggling begins anew,
with an object of its own, so nothing that was said in plain text can hold there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

from nbdstream.errors import ProtocolError
from nbdstream.wire.export import Agreement, ExportInfo, find_export
from nbdstream.wire.nbd import (
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION_REPLY,
    REP_MAGIC,
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
    """Over: there is an agreement, and whatever else the client has sent belongs to it."""
    CLOSED = auto()
    """Over: send what there is to send and close."""
    STARTTLS = auto()
    """Stop reading, then send what there is to send and begin TLS; inside it haggling begins anew."""


class Haggling:
    """The options of one client, in plain text or inside TLS."""

    def __init__(
        self,
        exports: Sequence[ExportInfo],
        *,
        default: str,
        admit: Admit,
        permit: Permit,
        tls: Tls,
        padding: bool,
    ) -> None:
        """``padding``: the client did not decline the zeroes behind the answer to EXPORT_NAME."""
        self.phase = Phase.OPTIONS
        """Where the options answered so far have led."""
        self.agreement: Agreement | None = None
        self._exports = exports
        self._default = default
        self._admit = admit
        self._permit = permit
        self._tls = tls
        self._padding = padding
        self._output = bytearray()
        self._structured = False
        self._extended = False
        self._contexts_export: ExportInfo | None = None
        self._contexts: dict[int, str] = {}

    def answer(self, option: int, data: bytes | None) -> bytes:
        """Return what an option is answered; its data are None if they were too long to be kept.

        Raises ProtocolError if the connection has to be closed without an answer.
        """
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
        output = bytes(self._output)
        self._output.clear()
        return output

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
        if self._padding:
            self._output += EXPORT_NAME_PADDING
        self._agree(export)

    def _list(self, data: bytes) -> None:
        parse_nothing(data)
        for export in filter(self._permit, self._exports):
            if not export.listed:
                continue
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
        export = find_export(self._exports, name, self._default)
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


def _counted(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "big") + data


def _typed(kind: Info, text: str) -> bytes:
    return kind.to_bytes(2, "big") + text.encode()
