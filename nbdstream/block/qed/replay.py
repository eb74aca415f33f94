"""Linking what a killed owner had acknowledged (see :mod:`nbdstream.block.qed.record`). All of it blocks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nbdstream.block.qed.record import AUTOCLEAR_RECORD, Link, read_record, record_path
from nbdstream.block.qed.tables import BAD_TABLE, UNALLOCATED, ZERO
from nbdstream.block.qed.walk import Walk
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from uuid import UUID

    from nbdstream.block.qed.extension import Extension
    from nbdstream.block.qed.layout import Header
    from nbdstream.block.qed.tables import Tables


def recorded_links(fd: int, header: Header, extension: Extension | None) -> list[Link]:
    """Return what a killed owner acknowledged and did not link, unless somebody else has written to the image since.

    Raises ImageError if there is a record that cannot be read or cannot be right.
    """
    if extension is None or not header.autoclear_features & AUTOCLEAR_RECORD:
        return []
    links = read_record(fd, extension.image_uuid)
    size = os.fstat(fd).st_size
    clusters = -(-header.image_size // header.cluster_size)
    valid = header.geometry.valid_cluster_offset
    for cluster, entry in links:
        if cluster >= clusters or (entry > ZERO and not valid(entry, size)):
            raise _damaged(fd, extension.image_uuid, f"it says that cluster {cluster} is at {entry:#x}")
    return links


def links_to_replay(fd: int, header: Header, extension: Extension | None) -> list[Link]:
    """Return the same to whoever is going to :func:`replay` it.

    Raises ImageError, too, if with these links two entries would lead to one place, or one onto a table: a record that
    is another state's of the file (a copy was put over it, say). Then nothing may be changed.
    """
    links = recorded_links(fd, header, extension)
    if not links or extension is None:
        return []
    others = Walk(fd, header, [(cluster, UNALLOCATED) for cluster, _ in links])
    others.run()
    used = others.used
    for cluster, entry in dict(links).items():  # the last link of each cluster is the one that stays
        if entry > ZERO:
            number = entry // header.cluster_size
            if used[number]:
                what = f"it says that cluster {cluster} is at {entry:#x}, and something else is there"
                raise _damaged(fd, extension.image_uuid, what)
            used[number] = 1
    return links


def _damaged(fd: int, uuid: UUID, what: str) -> ImageError:
    return ImageError(
        f"the record of its last owner, {record_path(fd, uuid)}, is damaged: {what}. "
        f"Remove it only if what was written last may be lost"
    )


def replay(fd: int, header: Header, tables: Tables, links: list[Link]) -> None:
    """Link what :func:`links_to_replay` returned, as one epoch; durable when this returns.

    The tables are as they were before it. What was in the page cache must be durable already.
    """
    table_bytes = header.geometry.table_bytes
    missing = sorted({index for cluster, _ in links if tables.l1[index := tables.l1_index(cluster)] <= BAD_TABLE})
    end = -(-os.fstat(fd).st_size // header.cluster_size) * header.cluster_size
    new = {index: end + i * table_bytes for i, index in enumerate(missing)}
    tables.write_new_tables(new, links)
    os.fdatasync(fd)
    tables.link(new, links)
    tables.linked(new, links)
    os.fdatasync(fd)
