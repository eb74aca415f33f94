"""Look for damage and leaks in a QED image, and repair it if that is asked for.

Without -r nothing is changed. With -r leaks, clusters that nothing leads to are given back: what lies at the end of
the file moves into them, and the file becomes shorter. With -r all, damage is repaired before: entries that lead
nowhere are made unallocated, and what is used twice gets a copy of its own. What the disk can read stays as it was;
what is given up is listed.

exit codes (as qemu-img check has them; after a repair, of what is left):
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
from nbdstream.block.qed.opening import opened, read_header_of
from nbdstream.block.qed.repair import RepairResult, repair
from nbdstream.block.qed.replay import recorded_links
from nbdstream.cli import arguments

if TYPE_CHECKING:
    import argparse

    from nbdstream.block.qed.mend import Ranges

_SHOWN = 20
"""Problems and ranges that are listed for people."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``check`` understands."""
    parser.add_argument("image", metavar="IMAGE", help="a QED image")
    parser.add_argument("-r", "--repair", choices=["leaks", "all"], help="repair leaks, or all that is wrong")
    arguments.add_json(parser)


async def run(options: argparse.Namespace) -> int:
    """Check, and print what was found."""
    if options.repair:
        result = await asyncio.to_thread(_repair, options.image, options.repair)
    else:
        found = await asyncio.to_thread(_check, options.image)
        result = RepairResult(found, found)
    if options.json:
        sys.stdout.write(json.dumps(_as_json(options.image, result), indent=4) + "\n")
    else:
        _print(options.image, result)
    return result.left.status


def _check(path: str) -> CheckResult:
    with opened(path) as fd:
        take_locks(fd, Sharing.READER, path)
        header, extension, _ = read_header_of(fd)
        return check(fd, recorded_links(fd, header, extension))


def _repair(path: str, what: str) -> RepairResult:
    with opened(path, writable=True) as fd:
        take_locks(fd, Sharing.WRITER, path)
        return repair(fd, leaks_only=what == "leaks")


def _as_json(path: str, result: RepairResult) -> dict[str, object]:
    """Return the members of QAPI's ImageCheck, and in words what is wrong, and what became of it."""
    left = result.left
    return {
        "filename": path,
        "format": "qed",
        "check-errors": left.check_errors,
        "corruptions": left.corruptions,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks": left.leaks,
        "leaks-fixed": result.leaks_fixed,
        "image-end-offset": left.image_end_offset,
        "total-clusters": left.total_clusters,
        "allocated-clusters": left.allocated_clusters,
        "fragmented-clusters": left.fragmented_clusters,
        "problems": [str(problem) for problem in result.found.problems],
        "lost-bytes": result.lost.bytes,
        "lost": [part._asdict() for part in result.lost.kept],
        "copied-bytes": result.copied.bytes,
        "copied": [part._asdict() for part in result.copied.kept],
    }


def _print(path: str, result: RepairResult) -> None:
    out = sys.stdout.write
    for problem in result.found.problems[:_SHOWN]:
        out(f"{problem}\n")
    _print_ranges("given up, since nothing could be read there", result.lost)
    _print_ranges("copied, since something else had the same place: it may be wrong", result.copied)
    if fixed := result.corruptions_fixed:
        out(f"{path}: {fixed} corruptions were repaired\n")
    if fixed := result.leaks_fixed:
        out(f"{path}: {fixed} leaked clusters were given back\n")
    left = result.left
    if left.check_errors:
        out(f"{path}: {left.check_errors} tables could not be read\n")
    if left.corruptions:
        out(f"{path}: {left.corruptions} corruptions: data that leads through them may be wrong\n")
    if left.leaks:
        out(f"{path}: {left.leaks} leaked clusters: space is lost, nothing else\n")
    if not left.status:
        out(f"{path}: no errors {'are left' if result.found.status else 'were found'}\n")
    out(f"{left.allocated_clusters} of {left.total_clusters} clusters allocated\n")


def _print_ranges(what: str, ranges: Ranges) -> None:
    if ranges.bytes:
        sys.stdout.write(f"{ranges.bytes} bytes of the disk were {what}:\n")
        for part in ranges.kept[:_SHOWN]:
            sys.stdout.write(f"{part.offset:>12} {part.length:>12}\n")
        if len(ranges.kept) > _SHOWN:
            sys.stdout.write("         ...  (all of them: --json)\n")
