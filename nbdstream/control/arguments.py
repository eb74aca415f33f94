"""The arguments of commands, as strictly as QAPI has them: by name and type, and nothing that is not there.

A command's arguments are a :class:`Arguments`, a msgspec Struct whose fields are QAPI's members. Optional ones are
UNSET unless they are given, since null is nothing that QAPI knows.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, TypeAlias, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta
from msgspec.structs import fields

from nbdstream.wire.qmp import QmpError

if TYPE_CHECKING:
    from collections.abc import Mapping

Int: TypeAlias = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""QAPI's int."""


class Arguments(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    """What a command takes; by itself, nothing."""

    REFUSED: ClassVar[dict[str, str]] = {}
    """Members that QEMU's command has and that are not honoured here, with the reason."""


A = TypeVar("A", bound=Arguments)

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,254}")
"""As QEMU has it, and no longer than a line."""

_NAMES: Final = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array"}


def parse_arguments(given: Mapping[str, Any], arguments: type[A]) -> A:
    """Return the arguments of a command from what a client gave. Raises QmpError, in QEMU's words."""
    known = fields(arguments)
    for member in given:
        if member in arguments.REFUSED:
            raise QmpError(f"Parameter '{member}' is not supported: {arguments.REFUSED[member]}")
    for field in known:
        if field.encode_name in given:
            _check(field.encode_name, given[field.encode_name], field.type)
        elif field.required:
            raise QmpError(f"Parameter '{field.encode_name}' is missing")
    names = {field.encode_name for field in known}
    for member in given:
        if member not in names:
            raise QmpError(f"Parameter '{member}' is unexpected")
    return msgspec.convert(given, arguments)


def check_id(text: str, refusal: str) -> None:
    """Raise QmpError with the text ``refusal`` for what cannot be an id."""
    if not _ID.fullmatch(text):
        raise QmpError(refusal)


def _check(member: str, value: object, expected: Any) -> None:
    try:
        msgspec.convert(value, expected)
    except msgspec.ValidationError:
        kind = _kind(expected)
        if isinstance(value, str) and kind is str:
            raise QmpError(f"Parameter '{member}' does not accept value '{value}'") from None
        raise QmpError(f"Invalid parameter type for '{member}', expected: {_NAMES[kind]}") from None


def _kind(expected: Any) -> type:
    """Return the JSON type behind an annotation: the first of a union's, since the others are UnsetType."""
    origin = get_origin(expected)
    if origin is Literal:
        return str
    if origin is list:
        return list
    if inner := get_args(expected):
        return _kind(inner[0])
    return str if issubclass(expected, Enum) else expected
