"""The exports of a server, with the images behind them, and the commands that add and remove them while it serves."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple

from msgspec import UNSET, UnsetType

from nbdstream.block.chain import open_device
from nbdstream.control.arguments import Arguments, check_id
from nbdstream.server.export import Export
from nbdstream.wire.nbd import TransmissionFlag
from nbdstream.wire.qmp import QmpError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import TypeVar

    from nbdstream.block.device import BlockDevice
    from nbdstream.control.commands import Commands
    from nbdstream.server.server import NbdServer

    T = TypeVar("T")

log = logging.getLogger(__name__)

BLOCK_EXPORT_DELETED: Final = "BLOCK_EXPORT_DELETED"


class ExportedImage(NamedTuple):
    """An image that is open for export."""

    path: str
    device: BlockDevice
    export: Export


class Exports:
    """The images that a server exports, by id."""

    def __init__(self, *, shared: int | None = None) -> None:
        """``shared`` is how many clients may have an export open at a time (None: no limit)."""
        self.images: dict[str, ExportedImage] = {}
        self._shared = shared

    async def open(
        self,
        export_id: str,
        path: str,
        name: str,
        *,
        image_format: str | None,
        backing_formats: Sequence[str],
        writable: bool,
        description: str | None,
        allow: Collection[str] | None,
    ) -> Export:
        """Open an image to be exported as ``name``. ``description`` None is the path.

        See :func:`open_device` and :class:`Export`. Raises NbdstreamError, and ValueError for what cannot go over the
        wire.
        """
        device = await open_device(path, image_format, backing_formats, writable=writable)
        try:
            export = Export(
                name,
                device,
                writable=writable,
                description=os.fsencode(path).decode(errors="replace") if description is None else description,
                max_connections=self._shared,
                allow=allow,
            )
        except ValueError:
            await device.close()
            raise
        self.images[export_id] = ExportedImage(path, device, export)
        return export

    async def close_image(self, export_id: str) -> None:
        """Close an image that is not served any more."""
        await self.images.pop(export_id).device.close()

    async def close(self) -> None:
        """Close them all, after the server."""
        for export_id in list(self.images):
            await self.close_image(export_id)


class AddArguments(Arguments):
    """Of block-export-add: QAPI's BlockExportOptions for an NBD export."""

    REFUSED: ClassVar[dict[str, str]] = {
        "bitmaps": "images have no bitmaps here",
        "allocation-depth": "an export offers it if its image has layers",
        "writethrough": "clients ask for it with FUA",
        "iothread": "there are no I/O threads to choose",
        "fixed-iothread": "there are no I/O threads to choose",
    }

    type: Literal["nbd"]
    id: str
    node_name: str
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    writable: bool = False
    x_format: Literal["raw", "qed"] | UnsetType = UNSET
    x_backing_format: list[Literal["raw", "qed"]] | UnsetType = UNSET
    x_allow: list[str] | UnsetType = UNSET


class DelArguments(Arguments):
    """Of block-export-del."""

    id: str
    mode: Literal["safe", "hard"] = "safe"


class ExportCommands:
    """query-block-exports, block-export-add and block-export-del."""

    def __init__(self, exports: Exports, server: NbdServer, emit: Callable[[str, dict[str, Any]], None]) -> None:
        """``emit`` is told of events."""
        self._exports = exports
        self._server = server
        self._emit = emit
        self._adding = asyncio.Lock()
        self._removing: dict[str, asyncio.Task[None]] = {}

    def add_to(self, commands: Commands) -> None:
        """Have them."""
        commands.add("query-block-exports", Arguments, self._query)
        commands.add("block-export-add", AddArguments, self._add)
        commands.add("block-export-del", DelArguments, self._del)

    async def close(self) -> None:
        """Give up what is being removed; it is closed with the others."""
        for task in self._removing.values():
            task.cancel()
        if self._removing:
            await asyncio.wait(self._removing.values())

    async def _query(self, _arguments: Arguments) -> object:
        return [
            {
                "id": export_id,
                "type": "nbd",
                "node-name": image.path,
                "shutting-down": export_id in self._removing,
                "x-name": image.export.name,
                "x-writable": not image.export.info.flags & TransmissionFlag.READ_ONLY,
                "x-connections": image.export.connections,
            }
            for export_id, image in self._exports.images.items()
        ]

    async def _add(self, arguments: AddArguments) -> object:
        name = arguments.node_name if arguments.name is UNSET else arguments.name
        async with self._adding:
            check_id(arguments.id, "Invalid block export id")
            if arguments.id in self._exports.images:
                raise QmpError(f"Block export id '{arguments.id}' is already in use")
            if any(export.name == name for export in self._server.exports):
                raise QmpError(f"NBD server already has export named '{name}'")
            if arguments.x_allow is not UNSET and self._server.tls is None:
                raise QmpError("Parameter 'x-allow' needs TLS: without it nobody can be told by a certificate")
            try:
                export = await self._exports.open(
                    arguments.id,
                    arguments.node_name,
                    name,
                    image_format=_given(arguments.x_format),
                    backing_formats=_given(arguments.x_backing_format) or (),
                    writable=arguments.writable,
                    description=_given(arguments.description),
                    allow=_given(arguments.x_allow),
                )
            except ValueError as error:
                raise QmpError(str(error)) from error
            self._server.add_export(export)
        log.info("serving %s as export %r", arguments.node_name, name)
        return {}

    async def _del(self, arguments: DelArguments) -> object:
        image = self._exports.images.get(arguments.id)
        if image is None:
            raise QmpError(f"Export '{arguments.id}' is not found")
        if arguments.id in self._removing:
            raise QmpError(f"Export '{arguments.id}' is already shutting down")
        if arguments.mode == "safe" and image.export.connections:
            raise QmpError(f"export '{arguments.id}' still in use")
        removing = asyncio.get_running_loop().create_task(self._remove(arguments.id, image.export))
        self._removing[arguments.id] = removing
        return {}

    async def _remove(self, export_id: str, export: Export) -> None:
        try:
            await self._server.remove_export(export)
            await self._exports.close_image(export_id)
        finally:
            del self._removing[export_id]
        log.info("export %r is served no more", export.name)
        self._emit(BLOCK_EXPORT_DELETED, {"id": export_id})


def _given(value: T | UnsetType) -> T | None:
    return None if value is UNSET else value
