"""What is fuzzed of the control socket: what a client sends, by bytes alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.wire.qmp import MAXIMUM_DEPTH, MAXIMUM_MESSAGE, Command, QmpServer
from tests.fuzz.portions import ways_to_cut

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Conversed(NamedTuple):
    """What a session came to."""

    sent: bytes
    commands: list[Command]
    negotiated: bool
    finished: bool


def qmp(data: bytes) -> None:
    """A client, from its first message on. Bit 0 of the first byte: the negotiation is over."""
    if len(data) < 2:
        return
    whole, *others = [_converse(portions, data[0]) for portions in ways_to_cut(data[1], data[2:])]
    for other in others:
        assert other == whole, f"{other} is not {whole}"
    for line in whole.sent.splitlines(keepends=True):
        assert line.endswith(b"\r\n")
        assert isinstance(json.loads(line.decode("ascii")), dict)
    assert whole.negotiated or not whole.commands, "a command was taken before the negotiation"
    assert all(_depth(command.arguments) < MAXIMUM_DEPTH for command in whole.commands)


def _converse(portions: Iterator[bytes], choice: int) -> _Conversed:
    core = QmpServer({})
    if choice & 1:
        core.receive(b'{"execute": "qmp_capabilities"}')
        assert core.next_command() is None
    sent = bytearray(core.data_to_send())
    commands = []
    for portion in portions:
        core.receive(portion)
        while command := core.next_command():
            if command.refusal:
                core.fail(command, command.refusal)
            else:
                core.answer(command, command.arguments)
                commands.append(command)
            sent += core.data_to_send()
        sent += core.data_to_send()
        assert core.finished or len(core._messages._input) < MAXIMUM_MESSAGE
    return _Conversed(bytes(sent), commands, core.negotiated, core.finished)


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0
