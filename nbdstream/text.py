"""Text that others wrote, for people to read."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text with a ``?`` for each character that would move a terminal's cursor, or that is none at all."""
    return "".join(character if character.isprintable() else "?" for character in text)
