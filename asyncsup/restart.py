"""What the end of a process means, and when to try again. Pure: the clock is passed in.

A process that had become ready and stayed up for ``min_uptime`` is started again at once; one that ended
earlier waits ``restart_delay``, then twice that, and so on up to ``restart_max_delay``. More than
``start_limit_burst`` restarts within ``start_limit_interval`` end in `GAVE_UP`, as with systemd's
``StartLimitBurst``.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from asyncsup.lifecycle import Event

if TYPE_CHECKING:
    from asyncsup.config import TargetConfig

RestartMode = Literal["always", "on-failure", "unless-stopped", "never"]


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended: an exit status, or the signal that killed it; neither, when nobody has seen it."""

    status: int | None = None
    signal: int | None = None

    @classmethod
    def from_wait_status(cls, status: int) -> Exit:
        """From the status as wait(2) has it."""
        number = status & 0x7F
        return cls(signal=number) if number else cls(status=status >> 8 & 0xFF)

    def __str__(self) -> str:
        if self.status is None and self.signal is None:
            return "ended unseen (exit status unknown)"
        if self.signal is None:
            return f"exit status {self.status}"
        try:
            return f"killed by {signal.Signals(self.signal).name}"
        except ValueError:
            return f"killed by signal {self.signal}"


class LastExit(msgspec.Struct, frozen=True, kw_only=True):
    """How the last process of an instance ended, as people and the next supervisor are told.

    Attributes:
        ended: or why there was no process.
        at: timestamp.
        reason: for people.
    """

    ended: Exit | str
    at: str
    reason: str
    out_of_memory: bool = False

    @property
    def exit_status(self) -> int:
        """As a shell would report it: 128 and the signal for a process that was killed."""
        if not isinstance(self.ended, Exit) or self.ended == Exit():
            return 1
        return 128 + self.ended.signal if self.ended.signal is not None else self.ended.status or 0

    def to_json(self) -> dict[str, Any]:
        ended = self.ended
        how: dict[str, Any] = {}
        if isinstance(ended, Exit):
            how = {"status": ended.status} if ended.signal is None else {"signal": ended.signal}
        if self.out_of_memory:
            how["out_of_memory"] = True
        return {**how, "at": self.at, "reason": self.reason}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LastExit:
        reason = str(value["reason"])
        how = {name: value[name] for name in ("status", "signal") if name in value}
        out_of_memory = bool(value.get("out_of_memory"))
        ended = Exit(**how) if how else reason
        return cls(ended=ended, at=str(value["at"]), reason=reason, out_of_memory=out_of_memory)


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When to start again; durations in seconds."""

    mode: RestartMode
    delay: float
    max_delay: float
    burst: int
    interval: float
    min_uptime: float
    success_exit_codes: tuple[int, ...]

    @classmethod
    def of(cls, config: TargetConfig) -> RestartPolicy:
        return cls(
            mode=config.restart,
            delay=config.restart_delay,
            max_delay=config.restart_max_delay,
            burst=config.start_limit_burst,
            interval=config.start_limit_interval,
            min_uptime=config.min_uptime,
            success_exit_codes=config.success_exit_codes,
        )

    def is_success(self, ended: Exit) -> bool:
        return ended.status in self.success_exit_codes


class RestartHistory(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy remembers: early ends in a row, and the times of recent restarts (monotonic)."""

    early_ends: int = 0
    restarts: tuple[float, ...] = ()


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    event: Event
    history: RestartHistory
    delay: float = 0.0
    reason: str


def decide(
    policy: RestartPolicy,
    history: RestartHistory,
    *,
    ended: Exit | str,
    uptime: float | None,
    now: float,
) -> Decision:
    """Decide what follows the end of a process.

    Args:
        ended: how it ended, or why it could not be spawned or had to be killed.
        uptime: seconds since it became ready, None when it never did.
        now: monotonic time.
    """
    success = isinstance(ended, Exit) and policy.is_success(ended)
    if policy.mode == "never" or (policy.mode == "on-failure" and success):
        event = Event.ENDED if success else Event.GAVE_UP
        return Decision(event=event, history=RestartHistory(), reason=str(ended))
    recent = tuple(at for at in history.restarts if now - at < policy.interval)
    if len(recent) >= policy.burst:
        return Decision(
            event=Event.GAVE_UP,
            history=RestartHistory(),
            reason=f"{ended}; gave up after {len(recent)} restarts within {policy.interval:g} s",
        )
    recent = (*recent, now)
    if uptime is not None and uptime >= policy.min_uptime:
        return Decision(event=Event.RESPAWN, history=RestartHistory(restarts=recent), reason=str(ended))
    early = history.early_ends + 1
    # The exponent is capped because 2.0**1024 overflows, long after the ceiling was reached.
    delay = min(policy.delay * 2.0 ** min(early - 1, 64), policy.max_delay)
    return Decision(
        event=Event.CRASHED,
        history=RestartHistory(early_ends=early, restarts=recent),
        delay=delay,
        reason=f"{ended}; trying again in {delay:g} s",
    )
