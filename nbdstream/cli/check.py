"""Look for damage and leaks in a QED image. Nothing is changed.

exit codes (as qemu-img check has them):
  0  clean
  1  the check could not be made (usage errors too)
  2  corruptions: what the guest reads there may be wrong
  3  leaked clusters: space is lost, nothing else"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING

from nbdstream.block.locks import Sharing, take_locks
from nbdstream.block.qed.check import CheckResult, check
from nbdstream.block.qed.opening import opened
from nbdstream.cli import arguments

if TYPE_CHECKING:
    import argparse

_SHOWN_PROBLEMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``check`` understands."""
    parser.add_argument("image", metavar="IMAGE", help="a QED image")
    arguments.add_json(parser)


async def run(options: argparse.Namespace) -> int:
    """Check, and print what was found."""
    result = await asyncio.to_thread(_check, options.image)
    if options.json:
        sys.stdout.write(json.dumps(_as_json(options.image, result), indent=4) + "\n")
    else:
        _print(options.image, result)
    return result.status


def _check(path: str) -> CheckResult:
    with opened(path) as fd:
        take_locks(fd, Sharing.READER, path)
        return check(fd)


def _as_json(path: str, result: CheckResult) -> dict[str, object]:
    """Return the members of QAPI's ImageCheck, and what is wrong in words."""
    return {
        "filename": path,
        "format": "qed",
        "check-errors": result.check_errors,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "problems": [str(problem) for problem in result.problems],
    }


def _print(path: str, result: CheckResult) -> None:
    out = sys.stdout.write
    for problem in result.problems[:_SHOWN_PROBLEMS]:
        out(f"{problem}\n")
    if result.check_errors:
        out(f"{path}: {result.check_errors} tables could not be read\n")
    if result.corruptions:
        out(f"{path}: {result.corruptions} corruptions: data that leads through them may be wrong\n")
    if result.leaks:
        out(f"{path}: {result.leaks} leaked clusters: space is lost, nothing else\n")
    if not result.status:
        out(f"{path}: no errors were found\n")
    out(f"{result.allocated_clusters} of {result.total_clusters} clusters allocated\n")
