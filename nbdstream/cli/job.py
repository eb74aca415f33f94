"""Control the job that streams a disk, by the control socket of 'nbdstream stream' or 'nbdstream receive' (--control).

exit codes:
  0  done; of step and wait: the overlay is independent
  1  failed, or refused
  2  usage
  3  of step: there is more to stream; of wait: there is no job, it was cancelled, or the streamer stopped before"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from nbdstream.cli import FAILED, arguments
from nbdstream.cli.picture import describe, describe_handover, streamed
from nbdstream.errors import ControlLostError
from nbdstream.units import format_rate, format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable

    from nbdstream.cli.monitor import Monitor

_NOT_INDEPENDENT = 3


class _Outcome(NamedTuple):
    """What a verb came to."""

    text: str
    """For people."""
    result: dict[str, Any]
    """For programs."""
    code: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``job`` understands."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name, (help_text, _) in _VERBS.items():
        verb = verbs.add_parser(name, help=help_text, description=help_text.capitalize() + ".", allow_abbrev=False)
        verb.add_argument("--control", required=True, metavar="PATH", help="the streamer's control socket")
        verb.add_argument("--device", help="the disk, where there are several (default: the first)")
        arguments.add_json(verb)
        if name == "speed":
            verb.add_argument("speed", nargs="?", type=arguments.size, metavar="BYTES", help="per second; 0: no limit")
            verb.add_argument(
                "--guest-latency",
                type=_objective,
                metavar="TIME",
                help="so gently that 99%% of the guest's requests that need no source take less: 5ms, or none",
            )
        elif name == "start":
            verb.add_argument(
                "--speed", type=arguments.size, default=0, metavar="BYTES", help="per second (default: no limit)"
            )
        elif name == "step":
            verb.add_argument(
                "--offset", type=arguments.size, metavar="N", help="where to begin (default: at what is remote first)"
            )
            verb.add_argument("--length", type=arguments.size, metavar="N", help="of the increment (default: 16M)")


async def run(options: argparse.Namespace) -> int:
    """Connect, do what the verb says, and print what came of it."""
    from nbdstream.cli.monitor import connected  # noqa: PLC0415 - see there

    if options.verb == "speed" and options.speed is None and options.guest_latency is None:
        raise arguments.UsageError("say how fast: BYTES, --guest-latency TIME, or both")
    async with connected(options.control, debug=options.debug) as monitor:
        _, perform = _VERBS[options.verb]
        outcome = await perform(monitor, options)
    sys.stdout.write((json.dumps(outcome.result) if options.json else outcome.text) + "\n")
    return outcome.code


async def _status(monitor: Monitor, options: argparse.Namespace) -> _Outcome:
    handover = await monitor.handover()
    devices = [options.device] if handover is None or options.device else streamed(handover)
    found = [await monitor.status(device) for device in devices]
    if handover is None:
        return _Outcome("\n".join(describe(found[0])), found[0])
    lines = [*describe_handover(handover), *(line for status in found for line in ("", *describe(status)))]
    return _Outcome("\n".join(lines), {"handover": handover, "disks": found})


async def _start(monitor: Monitor, options: argparse.Namespace) -> _Outcome:
    device = await monitor.device(options.device)
    await monitor.execute("block-stream", device=device, speed=options.speed)
    return _Outcome(f"{device} is being streamed", {"id": device})


async def _pause(monitor: Monitor, options: argparse.Namespace) -> _Outcome:
    job = await monitor.job(options.device)
    await monitor.execute("job-pause", id=job)
    return _Outcome(f"{job} is paused", {"id": job})


async def _resume(monitor: Monitor, options: argparse.Namespace) -> _Outcome:
    job = await monitor.job(options.device)
    await monitor.execute("job-resume", id=job)
    return _Outcome(f"{job} goes on", {"id": job})


async def _cancel(monitor: Monitor, options: argparse.Namespace) -> _Outcome:
    job = await monitor.job(options.device)
    await monitor.execute("job-cancel", id=job)
    return _Outcome(f"{job} is cancelled: the disk is served as before, and can be streamed again", {"id": job})


def _objective(text: str) -> float:
    """Return an objective in seconds, 0.0 for none."""
    return 0.0 if text == "none" else arguments.duration(text)


async def _speed(monitor: Monitor, options: argparse.Namespace) -> _Outcome:
    said: list[str] = []
    result: dict[str, Any] = {}
    if options.speed is not None:
        result["id"] = job = await monitor.job(options.device)
        await monitor.execute("block-job-set-speed", device=job, speed=options.speed)
        result["speed"] = options.speed
        limit = f"at most {format_rate(options.speed)}" if options.speed else "no limit"
        said.append(f"{job} is streamed with {limit}")
    if options.guest_latency is not None:
        result["device"] = device = await monitor.device(options.device)
        await monitor.execute("x-set-guest-latency", device=device, latency=options.guest_latency)
        result["guest-latency"] = options.guest_latency
        objective = f"{options.guest_latency * 1000:g} ms are left to" if options.guest_latency else "no objective for"
        said.append(f"{objective} the guest's requests")
    return _Outcome("\n".join(said), result)


async def _step(monitor: Monitor, options: argparse.Namespace) -> _Outcome:
    given = {"offset": options.offset, "length": options.length}
    chosen = {name: value for name, value in given.items() if value is not None}
    done = await monitor.execute("x-block-stream-step", device=await monitor.device(options.device), **chosen)
    if done["finished"]:
        return _Outcome("the overlay is independent", done)
    offset = done["offset"]
    return _Outcome(f"go on at offset {offset} ({format_size(offset)})", done, _NOT_INDEPENDENT)


async def _wait(monitor: Monitor, options: argparse.Namespace) -> _Outcome:
    try:
        status = await monitor.status(options.device)
        if status["status"] == "independent":
            return _independent()
        if "job" not in status:
            return _Outcome("no job streams the disk", {"outcome": "no job"}, _NOT_INDEPENDENT)
        ours = (status["device"], status["job"]["device"])
        while True:
            match await monitor.next_event():
                case _, {"device": other} if other not in ours:
                    continue
                case "X_DISK_INDEPENDENT", _:
                    return _independent()
                case "BLOCK_JOB_COMPLETED", {"error": error}:
                    return _Outcome(f"the job failed: {error}", {"outcome": "failed", "error": error}, FAILED)
                case "BLOCK_JOB_CANCELLED", _:
                    return _Outcome("the job was cancelled", {"outcome": "cancelled"}, _NOT_INDEPENDENT)
    except ControlLostError:
        return _Outcome("the streamer stopped before it was done", {"outcome": "stopped"}, _NOT_INDEPENDENT)


def _independent() -> _Outcome:
    return _Outcome("the overlay is independent", {"outcome": "independent"})


_VERBS: dict[str, tuple[str, Callable[[Monitor, argparse.Namespace], Awaitable[_Outcome]]]] = {
    "status": ("say how the disk is, and how far it has come", _status),
    "start": ("stream all of the disk in the background", _start),
    "pause": ("fetch nothing more in the background", _pause),
    "resume": ("go on after a pause", _resume),
    "cancel": ("end the job, and keep all that it has fetched", _cancel),
    "speed": ("change how much is fetched at most, or what is left to the guest", _speed),
    "step": ("stream one increment, and say where to go on", _step),
    "wait": ("wait until the overlay is independent", _wait),
}
