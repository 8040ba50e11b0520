"""Cron expressions: when something is due, in local time.

Wall-clock time, on purpose: "every night at three" means what the clock on the wall says. Where summer time
begins or ends, it is as with Debian's cron: what has an hour and a minute of its own is due once that day, at
the change if the clock skips it and the first time if it comes twice; what has an asterisk for one of them
goes by the time that really passes. The clock is looked at again at least once a minute, so one that is set
moves what is due along; what was missed meanwhile is due once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

LOOK_AGAIN_SECONDS: Final = 60.0
MOST_BACK: Final = timedelta(hours=1)


class LocalZone(tzinfo):
    """The zone of the C library with its rules: ``astimezone()`` knows but the offset of one moment.

    Of whatever names a zone (``TZ`` as a name, a path or a rule, ``/etc/localtime``, nothing at all) the C
    library makes what every other program shows, also where there are no zone files for `zoneinfo`.
    """

    def utcoffset(self, dt: datetime | None) -> timedelta | None:
        if dt is None:
            return None
        wall = dt.replace(tzinfo=None, microsecond=0)
        return wall - datetime.fromtimestamp(wall.timestamp(), UTC).replace(tzinfo=None)

    def fromutc(self, dt: datetime) -> datetime:
        # In whole seconds: a float has no room for all the digits of a date with its fraction.
        wall = datetime.fromtimestamp(int(dt.replace(tzinfo=UTC, microsecond=0).timestamp()))
        return wall.replace(microsecond=dt.microsecond, tzinfo=self)

    def dst(self, dt: datetime | None) -> timedelta | None:
        return None

    def tzname(self, dt: datetime | None) -> str | None:
        return None


LOCAL_ZONE: Final = LocalZone()


def next_time(expression: str, after: datetime) -> datetime | None:
    """The first time after ``after`` that fits; None when none ever does (the 30th of February).

    In UTC: two times of one zone are compared by the wall, on which an hour comes twice in autumn.
    """
    from cronsim import CronSim  # noqa: PLC0415 - only where something has a schedule

    begin = after.astimezone(UTC)
    # In the second of two such hours it begins with what was due in the first.
    fitting = (time.astimezone(UTC) for time in CronSim(expression, after))
    return next((time for time in fitting if time > begin), None)


def local_now() -> datetime:
    return datetime.now(LOCAL_ZONE)


async def keep(
    expressions: Mapping[str, str],
    due: Callable[[str], None],
    *,
    now: Callable[[], datetime] = local_now,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Call ``due`` with the name of each expression at each of its times, until cancelled."""
    seen = now()
    while True:
        times = {name: time for name, text in expressions.items() if (time := next_time(text, seen))}
        moment = now().astimezone(UTC)
        remaining = [(time - moment).total_seconds() for time in times.values()]
        await sleep(max(0.0, min([LOOK_AGAIN_SECONDS, *remaining])))
        local = now()
        moment = local.astimezone(UTC)
        for name, time in times.items():
            if time <= moment:
                due(name)
        # A clock that is put right makes nothing due twice; one that was an hour or more ahead was wrong
        # altogether.
        back = seen.astimezone(UTC) - moment
        seen = local if back < timedelta(0) or back > MOST_BACK else seen
