"""What the two state machines take and give: phases, journal records, events, operator's commands, effects.

A machine is asked what follows from an event, and answers with its next state and with *effects*. Whoever drives it
executes effects one after the other, strictly in the order in which they were given, each to its end before the next:
so what has to be durable before something is said is put before it, once, here. An effect that may take long, or fail,
is ``Do`` (operation); it is the last of its answer, and Done or Failed comes for it before the next effect is executed.
Events may come meanwhile; what follows from them waits its turn.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, TypeAlias

from msgspec import Struct

from nbdstream.wire.handover.messages import Disk, Manifest, Message


class Phase(StrEnum):
    """Where a side stands, as its journal has it."""

    OFFERED = "offered"
    """Source: it owns the disks, its guest runs. Which destination the token serves may be settled already."""
    FENCING = "fencing"
    """Source: it owns the disks; its guest is being stopped, or is stopped and the images are fenced."""
    GRANTED = "granted"
    """Source: it does not own the disks unless the destination declines."""
    RESUMING = "resuming"
    """Source: it owns the disks again; its guest has to be resumed. What it is then is in the record."""
    RELEASING = "releasing"
    """Source: the manifests were right; what is to become of the images is being done."""

    JOINING = "joining"
    """Destination: it has an offer, and has made nothing yet."""
    PREPARING = "preparing"
    """Destination: it knows the disks, and may have made some of the overlays."""
    PREPARED = "prepared"
    """Destination: overlays and the guest's sockets are there. It will accept what is granted."""
    HYDRATING = "hydrating"
    """Destination: it owns the disks and its guest was started."""
    INDEPENDENT = "independent"
    """Destination: nothing is only at the source any more."""

    ACCEPTED = "accepted"
    """Both: the destination owns the disks."""
    RELEASED = "released"
    """Both: the source has let go, and all is done."""
    DECLINED = "declined"
    """Both: the hand-over was called off, and the source owns the disks."""


class Operation(StrEnum):
    """What may take long, or fail. Each can be done again when it was done, wholly or in part."""

    HOOK_FENCE = "on-fence hook"
    """The guest must pause, and let go of the images."""
    TAKE_FENCE = "fence"
    """Lock everybody out who writes, and read the images afresh from now on."""
    HIDE = "rename of the images"
    """Rename the images beside themselves, durably, so that no autostart finds them."""
    SHOW = "rename of the images back"
    HOOK_RESUME = "on-resume hook"
    """The guest may run again."""
    DISPOSE = "on-release action"

    PREPARE = "preparation"
    """Make the overlays, or open those that this journal's hand-over made; serve the guest's sockets: no writes yet."""
    HOOK_ACCEPT = "on-accept hook"
    """The guest may start."""
    MANIFEST = "manifest"
    """Write a manifest beside each overlay, durably. Written comes for it, not Done."""
    DISCARD = "removal of the overlays"
    """Close the guest's sockets; delete what this journal's hand-over made."""


# -- journal records ------------------------------------------------------------------------------------------


class SourceRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What the source must not forget."""

    phase: Phase
    epoch: int
    """At which the source owns the disks, or has granted them."""
    destination: str = ""
    """The id of the one that the token serves."""
    fingerprint: str = ""
    """Of that one's certificate; empty where there is no TLS."""
    then: Phase = Phase.OFFERED
    """What RESUMING leads to: OFFERED or DECLINED."""


class DestinationRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What the destination must not forget."""

    phase: Phase
    epoch: int = 0
    """At which the source owns the disks; from ACCEPTED on, at which the destination does."""
    disks: tuple[Disk, ...] = ()
    port: int = 0
    """Of the source's NBD server."""
    manifests: tuple[Manifest, ...] = ()


# -- events -----------------------------------------------------------------------------------------------------


class Connected(Struct, frozen=True):
    """The peer is there, and from now on messages go to this connection.

    At the source: after a hello that :meth:`Source.refusal` has nothing against; it says who that is.
    """

    destination: str = ""
    fingerprint: str = ""


class Lost(Struct, frozen=True):
    """The connection is gone."""


class Received(Struct, frozen=True):
    """The peer said something else than hello."""

    message: Message


class Done(Struct, frozen=True):
    """An operation came to its end."""

    operation: Operation


class Failed(Struct, frozen=True):
    """An operation failed. Why is for people, and does not change what follows."""

    operation: Operation


class Written(Struct, frozen=True):
    """The manifests are written, durably."""

    manifests: tuple[Manifest, ...]


class Hydrated(Struct, frozen=True):
    """All overlays are independent, durably."""


class Tick(Struct, frozen=True):
    """Some seconds have gone by: what was said may be said again, what failed and needs nobody may be tried again."""


class FenceTimeout(Struct, frozen=True):
    """The destination was waited for long enough since StartFenceTimer."""


class Fence(Struct, frozen=True):
    """The operator's command to the source: change the owner now."""


class Decline(Struct, frozen=True):
    """The operator's command to either side: call it off."""


class Release(Struct, frozen=True):
    """The operator's command to the source: these manifests came by another way than the connection."""

    manifests: tuple[Manifest, ...]


class Override(Struct, frozen=True):
    """The operator's command to the source: take the disks back, since the destination certainly does not run.

    How that is known, in words, is kept in the journal.
    """

    evidence: str


class Retry(Struct, frozen=True):
    """The operator's command to either side: try again what failed."""


Command: TypeAlias = Fence | Decline | Release | Override | Retry
Event: TypeAlias = Connected | Lost | Received | Done | Failed | Written | Hydrated | Tick | FenceTimeout | Command


class CommandRefusedError(Exception):
    """An operator's command cannot be done as things stand. Nothing has changed."""


# -- effects ----------------------------------------------------------------------------------------------------


class Persist(Struct, frozen=True):
    """Write the record to the journal and make it durable. If that fails, nothing more may be done: end."""

    record: SourceRecord | DestinationRecord
    note: str = ""
    """For whoever reads the journal."""


class Send(Struct, frozen=True):
    """Send the message if the peer is connected. (The driver knows how much is still remote, and fills that in.)"""

    message: Message


class Do(Struct, frozen=True):
    """Do the operation, and tell Done, Failed or Written."""

    operation: Operation


class OpenExport(Struct, frozen=True):
    """Source: let the destination read the images."""


class CloseExport(Struct, frozen=True):
    """Source: let nobody read them."""


class ReleaseFence(Struct, frozen=True):
    """Source: let writers in again."""


class StartFenceTimer(Struct, frozen=True):
    """Source: tell FenceTimeout when the destination has been waited for long enough; from now on."""


class AllowWrites(Struct, frozen=True):
    """Destination: the guest's sockets take writes from now on."""


class Hydrate(Struct, frozen=True):
    """Destination: begin to stream, and tell Hydrated when all overlays are independent."""


class Alarm(Struct, frozen=True):
    """Something happened that must not; nothing follows but that the operator is told."""

    text: str


Effect: TypeAlias = (
    Persist | Send | Do | OpenExport | CloseExport | ReleaseFence | StartFenceTimer | AllowWrites | Hydrate | Alarm
)

NOTHING: Final[tuple[Effect, ...]] = ()
