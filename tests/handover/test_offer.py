from __future__ import annotations

import pytest

from nbdstream.handover.offer import Offer, OfferError

GROUP, TOKEN = "a" * 32, "b" * 32


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "host.example"])
@pytest.mark.parametrize("tls", [False, True])
def test_an_offer_is_what_its_uri_says(host: str, tls: bool) -> None:
    offer = Offer(host, 10808, tls, GROUP, TOKEN)
    assert Offer.parse(f"{offer}\n") == offer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nbd://localhost",
        f"handover://h/{GROUP}?token={TOKEN}",
        f"handover://h:0/{GROUP}?token={TOKEN}",
        f"handover://h:65536/{GROUP}?token={TOKEN}",
        f"handover://h:1/{GROUP}",
        f"handover://h:1/{GROUP}?token={TOKEN[1:]}",
        f"handover://h:1/{GROUP}?token={TOKEN}&more=1",
        f"handover://u@h:1/{GROUP}?token={TOKEN}",
        f"handover://::1:1/{GROUP}?token={TOKEN}",
        f"handover://h\n:1/{GROUP}?token={TOKEN}",
    ],
)
def test_what_is_no_offer_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(OfferError) as refused:
        Offer.parse(text)
    assert TOKEN not in str(refused.value)
