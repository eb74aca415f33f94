"""The commands of a control socket, and those that every one of them has."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nbdstream.control.arguments import Arguments, parse_arguments
from nbdstream.errors import NbdstreamError
from nbdstream.wire.qmp import ErrorClass, QmpError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import TypeVar

    A = TypeVar("A", bound=Arguments)

_NUMBERS: Final = [int(number) for number in version("nbdstream").split(".")[:3]]

VERSION: Final = {
    "qemu": dict(zip(("major", "minor", "micro"), _NUMBERS, strict=True)),
    "package": f"nbdstream {version('nbdstream')}",
}
"""QAPI's VersionInfo. Clients look for a number there, and it is ours: QEMU's would promise what only QEMU has."""


class _Known(NamedTuple):
    arguments: type[Arguments]
    run: Callable[[Any], Awaitable[object]]


class Commands:
    """What a client can say."""

    def __init__(self, stop: Callable[[], None]) -> None:
        """Begin with what every control socket has; ``stop`` is what ``quit`` calls."""
        self._known: dict[str, _Known] = {}
        self._stop = stop
        self.add("qmp_capabilities", Arguments, self._version)  # the session answers it; the list has it
        self.add("query-version", Arguments, self._version)
        self.add("query-commands", Arguments, self._commands)
        self.add("quit", Arguments, self._quit)

    def add(self, name: str, arguments: type[A], run: Callable[[A], Awaitable[object]]) -> None:
        """Have a command: ``run`` returns what JSON can hold, or raises QmpError, NbdstreamError or OSError."""
        self._known[name] = _Known(arguments, run)

    async def execute(self, name: str, given: Mapping[str, Any]) -> object:
        """Run a command with what a client gave as its arguments. Raises QmpError."""
        known = self._known.get(name)
        if known is None:
            raise QmpError(f"The command {name} has not been found", ErrorClass.COMMAND_NOT_FOUND)
        try:
            return await known.run(parse_arguments(given, known.arguments))
        except NbdstreamError as error:
            raise QmpError(" ".join(str(error).split())) from error
        except OSError as error:
            raise QmpError(error.strerror or str(error)) from error

    async def _version(self, _arguments: Arguments) -> object:
        return VERSION

    async def _commands(self, _arguments: Arguments) -> object:
        return [{"name": name} for name in self._known]

    async def _quit(self, _arguments: Arguments) -> object:
        self._stop()
        return {}
