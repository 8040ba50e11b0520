"""What is wrong in a configuration, and where. Pure.

A `Source` is a file, a `Layer` a table in it, a `Place` one key of a table. A `Report` gathers problems and
warnings, so that all of them are told at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from asyncsup.config.toml_lines import BARE_KEY, find_lines
from asyncsup.config.values import quoted, toml_text
from asyncsup.errors import ConfigError

MAX_SHOWN_VALUE = 60
"""Characters; a longer value is cut."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong. ``line`` counts from 1; it is None where it could not be found."""

    file: Path
    line: int | None
    key: str
    """With its tables, as in ``target.web.restart``; empty for the file as a whole."""
    value: str | None
    """What the key holds, shortened. None for a missing or unknown key, and for entries of `env`."""
    problem: str
    hint: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.file), "line": self.line, "key": self.key,
            "value": self.value, "problem": self.problem, "hint": self.hint,
        }  # fmt: skip


class Source:
    """One file.

    Args:
        path: where it is; relative paths in it are relative to its folder.
        shown: what the user would call it.
        number: its place among the files.
        text: None when only the data is known: there are no lines then.
    """

    def __init__(
        self, path: Path, *, shown: str, number: int, data: Mapping[str, Any], text: str | None = None
    ) -> None:
        self.path = path
        self.shown = shown
        self.number = number
        self.data = data
        self._text = text
        self._lines: Mapping[tuple[str, ...], int] | None = None

    def line(self, keys: tuple[str, ...]) -> int | None:
        """The line of a key, or of the nearest table around it that has one."""
        if self._text is None:
            return None
        if self._lines is None:
            try:
                self._lines = find_lines(self._text)
            except RecursionError:  # inline tables as deep as tomllib could just read
                self._lines = {}
        while keys and keys not in self._lines:
            keys = keys[:-1]
        return self._lines.get(keys)


class Place(NamedTuple):
    """One key of a table, whether it is there or not. ``value`` None: there is nothing to show."""

    source: Source
    keys: tuple[str, ...]
    value: Any = None

    @property
    def key(self) -> str:
        return ".".join(part if BARE_KEY.fullmatch(part) else quoted(part) for part in self.keys)

    @property
    def shown_value(self) -> str | None:
        table = self.keys[1:] if self.keys[:1] == ("target",) else self.keys
        if self.value is None or table[1:2] == ("env",):  # what is in there may be a secret
            return None
        text = toml_text(self.value)
        return text if len(text) <= MAX_SHOWN_VALUE else f"{text[: MAX_SHOWN_VALUE - 4]} ..."

    def __str__(self) -> str:
        line = self.source.line(self.keys)
        where = self.source.shown if line is None else f"{self.source.shown}:{line}"
        return f"{where}: {self.key}"


class Layer(NamedTuple):
    """One table of one file."""

    source: Source
    keys: tuple[str, ...]
    table: Mapping[str, Any]

    def place(self, name: str) -> Place:
        return Place(self.source, (*self.keys, name), self.table.get(name))


class Report:
    """Problems and warnings, each once: many targets may share the place of one mistake, in `[defaults]`."""

    def __init__(self) -> None:
        self._problems: dict[tuple[Path, str, str], tuple[Problem, Source]] = {}
        self._warnings: dict[str, None] = {}
        self.whole = True
        """Every file could be read. Where one could not, what seems to be missing may be in it."""

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._warnings)

    def problem(self, place: Place, text: str, hint: str | None = None) -> None:
        """Note that a key, or what it holds, is wrong."""
        entry = Problem(
            file=place.source.path,
            line=place.source.line(place.keys),
            key=place.key,
            value=place.shown_value,
            problem=text,
            hint=hint,
        )
        self._problems.setdefault((entry.file, entry.key, text), (entry, place.source))

    def unusable(self, source: Source, line: int | None, text: str, hint: str | None = None) -> None:
        """Note that a file as a whole cannot be used."""
        self.whole = False
        entry = Problem(file=source.path, line=line, key="", value=None, problem=text, hint=hint)
        self._problems.setdefault((entry.file, "", text), (entry, source))

    def warn(self, place: Place, text: str) -> None:
        """Note what is allowed but probably not meant."""
        self._warnings[f"{place}: {text}"] = None

    def raise_problems(self) -> None:
        """Raise one `ConfigError` with all problems in the order of the files, if there are any."""
        if not self._problems:
            return
        found = sorted(self._problems.values(), key=lambda entry: (entry[1].number, entry[0].line or 0))
        raise ConfigError(
            "\n".join(_as_text(problem, source.shown) for problem, source in found),
            problems=[problem.to_json() for problem, _ in found],
        )


def _as_text(problem: Problem, shown: str) -> str:
    parts = [shown if problem.line is None else f"{shown}:{problem.line}"]
    if problem.key:
        parts.append(problem.key if problem.value is None else f"{problem.key} = {problem.value}")
    parts.append(problem.problem)
    return ": ".join(parts) + (f"; {problem.hint}" if problem.hint else "")
