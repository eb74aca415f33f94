"""Say what an image or an export is.

Without -f a file is what its header says: a QED image is described, and its backing file is not opened."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from nbdstream.block.qed.layout import MAGIC, Header
from nbdstream.block.qed.opening import opened, read_header
from nbdstream.block.remote.export import RemoteExport
from nbdstream.cli import arguments
from nbdstream.text import printable
from nbdstream.units import format_size
from nbdstream.uri import is_nbd_uri

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``info`` understands."""
    parser.add_argument("image", metavar="IMAGE|URI", help="an image file, or an NBD URI")
    arguments.add_format(parser)
    arguments.add_json(parser)
    arguments.add_tls_certificates(parser)


async def run(options: argparse.Namespace) -> int:
    """Print what is known."""
    if is_nbd_uri(options.image):
        facts = await _export_facts(options.image, options.tls_certificates)
    else:
        facts = await asyncio.to_thread(_file_facts, options.image, options.format)
    if options.json:
        sys.stdout.write(json.dumps(facts, indent=4) + "\n")
    else:
        for name, value in facts.items():
            sys.stdout.write(f"{name}: {_for_people(name, value)}\n")
    return 0


async def _export_facts(uri: str, tls_certificates: str | None) -> dict[str, Any]:
    export = await RemoteExport.connect(uri, connections=1, tls_certificates=tls_certificates)
    try:
        info = export.info
        return {
            "uri": uri,
            "export-size": info.size,
            "is_read_only": info.read_only,
            "can_multi_conn": info.can_multi_conn,
            "contexts": ["base:allocation"] if info.has_allocation else [],
            "block_minimum": info.minimum_block,
            "block_preferred": info.preferred_block,
            "block_size_maximum": info.maximum_block,
        }
    finally:
        await export.close()


def _file_facts(path: str, image_format: str | None) -> dict[str, Any]:
    with opened(path) as fd:
        if image_format is None:
            image_format = "qed" if os.pread(fd, len(MAGIC), 0) == MAGIC else "raw"
        stat = os.fstat(fd)
        facts: dict[str, Any] = {
            "filename": path,
            "format": image_format,
            "virtual-size": os.lseek(fd, 0, os.SEEK_END),
            "actual-size": stat.st_blocks * 512,
        }
    return facts | _qed_facts(path) if image_format == "qed" else facts


def _qed_facts(path: str) -> dict[str, Any]:
    header, extension, backing_name = read_header(path)
    facts: dict[str, Any] = {
        "virtual-size": header.image_size,
        "cluster-size": header.cluster_size,
        "table-size": header.table_size,
        "dirty-flag": header.needs_check,
    }
    if backing_name is not None:
        facts |= {"backing-filename": backing_name} | _backing_format(header)
    if extension is not None:
        facts["uuid"] = str(extension.image_uuid)
        if extension.origin:
            facts["origin"] = extension.origin
    return facts


def _backing_format(header: Header) -> dict[str, str]:
    return {"backing-filename-format": "raw"} if header.backing_is_raw else {}


def _for_people(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "size" in name and name != "table-size":
        return f"{format_size(value)} ({value} bytes)"
    if isinstance(value, list):
        return ", ".join(value)
    return printable(str(value))
