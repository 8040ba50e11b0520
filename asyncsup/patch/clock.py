"""The latest time this host has seen, so that setting its clock back brings no expired patch back to life."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

SLACK_SECONDS: Final = 300.0
"""How far behind the clock may be: a time server steps it, a virtual machine's host corrects it."""


class SeenClock:
    """Compares the clock with the latest time that was ever seen, and goes on counting from there.

    Args:
        seen: that time, in seconds since the epoch, as it was remembered.
        wall: the clock that somebody can set.
        elapsed: one that nobody can, and that counts while the machine sleeps.
    """

    def __init__(
        self,
        seen: float,
        *,
        wall: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._wall = wall
        self._elapsed = elapsed
        self.trust(max(seen, wall()))

    def trust(self, now: float) -> None:
        """Count on from `now`, whatever was seen before."""
        self._base, self._since = now, self._elapsed()

    def behind(self) -> float | None:
        """The latest time that was seen, when the clock is behind it; None when it may be right."""
        now = self._wall()
        latest = self._base + self._elapsed() - self._since
        if now > latest:
            self.trust(now)
        return latest if now < latest - SLACK_SECONDS else None

    def now(self) -> tuple[datetime, datetime | None]:
        """Now by the clock, and when the clock is behind it the latest time that was seen."""
        behind = self.behind()
        now = datetime.fromtimestamp(self._wall(), UTC)
        return now, None if behind is None else datetime.fromtimestamp(behind, UTC)
