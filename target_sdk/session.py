"""What is said on the target channel, and when. Pure: frames and the time go in, frames and calls come out.

The supervisor may be restarted at any moment, and a message it had accepted but not read is then lost without
a trace. So everything the program reports is a request that stays until it is acknowledged, a new connection
begins with `hello` again (the new ROUTER knows nobody), and everything that is still true is said again.

In the other direction the supervisor repeats a request until it is answered, so a repeat must not run a
handler twice: one in progress is ignored, one that was answered gets the same answer.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from target_sdk.protocol import (
    Failure,
    Hello,
    Notification,
    Params,
    ProtocolError,
    Request,
    RequestId,
    Result,
    decode,
)

RESEND_AFTER: Final = 2.0
"""Seconds without an acknowledgement after which a report is sent again; doubled each time."""

RESEND_MAX: Final = 30.0
REMEMBERED_ANSWERS: Final = 256
PING: Final = "ping"

logger = logging.getLogger("target_sdk")


class Phase(Enum):
    DOWN = auto()
    """No connection."""
    GREETING = auto()
    """`hello` is sent; nothing else is, before it is answered."""
    OPEN = auto()
    REFUSED = auto()
    """The supervisor does not know us. Silent until the next connection; that one may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallKey:
    """Which request an answer belongs to.

    The digest is part of it because a restarted supervisor may count its ids from the beginning again.
    """

    id: RequestId
    digest: bytes


@dataclass(slots=True, kw_only=True)
class _Report:
    """Something the supervisor is to know. ``lasting``: still true after a reconnect, so said again then."""

    method: str
    params: Callable[[], Params]
    lasting: bool
    acknowledged: bool = False
    changed: bool = False
    """Replaced while an older content was on its way: sent as soon as that one is acknowledged."""
    id: int | None = None
    due: float | None = None
    interval: float = RESEND_AFTER


@dataclass(slots=True, kw_only=True)
class _Served:
    """A request of the supervisor. ``connection`` is the one it was last heard on."""

    connection: int
    answer: bytes | None = None


@dataclass(slots=True)
class Session:
    """Both directions of one channel, across any number of connections.

    Args:
        hello: who is speaking, asked anew for each connection (the build may have changed).
    """

    hello: Callable[[], Hello]
    outgoing: deque[bytes] = field(default_factory=deque)
    """Frames to be sent, in order. Emptied by the caller."""
    phase: Phase = Phase.DOWN
    _reports: dict[str, _Report] = field(default_factory=dict)
    _served: dict[CallKey, _Served] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _connection: int = 0

    def connected(self, now: float) -> None:
        """There is a new connection: introduce ourselves."""
        self._connection += 1
        self.phase = Phase.GREETING
        self.outgoing.clear()
        # An answer from before is not a true answer to a supervisor that may have been restarted since.
        self._served = {key: served for key, served in self._served.items() if served.answer is None}
        for report in self._reports.values():
            report.id = report.due = None
            report.interval = RESEND_AFTER
            report.acknowledged = report.acknowledged and not report.lasting
        greeting = _Report(method=Hello.METHOD, params=lambda: self.hello().params(), lasting=True)
        self._reports = {Hello.METHOD: greeting, **_without(self._reports, Hello.METHOD)}
        self._send(greeting, now)

    def disconnected(self) -> None:
        self.phase = Phase.DOWN
        self.outgoing.clear()

    def report(self, method: str, params: Callable[[], Params], *, lasting: bool, now: float) -> None:
        """Tell the supervisor, now or when there is one. The latest report of a method is what counts.

        Never more than one of a method is on its way, so a program that reports in a tight loop costs the
        supervisor one message per round trip.

        Args:
            params: asked at the moment of sending.
            lasting: say it again after a reconnect, although it was acknowledged.
        """
        under_way = self._reports.get(method)
        if under_way is not None and under_way.id is not None and not under_way.acknowledged:
            under_way.params, under_way.lasting, under_way.changed = params, lasting, True
            return
        report = _Report(method=method, params=params, lasting=lasting)
        self._reports = {**_without(self._reports, method), method: report}
        if self.phase is Phase.OPEN:
            self._send(report, now)

    @property
    def settled(self) -> bool:
        """Whether nothing is left that could be sent or acknowledged on this connection."""
        if self.phase in {Phase.DOWN, Phase.REFUSED}:
            return True
        return not self.outgoing and all(report.acknowledged for report in self._reports.values())

    def receive(self, frame: bytes, now: float) -> tuple[CallKey, Request] | None:
        """Take in a frame; return a call that is new. What is not a valid message is dropped."""
        try:
            message = decode(frame)
        except ProtocolError as error:
            logger.debug("dropped a frame of %d bytes: %s", len(frame), error)
            return None
        match message:
            case Request():
                return self._serve(message, frame)
            case Result() | Failure():
                self._acknowledge(message, now)
            case Notification():
                logger.debug("ignored the notification %r", message.method)
        return None

    def answer(self, key: CallKey, answer: Result | Failure) -> None:
        """Answer a call that `receive` returned; on a later connection only if it was repeated there."""
        served = self._served.get(key)
        if served is None or served.answer is not None:
            return
        served.answer = answer.encode()
        if served.connection == self._connection:
            self._send_answer(served.answer)

    @property
    def next_due(self) -> float | None:
        """When `tick` has something to do; None while there is nothing to wait for."""
        return min((report.due for report in self._waiting() if report.due is not None), default=None)

    def tick(self, now: float) -> None:
        """Send again what has waited too long for its acknowledgement."""
        for report in self._waiting():
            if report.due is not None and report.due <= now:
                report.interval = min(report.interval * 2, RESEND_MAX)
                self._send(report, now)

    def _waiting(self) -> list[_Report]:
        if self.phase in {Phase.DOWN, Phase.REFUSED}:
            return []
        return [report for report in self._reports.values() if not report.acknowledged]

    def _send(self, report: _Report, now: float) -> None:
        if report.id is None or report.changed:
            report.id = next(self._ids)
            report.changed = False
        report.due = now + report.interval
        self.outgoing.append(Request(id=report.id, method=report.method, params=report.params()).encode())

    def _acknowledge(self, message: Result | Failure, now: float) -> None:
        report = next(
            (
                r
                for r in self._reports.values()
                if r.id is not None and r.id == message.id and not r.acknowledged
            ),
            None,
        )
        if report is None:
            logger.debug("dropped an answer to %r, which nothing waits for", message.id)
            return
        report.acknowledged = True
        report.due = None
        if report.method != Hello.METHOD:
            if isinstance(message, Failure):
                logger.warning("the supervisor refused %r: %s", report.method, message.message)
            if report.changed:
                report.acknowledged = False
                report.interval = RESEND_AFTER
                self._send(report, now)
            return
        if isinstance(message, Failure):
            self.phase = Phase.REFUSED
            logger.warning("the supervisor refused this program: %s; running on without it", message.message)
            return
        self.phase = Phase.OPEN
        logger.info("known to the supervisor")
        for waiting in self._waiting():
            self._send(waiting, now)

    def _serve(self, request: Request, frame: bytes) -> tuple[CallKey, Request] | None:
        if request.method == PING:
            self._send_answer(Result(id=request.id, result={}).encode())
            return None
        key = CallKey(id=request.id, digest=hashlib.blake2b(frame, digest_size=16).digest())
        served = self._served.get(key)
        if served is None:
            self._served[key] = _Served(connection=self._connection)
            self._forget_oldest()
            return key, request
        served.connection = self._connection
        if served.answer is not None:
            self._send_answer(served.answer)
        return None

    def _send_answer(self, answer: bytes) -> None:
        if self.phase in {Phase.GREETING, Phase.OPEN}:
            self.outgoing.append(answer)

    def _forget_oldest(self) -> None:
        answered = [key for key, served in self._served.items() if served.answer is not None]
        for key in answered[: max(0, len(self._served) - REMEMBERED_ANSWERS)]:
            del self._served[key]


def _without(reports: dict[str, _Report], method: str) -> dict[str, _Report]:
    return {name: report for name, report in reports.items() if name != method}
