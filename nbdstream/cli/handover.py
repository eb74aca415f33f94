"""See and command a hand-over, on either side, by its state directory.

exit codes:
  0  done; of fence: the destination owns the disks
  1  failed, or refused; of fence: the guest belongs here still
  2  usage
  3  of fence: granted, but whether the destination has accepted is not known yet (see 'status')"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

from nbdstream.cli import FAILED, arguments
from nbdstream.cli.picture import describe_handover
from nbdstream.cli.states import control_path
from nbdstream.errors import ControlError, ControlLostError
from nbdstream.handover.journal import read_journal
from nbdstream.handover.manifest import read_manifest
from nbdstream.handover.status import advice
from nbdstream.wire.handover.vocabulary import SourceRecord

if TYPE_CHECKING:
    import argparse

    from nbdstream.cli.monitor import Monitor

_IN_DOUBT = 3
_PATIENCE_SECONDS = 10.0
"""After the grant an answer takes a round trip and a barrier."""

_VERBS = {
    "status": "say where this side stands, and what there is to do",
    "fence": "stop the guest here, and let the destination own the disks",
    "decline": "call it off: at the source before the grant, at the destination before it has accepted",
    "release": "let go of the disks at the source, by manifests that came by another way than the connection",
    "override": "take the disks back at the source, since the destination certainly does not run and never will",
    "retry": "try again what failed: a hook, a name that could not be changed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``handover`` understands."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name, help_text in _VERBS.items():
        verb = verbs.add_parser(name, help=help_text, description=help_text.capitalize() + ".", allow_abbrev=False)
        verb.add_argument("--state", required=True, metavar="DIR", help="the state directory of offer or receive")
        arguments.add_json(verb)
        if name == "release":
            verb.add_argument("manifests", nargs="+", metavar="MANIFEST", help="one for each disk, in their order")
        elif name == "override":
            verb.add_argument(
                "--evidence",
                required=True,
                metavar="TEXT",
                help="how it is known: it is kept in the journal. What the destination wrote is lost",
            )


async def run(options: argparse.Namespace) -> int:
    """Do what the verb says, and print what came of it."""
    from nbdstream.cli.monitor import connected  # noqa: PLC0415 - see there

    path = control_path(options.state)
    if not await asyncio.to_thread(os.path.exists, path):
        return _show_journal(options)
    said = options.verb == "status"
    try:
        async with connected(path, debug=options.debug) as monitor:
            code = 0
            if not said:
                await monitor.execute(f"x-handover-{options.verb}", **_given(options))
                said = True
            if options.verb == "fence":
                code = await _wait(monitor)
            _show(await monitor.execute("x-handover-status"), options)
            return code
    except ControlLostError:
        if not said:
            raise
        return _show_journal(options, said=True)  # the process has come to its end meanwhile
    except ControlError as error:
        if "refused" in str(error):  # the socket of a process that was killed
            return _show_journal(options)
        raise


def _given(options: argparse.Namespace) -> dict[str, Any]:
    if options.verb == "override":
        return {"evidence": options.evidence}
    if options.verb == "release":
        found = [read_manifest(path) for path in options.manifests]
        missing = [path for path, each in zip(options.manifests, found, strict=True) if each is None]
        if missing:
            raise ControlError(f"there is no {missing[0]}")
        return {"manifests": msgspec.to_builtins(found)}
    return {}


async def _wait(monitor: Monitor) -> int:
    """Wait until the change of owner has come to something."""
    granted = 0.0
    while True:
        state = (await monitor.execute("x-handover-status"))["state"]
        code = _come_to(state)
        if code == _IN_DOUBT:
            granted = granted or time.monotonic()
            if time.monotonic() - granted < _PATIENCE_SECONDS:
                code = None
        if code is not None:
            return code
        await asyncio.sleep(0.02)


def _come_to(state: str) -> int | None:
    """Return the exit code of ``fence`` where the source stands now; None if it cannot stay there."""
    if state in ("ACCEPTED", "RELEASING", "RELEASED"):
        return 0
    if state in ("OFFERED", "PREPARED", "DECLINED"):
        return FAILED
    return _IN_DOUBT if state in ("GRANTED", "IN-DOUBT") else None


def _show_journal(options: argparse.Namespace, *, said: bool = False) -> int:
    """Show what the journal of a side says that does not run; nothing else can be done with one.

    ``said`` is whether the verb had been done when it ended.
    """
    contents = read_journal(options.state)
    source = isinstance(contents.record, SourceRecord)
    state = contents.record.phase.upper()
    command = "offer" if source else "receive"
    over = state == "DECLINED" or (source and state == "RELEASED")
    again = " any more" if over else ": start it again with the same command line"
    status: dict[str, Any] = {
        "role": "source" if source else "destination",
        "running": False,
        "state": state,
        "epoch": contents.record.epoch,
        "since": contents.entries[-1].time,
        "connected": False,
        "advice": f"'nbdstream {command}' does not run{again}. {advice(state, source=source)}",
        "problem": "",
        "alarms": [],
        "remote": None,
        "disks": [],
        "timing": [],
    }
    _show(status, options)
    if said and options.verb == "fence":
        code = _come_to(state)
        return FAILED if code is None else code
    return 0 if said or options.verb == "status" else FAILED


def _show(status: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        sys.stdout.write(json.dumps(status) + "\n")
        return
    lines = describe_handover(status)
    if options.verb == "fence" and status["timing"]:
        parts = ", ".join(f"{part['what']} {part['seconds'] * 1000:.1f}" for part in status["timing"])
        lines.append(f"took, in milliseconds: {parts}")
    sys.stdout.write("\n".join(lines) + "\n")
