"""Where the keys of a TOML text stand. Pure.

tomllib gives no positions, and an error without a line is half of one. This is no parser: it relies on
tomllib having accepted the text.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
"""What a key may be without quotes."""

_SPACE: Final = re.compile(r"[ \t]+")
_BLANK: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)+")
_STRING: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'", re.DOTALL
)
_SCALAR: Final = re.compile(r"[^\s\[\]{},#\"'=]+(?:[ ][0-9][^\s\[\]{},#\"'=]*)?")


def find_lines(text: str) -> dict[tuple[str, ...], int]:
    """Find the line of each key (from 1), by the keys that lead to it.

    In a text that is not valid TOML it finds the keys up to where it got lost. Keys in tables within arrays
    have no path of their own and are left out.

    Raises:
        RecursionError: inline tables hundreds of levels deep.
    """
    return _Scanner(text).lines


class _Scanner:
    """Walks over statements; skips values, except that it looks for keys in inline tables."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._counted = 0
        self.lines: dict[tuple[str, ...], int] = {}
        table: tuple[str, ...] = ()
        while True:
            self._skip(_BLANK)
            if self._at == len(text):
                break
            if self._take("["):
                self._take("[")
                table = self._key(())
                self._take("]")
                self._take("]")
                if not table:
                    break
            elif not self._assignment(table):
                break

    def _skip(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match[0]

    def _take(self, char: str) -> bool:
        if not self._text.startswith(char, self._at):
            return False
        self._at += len(char)
        return True

    def _key(self, table: tuple[str, ...]) -> tuple[str, ...]:
        """Read a dotted key and note its line; an empty result for something that is no key."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        parts = list(table)
        while True:
            self._skip(_SPACE)
            if (bare := self._skip(BARE_KEY)) is not None:
                parts.append(bare)
            elif (quoted := self._skip(_STRING)) is not None:
                try:
                    parts.append(tomllib.loads(f"k = {quoted}")["k"])
                except tomllib.TOMLDecodeError:
                    return ()
            else:
                return ()
            self.lines.setdefault(tuple(parts), self._line)
            self._skip(_SPACE)
            if not self._take("."):
                return tuple(parts)

    def _assignment(self, table: tuple[str, ...]) -> bool:
        keys = self._key(table)
        if not keys or not self._take("="):
            return False
        self._skip(_SPACE)
        return self._inline_table(keys) if self._take("{") else self._value()

    def _inline_table(self, keys: tuple[str, ...]) -> bool:
        while True:
            self._skip(_BLANK)
            if self._take("}"):
                return True
            if not self._take(",") and not self._assignment(keys):
                return False

    def _value(self) -> bool:
        depth = 0
        while True:
            if self._text.startswith(("[", "{"), self._at):
                depth += 1
                self._at += 1
            elif depth and self._text.startswith(("]", "}"), self._at):
                depth -= 1
                self._at += 1
            elif self._skip(_STRING) is None and self._skip(_SCALAR) is None:
                between = self._take(",") or self._take("=") or self._skip(_BLANK) is not None
                if depth == 0 or not between:
                    return False
            if depth == 0:
                return True
