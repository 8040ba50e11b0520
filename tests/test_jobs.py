"""Jobs: whatever goes wrong after the work, whoever waits for it is told, and nobody else is harmed."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from asyncsup.errors import PatchError
from asyncsup.events import EventStream
from asyncsup.patch.jobs import Job, Jobs, Outcome
from asyncsup.patch.report import Report
from asyncsup.runtime import RootFacts


def no_facts(target: str) -> RootFacts:
    raise AssertionError(f"{target} has no part in it")


@pytest.mark.anyio
@pytest.mark.parametrize("fails", [False, True], ids=["work done", "work failed"])
async def test_what_goes_wrong_after_a_patch_keeps_nobody_from_hearing_of_it(
    fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    done = []

    async def unbegun(job: Job, outcome: Outcome) -> None:
        done.append("unbegun")
        raise KeyError("nobody foresaw this")

    async def settle(outcome: Outcome) -> None:
        done.append("settle")
        raise ValueError("nor this")

    async def work() -> dict[str, Any]:
        if fails:
            raise PatchError("no")
        return {"verdict": "committed"}

    async with anyio.create_task_group() as tasks:
        jobs = Jobs(tasks, unbegun)
        job = jobs.new(Report(action="apply", asked_by="test", trust="none", facts=no_facts), {})
        jobs.start(job, work, settle)
        if fails:
            with pytest.raises(PatchError, match="no"):
                await jobs.answer(job)
        else:
            assert await jobs.answer(job) == {"verdict": "committed"}
    assert done == ["unbegun", "settle"]
    assert not list(jobs)
    assert "nobody foresaw this" in caplog.text
    assert "nor this" in caplog.text


def test_the_message_of_an_error_is_text_whatever_a_file_is_called() -> None:
    assert PatchError("cannot read a\udcff").message == r"cannot read a\udcff"


@pytest.mark.anyio
async def test_an_event_that_tells_of_such_a_file_is_told_and_so_is_the_next() -> None:
    told: list[Any] = []
    events = EventStream(lambda topic, frame: told.append(json.loads(frame)["params"]))
    events.emit("first", at_fault=[{"a\udcff": "b\udcff"}])
    events.emit("second")
    events.flush()
    assert [event["type"] for event in told] == ["first", "second"]
    assert told[0]["at_fault"] == [{r"a\udcff": r"b\udcff"}]
