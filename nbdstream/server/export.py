"""An export: a device under a name, with what clients may do to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbdstream.server.contexts import BASE_ALLOCATION, LAYERED_CONTEXTS, MetaContext
from nbdstream.wire.export import ExportInfo
from nbdstream.wire.nbd import TransmissionFlag

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection, Sequence

    from nbdstream.block.device import BlockDevice

_FLAGS = (
    TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA | TransmissionFlag.SEND_CACHE
)
_WRITABLE_FLAGS = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO


class Export:
    """One device as one name on a server. Whoever made the device closes it, after the server."""

    def __init__(
        self,
        name: str,
        device: BlockDevice,
        *,
        writable: bool,
        description: str = "",
        max_connections: int | None = None,
        contexts: Sequence[MetaContext] | None = None,
        allow: Collection[str] | None = None,
        listed: bool = True,
    ) -> None:
        """Offer ``device`` as ``name``; raises ValueError for what cannot go over the wire.

        ``max_connections`` is how many clients may have it open at once (None: no limit but the server's). ``contexts``
        are the meta contexts it offers: by default those that the device has something to say in. ``allow`` names the
        clients that may know of it and open it, by a name in their certificates or by their fingerprints: nobody else,
        and nobody without TLS (None: everybody). Without ``listed`` only who knows the name finds it.
        """
        if writable and device.read_only:
            msg = f"the device of export {name!r} is read-only"
            raise ValueError(msg)
        self.device = device
        self.max_connections = max_connections
        if contexts is None:
            contexts = LAYERED_CONTEXTS if device.layered else (BASE_ALLOCATION,)
        self.contexts = {context.name: context for context in contexts}
        self.allow = None if allow is None else frozenset(allow)
        self.info = ExportInfo(
            name=name,
            size=device.size,
            flags=_flags(writable=writable, shared=max_connections != 1),
            description=description,
            minimum_block=device.minimum_block,
            preferred_block=max(device.preferred_block, device.minimum_block, 512),
            contexts=tuple(self.contexts),
            listed=listed,
        )
        self.connections = 0
        """Clients that have it open now."""
        self.requests = 0
        """Requests taken since it was made, refused ones included."""
        self.timed: Callable[[float, asyncio.Task[Any] | None], None] | None = None
        """Told of every request that was not answered at once: the seconds that it took, and the task that it was."""
        self.bytes_read = 0
        """Payload that clients asked for since it was made."""
        self.bytes_written = 0
        """Payload that clients sent since it was made."""

    @property
    def name(self) -> str:
        """The name that clients ask for."""
        return self.info.name

    def permits(self, names: Collection[str]) -> bool:
        """Whether a client may know of it whose certificate bears these names."""
        return self.allow is None or not self.allow.isdisjoint(names)

    def refusal(self) -> str | None:
        """Why one more client cannot open it, or None."""
        if self.max_connections is None or self.connections < self.max_connections:
            return None
        return f"the export is open by as many clients as it allows ({self.max_connections})"


def _flags(*, writable: bool, shared: bool) -> TransmissionFlag:
    flags = _FLAGS | (_WRITABLE_FLAGS if writable else TransmissionFlag.READ_ONLY)
    # All connections use one device, and its flush covers what every one of them wrote. Whoever is alone with
    # the export must not be invited to open it twice.
    return flags | TransmissionFlag.CAN_MULTI_CONN if shared else flags
