"""Another backing file name: at every moment of the change the image has the old one or the new one, whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.block.qed import rebase
from nbdstream.block.qed.opening import create_file, opened, read_header
from nbdstream.block.qed.rebase import replace_backing
from nbdstream.block.worker import pwrite_all
from nbdstream.errors import ImageError
from tests.support import qed

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20


def change(path: str, name: str, origin_size: int = SIZE) -> None:
    header, extension, _ = read_header(path)
    with opened(path, writable=True) as fd:
        replace_backing(fd, header, extension, name, origin_size)


def make(directory: Path, name: str, cluster_size: int = 65536) -> str:
    path = str(directory / "overlay.qed")
    create_file(path, SIZE, cluster_size=cluster_size, table_size=4, backing_name=name, origin_size=SIZE)
    return path


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_the_name_is_another_for_everybody(tmp_path: Path, cluster_size: int) -> None:
    path = make(tmp_path, "nbd://old/disk", cluster_size)
    identity = read_header(path)[1]
    for name in ("nbd://new/disk", "nbd://x/" + "y" * 2000, "nbd://third/disk"):
        change(path, name, SIZE - 7)
        _, extension, backing_name = read_header(path)
        assert backing_name == name
        assert extension
        assert identity
        assert (extension.origin, extension.origin_size) == (name, SIZE - 7)
        assert extension.image_uuid == identity.image_uuid
        assert qed.qemu_info(path)["backing-filename"] == name
        assert qed.qemu_check(path).status == 0


def test_an_image_of_qemus_can_have_another_name(tmp_path: Path) -> None:
    path = qed.create(str(tmp_path / "qemus.qed"), SIZE, backing="nbd://old/disk")
    change(path, "nbd://new/disk")
    assert qed.qemu_info(path)["backing-filename"] == "nbd://new/disk"


def test_a_name_for_which_there_is_no_room_changes_nothing(tmp_path: Path) -> None:
    path = make(tmp_path, "nbd://old/" + "o" * 4085)
    with pytest.raises(ImageError, match="no room"):
        change(path, "nbd://new/" + "n" * 4085)
    assert read_header(path)[2] == "nbd://old/" + "o" * 4085


NAMES = st.integers(1, 3000).map(lambda length: "nbd://" + "n" * length)


@given(NAMES, NAMES, st.integers(0, 1 << 30))
def test_a_cut_at_any_moment_leaves_one_of_the_two(
    tmp_path_factory: pytest.TempPathFactory, old: str, new: str, moment: int
) -> None:
    """What was written since the last barrier is there in part; sectors are whole."""
    path = make(tmp_path_factory.mktemp("cut"), old)
    with open(path, "rb") as file:
        state = bytearray(file.read())
    steps: list[bytes] = [bytes(state)]

    def recording(fd: int, data: bytes, offset: int) -> None:
        for at in range(0, len(data), 512):
            sector = data[at : at + 512]
            state[offset + at : offset + at + len(sector)] = sector
            steps.append(bytes(state))
        pwrite_all(fd, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebase, "pwrite_all", recording)
        change(path, new)
    with open(path, "wb") as cut:
        cut.write(steps[moment % len(steps)])
    assert read_header(path)[2] in (old, new)
