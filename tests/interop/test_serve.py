"""``nbdstream serve`` and the tools that people use with NBD, on raw and QED images, read-only and writable."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest

from tests.support.harness import make_image, socket_uri
from tests.support.processes import Command, run
from tests.support.qed import (
    SMALL_GEOMETRIES,
    Write,
    content,
    create,
    qemu_check,
    qemu_img,
    random_writes,
    write_all,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
SIZE = 24 * MIB


class Served:
    """An image, what it holds, and the command that serves it."""

    def __init__(self, directory: Path, image_format: str, *, writable: bool, seed: int) -> None:
        self.format = image_format
        self.writable = writable
        self.plain = str(directory / "plain.img")
        self.image = str(directory / f"disk.{image_format}")
        self.scratch = str(directory / "scratch.img")
        self.uri = socket_uri(str(directory / "nbd.sock"))
        make_image(self.plain, SIZE, random.Random(seed))
        qemu_img("convert", "-f", "raw", "-O", image_format, self.plain, self.image)
        options = ["--writable"] if writable else []
        self.command = Command("serve", self.image, "-f", image_format, "-U", str(directory / "nbd.sock"), *options)
        self.command.wait_until_serving()

    @property
    def data(self) -> bytes:
        """What the image held in the beginning."""
        with open(self.plain, "rb") as file:
            return file.read()

    def copy(self) -> bytes:
        """What the disk reads as now, to nbdcopy."""
        run("nbdcopy", self.uri, self.scratch)
        with open(self.scratch, "rb") as file:
            return file.read()

    def stop(self) -> bytes:
        """End the command, and return what the image holds then."""
        assert self.command.stop() == 0
        if self.format == "qed":
            assert qemu_check(self.image).status == 0
            return content(self.image)
        with open(self.image, "rb") as file:
            return file.read()


@pytest.fixture(params=["raw", "qed"])
def image_format(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["read-only", "writable"])
def served(request: pytest.FixtureRequest, tmp_path: Path, image_format: str, seed: int) -> Iterator[Served]:
    served = Served(tmp_path, image_format, writable=request.param == "writable", seed=seed)
    with served.command:
        yield served


@pytest.fixture
def writable(tmp_path: Path, image_format: str, seed: int) -> Iterator[Served]:
    served = Served(tmp_path, image_format, writable=True, seed=seed)
    with served.command:
        yield served


def test_nbdinfo_tells_what_it_is(served: Served) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", served.uri).stdout)["exports"]
    assert export["export-size"] == SIZE
    assert export["is_read_only"] is not served.writable
    assert "base:allocation" in export["contexts"]


def test_nbdinfo_maps_zeroes_where_there_are_only_zeroes(served: Served) -> None:
    extents = json.loads(run("nbdinfo", "--map", "--json", served.uri).stdout)
    position = zeroes = 0
    for extent in extents:
        assert extent["offset"] == position
        position += extent["length"]
        if extent["type"] & 2:
            zeroes += extent["length"]
            assert not any(served.data[extent["offset"] : position])
    assert position == SIZE
    assert zeroes > SIZE // 4


def test_nbdcopy_reads_it(served: Served) -> None:
    assert served.copy() == served.data


def test_qemu_img_tells_its_size(served: Served) -> None:
    info = json.loads(qemu_img("info", "--output=json", "-f", "raw", served.uri).stdout)
    assert info["virtual-size"] == SIZE


def test_qemu_img_converts_it(served: Served) -> None:
    qemu_img("convert", "-f", "raw", "-O", "raw", served.uri, served.scratch)
    with open(served.scratch, "rb") as file:
        assert file.read() == served.data


def test_qemu_img_compares_it(served: Served) -> None:
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "raw", served.uri, served.plain).stdout
    assert qemu_img("compare", "-f", "raw", served.uri, "/dev/null", check=False).returncode == 1


def test_fio_reads_it(served: Served) -> None:
    common = ["fio", "--ioengine=nbd", f"--uri={served.uri}", f"--size={SIZE}", "--readonly", "--rw=randread"]
    run(*common, "--name=small", "--bs=4k", "--iodepth=32", "--number_ios=4000")
    run(*common, "--name=large", "--bs=256k", "--iodepth=16", "--number_ios=200")


def test_nobody_writes_without_writable(served: Served) -> None:
    write = run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", served.uri, status=0 if served.writable else 1)
    assert served.writable or "Permission denied" in write.stderr + write.stdout
    copy = run("nbdcopy", served.plain, served.uri, status=0 if served.writable else 1)
    assert served.writable or "read-only" in copy.stderr
    assert served.stop() == served.data


def test_nbdcopy_fills_it(writable: Served, seed: int, tmp_path: Path) -> None:
    other = str(tmp_path / "other.img")
    make_image(other, SIZE, random.Random(seed + 1))
    run("nbdcopy", "--flush", other, writable.uri)
    with open(other, "rb") as file:
        expected = file.read()
    assert writable.copy() == expected
    assert writable.stop() == expected


def test_qemu_img_converts_into_it(writable: Served, seed: int, tmp_path: Path) -> None:
    other = str(tmp_path / "other.img")
    make_image(other, SIZE, random.Random(seed + 1))
    qemu_img("convert", "-n", "-f", "raw", "-O", "raw", other, writable.uri)
    with open(other, "rb") as file:
        assert writable.stop() == file.read()


def test_qemu_io_changes_it(writable: Served, seed: int) -> None:
    model = bytearray(writable.data)
    writes = random_writes(random.Random(seed), SIZE, 65536, 60)
    commands = [f"{write.command}" for write in writes]
    run("qemu-io", "-f", "raw", *(word for command in [*commands, "flush"] for word in ("-c", command)), writable.uri)
    for write in writes:
        write.apply(model)
    assert writable.copy() == model
    assert writable.stop() == model


def test_qemu_io_discards_and_zeroes(writable: Served) -> None:
    commands = ["write -P 5 1M 2M", "discard 1M 64k", "write -zu 1200k 64k", "write -z 1300k 70000", "flush"]
    run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), writable.uri)
    model = bytearray(writable.data)
    for write in (
        Write(MIB, 2 * MIB, 5),
        Write(MIB, 65536, None),
        Write(1200 << 10, 65536, None),
        Write(1300 << 10, 70000, None),
    ):
        write.apply(model)
    assert writable.copy() == model
    assert writable.stop() == model


@pytest.mark.parametrize("depth", [1, 32])
def test_fio_verifies_what_it_wrote(writable: Served, depth: int) -> None:
    run(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={writable.uri}", "--rw=randrw", "--bsrange=512-128k"),
        *("--bs_unaligned", "--size=8m", f"--iodepth={depth}", "--verify=crc32c", "--verify_fatal=1", "--fsync=16"),
        "--verify_state_save=0",
    )
    copied = writable.copy()
    assert copied[8 * MIB :] == writable.data[8 * MIB :]
    assert writable.stop() == copied


@pytest.mark.parametrize(("cluster_size", "table_size"), SMALL_GEOMETRIES)
def test_what_qemu_wrote_into_a_qed_image_is_served(
    tmp_path: Path, seed: int, cluster_size: int, table_size: int
) -> None:
    rng = random.Random(seed)
    size = rng.randrange(100, 700) * 4096 + 512 * rng.randrange(8)
    image = create(str(tmp_path / "disk.qed"), size, cluster_size=cluster_size, table_size=table_size)
    model = bytearray(size)
    write_all(image, random_writes(rng, size, cluster_size, 40), model)
    with Command("serve", image, "-f", "qed", "-U", str(tmp_path / "nbd.sock")) as command:
        command.wait_until_serving()
        run("nbdcopy", socket_uri(str(tmp_path / "nbd.sock")), str(tmp_path / "copy"))
        assert command.stop() == 0
    assert (tmp_path / "copy").read_bytes() == model


@pytest.mark.parametrize("access", ["read-only", "writable"])
@pytest.mark.parametrize("base_size", [3 * MIB, 8 * MIB, 13 * MIB + 512])
def test_a_chain_that_qemu_made_is_served_with_its_formats(
    tmp_path: Path, seed: int, base_size: int, access: str
) -> None:
    rng = random.Random(seed)
    size = 8 * MIB
    make_image(str(tmp_path / "base.raw"), base_size, rng, [(0, base_size)])
    model = bytearray((tmp_path / "base.raw").read_bytes()[:size].ljust(size, b"\0"))
    middle = create(str(tmp_path / "middle.qed"), size, backing="base.raw")
    write_all(middle, random_writes(rng, size, 65536, 15, whole_clusters=True), model)
    top = create(str(tmp_path / "top.qed"), size, backing="middle.qed", backing_format="qed")
    write_all(top, random_writes(rng, size, 65536, 15, whole_clusters=True), model)
    options = ["-f", "qed", "--backing-format", "qed,raw"] + (["--writable"] if access == "writable" else [])
    with Command("serve", top, *options, "-U", str(tmp_path / "nbd.sock")) as command:
        command.wait_until_serving()
        uri = socket_uri(str(tmp_path / "nbd.sock"))
        if access == "writable":
            writes = random_writes(rng, size, 65536, 30)
            run("qemu-io", "-f", "raw", *(word for write in writes for word in ("-c", write.command)), uri)
            for write in writes:
                write.apply(model)
        run("nbdcopy", uri, str(tmp_path / "copy"))
        assert command.stop() == 0
    assert (tmp_path / "copy").read_bytes() == model
    assert qemu_check(top).status == 0
    assert content(top) == model
