"""For the tests that cut the power: records what a play does to the disk, loses power in it, and checks what
recovery makes of that."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, TypeVar
from unittest.mock import patch

from power_model import STRACE_OPTIONS, CrashPoint, History, Mark, Recorder, State
from power_plays import NEXT, Play, Promises, Scene, View, apply, play_recovery
from store_kit import leftovers, roll_back, seen
from sync_sites import name_syncs
from traced import traced

from asyncsup.errors import AsyncsupError
from asyncsup.patch.audit import decode
from asyncsup.patch.database import FileRow
from asyncsup.patch.facts import UNDECIDED, Layout, TargetRoot
from asyncsup.patch.plan import Policy
from asyncsup.patch.store import Store

UNIMPORTANT: Final = frozenset({"lock", "state.db-shm"})
"""Who holds the lock; and an index that SQLite makes anew when it is the first to open the database."""

THOROUGHLY: Final = 5
"""After one in so many recoveries the next patch has to go through, and the audit to be whole."""

MOST_UNITS: Final = 5
"""Things that are lost one at a time, at one moment, when a sync is left out."""

T = TypeVar("T")

# --- recording ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """What a play, or a recovery, has done to the disk.

    Attributes:
        first: the number of the first operation that is not of what came before.
        sound: states of the disk with which nothing was wrong, and how they were looked at. Many a state is
            come to by leaving out one sync or another.
    """

    scene: Scene
    history: History
    promises: Sequence[Promises]
    first: int = 0
    sound: set[object] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def make(
        cls,
        scene: Scene,
        recorder: Recorder,
        act: Callable[[Scene], None],
        promises: Sequence[Promises],
        faults: Sequence[str] = (),
    ) -> Recording:
        """Record `act` on the disk as it is, which must be the recorder's live state.

        Args:
            promises: what has held so far: before every operation there is already, and now.
            faults: what strace is to do to the system calls.
        """
        first = len(recorder.operations)

        def act_named() -> None:
            name_syncs()
            act(scene)

        run = traced(act_named, *STRACE_OPTIONS, *faults, folder=scene.side)
        check(run.status == 0, f"it failed: {run.errors}")
        recorder.feed(run.trace)
        held = list(promises)
        view = recorder.start.copy()
        for number, operation in enumerate(recorder.operations):
            view.apply(operation)
            if number < first:
                continue
            now = held[-1]
            if isinstance(operation, Mark) and operation.name.startswith("promise "):
                now = now.after(operation.name.removeprefix("promise "))
            elif isinstance(operation, Mark) and operation.name == "recovered":
                # Whatever it has come to, that is what it stays.
                found = scene.build_of(scene.sees(view)[0].root, now)
                assert found is not None, "no build at all after a recovery"
                now = replace(now, seen=frozenset({found}), kept=frozenset({found}))
            held.append(now)
        return cls(scene, History(recorder.start, recorder.operations), held, first)

    def killed(self, number: int) -> Recording:
        """The recovery of a process that was killed before operation `number`; the power stays on."""
        recorder = Recorder(self.history.start, self.history.operations[:number], but_for=UNIMPORTANT)
        recorder.live.write()
        promises = [*self.promises[:number], self.promises[number].in_recovery()]
        return Recording.make(self.scene, recorder, play_recovery, promises, faults_of(self.scene))

    def interrupted(self, point: CrashPoint, chosen: Sequence[int]) -> Recording:
        """The recovery after power was lost."""
        recorder = Recorder(self.history.state(point, chosen), but_for=UNIMPORTANT)
        recorder.live.write()
        promises = [self.promises[point.number].in_recovery()]
        return Recording.make(self.scene, recorder, play_recovery, promises, faults_of(self.scene))

    @contextmanager
    def telling(self, point: CrashPoint | int, chosen: Sequence[int] = ()) -> Iterator[None]:
        """Add to a promise that is broken in the block when it was, and what was lost."""
        try:
            yield
        except BrokenPromiseError as broken:
            if isinstance(point, int):
                broken.add_note(f"killed before {self.history.describe(point)}")
            else:
                broken.add_note(f"power lost after {self.history.describe(point.number - 1)}; not on disk:")
                lost = [number for number in point.pending if number not in chosen]
                for number in lost:
                    broken.add_note(f"  lost: {self.history.describe(number)}")
            raise


def record(scene: Scene, play: Play) -> Recording:
    play.before(scene)
    begun = frozenset({play.at})
    pinned = (scene.state / "state" / "current").is_symlink()
    return Recording.make(
        scene,
        Recorder(State.read(scene.disk), but_for=UNIMPORTANT),
        play.act,
        [Promises(seen=begun, kept=begun, pinned=pinned)],
        faults_of(scene, play.elsewhere),
    )


def faults_of(scene: Scene, swap: int = 0) -> list[str]:
    """What strace is to do to system calls: those that would be of two file systems fail."""
    faults = [] if scene.links else ["inject=linkat:error=EXDEV"]
    faults += [f"inject=renameat2:error=EXDEV:when={swap}"] if swap else []
    return [word for fault in faults for word in ("-e", fault)]


@contextmanager
def _without_links() -> Iterator[None]:
    """The same in this process."""
    with patch.object(os, "link", side_effect=OSError(errno.EXDEV, os.strerror(errno.EXDEV))):
        yield


# --- what may not be ----------------------------------------------------------------------------------------


class BrokenPromiseError(AssertionError):
    """Something was promised, and does not hold."""


def check(holds: object, what: str) -> None:
    if not holds:
        raise BrokenPromiseError(what)


def check_programs(scene: Scene, views: Sequence[View], promises: Promises, allowed: frozenset[int]) -> int:
    """All targets show one and the same build, and it is one of those `allowed`; returns it."""
    builds = [scene.build_of(view.root, promises) for view in views]
    for build, view in zip(builds, views, strict=True):
        check(build is not None, f"a target shows no build, but a mix: {view.root}")
    check(len(set(builds)) == 1, f"the targets show different builds: {builds}")
    (build, *_) = builds
    assert build is not None
    check(build in allowed, f"the targets show build {build}, and may show {sorted(allowed)}")
    if promises.pinned:
        for view, target_ in zip(views, scene.targets, strict=True):
            check_pointer(view, target_, promises)
    return build


def check_pointer(view: View, target_: TargetRoot, promises: Promises) -> None:
    """Who reads below the generation that the pointer leads to finds what the root shows."""
    check(view.current is not None, f"the pointer leads nowhere for {target_.name}")
    assert view.current is not None
    assert view.mode is not None
    check(view.mode & 0o055 == 0o055, f"{target_.name}: only its owner may enter the generation")
    paths = view.current.keys() - promises.unsure
    if target_.layout is Layout.TREE:
        paths |= view.root.keys() - promises.unsure
    else:
        # The program may remove a name from the root, and not what the name leads to.
        removed = {
            path for files in promises.altered.values() for path, text in files.items() if text is None
        }
        paths -= removed - view.root.keys()
    for path in paths:
        found, shown = view.current.get(path), view.root.get(path)
        check(
            found == shown,
            f"{target_.name}: {path} is {found!r} behind the pointer, and {shown!r} in the root",
        )


def check_recovered(scene: Scene, promises: Promises, *, thoroughly: bool) -> None:
    """What recovery makes of the real disk, as it is now."""
    try:
        with nullcontext() if scene.links else _without_links(), closing(scene.open()) as store:
            build = check_store(scene, store, promises)
            if thoroughly:
                check_goes_on(scene, store, build, promises)
    except (OSError, AsyncsupError) as error:
        raise BrokenPromiseError(f"after recovery: {type(error).__name__}: {error}") from error


def check_store(scene: Scene, store: Store, promises: Promises) -> int:
    promises = replace(promises, pinned=True)
    build = check_programs(scene, scene.really_sees(), promises, promises.kept)
    for each in scene.targets:
        check(store.state(each.name).build == build, "state.db has another build than the files")
    check_history(store, promises)
    for undecided in store.undecided():
        # What the files of before needed is there until somebody decides.
        store.commit(undecided.txn)
        store.finish(undecided.txn, verdict="committed")
    for each in scene.targets:
        check(leftovers(each.root) == [], f"left over: {leftovers(each.root)}")
        check_generations(scene, store, each, promises)
        if each.layout is Layout.OVERLAY:
            check_root(scene, store, each, scene.folders(build, promises))
        if each.name in promises.released:
            check_released(each)
    check_treasures(scene, promises)
    check_copies(scene, store)
    check_staging(scene)
    return build


def check_staging(scene: Scene) -> None:
    """Nothing is left of what was about to be."""
    for name in ("staging/*", "next", "sets/*.new"):
        left = list((scene.state / "state").glob(name))
        check(not left, f"left over: {left}")


def check_root(scene: Scene, store: Store, each: TargetRoot, folders: set[str]) -> None:
    """An overlay's root has no links and folders of ours that are of no use."""
    files = store._database.files(each.name, store.state(each.name).generation)
    for path in each.root.rglob("*"):
        name = str(path.relative_to(each.root))
        if path.is_symlink():
            check(name in files and files[name].sha256 is not None, f"left over: a link for {name}")
        elif path.is_dir():
            check(name in folders, f"left over: folder {name}")


def check_released(each: TargetRoot) -> None:
    """Nothing of a released target is in the store, and its program may write to its files."""
    for path in (each.root, *each.root.rglob("*")):
        check(not path.is_symlink(), f"{path} is a link, though {each.name} was released")
        check(path.stat().st_mode & 0o200, f"{path} is read-only, though {each.name} was released")


def check_goes_on(scene: Scene, store: Store, build: int, promises: Promises) -> None:
    """The next patch goes through, and so does its rollback; and the audit is as it was written."""
    policy: Policy = "overwrite" if promises.altered else "refuse"
    for number, step in (
        (NEXT, lambda: apply(scene, store, NEXT, after=build, policy=policy)),
        (build, lambda: roll_back(store, *scene.names, policy=policy)),
    ):
        step()
        check_programs(scene, scene.really_sees(), replace(promises, pinned=True), frozenset({number}))
        for each in scene.targets:
            check(leftovers(each.root) == [], f"left over by the next patch: {leftovers(each.root)}")
    judgement = store.history.examine()
    check(judgement.ok, f"the audit is at fault: {[fault.message for fault in judgement.faults]}")


def check_treasures(scene: Scene, promises: Promises) -> None:
    """What the program has saved is somewhere: in its root, or among the saved copies."""
    for each in scene.targets:
        saved = scene.state / "state" / "saved" / each.name
        found = {*seen(each.root).values(), *(seen(saved).values() if saved.is_dir() else ())}
        lost = {text for text in promises.treasures if text.encode() not in found}
        check(not lost, f"{each.name}: it was saved, and is nowhere: {lost}")


def check_copies(scene: Scene, store: Store) -> None:
    """A transaction that has overwritten nothing leaves no copies of what it would have."""
    verdicts = {entry["txn"]: entry["verdict"] for entry in store.history.latest()}
    for folder in (scene.state / "state" / "saved").glob("*/*"):
        if folder.name.isdecimal():
            verdict = verdicts[int(folder.name)]
            check(verdict in {"committed", UNDECIDED}, f"left over: copies of transaction {folder.name}")


def check_history(store: Store, promises: Promises) -> None:
    known = {entry["txn"]: entry for entry in store.history.latest()}
    for txn in promises.begun:
        check(txn in known, f"transaction {txn} was reported, and is not known")
    for txn, entry in known.items():
        if txn in promises.undecided and entry["verdict"] == UNDECIDED:
            continue
        check(entry["took"] is not None, f"transaction {txn} has not ended")
        check(entry["verdict"] is not None, f"transaction {txn} has no verdict")
    for txn_, reported in promises.verdicts.items():
        if reported is None:
            continue
        found = [known[int(txn_)]["verdict"], known[int(txn_)]["code"]]
        check(found == list(reported), f"{reported} was reported, and the history says {found}")
    for patch_id, held in promises.held.items():
        check(
            held in {None, store.held(patch_id) is not None}, f"patch {patch_id[:8]} should be held: {held}"
        )
    for target_, wanted in promises.wanted.items():
        check(store.wanted(target_) == wanted, f"{target_} should be wanted: {wanted}")
    for target_, instances in promises.scaled.items():
        scaled = store.scaled(target_)
        check(scaled is not None and scaled.instances == instances, f"{target_} should be scaled: {scaled}")
    if promises.anchors or promises.noted:
        records = store.history.records(limit=1000)
        check(promises.anchors <= {record.hash for record in records}, "a record that was told is missing")
        events = {(decode(record.line) or {}).get("event") for record in records}
        check(promises.noted <= events, f"not in the audit: {promises.noted - events}")


def _may_hold(
    scene: Scene, each: TargetRoot, build: int, file: FileRow, promises: Promises
) -> set[bytes | None]:
    """What a generation may have of a file: that which was delivered, or what the program has made of it. An
    overlay knows what the program has removed; a tree goes with the program."""
    if file.sha256 is None:
        return {None}
    delivered = scene.build(build).get(file.path)
    altered = scene.altered(build, promises).get(file.path, delivered)
    return {delivered} if altered is None and each.layout is Layout.OVERLAY else {delivered, altered}


def check_generations(scene: Scene, store: Store, each: TargetRoot, promises: Promises) -> None:
    """Every generation that can be gone back to is there, whole, and nothing that nobody knows of."""
    folder = scene.state / "state" / "generations" / each.name
    database = store._database
    rows = {row.number: row for row in database.generations(each.name) if row.state == "live"}
    there = {int(path.name) for path in folder.iterdir()}
    check(there <= rows.keys(), f"{each.name}: generations {there} are there, {set(rows)} are known")
    number: int | None = store.state(each.name).generation
    while number is not None and (row := rows.get(number)) is not None:
        if row.place == "store":
            check(number in there, f"{each.name}: generation {number} is gone")
        for path, file in database.files(each.name, number).items() if number in there else ():
            found = folder / str(number) / path
            content = found.read_bytes() if found.is_file() else None
            check(
                content in _may_hold(scene, each, row.build, file, promises),
                f"{each.name}: {path} in generation {number} (build {row.build}) is {content!r}",
            )
        number = row.parent


# --- which states are looked at -----------------------------------------------------------------------------


@dataclass
class Counts:
    """How much was looked at.

    Attributes:
        states: distinct contents of the disk, as programs see them before any recovery.
        recovered: of them, those on which the real recovery was run.
        recoveries: recoveries that were recorded, and in whose course power was lost again.
    """

    states: int = 0
    recovered: int = 0
    recoveries: int = 0

    def __iadd__(self, other: Counts) -> Counts:
        self.states += other.states
        self.recovered += other.recovered
        self.recoveries += other.recoveries
        return self


@dataclass(frozen=True)
class Effort:
    """How much to look at in a recording.

    Attributes:
        moments: at which the power goes; None for all.
        samples: random choices of what is lost, at each moment.
        recovered: states that are recovered for real; None for all.
        interrupted: recoveries that lose power in their turn: after a loss of power, and after a kill.
        inner: how much to look at in those.
    """

    moments: int | None
    samples: int
    recovered: int | None
    interrupted: tuple[int, int] = (0, 0)
    inner: Effort | None = None


def explore(
    recording: Recording, effort: Effort, dice: random.Random, *, share: int = 0, of: int = 1
) -> Counts:
    """Lose power at the moments of a recording.

    Args:
        share, of: of the moments, look at this share only.
    Raises:
        BrokenPromiseError: the notes say when, and what was lost.
    """
    points = [
        point
        for point in recording.history.crash_points()
        if point.number >= recording.first and point.number % of == share
    ]
    points = _some(points, effort.moments, dice)
    found = list(_states(recording, points, dice, effort.samples))
    counts = Counts(states=len(found))
    for point, chosen in found:
        check_view(recording, point, chosen)
    for number, (point, chosen) in enumerate(_some(found, effort.recovered, dice)):
        recover(recording, point, chosen, thoroughly=number % THOROUGHLY == 0)
        counts.recovered += 1
    if effort.inner is None:
        return counts
    after_loss, after_kill = effort.interrupted
    for point, chosen in _some(found, after_loss, dice):
        with recording.telling(point, chosen):
            counts += explore(recording.interrupted(point, chosen), effort.inner, dice)
    kills = range(recording.first + share, len(recording.history.operations), of)
    for number in _some(kills, after_kill, dice):
        with recording.telling(number):
            counts += explore(recording.killed(number), effort.inner, dice)
    counts.recoveries += after_loss + after_kill
    return counts


def _states(
    recording: Recording, points: Iterable[CrashPoint], dice: random.Random, samples: int
) -> Iterator[tuple[CrashPoint, Sequence[int]]]:
    """Distinct states in which the power may leave the disk: when it goes, and which of the operations that
    are not durable by then are kept."""
    known: set[object] = set()
    for point in points:
        promises = recording.promises[point.number]
        for chosen in recording.history.choices(point, dice, samples):
            key = (recording.history.state(point, chosen).key(), id(promises))
            if key not in known:
                known.add(key)
                yield point, chosen


def check_view(recording: Recording, point: CrashPoint, chosen: Sequence[int]) -> None:
    """What programs see before any recovery."""
    promises = recording.promises[point.number]
    views = recording.scene.sees(recording.history.state(point, chosen))
    with recording.telling(point, chosen):
        check_programs(recording.scene, views, promises, promises.seen)


def recover(recording: Recording, point: CrashPoint, chosen: Sequence[int], *, thoroughly: bool) -> None:
    """Run the real recovery on a state of the disk."""
    state, scene = recording.history.state(point, chosen), recording.scene
    state.write()
    assert scene.sees(state) == scene.really_sees(), "the model sees something else"
    with recording.telling(point, chosen):
        check_recovered(scene, recording.promises[point.number], thoroughly=thoroughly)


def _some(items: Sequence[T], number: int | None, dice: random.Random) -> list[T]:
    """So many of them, or all, in any order."""
    return dice.sample(items, len(items) if number is None else min(number, len(items)))


@dataclass(frozen=True)
class Search:
    """How far to look for what goes wrong without a sync.

    Attributes:
        moments: at which the power goes; None for all.
        recovered: states that are recovered for real; those in which all is lost that the sync was for count
            apart from those in which a part of it is.
    """

    moments: int | None
    recovered: int


class LeftOut:
    """A recording, some of whose syncs are left out: what they were for is lost, and nothing or everything
    else with it; then parts of it are."""

    def __init__(self, recording: Recording, without: Collection[int]) -> None:
        self._recording = recording
        pending = recording.history.pending
        self._points = [
            (point, late)
            for point in recording.history.crash_points(without)
            if point.number >= recording.first
            and (late := [number for number in point.pending if number not in pending[point.number]])
        ]

    def what_goes_wrong(self, dice: random.Random, search: Search) -> BrokenPromiseError | None:
        """What is found to go wrong in a search; None if nothing is."""
        history = self._recording.history
        points = _some(self._points, search.moments, dice)
        known: set[object] = set()
        try:
            for losses in (_all_of_it, _parts_of_it):
                found: list[tuple[CrashPoint, list[int], tuple[object, int]]] = []
                for point, late in points:
                    for lost in losses(history, point, late, dice):
                        chosen = [number for number in point.pending if number not in lost]
                        promises = self._recording.promises[point.number]
                        key = (history.state(point, chosen).key(), id(promises))
                        if key not in known:
                            known.add(key)
                            found.append((point, chosen, key))
                            self._look(check_view, point, chosen, key)
                for thoroughly in (False, True):
                    for point, chosen, key in _some(found, search.recovered, dice):
                        self._look(partial(recover, thoroughly=thoroughly), point, chosen, (key, thoroughly))
        except BrokenPromiseError as broken:
            return broken
        return None

    def _look(
        self,
        at: Callable[[Recording, CrashPoint, Sequence[int]], None],
        point: CrashPoint,
        chosen: Sequence[int],
        key: object,
    ) -> None:
        """Unless it was done: the same is made of the same."""
        if key not in self._recording.sound:
            at(self._recording, point, chosen)
            self._recording.sound.add(key)


def _all_of_it(
    history: History, point: CrashPoint, late: Sequence[int], dice: random.Random
) -> Iterator[Collection[int]]:
    yield set(late)
    yield set(point.pending)
    yield {unit[0] for unit in history.units(late) if len(unit) > 1}


def _parts_of_it(
    history: History, point: CrashPoint, late: Sequence[int], dice: random.Random
) -> Iterator[Collection[int]]:
    yield from map(set, _some(history.units(late), MOST_UNITS, dice))
