"""Linking what a killed owner had acknowledged (see :mod:`nbdstream.block.qed.record`). All of it blocks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nbdstream.block.qed.record import AUTOCLEAR_RECORD, Link, read_record
from nbdstream.block.qed.tables import BAD_TABLE, ZERO
from nbdstream.errors import ImageError

if TYPE_CHECKING:
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
    if any(cluster >= clusters or (entry > ZERO and not valid(entry, size)) for cluster, entry in links):
        raise ImageError("the record of its last owner is damaged")
    return links


def replay(fd: int, header: Header, tables: Tables, links: list[Link]) -> None:
    """Link what :func:`recorded_links` returned, as one epoch; durable when this returns.

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
