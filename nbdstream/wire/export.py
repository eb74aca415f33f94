"""What negotiation tells a client about an export, and what it and the client agreed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nbdstream.wire.nbd import MAX_STRING, TransmissionFlag

if TYPE_CHECKING:
    from collections.abc import Sequence

MAXIMUM_PAYLOAD: Final = 64 << 20
"""Bytes. libnbd sends READ and WRITE up to this; proto.md asks for 32 MiB at the least, and nbd-server's own
integrity test sends 47.6 MiB."""


def check_string(text: str, what: str) -> str:
    """Return ``text`` if it may go over the wire ("Conventions": UTF-8, no NUL, 4096 bytes); raises ValueError."""
    # A surrogate stands for a byte that is no UTF-8, as in the name of a file.
    surrogate = any("\ud800" <= character <= "\udfff" for character in text)
    if "\0" in text or surrogate or len(text.encode()) > MAX_STRING:
        msg = f"{what} must be UTF-8 of at most {MAX_STRING} bytes without a NUL: {text[:80]!r}"
        raise ValueError(msg)
    return text


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """One export as a client sees it."""

    name: str
    size: int
    """Bytes."""
    flags: TransmissionFlag
    """Without those that depend on what the client negotiates: SEND_DF and BLOCK_STATUS_PAYLOAD."""
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = MAXIMUM_PAYLOAD
    contexts: tuple[str, ...] = ("base:allocation",)
    """Names of the meta contexts that can be selected."""
    listed: bool = True
    """Whether LIST has it."""

    def __post_init__(self) -> None:
        check_string(self.name, "an export name")
        check_string(self.description, "an export's description")
        # libnbd silently ignores a triple that breaks these rules of "Size constraints".
        minimum, preferred = self.minimum_block, self.preferred_block
        if not _is_power_of_2(minimum) or minimum > 1 << 16:
            msg = f"the minimum block must be a power of 2 up to 65536, not {minimum}"
            raise ValueError(msg)
        if not _is_power_of_2(preferred) or preferred < max(512, minimum):
            msg = f"the preferred block must be a power of 2, at least {max(512, minimum)}, not {preferred}"
            raise ValueError(msg)
        if self.maximum_payload < preferred or self.maximum_payload % minimum:
            msg = f"the maximum payload must be a multiple of the minimum block, at least {preferred}"
            raise ValueError(msg)
        # libnbd cannot hold a size above this.
        if not 0 <= self.size < 1 << 63:
            msg = f"an export's size must be below 2^63 bytes, not {self.size}"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What holds for the transmission phase of one connection."""

    export: ExportInfo
    structured: bool = False
    extended: bool = False
    """Headers of 32 bytes both ways; ``structured`` makes no difference then."""
    contexts: dict[int, str] = field(default_factory=dict)
    """The selected meta contexts: names by context id, in the order they are reported."""

    @property
    def flags(self) -> TransmissionFlag:
        """The transmission flags that the client was told."""
        flags = self.export.flags
        if self.structured or self.extended:
            flags |= TransmissionFlag.SEND_DF
        # "SHOULD NOT advertise this bit ... if the client does not negotiate metacontexts."
        if self.extended and self.contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags


def find_export(exports: Sequence[ExportInfo], name: str, default: str) -> ExportInfo | None:
    """Return the export of that name; the empty name stands for the one named ``default``, unless one bears it."""
    names = {export.name: export for export in exports}
    return names.get(name) or (None if name else names.get(default))


def _is_power_of_2(number: int) -> bool:
    return number > 0 and not number & (number - 1)
