"""The journal: what the next supervisor must know should this one die now. ``STATE/journal``.

Facts by key, each a JSON object. A change is one ``write`` at the end of the file, so it is safe from then on
against the death of this process, and costs some microseconds; nothing is synced, because nothing of it is
true after a reboot. A line that was cut off does not count. When lines that are out of date prevail, the file
is written anew.

The file is emptied by a supervisor that ends in good order: what is found in it at a start was left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import orjson
from msgspec.structs import asdict

from asyncsup.errors import StateError

log = logging.getLogger("asyncsup")

VERSION: Final = 1
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
SMALLEST_COMPACTION: Final = 1 << 20
"""Bytes below which a file is not written anew."""

_LINE: Final = msgspec.json.Decoder(tuple[str, msgspec.Raw])
"""Most lines are out of date: what they say is not looked at."""


class Journal:
    """An open journal.

    Args:
        path: the file; the caller has the lock on its folder.

    Raises:
        StateError: it was left behind by an asyncsup that writes it in another way.

    Attributes:
        left_behind: what a supervisor that did not end in good order had written, by key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._boot = BOOT_ID.read_text().strip()
        texts = self._read()
        self.left_behind: dict[str, Any] = {
            key: value for key, text in texts.items() if (value := _decoded(text)) is not None
        }
        self._facts = {key: texts[key] for key in self.left_behind}
        self._fd = -1
        self._size = 0
        self._limit = SMALLEST_COMPACTION
        self._failed = False
        self._rewrite()

    def put(self, key: str, value: object) -> None:
        """Write a fact down; ``value`` is what orjson can encode, structs included."""
        text = _encoded(value)
        if self._facts.get(key) == text:
            return
        self._facts[key] = text
        self._append(_line(key, text))

    def put_together(self, facts: Mapping[str, object]) -> None:
        """Write down several facts of which nobody may ever find only some."""
        texts = {key: _encoded(value) for key, value in facts.items()}
        self._facts |= texts
        self._append(b"".join(_line(key, text) for key, text in texts.items()))

    def drop(self, key: str) -> None:
        """Forget a fact; harmless when there is none."""
        if self._facts.pop(key, None) is not None:
            self._append(_line(key, b"null"))

    def close(self, *, empty: bool) -> None:
        """Let go of the file.

        Args:
            empty: nothing is left behind: every process has ended.
        """
        if empty and self._fd >= 0:
            os.ftruncate(self._fd, 0)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> dict[str, bytes]:
        """The last word on each fact, as it was written."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        facts: dict[str, bytes] = {}
        header = _decoded(lines[0])
        if not isinstance(header, Mapping) or header.get("boot") != self._boot:
            return {}
        if header.get("journal") != VERSION:
            raise StateError(
                f"{self._path} says what runs, but is of version {header.get('journal')}, and this asyncsup "
                f"knows {VERSION}; start the asyncsup that wrote it",
                code="state.version",
            )
        for line in lines[1:]:
            try:
                key, text = _LINE.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue  # cut off
            facts[key] = bytes(text)
        return facts

    def _append(self, line: bytes) -> None:
        if self._failed or self._size + len(line) > self._limit:
            self._rewrite()
            return
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            self._complain(error)
            return
        self._size += written
        if written < len(line):
            self._complain(OSError("no space for a whole line"))

    def _rewrite(self) -> None:
        """A new file with what is true now, in place of the old one."""
        content = orjson.dumps({"journal": VERSION, "boot": self._boot}) + b"\n"
        content += b"".join(_line(key, text) for key, text in self._facts.items())
        fresh = self._path.with_name(f"{self._path.name}.new")
        fd = -1
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            fresh.replace(self._path)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            with contextlib.suppress(OSError):
                fresh.unlink()
            self._complain(error)
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size, self._failed = fd, len(content), False
        self._limit = max(SMALLEST_COMPACTION, 4 * len(content))

    def _complain(self, error: OSError) -> None:
        """Supervising goes on without it: only a crash at this very time would show."""
        if not self._failed:
            log.error(
                "%s cannot be written (%s): should the supervisor crash before it can, instances would be "
                "started a second time",
                self._path,
                error.strerror or error,
            )
        self._failed = True


def _line(key: str, text: bytes) -> bytes:
    return b"[%b,%b]\n" % (orjson.dumps(key), text)


def _encoded(value: object) -> bytes:
    return orjson.dumps(value, default=asdict)


def _decoded(line: bytes) -> Any:
    """None for what was cut off, and for a fact that was forgotten."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
