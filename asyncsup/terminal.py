"""Where the command line and the console write to: text or JSON, colour or not, a terminal or a pipe.

One place decides what ``--json``, ``--quiet``, ``NO_COLOR`` and a reader that goes away (`asyncsup events |
head`) mean. Light: it is on the way of `asyncsup status`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TextIO

from asyncsup.errors import AsyncsupError
from asyncsup.render import Ink, clean, progress
from asyncsup.rpc import exit_status_of

BAR_INTERVAL_SECONDS: Final = 0.1


class Output:
    """Writes results to stdout and everything else to stderr.

    Args:
        json_wanted: results and errors as JSON; no text on stdout at all.
        color: None: where there is a terminal that wants it.
        quiet: no text but errors; the exit status says the rest.
    """

    def __init__(
        self,
        *,
        json_wanted: bool = False,
        color: bool | None = None,
        quiet: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        self.json_wanted = json_wanted
        self.quiet = quiet
        self.closed = False
        """The reader of stdout has gone; whoever writes for ever should stop."""
        self.failed = False
        """Something could not be written to stdout, and stderr says why."""
        self._stdout = sys.stdout if stdout is None else stdout
        self._stderr = sys.stderr if stderr is None else stderr
        self.is_terminal = self._stdout.isatty()
        if color is None:
            color = self.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.ink = Ink(color)
        self._bar = ""
        self._bar_drawn = 0.0

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None when lines are not to be cut."""
        if not self.is_terminal:
            return None
        try:
            return os.get_terminal_size(self._stdout.fileno()).columns or 80
        except OSError:
            return 80

    @property
    def is_live(self) -> bool:
        """Somebody may want to read along."""
        return not (self.json_wanted or self.quiet)

    def lines(self, lines: Iterable[str]) -> None:
        """Text for people; nothing with ``--json`` or ``--quiet``."""
        if self.is_live:
            self._write("".join(f"{line}\n" for line in lines))

    def result(self, value: Any, render: Callable[[], Iterable[str]]) -> None:
        """The answer to what was asked: as JSON, or as the lines of ``render``."""
        if self.json_wanted:
            self._write(json.dumps(value, indent=2) + "\n")
        else:
            self.lines(render())

    def row(self, value: Mapping[str, Any], render: Callable[[], Iterable[str]]) -> None:
        """One of many: as JSON on one line, or as the lines of ``render``."""
        if self.json_wanted:
            self._write(json.dumps(value, separators=(",", ":")) + "\n")
        else:
            self.lines(render())

    def raw(self, text: str) -> None:
        """Text that is the result itself, such as a log: written as it is."""
        if self.is_live:
            self._write(text)

    def verbatim(self, text: str) -> None:
        """A result that is JSON already, and has one form only."""
        if not self.quiet:
            self._write(text)

    def note(self, text: str) -> None:
        """A remark on stderr."""
        if not self.quiet:
            self._complain(text)

    def error(self, error: AsyncsupError) -> int:
        """Report an error in every form that was asked for; returns the exit status."""
        self._complain(error.message)
        if self.json_wanted:
            details = {"code": error.error_code, "message": error.message}
            value = {"error": {**error.details, **details, "exit_status": exit_status_of(error)}}
            self._write(json.dumps(value, indent=2, default=str) + "\n")
        return exit_status_of(error)

    def bar(self, done: int, total: int) -> None:
        """Draw a progress bar over the last one; only where there is a terminal to draw on."""
        now = time.monotonic()
        if not (self.is_terminal and self.is_live) or (done < total and now < self._bar_drawn):
            return
        self._bar_drawn = now + BAR_INTERVAL_SECONDS
        self._bar = progress(done, total, (self.width or 80) - 1)
        self._put(f"\r{self._bar}\x1b[K")

    def counter(self, total: int) -> Callable[[int], None]:
        """A progress bar for those who say how much more is done, not how much in all."""
        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            self.bar(min(done, total), total)

        return add

    def clear_bar(self) -> None:
        if self._bar:
            self._bar = ""
            self._put("\r\x1b[K")
        self._bar_drawn = 0.0

    def flush(self) -> None:
        """Have what others wrote to stdout (argparse its help) leave now, quietly when nobody reads it."""
        self._put("")

    def _write(self, text: str) -> None:
        self.clear_bar()
        self._put(text)

    def _put(self, text: str) -> None:
        if self.closed:
            return
        try:
            self._stdout.write(text)
            self._stdout.flush()
        except OSError as error:
            self.closed = True
            # What is still buffered must go somewhere, or the interpreter complains about it at its end.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stdout.fileno())
            os.close(null)
            if not isinstance(error, BrokenPipeError):
                # What was asked for goes on: a patch is not given up because its transcript has no room.
                self.failed = True
                self._complain(f"standard output: {error.strerror}")

    def _complain(self, text: str) -> None:
        self.clear_bar()
        try:
            for line in text.splitlines() or [""]:
                self._stderr.write(f"asyncsup: {clean(line)}\n")
            self._stderr.flush()
        except OSError:
            pass  # there is nobody left to tell; the exit status says it
