"""`asyncsup logs`: what targets have written, what they write, and log files opened anew."""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import math
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, Final

from asyncsup import render
from asyncsup.cli.arguments import names_argument, seconds
from asyncsup.cli.following import follow
from asyncsup.cli.session import QUERY_SECONDS, Session
from asyncsup.cli.verbs import Action
from asyncsup.errors import AsyncsupError, TargetNotFoundError, UsageError
from asyncsup.terminal import Output

FOLLOW_SECONDS: Final = 25.0
"""How long one question for more waits for it. So often it is also looked which instances there are."""
DEFAULT_LINES: Final = 100
BATCH_LINES: Final = 1000
"""So many lines of one instance at most are printed by one write."""
LONGEST_NUMBER: Final = 15


def _arguments(parser: argparse.ArgumentParser) -> None:
    names_argument(parser, "*")
    add = parser.add_argument
    add("-f", "--follow", action="store_true", help="go on with what is written from now on")
    add("-n", "--lines", type=line_count, metavar="N", help="the last N lines (100; with --since all)")
    add(
        "--since",
        type=moment,
        metavar="TIME",
        help="what was written since then: 10m (ago), 2026-11-28T10:00 (local time), @SECONDS",
    )
    add("--stderr", action="store_true", help="the error stream, where it is kept apart")
    add("--reopen", action="store_true", help="print nothing: open the log files anew, after logrotate")


def moment(text: str) -> float:
    """``10m`` (ago), ``2026-11-28T10:00`` (local time unless it says otherwise), ``@1795860000``.

    Returns:
        Seconds since the epoch.
    """
    with contextlib.suppress(ValueError, OverflowError, argparse.ArgumentTypeError):
        if text.startswith("@"):
            found = float(text[1:])
        elif re.match(r"[0-9]{4}-", text):
            found = datetime.fromisoformat(text).timestamp()
        else:
            found = max(0.0, time.time() - seconds(text))
        if found >= 0 and math.isfinite(found):
            return found
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a time: write 10m (ago), 2026-11-28T10:00 (local; with Z or +02:00 of elsewhere), "
        "2026-11-28, or @SECONDS since 1970"
    )


def line_count(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of lines")


def _logs(session: Session) -> int:
    args = session.args
    if args.reopen:
        paths = session.ask("logs.reopen", names=args.names)["paths"]
        session.out.result({"paths": paths}, lambda: [f"opened anew: {path}" for path in paths])
        return 0
    if not args.names:
        raise UsageError("logs: give at least one NAME, or all (try `asyncsup logs --help`)")
    logs = _Logs(session)
    try:
        logs.print_past()
        if args.follow:
            follow(session, logs.follow)
    finally:
        logs.flush()
    return 0


class _Printer:
    """Prints output by the line, each with its instance's name where there are several."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._colours: dict[str, int] = {}
        self._column = 0
        self._partial: dict[tuple[str, str], str] = {}
        self._prefixes: dict[tuple[str, str], str] = {}

    def announce(self, instances: Iterable[str]) -> None:
        """More instances to come. Each has its colour by its name, as far as there are enough."""
        for name in sorted(set(instances) - self._colours.keys()):
            colour = zlib.crc32(name.encode()) % render.NAME_COLOURS
            taken = set(self._colours.values())
            while colour in taken and len(taken) < render.NAME_COLOURS:
                colour = (colour + 1) % render.NAME_COLOURS
            self._colours[name] = colour
            self._column = max(self._column, render.width_of(render.clean(name)))

    def add(self, chunk: Mapping[str, Any]) -> None:
        """A line without its end waits for the rest of it."""
        key = (str(chunk["instance"]), str(chunk.get("stream", "stdout")))
        self._prefixes[key] = str(chunk.get("prefix", ""))
        *lines, rest = (self._partial.pop(key, "") + str(chunk["text"])).split("\n")
        if rest:
            self._partial[key] = rest
        self._print(key, lines)

    def flush(self) -> None:
        for key, rest in self._partial.items():
            self._print(key, [rest])
        self._partial.clear()

    def _print(self, key: tuple[str, str], lines: Sequence[str]) -> None:
        out, (instance, stream) = self._out, key
        if in_file := self._prefixes[key]:
            lines = [line.removeprefix(in_file) for line in lines]
        if out.json_wanted:
            for line in lines:
                out.row({"instance": instance, "stream": stream, "line": line}, list)
            return
        prefix = ""
        if len(self._colours) > 1:
            name = render.clean(instance)
            padding = " " * (self._column - render.width_of(name))
            prefix = out.ink.name(self._colours.get(instance, 0), f"{name}{padding} |") + " "
        # Into a pipe or a file the bytes go as they are; a terminal would act on them.
        shown = [render.clean_log(line, out.ink) for line in lines] if out.is_terminal else lines
        out.raw("".join(f"{prefix}{line}\n" for line in shown))


class _Logs:
    """What `logs` prints: first what there is, then what comes."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._out = session.out
        self._stream = "stderr" if session.args.stderr else "stdout"
        self._printer = _Printer(session.out)
        self._cursors: dict[str, Any] = {}
        self._looked = 0.0

    def print_past(self) -> None:
        args = self._session.args
        lines = args.lines if args.lines is not None or args.since is not None else DEFAULT_LINES
        chunks = self._find(lines=lines, since=args.since)
        if rough := [name for name, chunk in chunks.items() if not chunk.get("exact", True)]:
            where = f"{', '.join(rough[:3])}{', ...' if len(rough) > 3 else ''}"
            self._out.note(
                f"{where}: lines of this log.format have no times: "
                "this is from the beginning of the file written to then"
            )
        # By time where lines have one, else one instance after the other.
        pieces = map(itemgetter(1), heapq.merge(*map(self._past_of, chunks.values()), key=itemgetter(0)))
        for _, some in itertools.groupby(pieces, key=itemgetter("instance")):
            while batch := list(itertools.islice(some, BATCH_LINES)):
                self._printer.add({**batch[0], "text": "".join(piece["text"] for piece in batch)})
            if self._out.closed:
                return

    def follow(self) -> bool:
        """Wait for more and print it; False when there is nobody left who could write any."""
        if not self._cursors:
            return False  # a question about nobody is answered at once
        if time.monotonic() - self._looked > FOLLOW_SECONDS:
            self._look_again()
        try:
            chunks = self._read(list(self._cursors.values()), FOLLOW_SECONDS)
        except AsyncsupError as error:
            if error.error_code != TargetNotFoundError.code:
                raise
            self._look_again()
            return bool(self._cursors)
        for chunk in chunks:
            # Who has just been read is last the next time, if there is too much for one answer.
            self._cursors.pop(chunk["instance"], None)
            self._cursors[chunk["instance"]] = chunk["cursor"]
            self._printer.add(chunk)
        return True

    def flush(self) -> None:
        self._printer.flush()

    def _find(self, **wish: Any) -> dict[str, dict[str, Any]]:
        wanted = {key: value for key, value in wish.items() if value is not None}
        self._looked = time.monotonic()
        chunks: dict[str, dict[str, Any]] = {}
        for name in self._session.args.names:
            for chunk in self._session.ask("logs", name=name, stream=self._stream, **wanted)["chunks"]:
                chunks[chunk["instance"]] = chunk
        self._printer.announce(chunks)
        return chunks

    def _past_of(self, chunk: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Times and lines of an instance's output, up to what there was at first. The last line of an answer
        may go on in the next."""
        time_of_line, left, line = "", chunk.get("left", 0), ""
        while True:
            self._cursors[chunk["instance"]] = chunk["cursor"]
            for line in re.findall(r"[^\n]*\n|[^\n]+", chunk["text"]):
                time_of_line = render.time_of_log(line) or time_of_line
                yield time_of_line, {**chunk, "text": line}
            if left <= 0 or not (chunks := self._read([chunk["cursor"]], 0)):
                break
            (chunk,) = chunks
            left -= chunk["size"]
        if line and not line.endswith("\n") and not self._session.args.follow:
            yield time_of_line, {**chunk, "text": "\n"}

    def _read(self, cursors: list[Any], timeout: float) -> list[dict[str, Any]]:
        wish = {"cursors": cursors, "timeout": timeout}
        answer = self._session.client.call("logs.follow", wish, timeout=timeout + QUERY_SECONDS)
        for chunk in answer["chunks"]:
            if chunk.get("gap"):
                self._out.note(f"{chunk['instance']}: some output was rotated away before it was read")
        return list(answer["chunks"])

    def _look_again(self) -> None:
        """Instances come and go: with `scale`, with the configuration."""
        try:
            chunks = self._find(lines=DEFAULT_LINES)
        except AsyncsupError as error:
            if error.error_code != TargetNotFoundError.code:
                raise
            chunks = {}
        for name in self._cursors.keys() - chunks.keys():
            self._out.note(f"{name} is gone")
            del self._cursors[name]
        for name in chunks.keys() - self._cursors.keys():
            self._cursors[name] = chunks[name]["cursor"]
            self._printer.add(chunks[name])


LOGS = Action(_logs, _arguments)
