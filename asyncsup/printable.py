"""Text that anybody may have written, for one line of a log or a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with every control and format character written as an escape (``\x1b``)."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
