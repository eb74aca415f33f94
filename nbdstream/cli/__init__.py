"""The commands. The only place that prints, parses arguments or picks an event loop."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

COMMANDS = {
    "serve": "export an image over NBD",
    "stream": "run on a remote disk at once, and make it local in the background",
    "job": "control the job that streams a disk",
    "top": "watch a disk being streamed",
    "offer": "hand the disks of a running machine over to another host",
    "receive": "take over the disks that another host offers, and run on them at once",
    "handover": "see and command a hand-over, on either side",
    "create": "make a QED image or overlay",
    "info": "say what an image or export is",
    "map": "list which parts hold data, zeroes, or are still remote",
    "check": "look for damage and leaks in a QED image, and repair it",
    "resize": "make the disk of a QED image larger",
}

FAILED = 1
USAGE = 2

_DESCRIPTION = """\
Run the machine now, move its disk later: serve a disk image on one host, run on it at once on another, and have it
copied there in the background until nothing of it is left behind."""

_EPILOG = """\
example:
  source host:       nbdstream serve disk.raw -b 127.0.0.1 -p 10809
  destination host:  nbdstream stream nbd://localhost overlay.qed -U /run/guest.sock -p
  its guest:         qemu-system-x86_64 ... -drive file=nbd+unix:///?socket=/run/guest.sock,format=raw,if=virtio

'nbdstream COMMAND --help' tells about a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - pip can be told to ignore requires-python
        sys.stderr.write("nbdstream: Python 3.11 or newer is needed\n")
        return FAILED
    try:
        parser = _parser()
    except ModuleNotFoundError as error:
        if error.name not in ("nbd", "libnbdmod"):
            raise
        sys.stderr.write(
            "nbdstream: libnbd's Python bindings are missing: install python3-libnbd with the system's package "
            "manager, and use a virtual environment made with /usr/bin/python3 -m venv --system-site-packages\n"
        )
        return FAILED
    try:
        options = parser.parse_args(arguments)
    except SystemExit as ended:
        # 'check' says with 2 that an image is corrupt, so a wrong command line must be something else there.
        chosen = next((word for word in arguments or sys.argv[1:] if word in COMMANDS), None)
        return FAILED if ended.code == USAGE and chosen == "check" else int(ended.code or 0)
    # The working modules come after the parser, so that --help and a missing libnbd cost nothing more.
    running = importlib.import_module("nbdstream.cli.running")
    code: int = running.run(options)
    return code


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in a line, and leaves the dozen lines of usage to --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"nbdstream: {message} (see '{self.prog} --help')\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nbdstream",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="log what is going on, and where errors come from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, help_text in COMMANDS.items():
        module = importlib.import_module(f"nbdstream.cli.{name}")
        command = commands.add_parser(
            name,
            help=help_text,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
