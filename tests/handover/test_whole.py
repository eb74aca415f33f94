"""The whole path with real files and sockets, in one process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.raw import RawImage
from nbdstream.handover.driver import HandoverError, breakdown
from nbdstream.handover.manifest import read_manifest
from nbdstream.handover.source import SourceOptions
from nbdstream.wire.handover.vocabulary import Decline, Fence, Override, Phase, Retry
from tests.handover.rig import SIZE, Death, Rig, contents_of
from tests.support.client import NbdClient

if TYPE_CHECKING:
    from collections.abc import Callable

EPERM = 1


def write(guest: NbdClient, offset: int, data: bytes) -> int:
    """Write as a guest; return the error number."""
    cookie = guest.submit(1, offset, len(data), data)
    reply = guest.receive()
    assert reply.cookie == cookie
    return reply.error


def write_anew(path: str, offset: int, data: bytes) -> int:
    """Connect as a guest and write."""
    with NbdClient(path) as guest:
        return write(guest, offset, data)


async def test_the_guest_reads_before_it_is_accepted_and_writes_only_then(tmp_path: Path) -> None:
    async with Rig(str(tmp_path)) as rig:
        await rig.prepared()
        expected = Path(rig.images[0]).read_bytes()
        with await asyncio.to_thread(NbdClient, rig.sockets[0]) as guest:
            assert await asyncio.to_thread(guest.read, 0, 4096) == expected[:4096]
            assert not guest.flags & 2  # NBD_FLAG_READ_ONLY
            assert await asyncio.to_thread(write, guest, 0, b"early" * 100) == EPERM
            await rig.source.command(Fence())
            await rig.until(lambda: rig.destination.state.record.phase is not Phase.PREPARED)
            await rig.released()
            assert await asyncio.to_thread(write, guest, 0, b"mine!" * 100) == 0
            assert await asyncio.to_thread(guest.read, 0, 500) == b"mine!" * 100
        await rig.kill("destination")
        assert await contents_of(rig.overlays[0]) == b"mine!" * 100 + expected[500:]


async def test_what_was_read_before_the_fence_is_not_kept(tmp_path: Path) -> None:
    async with Rig(str(tmp_path)) as rig:
        await rig.prepared()
        with await asyncio.to_thread(NbdClient, rig.sockets[0]) as guest:
            await asyncio.to_thread(guest.read, 0, SIZE)
            with open(rig.images[0], "r+b") as image:  # the guest is still at the source
                image.write(b"late" * 1000)
                image.seek(SIZE // 2)
                image.write(b"more" * 1000)
            assert (await asyncio.to_thread(guest.read, 0, 4000)) == b"late" * 1000
        await rig.source.command(Fence())
        await rig.released()
        await rig.kill("destination")
        found = await contents_of(rig.overlays[0])
        assert found[:4000] == b"late" * 1000
        assert found[SIZE // 2 : SIZE // 2 + 4000] == b"more" * 1000


async def test_the_image_is_hidden_while_it_is_granted_and_kept(tmp_path: Path) -> None:
    async with Rig(str(tmp_path)) as rig:
        await rig.prepared()
        await rig.source.command(Fence())
        await rig.released()
        hidden = rig.source.images[0].hidden_path
        assert not os.path.exists(rig.images[0])
        assert os.path.exists(hidden)


async def test_the_image_is_removed_if_that_is_wanted(tmp_path: Path) -> None:
    rig = Rig(str(tmp_path))
    rig.source_options = SourceOptions(on_release="remove")
    async with rig:
        await rig.prepared()
        await rig.source.command(Fence())
        await rig.released()
        assert not [name for name in os.listdir(tmp_path) if ".img" in name]


async def test_a_manifest_lies_beside_the_overlay(tmp_path: Path) -> None:
    async with Rig(str(tmp_path)) as rig:
        await rig.prepared()
        await rig.source.command(Fence())
        await rig.released()
        manifest = read_manifest(f"{rig.overlays[0]}.manifest")
        assert manifest
        assert (manifest.epoch, manifest.size, manifest.uuid) == (2, SIZE, rig.source.setup.disks[0].uuid)
        assert manifest.data + manifest.zero + manifest.unallocated == SIZE // manifest.cluster_size


async def test_two_disks_go_together(tmp_path: Path) -> None:
    async with Rig(str(tmp_path), disks=2) as rig:
        await rig.prepared()
        await rig.source.command(Fence())
        await rig.released()
        await rig.kill("destination")
        for image, overlay in zip(rig.source.images, rig.overlays, strict=True):
            assert await contents_of(overlay) == Path(image.hidden_path).read_bytes()


async def test_two_disks_stay_together_if_one_cannot_be_fenced(tmp_path: Path) -> None:
    async with Rig(str(tmp_path), disks=2) as rig:
        await rig.prepared()
        writer = await RawImage.open(rig.images[1], writable=True)
        try:
            await rig.source.command(Fence())
            await rig.until(lambda: rig.source.state.record.phase is Phase.OFFERED)
            assert "is in use by" in rig.source.problem
            assert rig.destination.state.record.phase is Phase.PREPARED
            assert all(map(os.path.exists, rig.images))
        finally:
            await writer.close()
        await rig.source.command(Fence())
        await rig.released()


async def test_a_hook_that_fails_stops_the_fence_and_the_guest_is_resumed(tmp_path: Path) -> None:
    rig = Rig(str(tmp_path))
    said = tmp_path / "said"
    rig.source_options = SourceOptions(on_fence="echo no; exit 3", on_resume=f"echo $NBDSTREAM_STATE >> {said}")
    async with rig:
        await rig.prepared()
        await rig.source.command(Fence())
        await rig.until(lambda: rig.source.state.record.phase is Phase.OFFERED)
        assert "the on-fence hook failed with status 3: no" in rig.source.problem
        assert said.read_text() == "resuming\n"
        assert rig.source.state.record.epoch == 1


async def test_a_guest_that_does_not_start_is_tried_again_by_the_operator(tmp_path: Path) -> None:
    rig = Rig(str(tmp_path))
    rig.on_accept = f"test -e {tmp_path}/go"
    async with rig:
        await rig.prepared()
        await rig.source.command(Fence())
        await rig.until(lambda: rig.destination.state.failed is not None)
        assert rig.destination.state.record.phase is Phase.ACCEPTED
        (tmp_path / "go").touch()
        await rig.destination.command(Retry())
        await rig.released()


async def test_the_destination_declines_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    async with Rig(str(tmp_path)) as rig:
        await rig.prepared()
        await rig.destination.command(Decline())
        await rig.ended("destination")
        await rig.ended("source")
        assert rig.phases() == (Phase.DECLINED, Phase.DECLINED)
        assert not os.path.exists(rig.overlays[0])
        assert os.path.exists(rig.images[0])


async def test_the_source_calls_it_off_and_the_destination_removes_what_it_made(tmp_path: Path) -> None:
    async with Rig(str(tmp_path)) as rig:
        await rig.prepared()
        await rig.source.command(Decline())
        await rig.ended("destination")
        await rig.ended("source")
        assert not os.path.exists(rig.overlays[0])


async def test_an_override_gives_the_disk_back_at_an_epoch_of_its_own(tmp_path: Path) -> None:
    async with Rig(str(tmp_path)) as rig:
        await rig.prepared()
        rig.destination_death = rig.destination.death = Death(0)  # at its next effect
        await rig.source.command(Fence())
        await rig.stays_dead("destination")
        await rig.until(lambda: rig.source.state.record.phase is Phase.GRANTED and not rig.source.state.connected)
        with pytest.raises(HandoverError, match="say how it is known"):
            await rig.source.command(Override(" "))
        await rig.source.command(Override("the test has killed it"))
        await rig.until(lambda: rig.source.state.record.phase is Phase.DECLINED)
        assert rig.source.state.record.epoch == 3
        assert os.path.exists(rig.images[0])
        assert "the test has killed it" in Path(f"{tmp_path}/source/journal").read_text()


async def test_from_the_fence_request_to_accepted_it_takes_a_few_barriers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Rig(str(tmp_path)) as rig:
        await rig.prepared()
        await rig.source.command(Fence())
        await rig.released()
        times = rig.source.times[: [what for what, _ in rig.source.times].index("journal ACCEPTED") + 1]
        parts = [f"{what} {seconds * 1000:.1f}" for what, seconds in breakdown(times)]
        with capsys.disabled():
            print(f"\nfrom the fence request to ACCEPTED, in milliseconds: {', '.join(parts)}")
        assert len([part for part in parts if part.startswith("journal")]) == 3  # the last one is behind the answer
        assert times[-1][1] - times[0][1] < 1.0  # on a machine that others use, too; alone it is ten milliseconds


# -- deaths -----------------------------------------------------------------------------------------------------------


async def hand_over(rig: Rig, on_accepted: Callable[[], None] = lambda: None) -> None:
    """The whole path, whoever dies on it: the operator says fence until something comes of it."""
    while rig.source.state.record.phase is Phase.OFFERED:
        await rig.prepared()
        try:
            await asyncio.wait_for(rig.source.command(Fence()), 0.5)
        except (HandoverError, TimeoutError):  # it has died, before or after that was durable
            await rig.until(lambda: not rig._running["source"].done())
    await rig.until(lambda: rig.destination.state.record.phase in (Phase.HYDRATING, Phase.INDEPENDENT, Phase.RELEASED))
    on_accepted()
    await rig.released()


async def effects_of(directory: Path) -> tuple[int, int]:
    """Return how many effects each side has on the whole path."""
    directory.mkdir()
    async with Rig(str(directory)) as rig:
        await hand_over(rig)
        return rig.source_death.count, rig.destination_death.count


@pytest.mark.parametrize("what", ["dies before", "dies after", "loses its link before"])
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_death_or_a_cut_at_any_effect_changes_nothing_of_how_it_ends(
    side: str, what: str, tmp_path: Path
) -> None:
    most = dict(zip(("source", "destination"), await effects_of(tmp_path / "whole"), strict=True))[side]
    assert most > 10
    died = 0
    for at in range(most):
        directory = tmp_path / str(at)
        directory.mkdir()
        rig = Rig(str(directory))
        death = Death(at, after=what.endswith("after"), link="link" in what)
        setattr(rig, f"{side}_death", death)
        expected = Path(rig.images[0]).read_bytes()
        async with rig:
            await hand_over(rig)
            assert await asyncio.to_thread(write_anew, rig.sockets[0], 4096, b"guest") == 0
            await rig.kill("destination")
        assert rig.source.state.record.epoch == 2
        assert await contents_of(rig.overlays[0]) == expected[:4096] + b"guest" + expected[4101:], at
        died += death.came
    assert died >= most - 2  # the last ones may come too late to matter
