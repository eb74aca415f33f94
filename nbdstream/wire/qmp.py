"""QMP, server side (QEMU's docs/interop/qmp-spec): JSON objects in a stream, as bytes in and bytes out.

::

    greeting -> NEGOTIATION --qmp_capabilities--> COMMANDS          (in the first only that one command is taken)

Commands are pulled out one at a time, so that the answers leave in the order of the commands and a client that does not
read them is not read from either. What cannot be followed is a command as well, with a *refusal* to answer it with: the
stream is in step again behind it. Only a message that is too long or too deep ends the connection, after its answer.

Every message that is sent is one line of ASCII. The ``id`` of a command is echoed, in errors too.
"""

from __future__ import annotations

import json
import math
import re
from enum import StrEnum
from typing import Any, Final, NamedTuple

MAXIMUM_MESSAGE: Final = 128 << 10
"""Bytes of one message. The longest sensible one has a path, a name and a description of 4096 characters, each of them
written as ``\\uXXXX``: 72 KiB. (QEMU takes 64 MiB.)"""

MAXIMUM_DEPTH: Final = 32
"""Objects and arrays inside each other. No command needs more than three; the id may be anything. (QEMU: 1024.)"""

_OUTSIDE: Final = re.compile(rb'["{}\[\]]|[^\x20-\x7e\t\r\n]')
"""What matters between the tokens of a message, and what cannot be there."""

_INSIDE: Final = re.compile(rb'["\x00-\x1f\xfe\xff]|\\.?', re.DOTALL)
"""What matters within a string, and what cannot be there: a string that holds the end of a line was never ended."""

_STRAY: Final = re.compile(rb"[{\[\n]")
"""Where something ends that is no object and no array."""

_WHITE: Final = b" \t\r\n"


class ErrorClass(StrEnum):
    """QAPI's QapiErrorClass, as far as it is used here."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"


class QmpError(Exception):
    """What a command is answered with that cannot be done."""

    def __init__(self, description: str, error_class: ErrorClass = ErrorClass.GENERIC) -> None:
        super().__init__(description)
        self.error_class = error_class


class Command(NamedTuple):
    """One message of a client."""

    name: str
    arguments: dict[str, Any]
    echo: dict[str, Any]
    """What its answer has to repeat: the id, or nothing."""
    refusal: QmpError | None = None
    """It cannot be followed: answer it with this."""


class QmpServer:
    """One client's connection."""

    def __init__(self, version: dict[str, Any]) -> None:
        """``version`` is QAPI's VersionInfo: who we are."""
        self.finished = False
        """What comes next cannot be understood: close when everything is sent."""
        self.negotiated = False
        """Whether commands are taken and events sent."""
        self._messages = _Messages()
        self._output = bytearray()
        self._send({"QMP": {"version": version, "capabilities": []}})

    def data_to_send(self) -> bytes:
        """Return what has to go to the client now; every byte is returned once."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def receive(self, data: bytes) -> None:
        """Take bytes from the client, in any portions. Take the commands out before there is more."""
        if not self.finished:
            self._messages.feed(data)

    def next_command(self) -> Command | None:
        """Return the next command to be answered; None if no other is complete."""
        while not self.finished:
            try:
                message = self._messages.take()
            except _MessageError as error:
                self.finished = error.final
                return Command("", {}, {}, QmpError(str(error)))
            if message is None:
                break
            command = self._understand(message)
            if command.name != "qmp_capabilities" or command.refusal:
                return command
            self.negotiated = True
            self.answer(command, {})
        return None

    def answer(self, command: Command, value: object) -> None:
        """Say that the command was done, and what it returns."""
        self._send({"return": value, **command.echo})

    def fail(self, command: Command, error: QmpError) -> None:
        """Say that the command was not done, and why."""
        self._send({**command.echo, "error": {"class": error.error_class, "desc": str(error)}})

    def notify(self, event: bytes) -> None:
        """Send what :func:`encode_event` returned; a client that is still negotiating does not hear of it."""
        if self.negotiated:
            self._output += event

    def _send(self, message: dict[str, Any]) -> None:
        self._output += _encode(message)

    def _understand(self, message: dict[str, Any]) -> Command:
        echo = {"id": message["id"]} if "id" in message else {}
        name, arguments = message.get("execute", ""), message.get("arguments", {})
        try:
            _check_members(message)
            if not self.negotiated:
                _check_negotiation(name, arguments)
            elif name == "qmp_capabilities":
                raise QmpError(
                    "Capabilities negotiation is already complete, command ignored", ErrorClass.COMMAND_NOT_FOUND
                )
        except QmpError as refusal:
            return Command("", {}, echo, refusal)
        return Command(name, arguments, echo)


def encode_event(name: str, data: dict[str, Any], time_ns: int) -> bytes:
    """Return an event as it is sent to every client. ``time_ns`` is when it happened, since the epoch."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    timestamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    return _encode({"timestamp": timestamp, "event": name, "data": data})


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\r\n"


def _check_members(message: dict[str, Any]) -> None:
    for member in message:
        if member not in ("execute", "exec-oob", "arguments", "id"):
            raise QmpError(f"QMP input member '{member}' is unexpected")
    if "exec-oob" in message:
        raise QmpError("QMP input member 'exec-oob' needs the capability 'oob', which is not offered")
    if "execute" not in message:
        raise QmpError("QMP input lacks member 'execute'")
    if not isinstance(message["execute"], str):
        raise QmpError("QMP input member 'execute' must be a string")
    if not isinstance(message.get("arguments", {}), dict):
        raise QmpError("QMP input member 'arguments' must be an object")


def _check_negotiation(name: str, arguments: dict[str, Any]) -> None:
    if name != "qmp_capabilities":
        raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", ErrorClass.COMMAND_NOT_FOUND)
    for argument, value in arguments.items():
        if argument != "enable":
            raise QmpError(f"Parameter '{argument}' is unexpected")
        if not isinstance(value, list):
            raise QmpError("Invalid parameter type for 'enable', expected: array")
        if value:
            raise QmpError("Parameter 'enable' names a capability that is not offered")


class _MessageError(Exception):
    """A message that is none."""

    def __init__(self, text: str, *, final: bool = False) -> None:
        """``final``: it is not known where it ends, or its end is not waited for."""
        super().__init__(text)
        self.final = final


class _Messages:
    """Cuts a stream into JSON objects. It never keeps more than a message and what was fed at once."""

    def __init__(self) -> None:
        self._input = bytearray()
        self._begin(0)

    def _begin(self, at: int) -> None:
        """Begin anew behind the first ``at`` bytes."""
        del self._input[:at]
        self._at = 0
        """Everything before it has been looked at."""
        self._depth = 0
        self._in_string = False

    def feed(self, data: bytes) -> None:
        self._input += data

    def take(self) -> dict[str, Any] | None:
        """Return the next message, None if it is not complete. Raises _MessageError for what is none."""
        if self._at == 0:
            self._begin(len(self._input) - len(self._input.lstrip(_WHITE)))
        if not self._input:
            return None
        end = self._end() if self._input[0] in b"{[" else self._end_of_stray()
        if end is None:
            if len(self._input) >= MAXIMUM_MESSAGE:
                raise _MessageError(f"QMP input is longer than {MAXIMUM_MESSAGE} bytes", final=True)
            return None
        message = bytes(self._input[:end])
        self._begin(end)
        return _decode(message)

    def _end(self) -> int | None:
        """Return where the object or array ends that the input begins with; None if not within what is there."""
        limit = min(len(self._input), MAXIMUM_MESSAGE)
        while self._at < limit:
            found = (_INSIDE if self._in_string else _OUTSIDE).search(self._input, self._at, limit)
            if found is None:
                self._at = limit
                break
            what = found.group()
            if what == b"\\":  # what it escapes has not come yet
                self._at = found.start()
                break
            self._at = found.end()
            if what == b'"':
                self._in_string = not self._in_string
            elif what in (b"{", b"["):
                self._depth += 1
                if self._depth > MAXIMUM_DEPTH:
                    raise _MessageError("JSON nesting depth limit exceeded", final=True)
            elif what in (b"}", b"]"):
                self._depth -= 1
                if not self._depth:
                    return self._at
            elif not what.startswith(b"\\"):
                self._begin(self._at)
                raise _MessageError(f"JSON parse error, stray byte {what[0]:#04x}")
        return None

    def _end_of_stray(self) -> int | None:
        limit = min(len(self._input), MAXIMUM_MESSAGE)
        found = _STRAY.search(self._input, self._at, limit)
        self._at = limit
        return found.start() if found else None


def _decode(message: bytes) -> dict[str, Any]:
    try:
        value = json.loads(
            message.decode(), object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite
        )
        if b"\\u" in message:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except UnicodeError:
        raise _MessageError("JSON parse error, not a valid Unicode string") from None
    except json.JSONDecodeError as error:
        raise _MessageError(f"JSON parse error, {error.msg} at byte {error.pos}") from None
    except ValueError as error:  # a number of more digits than Python converts, or what is raised below
        raise _MessageError(f"JSON parse error, {error}") from None
    if not isinstance(value, dict):
        raise _MessageError("QMP input must be a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value
