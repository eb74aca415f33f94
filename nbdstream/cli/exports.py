"""What ``serve`` is to export, as its command line spells it: IMAGE, or NAME=IMAGE and what holds for that one.

Whether an argument is one or the other is seen from its text, never from what happens to exist: what begins with ``/``,
``./`` or ``../`` is a path, and so is what holds no ``=``. Such a path is taken as it stands. Everything else is
NAME=IMAGE[,KEY=VALUE...], with a comma in any part of it doubled, as QEMU has it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from nbdstream.cli.arguments import FORMATS, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

_PATH = re.compile(r"\.{0,2}/")


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """One export, as far as its own argument tells; None is left to the options that hold for all of them."""

    path: str
    name: str | None = None
    """None for a plain IMAGE."""
    image_format: str | None = None
    writable: bool | None = None
    allow: frozenset[str] | None = None
    """Names in the certificates of the clients that may open it; None: everybody."""
    backing_formats: tuple[str, ...] | None = None
    """Of the layers below, the next one first."""
    description: str | None = None

    @classmethod
    def parse(cls, text: str) -> ExportSpec:
        """Return what an argument says; raises UsageError."""
        if "=" not in text or _PATH.match(text):
            if not text:
                _refuse(text, "the name of the image is empty")
            return cls(text)
        first, *settings = split_commas(text)
        name, equals, path = first.partition("=")
        if not equals:
            _refuse(text, f"only NAME=IMAGE takes options: say NAME={text}")
        if not path:
            _refuse(text, "the name of the image is empty")
        fields: dict[str, object] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if key not in _SETTINGS or not equals:
                known = ", ".join(f"{known}=" for known in _SETTINGS)
                _refuse(text, f"{setting!r} is none of {known} (a comma in a name or a path is written twice)")
            field, read = _SETTINGS[key]
            if field in fields:
                _refuse(text, f"{key}= is given twice")
            fields[field] = read(text, key, value)
        return cls(path, name, **fields)  # type: ignore[arg-type]  # each reader returns its field's type


def split_commas(text: str) -> list[str]:
    """Split at the commas that are not doubled, and write those that are once."""
    parts = [""]
    for piece in re.findall(r",,|,|[^,]+", text):
        if piece == ",":
            parts.append("")
        else:
            parts[-1] += "," if piece == ",," else piece
    return parts


def complete(
    specs: Sequence[ExportSpec],
    *,
    name: str | None,
    image_format: str | None,
    writable: bool,
    backing_formats: Sequence[str],
) -> list[ExportSpec]:
    """Return the exports with what the options for all of them add, and with a name each; raises UsageError.

    A single plain IMAGE has ``name`` or the empty one; with several, each has its file's name.
    """
    if name is not None and len(specs) > 1:
        raise UsageError("--export-name names one export, and there are several: say NAME=IMAGE for each")
    if name is not None and specs[0].name is not None:
        raise UsageError(f"--export-name names the export {specs[0].name!r} a second time")
    done = []
    for spec in specs:
        form = spec.image_format or image_format
        below = spec.backing_formats
        if below is None:
            # One option for all of them means those that can have a backing file.
            below = tuple(backing_formats) if form == "qed" or len(specs) == 1 else ()
        done.append(
            replace(
                spec,
                name=_name(spec, name, alone=len(specs) == 1),
                image_format=form,
                writable=writable if spec.writable is None else spec.writable,
                backing_formats=below,
            )
        )
    _check_names(done)
    return done


def _name(spec: ExportSpec, name: str | None, *, alone: bool) -> str:
    if spec.name is not None:
        return spec.name
    if alone:
        return name or ""
    return os.path.basename(spec.path.rstrip("/"))


def _check_names(specs: Sequence[ExportSpec]) -> None:
    seen: dict[str | None, str] = {}
    for spec in specs:
        if spec.name in seen:
            raise UsageError(
                f"{seen[spec.name]} and {spec.path} would both be the export {spec.name!r}: say NAME=IMAGE for one"
            )
        seen[spec.name] = spec.path


def check_ambiguity(arguments: Sequence[str]) -> None:
    """Refuse an argument that means NAME=IMAGE but is the name of a file as well; raises UsageError."""
    for text in arguments:
        if "=" in text and not _PATH.match(text) and os.path.lexists(text):
            raise UsageError(f"{text} exists and would be read as NAME=IMAGE: say ./{text} for the file")


def _format(text: str, key: str, value: str) -> str:
    if value not in FORMATS:
        _refuse(text, f"{key}={value} is not a format: say {' or '.join(FORMATS)}")
    return value


def _formats(text: str, key: str, value: str) -> tuple[str, ...]:
    return tuple(_format(text, key, name) for name in value.split(":"))


def _switch(text: str, key: str, value: str) -> bool:
    if value not in ("on", "off"):
        _refuse(text, f"{key}={value}: say on or off")
    return value == "on"


def _names(text: str, key: str, value: str) -> frozenset[str]:
    names = value.split(":")
    if "" in names:
        _refuse(text, f"{key}= needs names with a colon between them")
    return frozenset(names)


def _text(_text: str, _key: str, value: str) -> str:
    return value


_SETTINGS = {
    "format": ("image_format", _format),
    "writable": ("writable", _switch),
    "allow": ("allow", _names),
    "backing-format": ("backing_formats", _formats),
    "description": ("description", _text),
}


def _refuse(text: str, why: str) -> NoReturn:
    raise UsageError(f"{text!r}: {why}")
