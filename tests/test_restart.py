"""What an exit means, and when to try again."""

from __future__ import annotations

import signal

import pytest
from msgspec.structs import replace

from asyncsup.lifecycle import Event
from asyncsup.restart import Exit, RestartHistory, RestartPolicy, decide

POLICY = RestartPolicy(
    mode="on-failure",
    delay=1.0,
    max_delay=8.0,
    burst=100,
    interval=60.0,
    min_uptime=1.0,
    success_exit_codes=(0, 3),
)
CRASH, DONE = Exit(status=1), Exit(status=0)


@pytest.mark.parametrize(
    ("mode", "ended", "event"),
    [
        ("always", DONE, Event.RESPAWN),
        ("always", CRASH, Event.RESPAWN),
        ("unless-stopped", DONE, Event.RESPAWN),
        ("unless-stopped", CRASH, Event.RESPAWN),
        ("on-failure", DONE, Event.ENDED),
        ("on-failure", Exit(status=3), Event.ENDED),
        ("on-failure", CRASH, Event.RESPAWN),
        ("on-failure", Exit(signal=signal.SIGTERM), Event.RESPAWN),
        ("never", DONE, Event.ENDED),
        ("never", CRASH, Event.GAVE_UP),
    ],
)
def test_policy_after_a_long_run(mode: str, ended: Exit, event: Event) -> None:
    policy = replace(POLICY, mode=mode)
    assert decide(policy, RestartHistory(), ended=ended, uptime=100.0, now=1000.0).event is event


def test_early_ends_back_off_exponentially_up_to_the_ceiling() -> None:
    history, delays = RestartHistory(), []
    for attempt in range(6):
        decision = decide(POLICY, history, ended=CRASH, uptime=0.2, now=float(attempt))
        assert decision.event is Event.CRASHED
        history = decision.history
        delays.append(decision.delay)
    assert delays == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_process_that_never_became_ready_ended_early() -> None:
    assert decide(POLICY, RestartHistory(), ended=CRASH, uptime=None, now=0.0).event is Event.CRASHED


def test_a_good_run_resets_the_back_off() -> None:
    history = RestartHistory(early_ends=5)
    decision = decide(POLICY, history, ended=CRASH, uptime=1.0, now=50.0)
    assert decision.event is Event.RESPAWN
    assert decision.delay == 0
    assert decision.history.early_ends == 0


def test_the_start_limit_gives_up_and_says_how_often_it_tried() -> None:
    policy, history = replace(POLICY, burst=3), RestartHistory()
    for attempt in range(3):
        decision = decide(policy, history, ended=CRASH, uptime=5.0, now=float(attempt))
        assert decision.event is Event.RESPAWN
        history = decision.history
    decision = decide(policy, history, ended=CRASH, uptime=5.0, now=3.0)
    assert decision.event is Event.GAVE_UP
    assert "3 restarts within 60 s" in decision.reason
    assert decision.history == RestartHistory()


def test_restarts_outside_the_interval_do_not_count() -> None:
    policy = replace(POLICY, burst=1)
    history = RestartHistory(restarts=(0.0,))
    assert decide(policy, history, ended=CRASH, uptime=5.0, now=59.0).event is Event.GAVE_UP
    assert decide(policy, history, ended=CRASH, uptime=5.0, now=60.0).event is Event.RESPAWN


def test_a_clock_that_has_moved_a_lot_does_not_overflow() -> None:
    history = RestartHistory(early_ends=100_000)
    assert decide(POLICY, history, ended="no such file", uptime=None, now=1e12).delay == 8.0


def test_an_exit_reads_as_an_operator_would_say_it() -> None:
    assert str(Exit(status=7)) == "exit status 7"
    assert str(Exit(signal=9)) == "killed by SIGKILL"
    assert str(Exit(signal=63)) == "killed by signal 63"
