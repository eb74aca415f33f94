"""Before a disk is streamed: the overlay is made, or it is seen that the one that exists belongs to the source.

Whatever can be refused is refused here, where nothing has been changed yet.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from nbdstream.block.qed.layout import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from nbdstream.block.qed.opening import create_file, read_header
from nbdstream.errors import ImageError, SourceError, WrongSourceError
from nbdstream.stream.source import Source, SourceOptions, round_up
from nbdstream.uri import NbdUri, UriError

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

log = logging.getLogger(__name__)


def parse_source(source: str) -> NbdUri:
    """Return the URI of a source. Raises SourceError for what is none."""
    try:
        return NbdUri.parse(source)
    except UriError as error:
        raise SourceError(str(error)) from error


def create_empty(
    path: str, uri: NbdUri, size: int, cluster_size: int = DEFAULT_CLUSTER_SIZE, table_size: int = DEFAULT_TABLE_SIZE
) -> None:
    """Make an overlay of a source of ``size`` bytes, in which nothing is local (*blocking*). Raises ImageError."""
    create_file(
        path,
        round_up(size),
        cluster_size=cluster_size,
        table_size=table_size,
        backing_name=str(uri.canonical()),
        origin_size=size,
    )


async def create_overlay(
    source: str, path: str, *, cluster_size: int, table_size: int, tls_certificates: str | None = None
) -> None:
    """Make an overlay of a source, of the size that it says it has. Raises NbdstreamError."""
    uri = parse_source(source)
    remote = Source(uri, options=SourceOptions(connections=1, tls_certificates=tls_certificates))
    try:
        await remote.connect()
        await asyncio.to_thread(create_empty, path, uri, remote.size, cluster_size, table_size)
    finally:
        await remote.close()


async def prepare(path: str, uri: NbdUri, source: Source, undo: AsyncExitStack, *, wait: bool, moved: bool) -> bool:
    """Make the overlay, or see that the one that exists belongs to this source; connect if it is needed.

    Return whether it was made.
    """
    if not moved and not await asyncio.to_thread(os.path.lexists, path):
        await source.connect()
        await asyncio.to_thread(create_empty, path, uri, source.size)
        undo.callback(os.unlink, path)
        return True
    header, extension, backing_name = await asyncio.to_thread(read_header, path)
    if moved and backing_name is None:
        raise ImageError(f"{path} has no source any more that could have moved")
    if not moved:
        check_origin(path, backing_name or (extension.origin if extension else ""), uri)
    if backing_name is None:
        return False
    remembered = extension.origin_size if extension else 0
    # Less than the overlay's own size where that has grown since.
    source.expect(remembered if 0 < remembered <= header.image_size else header.image_size)
    await _connect_or_wait(source, wait=wait)
    return False


def check_origin(path: str, origin: str, uri: NbdUri) -> None:
    """Raise ImageError unless ``origin``, of which the image is or was an overlay, is this source."""
    if not origin:
        raise ImageError(f"{path} is no overlay of {uri}: it has no backing file, and remembers none")
    try:
        same = NbdUri.parse(origin).same_source(uri)
    except UriError:
        same = False
    if not same:
        raise ImageError(f"{path} is an overlay of {origin}, not of {uri}")


async def _connect_or_wait(source: Source, *, wait: bool) -> None:
    """Connect to the source of an existing overlay; with ``wait``, one that is away may come later."""
    try:
        await source.connect()
    except SourceError as error:
        if not wait or isinstance(error, WrongSourceError):
            raise
        log.warning("%s: what is local is served, the rest waits", error)
        source.connect_later(str(error))


async def verify(source: Source, *, wait: bool) -> None:
    """Compare what is local with the source; with ``wait``, one that does not answer may do so later."""
    try:
        await source.verify()
    except SourceError as error:
        if not wait or isinstance(error, WrongSourceError):
            raise
        log.warning("%s: what is local is served, the rest waits", error)
