"""Every system call: whoever patches, goes back, releases or recovers is killed before it; and it fails with
what it may fail with, once or from then on. Every target is wholly old or wholly new, all targets alike,
at once and after recovery; what fails is told with a code, and nothing is in the way of the next patch.

strace says which calls there are. By default a sample of them is looked at (`chance.py`);
``ASYNCSUP_TESTS=all`` takes all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import pytest
import step_kit
from chance import EVERYTHING, dice
from conftest import alive
from power_kit import check_recovered
from power_plays import BOTH_LAYOUTS, PLAYS, Play, Promises, play_recovery
from store_kit import memory_folder
from syscall_kit import (
    ATTEMPTS,
    OPTIONS,
    Attempt,
    Fault,
    Point,
    Stage,
    endure,
    open_or_say_why,
    points_in,
    survive,
)
from told import Tell
from traced import attached, require_strace
from warm_serve import warm
from workers import in_workers

from asyncsup.errors import AsyncsupError, RemoteError, SupervisorUnreachableError
from asyncsup.patch.facts import Layout

pytestmark = pytest.mark.timeout(3600)


LAYOUTS: Final[Mapping[str, Mapping[str, Layout]]] = {
    "overlay": {"over": Layout.OVERLAY},
    "tree": {"tree": Layout.TREE},
    "three": {**BOTH_LAYOUTS, "third": Layout.OVERLAY},
}


@pytest.fixture(autouse=True, scope="module")
def strace() -> None:
    require_strace()


@dataclass(frozen=True)
class Item:
    """What is failed by one worker.

    Attributes:
        targets: of `LAYOUTS`.
        wanted: how many points of it; by default.
    """

    what: Play | Attempt
    targets: str
    wanted: int

    def __str__(self) -> str:
        return f"{self.what}, {self.targets}"

    @contextmanager
    def stage(self) -> Iterator[Stage]:
        with memory_folder() as base:
            yield Stage.before(self.what, base / "scene", LAYOUTS[self.targets])

    @contextmanager
    def telling(self, fault: Fault | None = None) -> Iterator[None]:
        """Add to a promise that is broken in the block when it was."""
        try:
            yield
        except AssertionError as error:
            error.add_note(f"{self}: {fault or 'nothing fails'}")
            raise

    def sample(self, points: Sequence[Point], wanted: int | None = None) -> list[Point]:
        return sample(points, self.wanted if wanted is None else wanted, str(self))


def sample(points: Sequence[Point], wanted: int, name: str) -> list[Point]:
    """So many of them: of every call as many as of any other, if it has as many, and those evenly. Where they
    begin depends on a name."""
    if EVERYTHING or wanted >= len(points):
        return list(points)
    called = Counter(point.call for point in points)
    shares: Counter[str] = Counter()
    while shares.total() < wanted:
        shares[min((call for call in called if shares[call] < called[call]), key=shares.__getitem__)] += 1
    random = dice(name)
    chosen = []
    for call, share in shares.items():
        of_it = [point for point in points if point.call == call]
        phase = random.random()
        chosen += [of_it[int((number + phase) * len(of_it) / share)] for number in range(share)]
    return sorted(chosen, key=lambda point: point.number)


RAREST_FIRST: Final = ("EMFILE", "ENOSPC", "EIO", "KILL")


def choose(faults: Sequence[Fault], chosen: Counter[str]) -> list[Fault]:
    """One of what may become of a point: what was chosen least so far, and what fewer points allow."""
    if EVERYTHING:
        return list(faults)
    return [min(faults, key=lambda fault: (chosen[fault.kind], RAREST_FIRST.index(fault.what)))]


def say(tell: Tell, counts: Iterable[Counter[str]]) -> Counter[str]:
    total = sum(counts, Counter[str]())
    tell(", ".join(f"{number} {what}" for what, number in sorted(total.items())))
    return total


# --- kill ---------------------------------------------------------------------------------------------------


def items(whats: Sequence[Play | Attempt], wanted: int) -> list[Item]:
    """Each with one, two or three targets of both layouts in turn; or with all of them."""
    return [
        Item(what, targets, wanted)
        for number, what in enumerate(whats)
        for turn, targets in enumerate(LAYOUTS)
        if EVERYTHING or (number + turn) % len(LAYOUTS) == 0
    ]


def is_of_the_program(point: Point, promises: Promises) -> bool:
    """Whether it was the program that was killed, in the middle of what it writes itself."""
    if any(path in point.text for path in promises.unsure):
        return True
    # Of folders it syncs the data alone, as nobody else does but SQLite with its files.
    return bool(promises.unsure) and point.call == "fdatasync" and "state.db" not in point.text


def kill(item: Item) -> Counter[str]:
    assert isinstance(item.what, Play)
    counts: Counter[str] = Counter()
    with item.stage() as stage:
        with item.telling():
            points = stage.points(item.what.act)
        for point in item.sample(points):
            with item.telling(Fault(point)):
                promises = stage.killed(item.what.act, point)
                if is_of_the_program(point, promises):
                    continue
                check_recovered(stage.scene, promises, thoroughly=True)
            counts["killed"] += 1
    return counts + Counter({"calls": len(points)})


# --- recovery -----------------------------------------------------------------------------------------------


def kill_and_fail_in_recovery(item: Item) -> Counter[str]:
    """Of what was killed, the recovery is killed, or a call of it fails."""
    assert isinstance(item.what, Play)
    counts: Counter[str] = Counter()
    with item.stage() as stage:
        for first in item.sample(stage.points(item.what.act)):
            with item.telling(Fault(first)):
                promises = stage.killed(item.what.act, first).in_recovery()
                stopped = Stage.of(stage.scene, promises, stage.faults)
                points = stopped.points(play_recovery)
                for number, point in enumerate(item.sample(points, 3)):
                    if number % 2:
                        stopped.killed(play_recovery, point)
                        counts["recoveries killed"] += 1
                    else:
                        stopped.failed(open_or_say_why, Fault(point, point.errors[0]))
                        counts["recoveries failed"] += 1
                    check_recovered(stage.scene, promises, thoroughly=True)
    return counts


# --- error --------------------------------------------------------------------------------------------------


def fail(item: Item) -> Counter[str]:
    assert isinstance(item.what, Attempt)
    counts: Counter[str] = Counter()
    with item.stage() as stage:
        with item.telling():
            points = stage.points(partial(survive, attempt=item.what))
        for point in item.sample(points):
            faults = [Fault(point, error, lasting) for lasting in (False, True) for error in point.errors]
            for fault in choose(faults, counts):
                with item.telling(fault):
                    act = partial(endure if fault.lasting else survive, attempt=item.what)
                    promises = stage.failed(act, fault)
                    check_recovered(stage.scene, promises, thoroughly=fault.lasting)
                counts[fault.kind] += 1
    return counts + Counter({"calls": len(points)})


def test_a_process_killed_at_any_call_leaves_old_or_new(tell: Tell) -> None:
    total = say(tell, in_workers(kill, items([play for play in PLAYS if EVERYTHING or not play.bulk], 10)))
    assert total["killed"] > 80


def test_recovery_may_be_killed_and_fail_at_any_call(tell: Tell) -> None:
    total = say(tell, in_workers(kill_and_fail_in_recovery, items(PLAYS[:6], 2)))
    assert total["recoveries killed"] > 8
    assert total["recoveries failed"] > 16


def test_a_call_that_fails_is_told_and_changes_nothing(tell: Tell) -> None:
    total = say(tell, in_workers(fail, items(ATTEMPTS, 22)))
    assert total.total() - total["calls"] > 80
    for error in ("EIO", "ENOSPC", "EMFILE"):
        assert total[error] > 2
        assert total[f"{error}, lasting"] > 2


# --- the supervisor itself ----------------------------------------------------------------------------------


SERVE_OPTIONS: Final = (*OPTIONS, "-b", "execve")
"""Programs that it starts meanwhile are not looked at."""
SERVES: Final = (
    (step_kit.Variant("warm", "overlay", 1), 6),
    (step_kit.Variant("warm", "tree", 3), 6),
    (step_kit.Variant("cold", "tree", 1), 5),
)
"""With how many points of each, by default."""


def points_of_serve(scene: step_kit.Scene) -> list[Point]:
    """What all its threads do for a patch, but for what they say: to logs, and of the points they pass."""
    goal = step_kit.APPLY.begin(scene)
    trace = scene.folder / "trace"
    with attached(scene.process.pid, *SERVE_OPTIONS, trace=trace):
        goal.act(scene.client)
    goal.is_reached(scene)
    scene.expect_processes()
    return [
        point
        for point in points_in(trace.read_text().splitlines(), scene.folder)
        if not point.call.endswith(("write", "write64", "truncate")) and '"points"' not in point.text
    ]


def fail_serve(scene: step_kit.Scene, fault: Fault) -> str:
    """Fail one call of a supervisor that patches; returns what came of it."""
    goal = step_kit.APPLY.begin(scene)
    scene.arm()
    trace = scene.folder / "trace"
    with (
        attached(scene.process.pid, *SERVE_OPTIONS, *fault.options, trace=trace),
        step_kit.asked(goal.act, scene) as outcome,
    ):
        scene.wait_for(lambda: outcome or not alive(scene.process.pid), "an answer, or the end")
    passed = scene.passed()
    # Its sockets are closed a moment before it is seen to have ended.
    if not alive(scene.process.pid) or isinstance(outcome[0], SupervisorUnreachableError):
        scene.killed()
        expect_old_or_new(scene, goal, passed)
        return "killed"
    error = outcome[0]
    is_met = "INJECTED" in trace.read_text(errors="replace")
    if isinstance(error, AsyncsupError):
        assert is_met
        assert isinstance(error, RemoteError)
        assert error.error_code != "internal", error.message
        report = error.details.get("report")
        # There is none of what fails before anybody has begun: the checksum beside a package cannot be read.
        assert report is None or report["verdict"] in {"refused", "rolled_back"}, error.message
        assert not step_kit.is_committed(passed)
    else:
        goal.is_reached(scene)
    scene.expect_processes()
    scene.expect_files("after a call has failed")
    scene.apply()
    if isinstance(error, AsyncsupError):
        return "failed"
    # Other threads may do it than did it before; then not as many calls are made by one.
    return "committed all the same" if is_met else "not met"


def expect_old_or_new(scene: step_kit.Scene, goal: step_kit.Goal, passed: Sequence[str]) -> None:
    old = scene.now
    scene.now = goal.standing if step_kit.is_switched(passed) else old
    scene.expect_files("right after the end of the supervisor")
    scene.end_orphans()
    scene.now = old
    scene.arm()
    assert scene.comes_up()
    newest = scene.newest_transaction()
    committed = (newest["patch"], newest["verdict"]) == (goal.reference, "committed")
    # What it was killed in the middle of may count.
    assert committed or not step_kit.is_committed(passed)
    assert not committed or "store.commit.begun" in passed
    if committed:
        goal.is_reached(scene)
    scene.expect_processes()
    scene.expect_files("after recovery")


def test_a_supervisor_killed_or_failed_at_a_call_goes_on(tell: Tell) -> None:
    def run(item: tuple[step_kit.Variant, int]) -> Counter[str]:
        variant, wanted = item
        counts: Counter[str] = Counter()
        with step_kit.scene_in(base, str(variant), variant) as scene:
            scene.start()
            scene.apply()
            points = points_of_serve(scene)
            chosen = sample(points, wanted, str(variant))
            # Where threads have shared the work otherwise, a call may not be met; there are more.
            for number, point in enumerate((*chosen, *sample(points, 3 * wanted, f"more of {variant}"))):
                if number >= len(chosen) and all(counts[what] for what in (*RAREST_FIRST, "failed")):
                    break
                for fault in choose([Fault(point), *(Fault(point, error) for error in point.errors)], counts):
                    try:
                        outcome = fail_serve(scene, fault)
                    except AssertionError as error:
                        error.add_note(f"{variant}: {fault}")
                        raise
                    counts[outcome] += 1
                    counts[fault.kind] += outcome != "not met"
            scene.apply()
            scene.stop()
            assert "Traceback" not in scene.serve.errors()
        return counts

    with memory_folder() as base, warm(), ThreadPoolExecutor(2) as pool:
        total = say(tell, pool.map(run, SERVES))
    assert total["failed"] > 2
    assert [what for what in RAREST_FIRST if not total[what]] == []
