"""Commands of the operator's, run at the moments that matter: the guest must pause, may resume, may start."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

from nbdstream.errors import NbdstreamError
from nbdstream.wire.handover.messages import plain

if TYPE_CHECKING:
    from collections.abc import Mapping

PATIENCE_SECONDS: Final = 120.0
"""What a hook may take. Pausing a guest and writing out what it has in its caches takes seconds."""

_SAID: Final = 300
"""Characters of what a hook that failed said, which are told; the last ones."""


class HookError(NbdstreamError):
    """A hook failed, did not end, or could not be run."""


async def run_hook(name: str, command: str, about: Mapping[str, str]) -> None:
    """Run a shell command, with ``about`` in its environment, in capitals behind NBDSTREAM_. Raises HookError."""
    environment = os.environ | {f"NBDSTREAM_{key.upper()}": value for key, value in about.items()}
    try:
        process = await asyncio.create_subprocess_shell(
            command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise HookError(f"the {name} cannot be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            said, _ = await process.communicate()
    except TimeoutError:
        _kill_group(process.pid)
        raise HookError(f"the {name} did not end within {PATIENCE_SECONDS:g} s") from None
    except asyncio.CancelledError:
        _kill_group(process.pid)
        raise
    if process.returncode:
        words = plain(said.decode(errors="replace")).strip()[-_SAID:]
        raise HookError(f"the {name} failed with status {process.returncode}" + (f": {words}" if words else ""))


def _kill_group(pid: int) -> None:
    """End a hook and what it started."""
    try:
        os.killpg(pid, 9)
    except ProcessLookupError:
        return
