"""The offer: the URI that tells a destination where its source is, and proves that it was told so.

::

    handover://192.0.2.1:10808/GROUP?token=TOKEN      and handovers:// with TLS

Whoever has it may become the destination, once. It is printed, kept in the state directory, and never logged.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from nbdstream.errors import NbdstreamError

_OFFER = re.compile(
    r"(?P<scheme>handovers?)://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]?#@]+):(?P<port>[0-9]{1,5})"
    r"/(?P<group>[0-9a-f]{32})\?token=(?P<token>[0-9a-f]{32})"
)


class OfferError(NbdstreamError):
    """Not an offer."""


class Offer(NamedTuple):
    """Where the source of a hand-over is, and which hand-over."""

    host: str
    """A name, or an address without brackets."""
    port: int
    tls: bool
    group: str
    token: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the offer that a URI is. Raises OfferError, whose text does not have the token."""
        match = _OFFER.fullmatch(text.strip())
        if not match or not 0 < int(match["port"]) < 65536:
            raise OfferError("that is no offer: it looks like handover://HOST:PORT/GROUP?token=TOKEN")
        host = match["host"].removeprefix("[").removesuffix("]")
        return cls(host, int(match["port"]), match["scheme"] == "handovers", match["group"], match["token"])

    def __str__(self) -> str:
        """Return the URI."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "handovers" if self.tls else "handover"
        return f"{scheme}://{host}:{self.port}/{self.group}?token={self.token}"
