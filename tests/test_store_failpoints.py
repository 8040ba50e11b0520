"""Failpoints do what the environment says, at the point it names, and nothing otherwise."""

from __future__ import annotations

import os
import signal
import time

import pytest

from asyncsup import failpoints
from asyncsup.failpoints import failpoint


@pytest.fixture(autouse=True)
def no_points_passed_yet() -> None:
    failpoints._passed.clear()


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    failpoint("any.point")


def test_an_error_is_raised_at_its_point_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "one.point:error, other.point:error")
    failpoint("third.point")
    for name in ("one.point", "other.point"):
        with pytest.raises(OSError, match=name):
            failpoint(name)


def test_a_count_means_that_passage_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "one.point:error:3")
    failpoint("one.point")
    failpoint("one.point")
    with pytest.raises(OSError, match="Input/output"):
        failpoint("one.point")
    failpoint("one.point")


def test_trace_names_every_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "*:trace")
    failpoint("one.point")
    failpoint("other.point")
    assert capsys.readouterr().err == "one.point\nother.point\n"


@pytest.mark.parametrize("value", ["one.point", "one.point:explode", "one.point:kill:soon", "a:error,b"])
def test_a_malformed_variable_is_an_error_and_not_a_fault_that_never_comes(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, value)
    with pytest.raises(ValueError, match="is not NAME:kill"):
        failpoint("z.point")


def test_kill_kills_and_hang_hangs() -> None:
    def child(action: str) -> int:
        pid = os.fork()
        if pid == 0:
            os.environ[failpoints.VARIABLE] = f"one.point:{action}"
            failpoint("one.point")
            os._exit(0)
        return pid

    killed = child("kill")
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    hanging = child("hang")
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        assert os.waitpid(hanging, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.kill(hanging, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(hanging, 0)[1]) == -signal.SIGKILL
