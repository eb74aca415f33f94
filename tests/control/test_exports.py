"""Exports that come and go while a server serves, in QAPI's terms."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdstream.block.locks import Sharing, take_locks
from nbdstream.block.remote.export import RemoteExport
from nbdstream.control.exports import ExportCommands, Exports
from nbdstream.errors import SourceError
from nbdstream.server.server import NbdServer
from tests.support.qed import qemu_img

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdstream.control.commands import Commands
    from nbdstream.control.server import ControlServer

DOCUMENT = (Path(__file__).parents[2] / "docs/control.md").read_text()


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Two raw images of 1 MiB that begin with A and B."""
    paths = []
    for letter in "AB":
        path = tmp_path / f"{letter}.img"
        path.write_bytes(letter.encode())
        os.truncate(path, 1 << 20)
        paths.append(str(path))
    return paths


class Served:
    """A server under control."""

    def __init__(self, server: NbdServer, exports: Exports, socket: str, control: str, qmp: QMPClient) -> None:
        self.server = server
        self.control = control
        self.exports = exports
        self.socket = socket
        self.qmp = qmp

    async def execute(self, command: str, **arguments: object) -> Any:
        return await self.qmp.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    async def refusal(self, command: str, **arguments: object) -> str:
        with pytest.raises(ExecuteError) as caught:
            await self.execute(command, **arguments)
        assert caught.value.error_class == "GenericError"
        return str(caught.value)

    async def deleted(self) -> str:
        """Wait until an export is gone, and return its id."""
        async with asyncio.timeout(20):
            event = await self.qmp.events.get()
        assert event["event"] == "BLOCK_EXPORT_DELETED"
        data: Any = event["data"]
        return str(data["id"])

    async def connect(self, name: str) -> RemoteExport:
        return await RemoteExport.connect(f"nbd+unix:///{name}?socket={self.socket}")

    async def first_byte(self, name: str) -> bytes:
        export = await self.connect(name)
        try:
            return b"".join(await export.read(0, 1))
        finally:
            await export.close()


@pytest.fixture
async def served(
    images: list[str], directory: str, control: ControlServer, commands: Commands
) -> AsyncIterator[Served]:
    """The first image as export "a", with the id export0."""
    exports = Exports()
    first = await exports.open(
        "export0",
        images[0],
        "a",
        image_format=None,
        backing_formats=(),
        writable=False,
        description=None,
        allow=None,
    )
    server = NbdServer([first])
    await server.listen_unix(f"{directory}/nbd")
    managed = ExportCommands(exports, server, control.emit)
    managed.add_to(commands)
    await control.begin(commands)
    qmp = QMPClient("test")
    await qmp.connect(control.path)
    yield Served(server, exports, f"{directory}/nbd", control.path, qmp)
    await qmp.disconnect()
    await managed.close()
    await server.close()
    await exports.close()


async def test_the_exports_are_listed(served: Served, images: list[str]) -> None:
    assert await served.execute("query-block-exports") == [
        {
            "id": "export0",
            "type": "nbd",
            "node-name": images[0],
            "shutting-down": False,
            "x-name": "a",
            "x-writable": False,
            "x-connections": 0,
        }
    ]
    client = await served.connect("a")
    (listed,) = await served.execute("query-block-exports")
    assert listed["x-connections"] >= 1
    await client.close()


async def test_an_export_that_is_added_can_be_used_at_once(served: Served, images: list[str]) -> None:
    added = await served.execute(
        "block-export-add", type="nbd", id="b", node_name=images[1], name="second", description="hello"
    )
    assert added == {}
    assert await served.first_byte("second") == b"B"
    assert [export["id"] for export in await served.execute("query-block-exports")] == ["export0", "b"]
    assert served.server.exports[1].info.description == "hello"


async def test_without_a_name_the_export_has_that_of_the_node(served: Served, images: list[str]) -> None:
    await served.execute("block-export-add", type="nbd", id="b", node_name=images[1])
    assert served.server.exports[1].name == images[1]


async def test_an_export_may_be_writable(served: Served, images: list[str]) -> None:
    await served.execute("block-export-add", type="nbd", id="b", node_name=images[1], name="b", writable=True)
    client = await served.connect("b")
    assert not client.info.read_only
    await client.close()


async def test_a_qed_image_needs_its_format_named(served: Served, tmp_path: Path) -> None:
    path = str(tmp_path / "image.qed")
    qemu_img("create", "-q", "-f", "qed", path, "1M")
    text = await served.refusal("block-export-add", type="nbd", id="q", node_name=path, name="q")
    assert "QED" in text
    await served.execute("block-export-add", type="nbd", id="q", node_name=path, name="q", x_format="qed")
    assert await served.first_byte("q") == b"\0"


async def test_what_is_deleted_is_gone_and_its_image_is_let_go(served: Served, images: list[str]) -> None:
    await served.execute("block-export-add", type="nbd", id="b", node_name=images[1], name="b", writable=True)
    assert await served.execute("block-export-del", id="b") == {}
    assert await served.deleted() == "b"
    with pytest.raises(SourceError):
        await served.connect("b")
    with open(images[1], "r+b") as image:
        take_locks(image.fileno(), Sharing.WRITER, images[1])
    assert [export["id"] for export in await served.execute("query-block-exports")] == ["export0"]


async def test_what_is_in_use_is_deleted_only_by_force(served: Served) -> None:
    client = await served.connect("a")
    assert await served.refusal("block-export-del", id="export0") == "export 'export0' still in use"
    assert await served.refusal("block-export-del", id="export0", mode="safe") == "export 'export0' still in use"
    assert await served.execute("block-export-del", id="export0", mode="hard") == {}
    assert await served.deleted() == "export0"
    with pytest.raises(OSError):  # noqa: PT011 - whatever a lost connection is to the client
        await client.read(0, 1)
    await client.close()


async def test_the_default_is_never_another_export(served: Served, images: list[str]) -> None:
    await served.execute("block-export-add", type="nbd", id="b", node_name=images[1], name="b")
    assert await served.first_byte("") == b"A"
    await served.execute("block-export-del", id="export0")
    await served.deleted()
    with pytest.raises(SourceError):
        await served.connect("")
    await served.execute("block-export-add", type="nbd", id="again", node_name=images[0], name="a")
    assert await served.first_byte("") == b"A"


async def test_adding_what_is_being_added_is_refused(served: Served, images: list[str]) -> None:
    again = QMPClient("again")
    await again.connect(served.control)
    arguments: dict[str, object] = {"type": "nbd", "id": "b", "node-name": images[1], "name": "b"}
    results = await asyncio.gather(
        served.qmp.execute("block-export-add", arguments),
        again.execute("block-export-add", arguments),
        return_exceptions=True,
    )
    assert sorted(map(str, results)) == ["Block export id 'b' is already in use", "{}"]
    await again.disconnect()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Parameter 'type' is missing"),
        ({"type": "fuse"}, "Parameter 'type' does not accept value 'fuse'"),
        ({"type": "nbd", "id": "b"}, "Parameter 'node-name' is missing"),
        ({"type": "nbd", "id": "-b", "node-name": "x"}, "Invalid block export id"),
        ({"type": "nbd", "id": "export0", "node-name": "x"}, "Block export id 'export0' is already in use"),
        ({"type": "nbd", "id": "b", "node-name": "x", "name": "a"}, "NBD server already has export named 'a'"),
        ({"type": "nbd", "id": "b", "node-name": "/no/such"}, "/no/such cannot be opened: No such file or directory"),
        (
            {"type": "nbd", "id": "b", "node-name": "x", "writable": 1},
            "Invalid parameter type for 'writable', expected: boolean",
        ),
        (
            {"type": "nbd", "id": "b", "node-name": "x", "x-format": "qcow2"},
            "Parameter 'x-format' does not accept value 'qcow2'",
        ),
        (
            {"type": "nbd", "id": "b", "node-name": "x", "bitmaps": []},
            "Parameter 'bitmaps' is not supported: images have no bitmaps here",
        ),
        (
            {"type": "nbd", "id": "b", "node-name": "x", "x-allow": ["c"]},
            "Parameter 'x-allow' needs TLS: without it nobody can be told by a certificate",
        ),
    ],
)
async def test_wrong_additions_are_refused(served: Served, arguments: dict[str, object], text: str) -> None:
    assert await served.refusal("block-export-add", **arguments) == text
    assert len(served.exports.images) == len(served.server.exports) == 1


async def test_a_name_that_cannot_go_over_the_wire_is_refused(served: Served, images: list[str]) -> None:
    text = await served.refusal("block-export-add", type="nbd", id="b", node_name=images[1], name="x" * 5000)
    assert "an export name must be UTF-8 of at most 4096 bytes" in text
    with open(images[1], "r+b") as image:
        take_locks(image.fileno(), Sharing.WRITER, images[1])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Parameter 'id' is missing"),
        ({"id": "x"}, "Export 'x' is not found"),
        ({"id": "export0", "mode": "x"}, "Parameter 'mode' does not accept value 'x'"),
    ],
)
async def test_wrong_deletions_are_refused(served: Served, arguments: dict[str, object], text: str) -> None:
    assert await served.refusal("block-export-del", **arguments) == text


async def test_every_command_is_documented(served: Served) -> None:
    for command in await served.execute("query-commands"):
        assert f"`{command['name']}`" in DOCUMENT
