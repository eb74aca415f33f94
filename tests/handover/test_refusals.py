"""Whoever is not the destination is refused, and changes nothing."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from nbdstream.block.remote.export import RemoteExport
from nbdstream.errors import ImageError, SourceError
from nbdstream.handover.driver import HandoverError
from nbdstream.handover.link import client_context
from nbdstream.handover.source import MOST_CONNECTIONS
from nbdstream.server.tls import TlsPolicy, server_context
from nbdstream.uri import NbdUri
from nbdstream.wire.handover.vocabulary import Fence, Phase
from tests.handover.rig import Rig
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdstream.handover.offer import Offer

STRANGER: Final = "e" * 32


async def talk(offer: Offer, *lines: bytes, tls: ssl.SSLContext | None = None) -> dict[str, Any] | None:
    """Say something to the source, and return what it says to that; None if it just hangs up."""
    reader, writer = await asyncio.open_connection(
        offer.host, offer.port, ssl=tls, server_hostname=offer.host if tls else None
    )
    try:
        writer.writelines(lines)
        async with asyncio.timeout(20):
            said = await reader.readline()
        return json.loads(said) if said else None
    except ConnectionError:
        return None
    finally:
        writer.close()


def hello(offer: Offer, **changes: Any) -> bytes:
    """Return a hello."""
    fields = {"message": "hello", "group": offer.group, "destination": STRANGER, "epoch": 0, "seq": 0}
    return json.dumps(fields | {"version": 1, "token": offer.token} | changes).encode() + b"\n"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """A hand-over that is prepared."""
    async with Rig(str(tmp_path)) as rig:
        await rig.prepared()
        yield rig


def journals(rig: Rig) -> list[bytes]:
    return [Path(f"{rig.directory}/{side}/journal").read_bytes() for side in ("source", "destination")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token": "0" * 32}, "there is no such offer, or this is not its token"),
        ({"group": "0" * 32}, "there is no such offer, or this is not its token"),
        ({}, "the token serves this destination with another state directory"),
        ({"version": 2}, "version 2 is not known here: this is version 1"),
        ({"version": 2, "colour": "red"}, "version 2 is not known here: this is version 1"),
        ({"colour": "red"}, "a message that is none of version 1: Object contains unknown field `colour`"),
        ({"message": "grant"}, "a message that is none of version 1: Invalid value 'grant' - at `$.message`"),
        ({"seq": 1}, "message 1 came where 0 was due"),
        ({"epoch": -1}, "a message that is none of version 1: Expected `int` >= 0 - at `$.epoch`"),
    ],
)
async def test_a_wrong_hello_is_refused_with_the_reason(rig: Rig, changes: dict[str, Any], reason: str) -> None:
    before = journals(rig)
    assert await talk(rig.offer, hello(rig.offer, **changes)) == {
        "message": "refused",
        "reason": reason,
        "version": 1,
    }
    assert journals(rig) == before
    assert rig.source.state.connected


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100 + b"\n", b"x" * 70_000, b"[" * 60_000 + b"\n"])
async def test_what_is_no_message_is_refused(rig: Rig, line: bytes) -> None:
    before = journals(rig)
    answer = await talk(rig.offer, line)
    assert answer is None or answer["message"] == "refused"
    assert journals(rig) == before
    assert rig.source.state.connected


async def test_a_replayed_conversation_is_refused(rig: Rig) -> None:
    """Whoever saw the destination's messages on a line without TLS cannot say them again as somebody else."""
    key = {"group": rig.offer.group, "destination": rig.destination.setup.destination, "epoch": 1}
    declined = json.dumps({"message": "declined", **key, "seq": 0}).encode() + b"\n"
    assert await talk(rig.offer, declined) == {
        "message": "refused",
        "reason": "the first message must be hello",
        "version": 1,
    }
    assert rig.source.state.record.phase is Phase.OFFERED


async def test_a_flood_of_connections_does_not_keep_the_destination_out(rig: Rig) -> None:
    flood = [await asyncio.open_connection(rig.offer.host, rig.offer.port) for _ in range(4 * MOST_CONNECTIONS)]
    await rig.kill("destination")
    await rig.start_destination()
    await rig.prepared()
    assert len(rig.source._strangers) <= MOST_CONNECTIONS
    for _, writer in flood:
        writer.close()
    await rig.source.command(Fence())
    await rig.released()


async def test_the_exports_are_found_by_nobody_who_does_not_know_their_names(rig: Rig) -> None:
    for name in ("", "0", "disk"):
        uri = NbdUri(host="127.0.0.1", port=rig.source.setup.nbd_port, export=name)
        with pytest.raises(SourceError):
            await RemoteExport.connect(str(uri))


async def test_another_image_behind_the_same_name_is_noticed(rig: Rig) -> None:
    await rig.kill("source")
    image = Path(rig.images[0])
    data = image.read_bytes()
    image.rename(f"{image}.old")
    image.write_bytes(data)
    with pytest.raises(ImageError, match="is another file than the one that was offered"):
        await rig.start_source()


async def test_a_receiver_of_another_offer_does_not_take_over_the_state_directory(rig: Rig, tmp_path: Path) -> None:
    await rig.kill("destination")
    rig.offer = rig.offer._replace(token="0" * 32)
    with pytest.raises(HandoverError, match="is of another offer"):
        await rig.start_destination()


async def test_an_overlay_that_is_not_ours_is_neither_used_nor_removed(tmp_path: Path) -> None:
    rig = Rig(str(tmp_path))
    Path(rig.overlays[0]).write_bytes(b"precious")
    await rig.start_source()
    try:
        with pytest.raises(HandoverError, match="exists, and this hand-over has not made it"):
            await rig.start_destination()
        assert Path(rig.overlays[0]).read_bytes() == b"precious"
    finally:
        await rig.kill("source")


async def test_a_wrong_token_ends_the_receiver_with_the_reason(tmp_path: Path) -> None:
    rig = Rig(str(tmp_path))
    await rig.start_source()
    rig.offer = rig.offer._replace(token="0" * 32)
    await rig.start_destination()
    with pytest.raises(HandoverError, match="the source refuses: there is no such offer"):
        await rig.ended("destination")
    await rig.destination.close()
    del rig._running["destination"]
    await rig.kill("source")


# -- TLS ------------------------------------------------------------------------------------------------------------


def secured(tmp_path: Path) -> tuple[Rig, Authority]:
    """A hand-over with TLS that is not started yet, and who signs for it."""
    authority = Authority()
    server, client = authority.server(tmp_path / "server"), authority.client(tmp_path / "client", "destination")
    policy = TlsPolicy(server_context(server, verify_peer=True), required=True)
    return Rig(str(tmp_path), tls=policy, certificates=client), authority


async def test_the_whole_path_with_tls(tmp_path: Path) -> None:
    rig, _ = secured(tmp_path)
    async with rig:
        await rig.prepared()
        await rig.source.command(Fence())
        await rig.released()


async def test_another_certificate_is_refused_by_the_offer_and_by_the_export(tmp_path: Path) -> None:
    rig, authority = secured(tmp_path)
    async with rig:
        await rig.prepared()
        before = journals(rig)
        other = authority.client(tmp_path / "other", "other")
        context = client_context(other)
        answer = await talk(rig.offer, hello(rig.offer), tls=context)
        assert answer is not None
        assert answer["reason"] == "the token serves another destination"
        uri = NbdUri(
            tls=True, host="localhost", port=rig.source.setup.nbd_port, export=rig.source.setup.disks[0].export
        )
        with pytest.raises(SourceError):
            await RemoteExport.connect(str(uri), tls_certificates=other)
        mine = await RemoteExport.connect(str(uri), tls_certificates=rig.certificates)
        await mine.close()
        assert journals(rig) == before
        assert rig.source.state.connected


@pytest.mark.parametrize("who", ["nobody", "another authority's"])
async def test_a_client_whose_certificate_is_not_confirmed_gets_no_word(who: str, tmp_path: Path) -> None:
    rig, authority = secured(tmp_path)
    async with rig:
        await rig.prepared()
        directory = authority.client(tmp_path / "other") if who == "nobody" else Authority().client(tmp_path / "o", "x")
        context = ssl.create_default_context(cafile=f"{tmp_path}/client/ca-cert.pem")
        if who != "nobody":
            context.load_cert_chain(f"{directory}/client-cert.pem", f"{directory}/client-key.pem")
        try:
            answer = await talk(rig.offer, hello(rig.offer), tls=context)
        except (ssl.SSLError, OSError):
            answer = None
        assert answer is None
        assert rig.source.state.connected


async def test_the_same_certificate_with_a_new_state_directory_is_served_until_the_fence(tmp_path: Path) -> None:
    rig, _ = secured(tmp_path)
    async with rig:
        await rig.prepared()
        await rig.kill("destination")
        (tmp_path / "destination").rename(tmp_path / "lost")
        Path(rig.overlays[0]).unlink()
        await rig.start_destination()
        await rig.prepared()
        await rig.source.command(Fence())
        await rig.released()


async def test_a_source_that_is_not_the_one_in_the_offer_is_not_talked_to(tmp_path: Path) -> None:
    rig, _ = secured(tmp_path)
    stranger = Authority().server(tmp_path / "stranger")
    rig.source_options = rig.source_options._replace(
        tls=TlsPolicy(server_context(stranger, verify_peer=False), required=True)
    )
    async with rig:
        await rig.until(lambda: "certificate verify failed" in rig.destination.problem)
        assert not rig.source.state.record.destination
