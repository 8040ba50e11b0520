"""Whenever the power goes, whatever of the unsynced has reached the disk by then: every target is wholly old
or wholly new, all targets alike, before recovery and after it; what was reported is never lost; and recovery
may lose its power as well.

What is looked at is the real store, its system calls recorded by strace (`power_model.py` says which states
of a disk they can lead to), and the real recovery on the states found. By default it is a sample
(`chance.py`); ``ASYNCSUP_TESTS=all`` looks at every moment, and recovers every state.
"""

from __future__ import annotations

import functools
import os
from typing import Final

import pytest
from chance import EVERYTHING, dice
from power_kit import Counts, Effort, explore, record
from power_plays import PLAYS, Play, Scene
from store_kit import memory_folder
from told import Tell
from traced import require_strace
from workers import in_workers

pytestmark = pytest.mark.timeout(900)

WORKERS: Final = len(os.sched_getaffinity(0)) if EVERYTHING else 1

_SECOND: Final = Effort(moments=6, samples=1, recovered=2)
SAMPLE: Final = Effort(moments=25, samples=1, recovered=6, interrupted=(1, 1), inner=_SECOND)
"""For each worker and play."""

ALL: Final = Effort(
    moments=None,
    samples=8,
    recovered=None,
    interrupted=(40, 40),
    inner=Effort(
        moments=None,
        samples=2,
        recovered=40,
        interrupted=(4, 4),
        inner=Effort(moments=None, samples=1, recovered=20),
    ),
)


@pytest.fixture(autouse=True, scope="module")
def strace() -> None:
    require_strace()


def lose_power(play: Play, worker: int) -> Counts:
    with memory_folder() as base:
        recording = record(Scene.of(play, base / "scene"), play)
        effort = ALL if EVERYTHING else SAMPLE
        return explore(recording, effort, dice(f"{play} {worker}"), share=worker, of=WORKERS)


@pytest.mark.parametrize("play", PLAYS, ids=lambda play: play.name.replace(" ", "_"))
def test_power_loss_leaves_all_targets_old_or_all_new(play: Play, tell: Tell) -> None:
    total = Counts()
    for counts in in_workers(functools.partial(lose_power, play), range(WORKERS)):
        total += counts
    tell(
        f"{total.states} states, {total.recovered} of them recovered, "
        f"{total.recoveries} recoveries interrupted"
    )
    assert total.states > 50
    assert total.recovered > 8
    assert total.recoveries > 1
