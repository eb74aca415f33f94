"""Bad input: one clear line on stderr that names the culprit, a non-zero exit, and nothing changed on disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed.opening import create_file
from tests.support.harness import Filler, make_image, small_filesystem, socket_uri
from tests.support.processes import NBDSTREAM, Command, Process, nbdstream, run, wait_until
from tests.support.qed import RawImage, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
SIZE = 2 * MIB


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The NBD URI of a disk of 2 MiB."""
    directory = tmp_path_factory.mktemp("source")
    make_image(str(directory / "disk.img"), SIZE, random.Random(1), [(0, MIB)])
    with Command("serve", str(directory / "disk.img"), "-U", str(directory / "nbd.sock")) as command:
        yield command.wait_until_serving()


@pytest.fixture
def overlay(source: str, tmp_path: Path) -> str:
    """An overlay of that disk, of which nothing is local."""
    path = str(tmp_path / "overlay.qed")
    nbdstream("create", path, "--backing", source)
    return path


def tree(directory: Path) -> dict[str, tuple[int, int, int, str]]:
    """Mode, size, time of the last change and digest of everything in a directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        about = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (about.st_mode, about.st_size, about.st_mtime_ns, digest)
    return found


def refused(directory: Path, *arguments: str, status: int = 1) -> str:
    """Run a command that must fail and change nothing in the directory; return what it says."""
    before = tree(directory)
    result = nbdstream(*arguments, status=None)
    assert tree(directory) == before
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("nbdstream: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


# -- images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["serve"], ["serve", "-f", "qed"], ["info"], ["map"], ["check"]])
def test_an_image_that_is_not_there(tmp_path: Path, command: list[str]) -> None:
    path = str(tmp_path / "missing.img")
    said = refused(tmp_path, *command, path)
    assert path in said
    assert "No such file" in said


@pytest.mark.parametrize("command", [["serve"], ["serve", "-f", "qed"], ["info"], ["map"], ["check"]])
def test_an_image_that_is_a_directory(tmp_path: Path, command: list[str]) -> None:
    path = tmp_path / "directory"
    path.mkdir()
    said = refused(tmp_path, *command, str(path))
    assert str(path) in said
    assert "directory" in said.replace(str(path), "")


def test_a_qed_image_is_not_served_as_raw_by_oversight(tmp_path: Path) -> None:
    path = create(str(tmp_path / "disk.img"), SIZE)
    said = refused(tmp_path, "serve", path)
    assert path in said
    assert "-f qed" in said


def test_a_backing_file_is_not_left_out_by_oversight(tmp_path: Path) -> None:
    path = create(str(tmp_path / "disk.qed"), SIZE, backing="/nowhere/base.raw")
    said = refused(tmp_path, "serve", "-f", "qed", path)
    assert path in said
    assert "/nowhere/base.raw" in said
    assert "--backing-format" in said


def test_a_backing_file_that_is_not_there(tmp_path: Path) -> None:
    path = create(str(tmp_path / "disk.qed"), SIZE, backing="base.raw")
    assert str(tmp_path / "base.raw") in refused(tmp_path, "serve", "-f", "qed", "--backing-format", "raw", path)


@pytest.mark.parametrize("command", [["info"], ["serve", "-f", "qed"], ["map", "-f", "qed", "--backing-format", "raw"]])
def test_a_name_in_a_strangers_image_is_printed_as_text_on_one_line(tmp_path: Path, command: list[str]) -> None:
    path, name = str(tmp_path / "disk.qed"), "/nowhere/\x1b[2J\nnbdstream: all is well\udcff"
    create_file(path, SIZE, cluster_size=4096, table_size=2, backing_name=name)
    said = run("env", "PYTHONIOENCODING=utf-8:strict", NBDSTREAM, *command, path, status=None)
    lines = (said.stdout + said.stderr).split("\n")
    assert any("/nowhere/?[2J" in line and "nbdstream: all is well?" in line for line in lines)
    assert all(line.isprintable() for line in lines)
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize("command", [["info"], ["check"], ["check", "-r", "all"], ["map", "-f", "qed"]])
def test_an_image_whose_name_is_no_text(tmp_path: Path, command: list[str]) -> None:
    path = create(str(tmp_path / "disk.qed"), SIZE)
    name = str(tmp_path / "\udcff.qed")
    os.rename(path, name)
    os.truncate(name, os.path.getsize(name) + 65536)  # a leak, which is told with the name
    said = run("env", "PYTHONIOENCODING=utf-8:strict", NBDSTREAM, *command, name, status=None)
    assert said.stderr == ""


# -- overlays ---------------------------------------------------------------------------------------------------


def not_qed(path: str) -> None:
    with open(path, "wb") as file:
        file.write(b"something else" * 10_000)


def empty(path: str) -> None:
    with open(path, "wb"):
        pass


def cut_within_its_tables(path: str) -> None:
    os.truncate(path, 100_000)


def cut_within_its_header(path: str) -> None:
    os.truncate(path, 40)


def unknown_feature(path: str) -> None:
    RawImage(path).put(16, 1 << 20 | RawImage(path).get(16))


def impossible_cluster_size(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(4)
        file.write((12345).to_bytes(4, "little"))


def table_outside_the_file(path: str) -> None:
    image = RawImage(path)
    image.put(image.l1_offset(0), 1 << 40)


def data_outside_the_file(path: str) -> None:
    qemu_io(path, "write 0 4k")
    image = RawImage(path)
    image.put(image.l2_offset(0), 1 << 40)


def data_at_two_places_in_one(path: str) -> None:
    qemu_io(path, "write 0 4k", "write 64k 4k")
    image = RawImage(path)
    image.put(image.l2_offset(0), image.get(image.l2_offset(1)))


DAMAGE: list[Callable[[str], None]] = [
    not_qed,
    empty,
    cut_within_its_tables,
    cut_within_its_header,
    unknown_feature,
    impossible_cluster_size,
    table_outside_the_file,
    data_outside_the_file,
    data_at_two_places_in_one,
]


@pytest.mark.parametrize("serving", [[], ["-U"]], ids=["without -U", "with -U"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_overlay_that_is_none_or_is_damaged(
    tmp_path: Path, source: str, overlay: str, damage: Callable[[str], None], serving: list[str]
) -> None:
    damage(overlay)
    options = [*serving, str(tmp_path / "guest.sock")] if serving else []
    assert overlay in refused(tmp_path, "stream", source, overlay, *options)


def test_an_overlay_that_is_a_directory(tmp_path: Path, source: str) -> None:
    (tmp_path / "overlay").mkdir()
    assert f"{tmp_path}/overlay" in refused(tmp_path, "stream", source, f"{tmp_path}/overlay")


def test_an_overlay_in_a_directory_that_is_not_there(tmp_path: Path, source: str) -> None:
    path = str(tmp_path / "missing" / "overlay.qed")
    assert path in refused(tmp_path, "stream", source, path)


def test_an_overlay_of_another_source(tmp_path: Path, source: str, overlay: str) -> None:
    other = socket_uri("/another/source.sock")
    said = refused(tmp_path, "stream", other, overlay)
    assert overlay in said
    assert source in said
    assert other in said


def test_an_image_that_is_nobodys_overlay(tmp_path: Path, source: str) -> None:
    path = create(str(tmp_path / "plain.qed"), SIZE)
    assert path in refused(tmp_path, "stream", source, path)


def test_an_overlay_that_became_independent_of_another_source(tmp_path: Path, source: str, overlay: str) -> None:
    nbdstream("stream", source, overlay)
    other = socket_uri("/another/source.sock")
    said = refused(tmp_path, "stream", other, overlay)
    assert source in said
    assert other in said


def test_an_overlay_that_exists_is_not_made_again(tmp_path: Path, source: str, overlay: str) -> None:
    assert overlay in refused(tmp_path, "create", overlay, "--backing", source)
    assert overlay in refused(tmp_path, "create", overlay, "--size", "1M")


@pytest.mark.parametrize("geometry", [["--cluster-size", "12345"], ["--table-size", "3"], ["--cluster-size", "2048"]])
def test_a_geometry_that_is_impossible(tmp_path: Path, geometry: list[str]) -> None:
    assert geometry[1] in refused(tmp_path, "create", str(tmp_path / "new.qed"), "--size", "1M", *geometry)


# -- sources ----------------------------------------------------------------------------------------------------


def test_a_source_whose_port_is_closed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    said = refused(tmp_path, "stream", f"nbd://127.0.0.1:{port}", str(tmp_path / "overlay.qed"))
    assert f"127.0.0.1:{port}" in said
    assert "refused" in said


def test_a_source_whose_socket_is_not_there(tmp_path: Path) -> None:
    uri = socket_uri(str(tmp_path / "nobody.sock"))
    assert str(tmp_path / "nobody.sock") in refused(tmp_path, "stream", uri, str(tmp_path / "overlay.qed"))


def test_a_source_that_has_no_such_export(tmp_path: Path, source: str) -> None:
    uri = source.replace(":///", ":///another")
    assert "another" in refused(tmp_path, "stream", uri, str(tmp_path / "overlay.qed"))


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2\r\n" * 20, b""], ids=["an SSH server", "one that hangs up"])
def test_a_source_that_is_no_nbd_server(tmp_path: Path, greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.sendall(greeting)

        threading.Thread(target=greet, daemon=True).start()
        uri = f"nbd://127.0.0.1:{listener.getsockname()[1]}"
        assert uri in refused(tmp_path, "stream", uri, str(tmp_path / "overlay.qed"))
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("uri", ["disk.img", "http://host/disk", "nbd://host:port", "nbd+unix:///disk"])
def test_a_source_that_is_no_nbd_uri(tmp_path: Path, uri: str) -> None:
    assert uri in refused(tmp_path, "stream", uri, str(tmp_path / "overlay.qed"))


@pytest.mark.parametrize("serving", [False, True], ids=["without -U", "with -U"])
@pytest.mark.parametrize("size", [SIZE + 512, SIZE - 512, 4 * SIZE])
def test_a_source_of_another_size_than_the_overlay(tmp_path: Path, size: int, *, serving: bool) -> None:
    disk, overlay, nbd = (str(tmp_path / name) for name in ("disk.img", "overlay.qed", "nbd.sock"))
    options = ["-U", str(tmp_path / "guest.sock")] if serving else []
    make_image(disk, SIZE, random.Random(1), [(0, MIB)])
    with Command("serve", disk, "-U", nbd) as command:
        command.wait_until_serving()
        nbdstream("create", overlay, "--backing", socket_uri(nbd))
    os.truncate(disk, size)
    with Command("serve", disk, "-U", nbd) as command:
        command.wait_until_serving()
        said = refused(tmp_path, "stream", socket_uri(nbd), overlay, *options)
    assert str(size) in said
    assert str(SIZE) in said


def test_a_source_that_only_pads_its_last_sector_is_the_same(tmp_path: Path) -> None:
    disk, overlay, nbd = (str(tmp_path / name) for name in ("disk.img", "overlay.qed", "nbd.sock"))
    make_image(disk, SIZE - 100, random.Random(1), [(0, SIZE - 100)])
    for size in (SIZE - 100, SIZE):
        os.truncate(disk, size)
        with Command("serve", disk, "-U", nbd) as command:
            command.wait_until_serving()
            if size < SIZE:
                nbdstream("create", overlay, "--backing", socket_uri(nbd))
            else:
                nbdstream("stream", socket_uri(nbd), overlay)


# -- where to listen --------------------------------------------------------------------------------------------


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    disk = str(tmp_path / "disk.img")
    make_image(disk, SIZE, random.Random(1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        said = refused(tmp_path, "serve", disk, "-p", port)
    assert port in said
    assert "in use" in said


def test_a_socket_that_is_in_use(tmp_path: Path, source: str, overlay: str) -> None:
    live = source.partition("socket=")[2]
    disk = str(tmp_path / "disk.img")
    make_image(disk, SIZE, random.Random(1))
    assert live in refused(tmp_path, "serve", disk, "-U", live)
    assert live in refused(tmp_path, "stream", source, str(tmp_path / "new.qed"), "-U", live)
    assert live in refused(tmp_path, "stream", source, overlay, "-U", live)
    assert json.loads(run("nbdinfo", "--json", source).stdout)["exports"], "it is still there"


def test_a_socket_that_is_something_else(tmp_path: Path, source: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("keep this")
    assert str(file) in refused(tmp_path, "stream", source, str(tmp_path / "new.qed"), "-U", str(file))


def test_a_socket_in_a_directory_that_is_not_there(tmp_path: Path, source: str) -> None:
    path = str(tmp_path / "missing" / "guest.sock")
    assert path in refused(tmp_path, "stream", source, str(tmp_path / "new.qed"), "-U", path)


def test_a_socket_that_nobody_listens_on_is_replaced(tmp_path: Path, source: str) -> None:
    path = str(tmp_path / "guest.sock")
    with Command("stream", source, str(tmp_path / "overlay.qed"), "-U", path) as command:
        command.wait_until_serving()
    assert os.path.exists(path), "it was killed"
    with Command("stream", source, str(tmp_path / "overlay.qed"), "-U", path) as command:
        command.wait_until_serving()
        command.wait_until_independent()
        assert run("nbdinfo", "--size", socket_uri(path)).stdout == f"{SIZE}\n"
        assert command.stop() == 0
    assert not os.path.exists(path)


# -- who else has it --------------------------------------------------------------------------------------------


@contextmanager
def held_by_qemu(path: str, *, writable: bool = True) -> Iterator[None]:
    file = {"driver": "file", "filename": path}
    node = {"driver": "qed", "node-name": "disk", "file": file, "backing": None, "read-only": not writable}
    pid_file = f"{path}.pid"
    with Process("qemu-storage-daemon", "--blockdev", json.dumps(node), "--pidfile", pid_file) as daemon:
        wait_until(
            lambda: not daemon.running or (os.path.exists(pid_file) and os.path.getsize(pid_file)),
            "qemu-storage-daemon",
        )
        assert daemon.running, daemon
        yield
        daemon.stop()


def test_an_overlay_that_another_nbdstream_has_open(tmp_path: Path, source: str, overlay: str) -> None:
    with Command("stream", source, overlay, "-U", str(tmp_path / "guest.sock"), "--rate", "1k") as command:
        command.wait_until_serving()
        result = nbdstream("stream", source, overlay, status=1)
        assert overlay in result.stderr
        assert f"nbdstream (process {command.pid})" in result.stderr
        assert result.stderr.count("\n") == 1
        for other in (["serve", "-f", "qed"], ["map"], ["check"]):
            assert overlay in nbdstream(*other, overlay, status=1).stderr


@pytest.mark.parametrize("writable", [True, False])
def test_an_overlay_that_qemu_has_open(tmp_path: Path, source: str, overlay: str, *, writable: bool) -> None:
    with held_by_qemu(overlay, writable=writable):
        said = refused(tmp_path, "stream", source, overlay, "-U", str(tmp_path / "guest.sock"))
    assert overlay in said
    assert "qemu-storage" in said


def test_a_raw_image_that_qemu_writes(tmp_path: Path) -> None:
    disk = str(tmp_path / "disk.img")
    make_image(disk, SIZE, random.Random(1))
    nbd = str(tmp_path / "nbd.sock")
    with Process("qemu-nbd", "-f", "raw", "-t", "-k", nbd, disk) as holder:
        wait_until(lambda: os.path.exists(nbd) or not holder.running, "qemu-nbd")
        said = refused(tmp_path, "serve", disk, "-U", str(tmp_path / "ours.sock"))
    assert disk in said
    assert "qemu-nbd" in said


# -- room -------------------------------------------------------------------------------------------------------


def test_no_room_to_make_the_overlay(tmp_path: Path, source: str) -> None:
    with small_filesystem(str(tmp_path), 2 * MIB) as small:
        filler = Filler(small, leave=100_000)
        before = os.listdir(small)
        result = nbdstream("stream", source, f"{small}/overlay.qed", "-U", f"{small}/guest.sock", status=1)
        assert f"{small}/overlay.qed" in result.stderr
        assert "No space left" in result.stderr
        assert result.stderr.count("\n") == 1
        assert os.listdir(small) == before
        filler.remove()
        nbdstream("create", f"{small}/overlay.qed", "--backing", source)


# -- the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["destroy"],
        ["serve"],
        ["serve", "disk.img", "-f", "qcow2"],
        ["serve", "disk.img", "-p", "65536"],
        ["serve", "disk.img", "-r", "--writable"],
        ["stream", "nbd://host"],
        ["stream", "nbd://host", "overlay.qed", "-c", "0"],
        ["stream", "nbd://host", "overlay.qed", "--rate", "fast"],
        ["stream", "nbd://host", "overlay.qed", "--progress", "xml"],
        ["create", "new.qed"],
        ["create", "new.qed", "--size", "1M", "--backing", "nbd://host"],
        ["create", "new.qed", "--size", "-1"],
        ["info"],
        ["map", "disk.img", "--nonsense"],
    ],
)
def test_a_wrong_command_line_ends_with_2(tmp_path: Path, arguments: list[str]) -> None:
    result = nbdstream(*arguments, status=2)
    assert result.stderr.endswith("--help')\n")
    assert result.stderr.count("\n") == 1


def test_a_wrong_command_line_of_check_ends_with_1_since_2_says_corrupt() -> None:
    assert "(see 'nbdstream check --help')" in nbdstream("check", status=1).stderr


def test_without_libnbd_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "nbd.py").write_text("raise ModuleNotFoundError(\"No module named 'libnbdmod'\", name='libnbdmod')\n")
    result = run("env", f"PYTHONPATH={tmp_path}", NBDSTREAM, "info", "x", status=1)
    assert result.stderr.count("\n") == 1
    assert "python3-libnbd" in result.stderr
