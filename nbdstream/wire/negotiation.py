"""The handshake, server side: fixed newstyle and its options, as bytes in and bytes out.

::

    GREETING --client flags--> OPTIONS --EXPORT_NAME or GO--> TRANSMISSION
        |                         |
        +-------------------------+--ABORT--> CLOSED         (anything that cannot be followed: ProtocolError)
                                  +--STARTTLS--> STARTTLS, and inside TLS once more the OPTIONS

An unknown option is answered ERR_UNSUP, a malformed one ERR_INVALID, and the stream stays in step in both cases.
What is kept is bounded by the largest option that is accepted; larger ones are skipped as they arrive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdstream.errors import ProtocolError
from nbdstream.wire.haggling import Admit, Haggling, Permit, Phase, Tls
from nbdstream.wire.nbd import CLIENT_FLAGS, GREETING, IHAVEOPT, NBDMAGIC, OPTION, ClientFlag, HandshakeFlag, Opt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdstream.wire.export import Agreement, ExportInfo

__all__ = ["Negotiation", "Phase", "Tls"]

MAXIMUM_OPTION: Final = 256 << 10
"""Bytes of data with one option. The largest sensible one (a name and every information type) has 135,172."""

ABSURD_OPTION: Final = 32 << 20
"""Bytes. Beyond MAXIMUM_OPTION an option is skipped and answered; beyond this it is an attack, as QEMU has it."""

MAXIMUM_OPTIONS: Final = 1024
"""Options on one connection. Real clients send fewer than ten for an export."""

# An int: the complement of a flag knows its own class's bits only.
_KNOWN_CLIENT_FLAGS: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)


class Negotiation:
    """The handshake of one connection."""

    def __init__(
        self,
        exports: Sequence[ExportInfo],
        *,
        default: str | None = None,
        admit: Admit = lambda _export: None,
        permit: Permit = lambda _export: True,
        tls: Tls = Tls.OFF,
        maximum_option: int = MAXIMUM_OPTION,
        maximum_options: int = MAXIMUM_OPTIONS,
    ) -> None:
        """``default`` is the name of the export that the empty name stands for; None: that of the first."""
        self.phase = Phase.GREETING
        self._exports = exports
        self._default = default if default is not None else exports[0].name if exports else ""
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
        self._haggling: Haggling | None = None

    @property
    def agreement(self) -> Agreement | None:
        """What holds for the transmission phase, once that is reached."""
        return self._haggling.agreement if self._haggling else None

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

    def secure(self) -> None:
        """Begin anew inside TLS: of what was said in plain text only the client flags hold.

        ``permit`` must know by now who the client is.
        """
        self._begin(Tls.ACTIVE)

    def _begin(self, tls: Tls) -> None:
        padding = not self._client_flags & ClientFlag.NO_ZEROES
        self._haggling = Haggling(
            self._exports,
            default=self._default,
            admit=self._admit,
            permit=self._permit,
            tls=tls,
            padding=padding,
        )
        self.phase = Phase.OPTIONS

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
        self._begin(self._tls)
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
        assert self._haggling is not None
        self._output += self._haggling.answer(option, data)
        self.phase = self._haggling.phase

    def _take(self, length: int) -> bytes:
        taken = bytes(self._input[:length])
        del self._input[:length]
        return taken
