"""``nbdstream serve`` as a command: several exports, where it listens, and as the child of another program."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import stat
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.cli.listening import is_loopback
from tests.support.certificates import Authority
from tests.support.client import NbdClient
from tests.support.processes import NBDSTREAM, Command, Process, nbdstream, run, wait_until
from tests.support.qed import qemu_img

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> str:
    """An image with an A at its beginning."""
    return make_image(tmp_path / "disk.img", b"A")


def make_image(path: Path, first: bytes, size: int = SIZE) -> str:
    path.write_bytes(first)
    os.truncate(path, size)
    return str(path)


def nbdinfo(*arguments: str) -> list[dict[str, Any]]:
    """Return what nbdinfo says of the exports."""
    exports: list[dict[str, Any]] = json.loads(run("nbdinfo", "--json", *arguments).stdout)["exports"]
    return exports


def nbdsh(*lines: str) -> str:
    return run("nbdsh", *(part for line in lines for part in ("-c", line))).stdout


def refused(*arguments: str, status: int = 2) -> str:
    """Run ``serve``, which must refuse, and return the one line that it says."""
    result = nbdstream("serve", *arguments, status=status)
    (line,) = result.stderr.splitlines()
    assert not result.stdout
    return line.removeprefix("nbdstream: ")


# -- several exports -------------------------------------------------------------------------------------------


def test_several_images_are_listed_with_their_names_and_descriptions(tmp_path: Path) -> None:
    one, two = make_image(tmp_path / "one.img", b"1"), make_image(tmp_path / "two.img", b"2", 2 * SIZE)
    path = f"{tmp_path}/sock"
    with Command("serve", one, f"second={two},description=a disk,, of mine", "-U", path) as server:
        server.wait_until_serving()
        exports = nbdinfo("--list", f"nbd+unix://?socket={path}")
        assert [export["export-name"] for export in exports] == ["one.img", "second"]
        assert [export["description"] for export in exports] == [one, "a disk, of mine"]
        assert [export["export-size"] for export in exports] == [SIZE, 2 * SIZE]
        assert server.stop() == 0
    assert server.lines[:2] == [
        f"nbdstream: serving {one} at nbd+unix:///one.img?socket={path}",
        f"nbdstream: serving {two} at nbd+unix:///second?socket={path}",
    ]


def test_the_first_of_several_is_the_default_export(tmp_path: Path, image: str) -> None:
    other = make_image(tmp_path / "other.img", b"B")
    with Command("serve", f"x={other}", image, "-U", f"{tmp_path}/sock") as server:
        server.wait_until_serving()
        with NbdClient(f"{tmp_path}/sock") as client:
            assert client.read(0, 1) == b"B"


def test_a_single_image_is_the_default_export_or_has_the_name_that_is_given(tmp_path: Path, image: str) -> None:
    for arguments, name in ([image], ""), ([image, "-x", "n"], "n"), ([f"n={image}"], "n"):
        with Command("serve", *arguments, "-U", f"{tmp_path}/sock") as server:
            server.wait_until_serving()
            (export,) = nbdinfo("--list", f"nbd+unix://?socket={tmp_path}/sock")
            assert export["export-name"] == name


@pytest.mark.parametrize("option", [[], ["--writable"]])
def test_read_only_and_writable_exports_side_by_side(tmp_path: Path, option: list[str]) -> None:
    images = {name: make_image(tmp_path / name, name.encode()) for name in ("own", "on", "off")}
    arguments = [images["own"], f"on={images['on']},writable=on", f"off={images['off']},writable=off"]
    with Command("serve", *arguments, *option, "-U", f"{tmp_path}/sock") as server:
        server.wait_until_serving()
        exports = nbdinfo("--list", f"nbd+unix://?socket={tmp_path}/sock")
        assert [export["is_read_only"] for export in exports] == [not option, False, True]
        uri = f"nbd+unix:///%s?socket={tmp_path}/sock"
        run("qemu-io", "-f", "raw", "-c", "write -P 0x58 0 512", uri % "on")
        run("qemu-io", "-f", "raw", "-c", "write -P 0x58 0 512", uri % "off", status=1)
    assert (tmp_path / "on").read_bytes()[:3] == b"XXX"
    assert (tmp_path / "off").read_bytes()[:3] == b"off"


def test_formats_side_by_side_and_a_backing_chain(tmp_path: Path, image: str) -> None:
    qemu_img("create", "-q", "-f", "qed", "-b", image, "-F", "raw", f"{tmp_path}/overlay.qed")
    overlay = f"{tmp_path}/overlay.qed"
    with Command(
        "serve", f"o={overlay},format=qed,backing-format=raw", f"file={overlay},format=raw", "-U", f"{tmp_path}/sock"
    ) as server:
        server.wait_until_serving()
        sizes = [export["export-size"] for export in nbdinfo("--list", f"nbd+unix://?socket={tmp_path}/sock")]
        assert sizes == [SIZE, os.path.getsize(overlay)]
        with NbdClient(f"{tmp_path}/sock") as client:
            assert client.read(0, 2) == b"A\0"


def test_a_name_with_commas_and_an_image_that_looks_like_a_setting(tmp_path: Path) -> None:
    path = make_image(tmp_path / "a,b=c.img", b"1")
    for argument, name in (path, ""), (f"x,,y={path.replace(',', ',,')}", "x,y"):
        with Command("serve", argument, "-U", f"{tmp_path}/sock") as server:
            server.wait_until_serving()
            (export,) = nbdinfo("--list", f"nbd+unix://?socket={tmp_path}/sock")
            assert export["export-name"] == name


def test_a_path_that_is_no_utf_8_is_served_under_a_name_that_is(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.img"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    text = os.fsdecode(path)
    with Command("serve", f"x={text}", "-U", f"{tmp_path}/sock") as server:
        server.wait_until_serving()
        (export,) = nbdinfo("--list", f"nbd+unix://?socket={tmp_path}/sock")
        assert export["description"] == f"{tmp_path}/\ufffd.img"
    assert "an export name must be UTF-8" in refused(text, f"x={text}", "-U", f"{tmp_path}/sock")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["disk.img", "./disk.img"], "disk.img and ./disk.img would both be the export 'disk.img'"),
        (["-x", "n", "a", "b"], "--export-name names one export, and there are several"),
        (["-x", "n", "m=a"], "--export-name names the export 'm' a second time"),
        (["a=b,c=d"], "'a=b,c=d': 'c=d' is none of"),
        (["a,format=raw"], "'a,format=raw': only NAME=IMAGE takes options"),
        (["n=a,allow=me"], "export 'n' has allow=: clients have names with --tls require --tls-verify-peer only"),
        (["n=a,allow=me", "--tls", "require"], "export 'n' has allow=: clients have names with"),
        (["a", "--tls-certificates", "/x"], "certificates are given, but TLS is off"),
        (["a", "--tls-verify-peer"], "certificates are given, but TLS is off"),
        (["a", "-U", "s", "-p", "1"], "--unix and --port are two places to listen"),
        (["a", "-U", ""], "--unix needs the path of a socket"),
        (
            ["a", "-p", "x"],
            "argument -p/--port: 'x' is not a whole number from 0 to 65535 (see 'nbdstream",
        ),
        (["a", "--stdio", "-U", "s"], "--stdio and --unix cannot be combined"),
        (["a", "--stdio", "-b", "::1"], "--stdio and --bind cannot be combined"),
    ],
)
def test_a_command_line_that_contradicts_itself_is_a_usage_error(arguments: list[str], why: str) -> None:
    assert refused(*arguments).startswith(why)


# -- who can reach it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["0.0.0.0", "::", ""])
@pytest.mark.parametrize("tls", [[], ["--tls", "on"]])
def test_the_network_is_not_listened_on_without_tls(tmp_path: Path, image: str, address: str, tls: list[str]) -> None:
    if tls:
        tls = [*tls, "--tls-certificates", Authority().server(tmp_path / "tls")]
    line = refused(image, "-b", address, "-p", "0", *tls)
    assert line.startswith("without TLS, whoever reaches ")
    assert "--tls require" in line
    assert "--insecure" in line


def test_the_network_is_listened_on_if_that_is_what_one_wants(image: str) -> None:
    with Command("serve", image, "-b", "0.0.0.0", "-p", "0", "--insecure") as server:
        port = server.wait_until_serving().rpartition(":")[2].rstrip("/")
        assert nbdinfo(f"nbd://localhost:{port}")[0]["export-size"] == SIZE


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "localhost"])
def test_loopback_needs_no_leave(image: str, address: str) -> None:
    with Command("serve", image, "-b", address, "-p", "0") as server:
        server.wait_until_serving()


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:192.0.2.1", False),
        ("192.0.2.1", False),
        ("fe80::1%eth0", False),
        ("", False),
    ],
)
def test_what_counts_as_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


# -- standard input and output -----------------------------------------------------------------------------------


def test_libnbd_starts_us_on_standard_input_and_output(image: str) -> None:
    command = [NBDSTREAM, "serve", "--stdio", "--writable", image]
    said = nbdsh(
        f"h.connect_command({command!r})",
        "h.pwrite(b'hello', 0, nbd.CMD_FLAG_FUA)",
        "print(h.get_size(), h.pread(5, 0))",
        "h.shutdown()",
    )
    assert said == f"{SIZE} {bytearray(b'hello')!r}\n"
    with open(image, "rb") as file:
        assert file.read(5) == b"hello"


GREETING_AND_GO = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06" + bytes(6)
READ_AND_DISC = b"".join(
    struct.pack(">IHHQQI", 0x25609513, 0, command, 0, 0, length) for command, length in ((0, SIZE), (2, 0))
)


def test_two_pipes_carry_a_session_and_nothing_else_and_the_end_of_it_ends_us(image: str) -> None:
    result = subprocess.run(
        [NBDSTREAM, "serve", "--stdio", image], input=GREETING_AND_GO + READ_AND_DISC, capture_output=True, check=False
    )
    assert result.stderr == f"nbdstream: serving {image} on standard input and output\n".encode()
    assert result.returncode == 0
    assert result.stdout.startswith(b"NBDMAGICIHAVEOPT")
    with open(image, "rb") as file:
        assert result.stdout.endswith(b"\x67\x44\x66\x98" + bytes(12) + file.read())


@pytest.mark.parametrize("goodbye", [b"", b"\0\0\0\x03", b"\0\0\0\x03IHAVEOPT\0\0\0\x02\0\0\0\0", b"garbage!"])
def test_a_client_that_leaves_before_it_has_opened_an_export_ends_us(image: str, goodbye: bytes) -> None:
    result = subprocess.run(
        [NBDSTREAM, "serve", "--stdio", image], input=goodbye, capture_output=True, check=False, timeout=60
    )
    assert result.returncode == 0
    assert result.stdout.startswith(b"NBDMAGICIHAVEOPT")


def test_a_client_that_takes_nothing_any_more_ends_us(image: str) -> None:
    with subprocess.Popen(
        [NBDSTREAM, "serve", "--stdio", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdin
        assert server.stdout
        assert server.stdout.read(18)
        server.stdout.close()
        server.stdin.write(GREETING_AND_GO)
        server.stdin.flush()
        assert server.wait(60) == 0


def test_sigterm_ends_a_session_on_standard_input_and_output(image: str) -> None:
    one, other = socket.socketpair()
    with (
        one,
        other,
        subprocess.Popen(
            [NBDSTREAM, "serve", "--stdio", image], stdin=one.fileno(), stdout=one.fileno(), stderr=subprocess.PIPE
        ) as server,
    ):
        assert server.stderr
        assert b"serving" in server.stderr.readline()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_a_terminal_or_a_closed_descriptor_is_no_connection(image: str) -> None:
    ours, theirs = pty.openpty()
    terminal = subprocess.run(
        [NBDSTREAM, "serve", "--stdio", image],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    assert terminal.returncode == 1
    assert terminal.stderr.startswith("nbdstream: --stdio is for programs that start nbdstream")
    closed = run("sh", "-c", 'exec "$@" <&-', "sh", NBDSTREAM, "serve", "--stdio", image, status=1)
    assert closed.stderr == "nbdstream: --stdio needs standard input and output, and one of them is closed\n"


# -- socket activation ---------------------------------------------------------------------------------------------


def test_nbdinfo_starts_us_with_a_socket(image: str) -> None:
    (export,) = nbdinfo("--", "[", NBDSTREAM, "serve", image, "]")
    assert (export["export-size"], export["is_read_only"]) == (SIZE, True)


def test_nbdsh_starts_us_with_a_socket_and_ends_us(image: str) -> None:
    command = [NBDSTREAM, "serve", "--writable", image]
    said = nbdsh(
        f"h.connect_systemd_socket_activation({command!r})",
        "h.pwrite(b'hello', 0)",
        "print(h.pread(5, 0))",
        "h.shutdown()",
    )
    assert said == f"{bytearray(b'hello')!r}\n"


def test_nbdcopy_copies_from_one_of_us_to_another(tmp_path: Path, image: str) -> None:
    other = make_image(tmp_path / "other.img", b"")
    ours = [NBDSTREAM, "serve"]
    run("nbdcopy", "--", "[", *ours, image, "]", "[", *ours, "--writable", other, "]")
    with open(image, "rb") as one, open(other, "rb") as copy:
        assert one.read() == copy.read()


def activated(listen: str, *arguments: str) -> Process:
    """Start ``serve`` as systemd does when somebody connects."""
    return Process("systemd-socket-activate", "-l", listen, NBDSTREAM, "serve", *arguments)


@pytest.mark.parametrize("named", [False, True])
def test_a_socket_from_systemd_is_served_and_its_file_stays(tmp_path: Path, image: str, named: bool) -> None:
    path = f"{tmp_path}/sock"
    with activated(path, image, *(["-U", path] if named else [])) as server:
        wait_until(lambda: os.path.exists(path), path)
        with NbdClient(path) as client:
            assert client.read(0, 1) == b"A"
        assert server.stop() == 0
    assert stat.S_ISSOCK(os.stat(path).st_mode)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [(["-p", "0"], "--port"), (["-b", "::1"], "--bind"), (["-U", "elsewhere"], "--unix"), (["--stdio"], "--stdio")],
)
def test_with_sockets_there_is_nowhere_else_to_listen(
    tmp_path: Path, image: str, arguments: list[str], culprit: str
) -> None:
    with activated(f"{tmp_path}/sock", image, *arguments) as server:
        wait_until(lambda: os.path.exists(f"{tmp_path}/sock"), "the socket")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/sock")
            assert server.wait() == 2
        assert "LISTEN_FDS" in server.lines[-1]
        assert culprit in server.lines[-1]


def test_a_socket_on_the_network_needs_tls_as_well(image: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with activated(f"0.0.0.0:{port}", image) as server:
        server.wait_for("Listening on")
        with socket.create_connection(("127.0.0.1", port)):
            assert server.wait() == 2
        assert "without TLS, whoever reaches 0.0.0.0 could use the exports" in server.lines[-1]


# -- limits ----------------------------------------------------------------------------------------------------------


def test_limits_are_set_on_the_command_line(tmp_path: Path, image: str) -> None:
    path = f"{tmp_path}/sock"
    with Command("serve", image, "-U", path, "--handshake-timeout", "0.1", "--max-connections", "1") as server:
        server.wait_until_serving()
        with socket.socket(socket.AF_UNIX) as idle:
            idle.connect(path)
            assert idle.recv(18)
            assert idle.recv(1) == b""  # dropped: it has opened no export
        with NbdClient(path) as client, socket.socket(socket.AF_UNIX) as second:
            second.connect(path)
            with contextlib.suppress(ConnectionResetError):
                assert second.recv(1) == b""
            assert client.read(0, 1) == b"A"
        server.wait_for("turned away: 1 clients are connected already")
