"""QMP by bytes alone: what is taken, what is refused in QEMU's words, and what is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.wire.qmp import (
    MAXIMUM_DEPTH,
    MAXIMUM_MESSAGE,
    Command,
    ErrorClass,
    QmpError,
    QmpServer,
    encode_event,
)

VERSION = {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "test"}
CAPABILITIES = b'{"execute": "qmp_capabilities"}\n'


def messages(data: bytes) -> list[Any]:
    """What a client reads: a line each, ASCII."""
    assert not data or data.endswith(b"\r\n")
    return [json.loads(line.decode("ascii")) for line in data.split(b"\r\n")[:-1]]


def negotiated() -> QmpServer:
    server = QmpServer(VERSION)
    server.receive(CAPABILITIES)
    assert server.next_command() is None
    server.data_to_send()
    return server


def commands(server: QmpServer, *portions: bytes) -> list[Command]:
    """Answer whatever comes: with the arguments, or the refusal."""
    taken = []
    for portion in portions:
        server.receive(portion)
        while command := server.next_command():
            taken.append(command)
            if command.refusal:
                server.fail(command, command.refusal)
            else:
                server.answer(command, command.arguments)
    return taken


def answers(data: bytes) -> list[Any]:
    server = negotiated()
    commands(server, data)
    return messages(server.data_to_send())


def refusal(data: bytes) -> str:
    """The one error that the bytes are answered with."""
    (answer,) = answers(data)
    assert answer["error"]["class"] == "GenericError"
    return str(answer["error"]["desc"])


# Greeting and negotiation.


def test_the_greeting_says_who_we_are_and_that_there_are_no_capabilities() -> None:
    assert messages(QmpServer(VERSION).data_to_send()) == [{"QMP": {"version": VERSION, "capabilities": []}}]


def test_negotiation_is_answered_and_opens_the_rest() -> None:
    server = QmpServer(VERSION)
    server.data_to_send()
    server.receive(b'{"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": 1}')
    assert server.next_command() is None
    assert server.negotiated
    assert messages(server.data_to_send()) == [{"return": {}, "id": 1}]
    assert [command.name for command in commands(server, b'{"execute": "query-jobs"}')] == ["query-jobs"]


def test_before_negotiation_there_is_no_other_command() -> None:
    server = QmpServer(VERSION)
    server.data_to_send()
    commands(server, b'{"execute": "query-jobs", "id": "a"}')
    assert messages(server.data_to_send()) == [
        {
            "id": "a",
            "error": {
                "class": "CommandNotFound",
                "desc": "Expecting capabilities negotiation with 'qmp_capabilities'",
            },
        }
    ]
    assert not server.negotiated


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"enable": ["oob"]}, "Parameter 'enable' names a capability that is not offered"),
        ({"enable": 5}, "Invalid parameter type for 'enable', expected: array"),
        ({"other": 5}, "Parameter 'other' is unexpected"),
    ],
)
def test_a_negotiation_for_what_is_not_there_is_refused(arguments: dict[str, Any], text: str) -> None:
    server = QmpServer(VERSION)
    (command,) = commands(server, json.dumps({"execute": "qmp_capabilities", "arguments": arguments}).encode())
    assert str(command.refusal) == text
    assert not server.negotiated


def test_there_is_one_negotiation() -> None:
    (answer,) = answers(CAPABILITIES)
    assert answer["error"] == {
        "class": "CommandNotFound",
        "desc": "Capabilities negotiation is already complete, command ignored",
    }


# Commands.


def test_a_command_has_a_name_and_arguments_and_its_id_is_echoed() -> None:
    server = negotiated()
    (command,) = commands(server, b'{"execute": "c", "arguments": {"a": 1}, "id": {"x": [1, null, "\xc3\xb6"]}}')
    assert (command.name, command.arguments, command.refusal) == ("c", {"a": 1}, None)
    sent = server.data_to_send()
    assert sent == b'{"return": {"a": 1}, "id": {"x": [1, null, "\\u00f6"]}}\r\n'


@pytest.mark.parametrize("value", [None, 0, "", False, [], {}, 1.5])
def test_any_json_is_an_id(value: object) -> None:
    assert answers(json.dumps({"execute": "c", "id": value}).encode()) == [{"return": {}, "id": value}]


def test_a_failure_has_a_class_and_echoes_the_id() -> None:
    server = negotiated()
    server.receive(b'{"execute": "c", "id": 7}')
    command = server.next_command()
    assert command
    server.fail(command, QmpError("no such job", ErrorClass.DEVICE_NOT_ACTIVE))
    assert messages(server.data_to_send()) == [{"id": 7, "error": {"class": "DeviceNotActive", "desc": "no such job"}}]


def test_messages_need_nothing_between_them() -> None:
    stream = b'{"execute":"c","id":1}{"execute":"c","id":2}\r\n\t {"execute":"c","id":3}'
    assert [answer["id"] for answer in answers(stream)] == [1, 2, 3]


def test_a_message_may_lie_on_several_lines() -> None:
    assert answers(b'{\n "execute":\r\n\t"c"\n}') == [{"return": {}}]


def test_braces_and_quotes_in_strings_are_text() -> None:
    text = 'a } b { c ] [ \\ " \\" {{{ '
    assert answers(json.dumps({"execute": "c", "id": text}).encode()) == [{"return": {}, "id": text}]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"[1]", "QMP input must be a JSON object"),
        (b"5\n", "QMP input must be a JSON object"),
        (b'"a"\n', "QMP input must be a JSON object"),
        (b'{"execute":5}', "QMP input member 'execute' must be a string"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b'{"execute":"c","foo":1}', "QMP input member 'foo' is unexpected"),
        (b'{"execute":"c","arguments":[]}', "QMP input member 'arguments' must be an object"),
        (b'{"execute":"c","arguments":null}', "QMP input member 'arguments' must be an object"),
        (b'{"exec-oob":"c"}', "QMP input member 'exec-oob' needs the capability 'oob', which is not offered"),
    ],
)
def test_what_is_no_command_is_refused(message: bytes, text: str) -> None:
    assert refusal(message) == text


def test_a_refusal_echoes_the_id() -> None:
    assert answers(b'{"execute":5,"id":1}')[0]["id"] == 1


@pytest.mark.parametrize(
    "message",
    [
        b'{"a" 5}',
        b'{"a": 1,}',
        b"{]",
        b'{"a": 01}',
        b'{"a": +1}',
        b"{'execute': 'c'}",
        b'{"execute": "c", "execute": "d"}',
        b'{"execute": "c", "id": {"a": 1, "a": 2}}',
        b'{"execute": "c", "id": NaN}',
        b'{"execute": "c", "id": -Infinity}',
        b'{"execute": "c", "id": 1e999}',
        b'{"execute": "c", "id": "\\ud800"}',
        b'{"execute": "c", "id": "\\x"}',
        b'{"execute": "c", "id": "\x80"}',
        b'{"execute": "c", "id": "\xc0\xaf"}',
        b'{"execute": "c", "id": "\xed\xa0\x80"}',
        b'{"execute": "c", "id": ' + b"9" * 5000 + b"}",
        b"nonsense ",
        b"}",
        b"\xff\n",
        b"\0\n",
    ],
)
def test_what_is_no_json_is_refused_and_the_next_message_is_understood(message: bytes) -> None:
    first, second = answers(message + b'{"execute": "c", "id": 2}')
    assert first["error"]["class"] == "GenericError"
    assert first["error"]["desc"].startswith("JSON parse error, ")
    assert second == {"return": {}, "id": 2}


@pytest.mark.parametrize("message", [b'{"execute": "c\n', b'{"execute": \xff', b'{"execute": "c\xff', b'{"a": \x01'])
def test_a_message_that_cannot_go_on_is_given_up_at_once(message: bytes) -> None:
    first, second = answers(message + b'{"execute": "c", "id": 2}')
    assert "stray byte" in first["error"]["desc"]
    assert second == {"return": {}, "id": 2}


def test_what_is_not_complete_is_waited_for() -> None:
    server = negotiated()
    for portion in (b'{"execute"', b': "c", "id": "\\', b'"', b'"', b"}"):
        assert not commands(server)
        server.receive(portion)
    (command,) = commands(server, b"")
    assert command.echo == {"id": '"'}


# Bounds.


@pytest.mark.parametrize("head", [b'{"execute": "', b"{" + b" " * 10, b"x", b'"', b'{"a": "\\'])
def test_a_message_without_an_end_ends_the_connection(head: bytes) -> None:
    server = negotiated()
    (command,) = commands(server, head + b"x" * MAXIMUM_MESSAGE)
    assert str(command.refusal) == f"QMP input is longer than {MAXIMUM_MESSAGE} bytes"
    assert server.finished
    assert not commands(server, b'{"execute": "c"}')


def test_the_longest_message_is_taken() -> None:
    frame = b'{"execute": "c", "id": "%s"}'
    text = b"x" * (MAXIMUM_MESSAGE - len(frame) + 2)
    assert [answer["id"] for answer in answers(frame % text)] == [text.decode()]
    server = negotiated()
    commands(server, frame % (text + b"x"))
    assert server.finished


def test_white_space_before_a_message_does_not_count() -> None:
    server = negotiated()
    assert not commands(server, b" \n" * MAXIMUM_MESSAGE, b"\t")
    assert len(commands(server, b'{"execute": "c"}')) == 1


@pytest.mark.parametrize(("opened", "closed"), [(b"[", b"]"), (b'{"a":', b"1}")])
def test_what_is_too_deep_ends_the_connection(opened: bytes, closed: bytes) -> None:
    def command(depth: int) -> bytes:
        inside = opened * depth + (b"" if closed == b"]" else b"1") + closed.lstrip(b"1") * depth
        return b'{"execute": "c", "id": ' + inside + b"}"

    assert "return" in answers(command(MAXIMUM_DEPTH - 1))[0]
    server = negotiated()
    (refused,) = commands(server, command(MAXIMUM_DEPTH))
    assert str(refused.refusal) == "JSON nesting depth limit exceeded"
    assert server.finished


def test_what_is_taken_is_kept_no_longer() -> None:
    server = negotiated()
    for _ in range(100):
        commands(server, b'{"execute": "c", "id": "%s"}' % (b"x" * 10_000))
        server.data_to_send()
    assert len(server._messages._input) == 0


# Events.


def test_an_event_has_a_name_data_and_the_time() -> None:
    event = encode_event("JOB_STATUS_CHANGE", {"id": "ö", "status": "running"}, 1_700_000_000_123_456_789)
    assert event.isascii()
    assert messages(event) == [
        {
            "timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456},
            "event": "JOB_STATUS_CHANGE",
            "data": {"id": "ö", "status": "running"},
        }
    ]


def test_events_are_sent_from_the_negotiation_on() -> None:
    server = QmpServer(VERSION)
    server.data_to_send()
    server.notify(encode_event("A", {}, 0))
    assert server.data_to_send() == b""
    server.receive(CAPABILITIES)
    server.next_command()
    server.notify(encode_event("B", {}, 0))
    answer, event = messages(server.data_to_send())
    assert (answer, event["event"]) == ({"return": {}}, "B")


# However it is cut.

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"{}\\', max_size=3), inner, max_size=3),
    max_leaves=8,
)
_COMMANDS = st.builds(
    lambda name, arguments, identity, ascii_only: json.dumps(
        {"execute": name, "arguments": arguments, "id": identity}, ensure_ascii=ascii_only
    ).encode(),
    st.text("abc-", max_size=4),
    st.dictionaries(st.text("xy", max_size=2), _JSON, max_size=2),
    _JSON,
    st.booleans(),
)
_NOISE = st.binary(max_size=12) | st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b"5", b"\xff", b"{]"])


@given(st.lists(_COMMANDS, max_size=4))
def test_every_command_comes_out_as_it_went_in(sent: list[bytes]) -> None:
    taken = commands(negotiated(), b" ".join(sent))
    assert [(c.name, c.arguments, c.echo["id"]) for c in taken] == [
        (message["execute"], message["arguments"], message["id"]) for message in map(json.loads, sent)
    ]


@given(st.lists(_COMMANDS | _NOISE, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_it_does_not_matter_how_the_stream_is_cut(pieces: list[bytes], lengths: list[int]) -> None:
    stream = b"".join(pieces)
    whole, single, uneven = negotiated(), negotiated(), negotiated()
    commands(whole, stream)
    commands(single, *(stream[at : at + 1] for at in range(len(stream))))
    at = turn = 0
    while at < len(stream):
        length = lengths[turn % len(lengths)]
        commands(uneven, stream[at : at + length])
        at, turn = at + length, turn + 1
    sent = whole.data_to_send()
    messages(sent)
    assert single.data_to_send() == uneven.data_to_send() == sent
