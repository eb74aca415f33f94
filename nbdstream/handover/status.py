"""What a hand-over's state is called for people, and what there is to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdstream.wire.handover.source import SourceState
from nbdstream.wire.handover.vocabulary import Phase

if TYPE_CHECKING:
    from nbdstream.wire.handover.destination import DestinationState

IN_DOUBT: Final = "IN-DOUBT"


def shown_state(state: SourceState | DestinationState) -> str:
    """Return the state's name: the journal's, or at the source one that says more."""
    phase = state.record.phase
    if isinstance(state, SourceState):
        if phase is Phase.OFFERED and state.prepared:
            return "PREPARED"
        if phase is Phase.FENCING and state.fenced:
            return "FENCED"
        if phase is Phase.GRANTED and not (state.connected and state.fenced):
            return IN_DOUBT
    return phase.upper()


_SOURCE_ADVICE: Final = {
    "OFFERED": "the guest runs here; give the offer to the destination",
    "PREPARED": "the guest runs here; 'nbdstream handover fence' changes the owner",
    "FENCING": "the guest is being stopped",
    "FENCED": "the guest stands still; waiting for the destination, and if it does not come the guest is resumed",
    "GRANTED": "the destination is asked to accept; the guest stays stopped here",
    IN_DOUBT: "the guest stays stopped here, for the destination may own the disks: restore the link, or see what "
    "'nbdstream handover status' says there; decline there, or if that host will certainly never run the guest, "
    "'nbdstream handover override' here",
    "ACCEPTED": "the destination owns the disks, and needs this source until it is INDEPENDENT: keep it running",
    "RESUMING": "the disks are owned here; if the guest could not be resumed, see why and say "
    "'nbdstream handover retry'",
    "RELEASING": "the destination is independent; if the on-release action failed, see why and say "
    "'nbdstream handover retry'",
    "RELEASED": "it is done: the images here are not needed any more",
    "DECLINED": "it was called off: the guest runs here",
}

_DESTINATION_ADVICE: Final = {
    "JOINING": "waiting for the source's offer",
    "PREPARING": "overlays are being made",
    "PREPARED": "the guest may be prepared, on a disk that it can read; waiting for the source's grant, and it can "
    "still be declined",
    "ACCEPTED": "the disks are owned here; if the guest could not be started, see why and say "
    "'nbdstream handover retry'",
    "HYDRATING": "the guest runs here; what is only at the source would be lost with it",
    "INDEPENDENT": "the source is not needed any more; it has still to be told, as soon as it runs",
    "RELEASED": "it is done",
    "DECLINED": "it was called off: the guest runs at the source, and nothing is left here",
}


def advice(shown: str, *, source: bool) -> str:
    """Return what a state means, and what to do."""
    return (_SOURCE_ADVICE if source else _DESTINATION_ADVICE).get(shown, "")
