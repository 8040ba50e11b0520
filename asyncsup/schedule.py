"""Cron expressions: when something is due, in local time.

Wall-clock time, on purpose: "every night at three" means what the clock on the wall says. It is looked at
again at least once a minute, so a clock that is set, or a change to summer time, moves what is due along;
what was missed meanwhile is due once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Final

LOOK_AGAIN_SECONDS: Final = 60.0
MOST_BACK: Final = timedelta(hours=1)


def next_time(expression: str, after: datetime) -> datetime | None:
    """The first time after ``after`` that fits; None when none ever does (the 30th of February)."""
    from cronsim import CronSim  # noqa: PLC0415 - only where something has a schedule

    return next(CronSim(expression, after), None)


def local_now() -> datetime:
    return datetime.now().astimezone()


async def keep(
    expressions: Mapping[str, str],
    due: Callable[[str], None],
    *,
    now: Callable[[], datetime] = local_now,
) -> None:
    """Call ``due`` with the name of each expression at each of its times, until cancelled."""
    seen = now()
    while True:
        times = {name: time for name, text in expressions.items() if (time := next_time(text, seen))}
        remaining = [(time - now()).total_seconds() for time in times.values()]
        await asyncio.sleep(max(0.0, min([LOOK_AGAIN_SECONDS, *remaining])))
        moment = now()
        for name, time in times.items():
            if time <= moment:
                due(name)
        # Autumn's second hour, and a clock that is put right, make nothing due twice; one that was an hour or
        # more ahead was wrong altogether.
        seen = moment if moment > seen or seen - moment > MOST_BACK else seen
