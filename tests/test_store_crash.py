"""Whatever point the process dies or fails at: every target is wholly old or wholly new, before and after
recovery, all targets of a patch alike; and the next patch goes through."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from store_kit import (
    Tree,
    apply,
    begin,
    leftovers,
    memory_folder,
    names_in,
    open_store,
    package,
    roll_back,
    seen,
    staged,
    target,
    write_tree,
)

from asyncsup import failpoints
from asyncsup.errors import AsyncsupError
from asyncsup.patch.facts import Layout, TargetRoot
from asyncsup.patch.package import Package
from asyncsup.patch.plan import Policy
from asyncsup.patch.store import Store

ORIGINAL: Tree = {
    "app.json": b"one",
    "rules/eu.json": b"eu 1",
    "rules/us.json": b"us 1",
    "rules/old/gone.json": b"to be deleted",
    "data/own.log": b"the program's",
    "own.state": b"saved",
}
FIRST: Tree = {**ORIGINAL, "app.json": b"two", "extra/deep/new.json": b"new in 2"}
SECOND: Tree = {
    "app.json": b"three",
    "rules/eu.json": b"eu 3",
    "rules/us.json": b"us 1",
    "data/own.log": b"the program's",
    "own.state": b"saved",
    "extra/deep/new.json": b"new in 3",
    "extra/deeper/still/more.json": b"also new",
}
THIRD: Tree = {**SECOND, "app.json": b"four", "rules/us.json": b"us 4"}

MINE = b"written by a person"
MEDDLED: Tree = {path: FIRST[path] for path in FIRST if path != "extra/deep/new.json"} | {"app.json": MINE}
MEDDLED_LATER: Tree = {**SECOND, "app.json": MINE}

SHAPES = {
    "pair": (Layout.OVERLAY, Layout.TREE),
    "overlay": (Layout.OVERLAY,),
    "tree": (Layout.TREE,),
    "three": (Layout.OVERLAY, Layout.TREE, Layout.OVERLAY),
}


@dataclass(frozen=True)
class Scene:
    """A state directory, its targets, and what their files are."""

    base: Path
    targets: tuple[TargetRoot, ...]

    @classmethod
    def make(cls, base: Path, shape: str) -> Scene:
        base.mkdir()
        targets = tuple(
            target(
                base,
                layout,
                f"t{n}",
                persist=("data", "own.state", "absent") if layout is Layout.TREE else (),
                build=100,
            )
            for n, layout in enumerate(SHAPES[shape])
        )
        for each in targets:
            write_tree(each.root, ORIGINAL)
        return cls(base, targets)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.targets)

    def open(self) -> Store:
        return open_store(self.base, *self.targets)

    def patch(self, build: int) -> Package:
        if build == 200:
            new = {"extra/deep/new.json": FIRST["extra/deep/new.json"]}
            return package(self.base, 200, new=new, modified={"app.json": FIRST["app.json"]})
        if build == 400:
            changed = {path: THIRD[path] for path in ("app.json", "rules/us.json")}
            return package(self.base, 400, modified=changed)
        paths = ("app.json", "rules/eu.json", "extra/deep/new.json")
        return package(
            self.base,
            300,
            new={"extra/deeper/still/more.json": SECOND["extra/deeper/still/more.json"]},
            modified={path: SECOND[path] for path in paths},
            deleted=["rules/old/gone.json"],
            # Without patch 200 before it, it is made all the same.
            options={"extra/deep/new.json": {"missing_ok": True}},
        )

    def files(self) -> Tree:
        """What the targets show; all must show the same."""
        trees = [seen(each.root) for each in self.targets]
        assert all(tree == trees[0] for tree in trees), "the targets differ"
        return trees[0]

    def check_sound(self, store: Store) -> None:
        """Nothing holds a target, and nothing is left over (at the latest when the next patch begins)."""
        with self.patch(400) as patch:
            txn = begin(store, patch, *self.names)
            store.abort(txn)
        for each in self.targets:
            assert leftovers(each.root) == []
            assert (store.current_link(each.name)).is_dir()
        assert names_in(self.base / "state" / "staging") == []
        assert not os.path.lexists(self.base / "state" / "next")


def in_child(action: Callable[[], None], failpoint: str, output: Path) -> int:
    """Run in a process of its own, which may be killed; returns its status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ[failpoints.VARIABLE] = failpoint
            sys.stderr = output.open("w")
            action()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def points_of(action: Callable[[], None], output: Path) -> list[str]:
    """The failpoints an action passes, each with the first and the last time it does, as ``NAME:ACTION:N``
    without the action."""
    assert in_child(action, "*:trace", output) == 0, output.read_text()
    counts = Counter(output.read_text().split())
    return [f"{name}:{{}}:{n}" for name, count in counts.items() for n in sorted({1, count})]


# --- what is played -----------------------------------------------------------------------------------------


def play_apply(scene: Scene) -> None:
    store = scene.open()
    with scene.patch(300) as patch:
        apply(store, patch, *scene.names)
    store.close()


def play_overwrite(scene: Scene) -> None:
    store = scene.open()
    with scene.patch(300) as patch:
        apply(store, patch, *scene.names, policy="overwrite")
    store.close()


def play_undecided(scene: Scene) -> None:
    """It fails after the switch, stays over a restart, and is then taken back."""
    store = scene.open()
    with scene.patch(300) as patch:
        txn = begin(store, patch, *scene.names, by_hand=True)
        for name in scene.names:
            store.stage(txn, name, patch)
    store.switch(txn)
    store.leave_undecided(txn, error="it failed", code="patch.reload_failed")
    store.close()
    store = scene.open()
    decide(store)
    store.close()


def decide(store: Store) -> None:
    """Take back what waits for a decision."""
    for each in store.undecided():
        store.abort(each.txn)
        store.finish(each.txn, verdict="rolled_back", error=each.error, code=each.code)


def play_undo(scene: Scene) -> None:
    store = scene.open()
    with scene.patch(300) as patch:
        txn = staged(store, patch, *scene.names)
    store.switch(txn)
    store.switch_back(txn)
    store.abort(txn, "it was not meant to be")
    store.finish(txn, verdict="rolled_back")
    store.close()


def play_rollback(scene: Scene) -> None:
    store = scene.open()
    roll_back(store, *scene.names)
    store.close()


def play_rollback_keeping(scene: Scene) -> None:
    store = scene.open()
    roll_back(store, *scene.names, policy="keep")
    store.close()


def play_recovery(scene: Scene) -> None:
    scene.open().close()


def play_prune(scene: Scene) -> None:
    store = scene.open()
    for name in scene.names:
        store.prune(name, 0)
    store.close()


def play_release(scene: Scene) -> None:
    store = scene.open()
    for name in scene.names:
        store.release(name)
    store.close()


@dataclass(frozen=True)
class Play:
    """What is played on which state.

    Attributes:
        before: brings the scene into the state it begins in.
        action: what is killed.
        allowed: what the files may be afterwards.
        policy: what becomes of files that are not what patches have made them.
    """

    name: str
    before: Callable[[Scene, Path], None]
    action: Callable[[Scene], None]
    allowed: tuple[Tree, ...]
    policy: Policy = "refuse"

    @property
    def shapes(self) -> list[str]:
        """Mostly three targets of both layouts; the apply with each layout alone as well."""
        if self.policy != "refuse" or self.action is play_undecided:
            return ["pair"]
        return ["overlay", "tree", "three"] if self.action is play_apply else ["three"]


def fresh(scene: Scene, output: Path) -> None:
    """Nothing was ever patched, the store does not exist."""


def patched(scene: Scene, output: Path) -> None:
    store = scene.open()
    with scene.patch(200) as patch:
        apply(store, patch, *scene.names)
    store.close()


def patched_twice(scene: Scene, output: Path) -> None:
    patched(scene, output)
    play_apply(scene)


def meddled(scene: Scene, output: Path) -> None:
    """One file is replaced, one removed."""
    patched(scene, output)
    for each in scene.targets:
        (each.root / "app.json").unlink()
        (each.root / "extra/deep/new.json").unlink()
        # And a persistent one is saved again, by replacing it.
        write_tree(each.root, {"app.json": MINE, "own.state.tmp": b"saved"})
        (each.root / "own.state.tmp").replace(each.root / "own.state")


def meddled_later(scene: Scene, output: Path) -> None:
    """One file is written through."""
    patched_twice(scene, output)
    for each in scene.targets:
        (each.root / "app.json").resolve().chmod(0o644)
        write_tree(each.root, {"app.json": MINE})


def killed(point: str, before: Callable[[Scene, Path], None], scene: Scene, output: Path) -> None:
    before(scene, output)
    assert in_child(partial(play_apply, scene), f"{point}:kill", output) == -signal.SIGKILL


APPLYING = (play_apply, play_overwrite, play_rollback, play_rollback_keeping)
"""What is confirmed in the end, or never was."""

KILLED_BEFORE_SWITCH = partial(killed, "store.stage.recorded", fresh)
KILLED_AFTER_SWITCH = partial(killed, "store.switch.renamed", patched)
KILLED_AFTER_COMMIT = partial(killed, "store.commit.recorded", patched)

PLAYS = [
    Play("first apply", fresh, play_apply, (ORIGINAL, SECOND)),
    Play("apply", patched, play_apply, (FIRST, SECOND)),
    Play("undo", patched, play_undo, (FIRST, SECOND)),
    Play("first undo", fresh, play_undo, (ORIGINAL, SECOND)),
    Play("rollback", patched_twice, play_rollback, (SECOND, FIRST)),
    Play("recovery before the switch", KILLED_BEFORE_SWITCH, play_recovery, (ORIGINAL,)),
    Play("recovery after the switch", KILLED_AFTER_SWITCH, play_recovery, (FIRST, SECOND)),
    Play("recovery after the commit", KILLED_AFTER_COMMIT, play_recovery, (SECOND,)),
    Play("undecided", patched, play_undecided, (FIRST, SECOND)),
    Play("overwrite", meddled, play_overwrite, (MEDDLED, SECOND), "overwrite"),
    Play(
        "rollback keeping",
        meddled_later,
        play_rollback_keeping,
        (MEDDLED_LATER, {**FIRST, "app.json": MINE}),
        "keep",
    ),
    Play("prune", patched_twice, play_prune, (SECOND,)),
    Play("release", patched_twice, play_release, (SECOND,)),
]


@pytest.fixture
def base() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture
def scenes(base: Path) -> Callable[[str], Scene]:
    """New scenes, each in a folder of its own."""
    numbers = iter(range(10_000))
    return lambda shape: Scene.make(base / str(next(numbers)), shape)


def play_cases(*actions: Callable[[Scene], None]) -> list[object]:
    """Every play with what its action is, or any."""
    return [
        pytest.param(play, shape, id=f"{play.name}-{shape}".replace(" ", "_"))
        for play in PLAYS
        if not actions or play.action in actions
        for shape in play.shapes
    ]


@pytest.mark.parametrize(("play", "shape"), play_cases())
def test_a_kill_at_any_point_leaves_every_target_wholly_old_or_wholly_new(
    play: Play, shape: str, scenes: Callable[[str], Scene], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    model = scenes(shape)
    play.before(model, output)
    points = points_of(partial(play.action, model), output)
    assert points
    for point in points:
        scene = scenes(shape)
        play.before(scene, output)
        status = in_child(partial(play.action, scene), point.format("kill"), output)
        assert status == -signal.SIGKILL, f"{point}: {output.read_text()}"
        # Before recovery: this is what the programs, which have not died, go on reading.
        left = scene.files()
        assert left in play.allowed, point
        store = scene.open()
        recovered = scene.files()
        assert recovered in play.allowed, point
        if play.action in APPLYING and "commit.recorded" not in point:
            # Links go when everything is confirmed.
            after = ("unlink.taken", "commit.tidied", "finish.recorded")
            after_commit = any(name in point for name in after)
            assert recovered == play.allowed[-1 if after_commit else 0], point
        if store.undecided():
            assert recovered == SECOND, point
            decide(store)
            recovered = scene.files()
            assert recovered == FIRST, point
        scene.check_sound(store)
        assert scene.files() == recovered, point
        with scene.patch(400) as patch:
            if recovered == SECOND:
                apply(store, patch, *scene.names)
                assert scene.files() == THIRD, point
            elif play.policy != "refuse":
                apply(store, patch, *scene.names, policy="overwrite")
                named = {path: THIRD[path] for path in ("app.json", "rules/us.json")}
                assert scene.files() == {**recovered, **named}, point
            else:
                with scene.patch(300) as again:
                    apply(store, again, *scene.names)
                assert scene.files() == SECOND, point
        store.close()


@pytest.mark.parametrize(("play", "shape"), play_cases(*APPLYING, play_undo))
def test_an_error_at_any_point_is_undone_without_a_restart(
    play: Play, shape: str, scenes: Callable[[str], Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    model = scenes(shape)
    play.before(model, output)
    points = [
        point
        for point in points_of(partial(play.action, model), output)
        if not point.startswith(("store.open", "store.register", "store.recover", "store.finish"))
    ]
    for point in points:
        scene = scenes(shape)
        play.before(scene, output)
        store = scene.open()
        before = scene.files()
        failpoints._passed.clear()
        monkeypatch.setenv(failpoints.VARIABLE, point.format("error"))
        txn = None
        failed = True
        try:
            with scene.patch(300) as patch:
                if play.action in {play_rollback, play_rollback_keeping}:
                    txn = store.begin(action="rollback", patch=None, targets=scene.names, asked_by="test")
                    for name in scene.names:
                        store.stage_rollback(txn, name, 1, policy=play.policy)
                else:
                    txn = begin(store, patch, *scene.names)
                    for name in scene.names:
                        store.stage(txn, name, patch, policy=play.policy)
                for name in scene.names:
                    store.carry(txn, name)
                store.switch(txn)
                if play.action is play_undo:
                    store.switch_back(txn)
                    store.abort(txn)
                else:
                    store.commit(txn)
                failed = False
        except (AsyncsupError, OSError):
            pass
        monkeypatch.delenv(failpoints.VARIABLE)
        # As the transaction does: the way back, last step first.
        if failed and txn is not None:
            store.switch_back(txn)
            store.abort(txn)
            store.finish(txn, verdict="rolled_back")
        if not failed:
            # What comes after the confirmation, or only helps on the way back, is not what decides.
            assert point.split(":")[0] in {
                "store.commit.recorded",
                "store.commit.tidied",
                "store.unlink.taken",
                "store.carry.linked",
            }, point
        undone = failed or play.action is play_undo
        assert scene.files() == (before if undone else play.allowed[-1]), point
        if failed and txn is None:
            store.close()
            store = scene.open()  # `begin` was written down, but nobody was told its number.
        scene.check_sound(store)
        store.close()


def test_every_failpoint_of_the_store_is_passed_by_a_play(
    scenes: Callable[[str], Scene], tmp_path: Path
) -> None:
    folder = Path(sys.modules[Store.__module__].__file__ or "").parent
    source = "\n".join(file.read_text() for file in folder.glob("*.py"))
    named = set(re.findall(r'failpoint\("(store\.[a-z_.]+)"\)', source))
    suffixes = re.findall(r'failpoint\(f"\{point\}\.([a-z]+)"\)', source)
    named |= {
        f"{prefix}.{suffix}" for prefix in re.findall(r'point="([a-z_.]+)"', source) for suffix in suffixes
    }
    assert len(named) > 40
    passed: set[str] = set()
    for play in PLAYS:
        scene = scenes(play.shapes[-1])
        play.before(scene, tmp_path / "output")
        points = points_of(partial(play.action, scene), tmp_path / "output")
        passed |= {point.partition(":")[0] for point in points}
    # These are passed by the plays of tests/test_every_step.py.
    elsewhere = {point for point in named if point.startswith(("store.repair.", "store.hold."))}
    elsewhere.add("store.convert.copied")
    assert named - passed - elsewhere == set()
