"""The event stream: everything that happens, numbered without gaps, kept for a while, published.

A client takes a snapshot (`status` carries the sequence number it is true for), follows the PUB socket from
there, and asks `events.since` when a number is missing.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from target_sdk.protocol import Notification

KEPT_EVENTS: Final = 10_000
"""How far back `events.since` can go."""


def timestamp() -> str:
    """Now, as RFC 3339 in UTC with milliseconds: for people, never for measuring."""
    second, milliseconds = divmod(time.time_ns() // 10**6, 1000)
    return f"{_in_utc(second)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=1)
def _in_utc(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class EventStream:
    """Numbers events and hands them to `publish` as ``(topic, frame)``, in the next turn of the event loop:
    whoever has something to tell, a crash for one, has something to do about it first.
    """

    def __init__(self, publish: Callable[[bytes, bytes], None]) -> None:
        self._publish = publish
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._unpublished: list[dict[str, Any]] = []
        self._loop = asyncio.get_running_loop()
        self.seq = 0

    def emit(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.seq += 1
        event = {"seq": self.seq, "at": timestamp(), "type": kind, **fields}
        self._kept.append(event)
        if not self._unpublished:
            self._loop.call_soon(self.flush)
        self._unpublished.append(event)
        return event

    def flush(self) -> None:
        """Publish what is not published yet."""
        unpublished, self._unpublished = self._unpublished, []
        for event in unpublished:
            self._publish(event["type"].encode(), Notification(method="event", params=event).encode())

    def since(self, seq: int) -> tuple[list[dict[str, Any]], int]:
        """Events after ``seq`` and the oldest number still kept."""
        oldest = self.seq - len(self._kept) + 1
        skip = max(0, seq + 1 - oldest)
        return [event for index, event in enumerate(self._kept) if index >= skip], oldest
