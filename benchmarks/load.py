"""A load at a fixed rate on one HTTP service, and every way in which a request of it can fail.

    python benchmarks/load.py URL [--mode new | keep-alive | websocket] [--rate 200] [--seconds 10] [--json]

The load is open: each request has a time at which it is due, whatever became of those before it, and its
latency counts from that time; so a service that stands still is charged for every request it kept waiting.
Slow requests in flight are a URL that is slow, in mode `new` or `keep-alive`. In mode `websocket` each
request is one message that the service has to send back.

Only asyncio, in one thread: some hundred requests a second cost a small part of a core. As a library: `Load`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import math
import os
import select
import ssl
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from types import TracebackType
from typing import Final, Literal, Self
from urllib.parse import urlsplit

Mode = Literal["new", "keep-alive", "websocket"]
MODES: Final[tuple[Mode, ...]] = ("new", "keep-alive", "websocket")

MAX_HEAD: Final = 1 << 16
GOODBYES: Final = frozenset({1000, 1001, 1012})
"""Codes with which a websocket is closed politely: normal, going away, service restart."""


class Outcome(StrEnum):
    OK = "ok"
    REFUSED = "refused"
    RESET = "reset"
    CLOSED = "closed"
    """Closed without a byte of an answer, on a connection that was new."""
    STALE = "stale"
    """Reset or closed without a byte of an answer, on a connection that had been idle."""
    TRUNCATED = "truncated"
    """Closed or reset in the middle of an answer."""
    SERVER_ERROR = "5xx"
    TIMEOUT = "timeout"
    WRONG = "wrong"
    """Another status than 2xx or 5xx, no HTTP, another message than was sent, a websocket closed as wrong."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request; times are seconds of `time.monotonic`."""

    due: float
    ended: float
    outcome: Outcome
    resent: bool = False

    @property
    def latency(self) -> float:
        return self.ended - self.due


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What happened to the requests due in some time; latencies are milliseconds, of those answered."""

    requests: int
    failed: int
    outcomes: dict[str, int]
    p50: float
    p99: float
    max: float
    gap: float
    """The longest time without a successful answer (milliseconds)."""
    resent: int
    """Websocket messages that crossed a polite goodbye: no failure, the client sent them again elsewhere."""


class Results:
    """What a load has measured. `between` looks at a part of its time: a restart, or the time without one."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = sorted(samples, key=lambda sample: sample.due)

    def between(self, start: float = -math.inf, end: float = math.inf) -> Summary:
        chosen = [sample for sample in self.samples if start <= sample.due < end]
        answered = [sample for sample in chosen if sample.outcome is Outcome.OK]
        latencies = sorted(sample.latency * 1000 for sample in answered)
        outcomes = Counter(sample.outcome.value for sample in chosen)
        return Summary(
            requests=len(chosen),
            failed=len(chosen) - len(answered),
            outcomes=dict(outcomes),
            p50=_quantile(latencies, 0.5),
            p99=_quantile(latencies, 0.99),
            max=latencies[-1] if latencies else math.nan,
            gap=self._longest_gap(chosen),
            resent=sum(sample.resent for sample in chosen),
        )

    def _longest_gap(self, chosen: Sequence[Sample]) -> float:
        if not chosen:
            return math.nan
        successes = sorted(sample.ended for sample in self.samples if sample.outcome is Outcome.OK)
        # From the last success before these requests to the first one after them.
        first = chosen[0].due
        begin = max((at for at in successes if at <= first), default=first)
        last = max(chosen[-1].due, begin)
        stop = next((at for at in successes if at > last), max(sample.ended for sample in chosen))
        inside = [begin, *(at for at in successes if begin < at < stop), stop]
        return max(later - earlier for earlier, later in itertools.pairwise(inside)) * 1000


class Load:
    """Use as a context manager: requests are made while it is entered, in a thread of their own.

    Args:
        rate: requests a second.
        connections: how many connections are kept (`keep-alive`, `websocket`), used one after the other: each
            is idle for ``connections / rate`` seconds. More are opened while all are busy.
        timeout: seconds from the start of a request after which it has failed.
    """

    def __init__(
        self,
        url: str,
        *,
        mode: Mode = "new",
        rate: float = 200.0,
        connections: int = 20,
        timeout: float = 10.0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate!r}")
        self._place = Place.of(url)
        self._mode = mode
        self._rate = rate
        self._pool: deque[Connection] = deque()
        self._connections = connections
        self._timeout = timeout
        self._samples: list[Sample] = []
        self._under_way = 0
        self.most_open = 0
        """The most connections that were open at one time."""
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    @property
    def results(self) -> Results:
        """What has ended so far; complete once the load is left."""
        return Results(list(self._samples))

    def _run(self) -> None:
        try:
            asyncio.run(self._make_requests())
        except BaseException as error:
            self._failure = error

    async def _make_requests(self) -> None:
        start = time.monotonic()
        number = 0
        running: set[asyncio.Task[None]] = set()
        while not self._stop.is_set():
            due = start + number / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            number += 1
            task = asyncio.create_task(self._measure(due, number))
            running.add(task)
            task.add_done_callback(running.discard)
        if running:
            await asyncio.gather(*running)
        for connection in self._pool:
            connection.close()

    async def _measure(self, due: float, number: int) -> None:
        attempt = Attempt()
        self._under_way += 1
        try:
            async with asyncio.timeout(self._timeout):
                await self._request(attempt, number)
                outcome = Outcome.OK
        except TimeoutError:
            outcome = Outcome.TIMEOUT
        except RequestError as error:
            outcome = error.outcome
        except OSError as error:
            outcome = attempt.outcome_of(error)
        except asyncio.IncompleteReadError:
            outcome = attempt.outcome_of(None)
        except asyncio.LimitOverrunError:
            outcome = Outcome.WRONG
        finally:
            self._under_way -= 1
        if outcome is not Outcome.OK and attempt.connection is not None:
            attempt.connection.close()
        self._samples.append(Sample(due, time.monotonic(), outcome, attempt.resent))

    async def _request(self, attempt: Attempt, number: int) -> None:
        connection = await self._connection(attempt)
        if self._mode == "websocket":
            message = f"message {number}".encode()
            while not await connection.echo(message):
                attempt.resent = True
                connection.close()
                connection = await self._connection(attempt)
            keep = True
        else:
            keep = await connection.get(attempt, keep_alive=self._mode == "keep-alive")
        if keep and len(self._pool) < self._connections:
            self._pool.append(connection)
        else:
            connection.close()

    async def _connection(self, attempt: Attempt) -> Connection:
        """The one that was idle longest, once there are as many as there should be; else a new one."""
        if self._mode != "new":
            # A client sees that an idle connection was closed, and opens another one: no failure.
            for idle in [idle for idle in self._pool if idle.closed]:
                self._pool.remove(idle)
                idle.close()
            if len(self._pool) >= self._connections:
                attempt.connection = self._pool.popleft()
                attempt.reused = True
                return attempt.connection
        self.most_open = max(self.most_open, len(self._pool) + self._under_way)
        attempt.connection = Connection(self._place)
        await attempt.connection.open(websocket=self._mode == "websocket", attempt=attempt)
        return attempt.connection


class RequestError(Exception):
    """The service answered, and it was no success."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


class Attempt:
    """How far one request has got: what the end of its connection means depends on that."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.reused = False
        self.answering = False
        """Part of an answer has come."""
        self.resent = False

    def outcome_of(self, error: OSError | None) -> Outcome:
        """None: the connection was closed in the regular way."""
        if isinstance(error, ConnectionRefusedError):
            return Outcome.REFUSED
        if self.answering:
            return Outcome.TRUNCATED
        if self.reused:
            return Outcome.STALE
        return Outcome.CLOSED if error is None else Outcome.RESET


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where requests go."""

    host: str
    port: int
    tls: bool
    path: str

    @classmethod
    def of(cls, url: str) -> Place:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https", "ws", "wss"} or not parts.hostname:
            raise ValueError(f"not a URL of http, https, ws or wss: {url!r}")
        tls = parts.scheme in {"https", "wss"}
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(host=parts.hostname, port=parts.port or (443 if tls else 80), tls=tls, path=path)


class Connection:
    """One connection of a client, for HTTP/1.1 or a websocket."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._frame: asyncio.Task[tuple[int, bytes]] | None = None
        """The next frame of a websocket: always waited for, because a goodbye may come at any time."""

    async def open(self, *, websocket: bool, attempt: Attempt) -> None:
        place = self._place
        self._reader, self._writer = await asyncio.open_connection(
            place.host, place.port, ssl=ssl.create_default_context() if place.tls else None, limit=MAX_HEAD
        )
        if websocket:
            key = base64.b64encode(os.urandom(16)).decode()
            await self._ask(
                "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
                f"Sec-WebSocket-Key: {key}",
            )  # fmt: skip
            status, _ = await self._head(attempt)
            if status != 101:
                raise RequestError(Outcome.SERVER_ERROR if status >= 500 else Outcome.WRONG)
            attempt.answering = False
            self._frame = asyncio.create_task(self._next_frame())

    @property
    def closed(self) -> bool:
        """Whether the service closed it, or said goodbye on it, while it was idle."""
        if self._frame is not None:
            return self._frame.done()
        assert self._reader is not None and self._writer is not None
        if self._reader.at_eof() or self._reader.exception() is not None or self._writer.is_closing():
            return True
        if self._place.tls:
            return False  # what can be read may be a session ticket
        # The loop may not have come to it yet; nothing is due on an idle connection but its end.
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        if self._frame is not None:
            self._frame.cancel()
            if self._frame.done() and not self._frame.cancelled():
                self._frame.exception()  # seen: nothing to tell about
        if self._writer is not None:
            self._writer.close()

    async def get(self, attempt: Attempt, *, keep_alive: bool) -> bool:
        """One request; returns whether the connection can be used again."""
        await self._ask("Connection: keep-alive" if keep_alive else "Connection: close")
        status, headers = await self._head(attempt)
        to_the_end = await self._skip_body(headers)
        if status >= 500:
            raise RequestError(Outcome.SERVER_ERROR)
        if not 200 <= status < 300:
            raise RequestError(Outcome.WRONG)
        return keep_alive and not to_the_end and "close" not in headers.get("connection", "").lower()

    async def echo(self, message: bytes) -> bool:
        """One message there and back; False if the service said goodbye instead."""
        assert self._writer is not None and self._frame is not None
        self._writer.write(_frame(0x1, message))
        kind, content = await self._frame
        if kind == 0x8:
            if int.from_bytes(content[:2]) in GOODBYES:
                return False
            raise RequestError(Outcome.WRONG)
        if kind != 0x1 or content != message:
            raise RequestError(Outcome.WRONG)
        self._frame = asyncio.create_task(self._next_frame())
        return True

    async def _ask(self, *headers: str) -> None:
        assert self._writer is not None
        host = f"[{self._place.host}]" if ":" in self._place.host else self._place.host
        lines = [f"GET {self._place.path} HTTP/1.1", f"Host: {host}:{self._place.port}", *headers, "", ""]
        self._writer.write("\r\n".join(lines).encode("ascii"))
        await self._writer.drain()

    async def _head(self, attempt: Attempt) -> tuple[int, dict[str, str]]:
        assert self._reader is not None
        first = await self._reader.readexactly(1)
        attempt.answering = True
        head = (first + await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head.rstrip("\r\n").split("\r\n")
        parts = line.split(" ", 2)
        if not parts[0].startswith("HTTP/1.") or len(parts) < 2 or not parts[1].isdecimal():
            raise RequestError(Outcome.WRONG)
        pairs = (header.partition(":") for header in rest)
        return int(parts[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}

    async def _skip_body(self, headers: dict[str, str]) -> bool:
        """Read the body; returns whether only the end of the connection ended it."""
        assert self._reader is not None
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                await self._reader.readexactly(size + 2)
            while await self._reader.readuntil(b"\r\n") != b"\r\n":
                pass
            return False
        if "content-length" in headers:
            await self._reader.readexactly(int(headers["content-length"]))
            return False
        await self._reader.read(-1)
        return True

    async def _next_frame(self) -> tuple[int, bytes]:
        """The next frame that is no ping or pong: its opcode and content."""
        assert self._reader is not None and self._writer is not None
        while True:
            first = await self._reader.readexactly(1)
            try:
                size = (await self._reader.readexactly(1))[0] & 0x7F
                if size >= 126:
                    size = int.from_bytes(await self._reader.readexactly(2 if size == 126 else 8))
                content = await self._reader.readexactly(size)
            except (OSError, asyncio.IncompleteReadError):
                raise RequestError(Outcome.TRUNCATED) from None
            kind = first[0] & 0x0F
            if kind == 0x9:
                self._writer.write(_frame(0xA, content))
            elif kind != 0xA:
                return kind, content


def _frame(kind: int, content: bytes) -> bytes:
    """A masked websocket frame, of a client and at most 125 bytes long."""
    mask = os.urandom(4)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(content))
    return bytes([0x80 | kind, 0x80 | len(content)]) + mask + masked


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 1 if any request has failed."""
    parser = argparse.ArgumentParser(description="A load at a fixed rate, and how its requests fail.")
    parser.add_argument("url")
    parser.add_argument("--mode", choices=MODES, default="new")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second (default: 200)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for how long (default: 10)")
    parser.add_argument("--connections", type=int, default=20, help="connections kept (default: 20)")
    parser.add_argument(
        "--timeout", type=float, default=10.0, help="of one request, in seconds (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with (
        contextlib.suppress(KeyboardInterrupt),
        Load(
            options.url, mode=options.mode, rate=options.rate, connections=options.connections,
            timeout=options.timeout,
        ) as load,
    ):  # fmt: skip
        time.sleep(options.seconds)
    summary = load.results.between()
    if options.json:
        print(json.dumps(asdict(summary)))
    else:
        failures = {name: count for name, count in summary.outcomes.items() if name != Outcome.OK}
        told = ", ".join(f"{count} {name}" for name, count in failures.items())
        print(f"{summary.requests} requests, {summary.failed} failed" + (f": {told}" if told else ""))
        print(f"p50 {summary.p50:.1f} ms, p99 {summary.p99:.1f} ms, max {summary.max:.1f} ms")
        print(f"longest time without a success {summary.gap:.1f} ms")
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
