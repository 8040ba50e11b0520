"""The store against a model of it: whatever is done to it, in whatever order, killed or failing wherever.

One step is one call of the store, so that transactions over different targets run into each other at every
step, and programs write in between. A crash leaves everything as it lies; a kill happens at a failpoint of a
child that makes the next call. Hypothesis finds the orders; the model (`files_model.py`) says what the files
must be after each step.

By default the same plays are given each time (`chance.py`). ``ASYNCSUP_TESTS=all`` looks for new ones, for
longer, and makes one that fails as short as it can.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from chance import EVERYTHING, SEED
from files_model import (
    Edit,
    FilesModel,
    Generation,
    Move,
    OverlayModel,
    Tree,
    TreeModel,
    cells,
    package_arguments,
)
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace
from store_kit import MEMORY, info, look, open_store, package, write_tree
from told import Tell

from asyncsup import failpoints
from asyncsup.errors import AsyncsupError, StateError
from asyncsup.patch.facts import Layout, StagedTarget, TargetRoot
from asyncsup.patch.manifest import Kind, Op
from asyncsup.patch.package import Package
from asyncsup.patch.plan import Policy
from asyncsup.patch.store import Store

ORIGINAL: Final[Tree] = {
    "a": b"original a",
    "b": b"original b",
    "d/e": b"original e",
    "log": b"the program's",
    "data/db": b"persistent",
}
PATHS: Final = ("a", "b", "c", "d/e", "d/f", "g/h/i", "j")
"""What patches change, and the program as well."""

NAMES: Final = ("over", "tree", "more")


def named_in_sources() -> list[str]:
    """Every failpoint of the store, put together as the sources do."""
    folder = Path(sys.modules[Store.__module__].__file__ or "").parent
    source = "\n".join(file.read_text() for file in folder.glob("*.py"))
    named = set(re.findall(r'failpoint\("(store\.[a-z_.]+)"\)', source))
    suffixes = re.findall(r'failpoint\(f"\{point\}\.([a-z]+)"\)', source)
    named |= {f"{prefix}.{end}" for prefix in re.findall(r'point="([a-z_.]+)"', source) for end in suffixes}
    return sorted(named)


POINTS: Final = named_in_sources()

COUNTS: Final[Counter[str]] = Counter()
"""What the plays have brought about, to be told at the end: what never happens is not tested."""

SAME: Final = {"gate.detached": "drift", "gate.drift": "drift"} | {
    code: code for code in ("gate.base", "gate.conflict", "patch.not_found")
}
"""Whether it was replaced in place or in the root is not told apart once a patch was cut off over it."""

which = st.integers(0, 11)
policies: st.SearchStrategy[Policy] = st.sampled_from(["refuse", "refuse", "keep", "overwrite"])
points = st.sampled_from(POINTS)
paths = st.sampled_from(PATHS)
how_far = st.sampled_from([9, 9, 9, 1, 2, 3, 4])
"""How many calls of a transaction come at once; it takes one for each target and two more."""
Wishes = list[tuple[str, str]]
wishes = st.lists(
    st.tuples(paths, st.sampled_from(["modify"] * 4 + ["new", "delete", "based", "strict"])),
    min_size=1,
    max_size=4,
    unique_by=lambda item: item[0],
)


@dataclass(eq=False)
class Open:
    """A transaction under way.

    Attributes:
        goals, numbers: of a rollback, by target: where it leads to.
        moves: by target, as far as it is staged.
        saved: copies of what the target staged last had.
        spoilt: a program has changed what it touches since it was staged.
    """

    txn: int
    action: str
    targets: Sequence[str]
    policy: Policy
    patch: Package | None = None
    edits: Mapping[str, Edit] = field(default_factory=dict)
    goals: Mapping[str, Generation] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    moves: dict[str, Move] = field(default_factory=dict)
    saved: Mapping[str, Path] = field(default_factory=dict)
    switched: bool = False
    spoilt: bool = False

    @property
    def staged(self) -> bool:
        return len(self.moves) == len(self.targets)

    @property
    def next(self) -> str:
        """The target to be staged next."""
        return self.targets[len(self.moves)]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
        self.targets: dict[str, TargetRoot] = {}
        self.models: dict[str, FilesModel] = {}
        for name in NAMES:
            root = self.base / f"{name}-root"
            write_tree(root, ORIGINAL)
            self.targets[name] = TargetRoot(name=name, root=root, layout=Layout.OVERLAY, build=0)
            self.models[name] = OverlayModel(cells(ORIGINAL), 0)
        self._lay_out("tree", Layout.TREE)
        self.store = open_store(self.base, *self.targets.values())
        self.open: list[Open] = []
        self.ended: list[tuple[str, str, tuple[str, ...]]] = []
        """Action, verdict and targets of every transaction that has ended, oldest first."""
        self.pins: list[tuple[int, Generation]] = []
        self.numbers = itertools.count(1)
        self.packages = ExitStack()

    def teardown(self) -> None:
        self.packages.close()
        os.environ.pop(failpoints.VARIABLE, None)
        for fd, *_ in self.pins:
            os.close(fd)
        self.store.close()
        shutil.rmtree(self.base)

    # --- helpers --------------------------------------------------------------------------------------------

    def _lay_out(self, name: str, layout: Layout) -> None:
        """The model and the configuration of a target none of whose files are managed."""
        old = self.models[name]
        model = (OverlayModel if layout is Layout.OVERLAY else TreeModel)(old.cells(), old.current.build)
        self.models[name] = model
        persist = ("data",) if layout is Layout.TREE else ()
        self.targets[name] = replace(self.targets[name], layout=layout, persist=persist)

    def _free(self) -> list[str]:
        """Targets that no transaction has."""
        taken = {name for each in self.open for name in each.targets}
        return [name for name in self.targets if name not in taken]

    def _pick(self, items: Sequence[Any], number: int) -> Any:
        return items[number % len(items)]

    def _undone(self, each: Open, verdict: str) -> None:
        """The transaction is off, also as far as the model is concerned."""
        for name in each.targets:
            model = self.models[name]
            if name in each.moves:
                model.undo(each.moves[name])
            else:
                paths = each.edits or model.edits_back(each.goals[name])
                model.cut_off({path: (self.targets[name].root / path).is_symlink() for path in paths})
        self._ended(each, verdict)

    def _committed(self, each: Open) -> None:
        for name in each.targets:
            self.models[name].commit(each.moves[name])
        self._ended(each, "committed")

    def _ended(self, each: Open, verdict: str) -> None:
        self.open.remove(each)
        self.ended.append((each.action, verdict, tuple(sorted(each.targets))))
        how = "switched" if each.switched else "staged" if each.staged else "begun"
        COUNTS[f"{each.action} {verdict} when {how}"] += 1

    def _undo(self, each: Open) -> None:
        """As the supervisor's transaction does, last step first."""
        self.store.switch_back(each.txn)
        self.store.abort(each.txn)
        self.store.finish(each.txn, verdict="rolled_back")
        self._undone(each, "rolled_back")

    def _restart(self) -> None:
        """What a supervisor does at its start: all that was under way is undone."""
        self.store = open_store(self.base, *self.targets.values())
        for each in list(self.open):
            self._undone(each, "rolled_back")

    def _in_child(self, act: Callable[[Store], object], point: str) -> list[str]:
        """Let another process do it, which dies at the failpoint, if it gets there; the points it passed."""
        self.store.close()
        output = self.base / "trace"
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ[failpoints.VARIABLE] = f"*:trace,{point}:kill"
                sys.stderr = output.open("w")
                store = Store.open(self.base / "state")
                store.register(list(self.targets.values()))
                act(store)
                status = 0
            except AsyncsupError:
                status = 2
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in {0, 2, -signal.SIGKILL}, output.read_text()
        COUNTS["killed at a point"] += status == -signal.SIGKILL
        return output.read_text().split()

    @contextmanager
    def _failing_at(self, point: str) -> Iterator[None]:
        failpoints._passed.clear()
        os.environ[failpoints.VARIABLE] = f"{point}:error"
        try:
            yield
        finally:
            del os.environ[failpoints.VARIABLE]

    # --- transactions ---------------------------------------------------------------------------------------

    def _edits(self, wanted: Wishes, names: Sequence[str], build: int, *, fits: bool) -> dict[str, Edit]:
        """Changes made for the first of the targets. With `fits` only those that are in nobody's way."""
        visible = self.models[names[0]].visible()
        edits = {}
        for path, how in wanted:
            content = f"{path} of build {build}".encode()
            there = visible.get(path)
            if how == "delete":
                edits[path] = Edit(Op.DELETED, lenient=there is None)
            elif how == "new" or there is None:
                edits[path] = Edit(Op.NEW, content, lenient=there is not None)
            elif how == "based":
                edits[path] = Edit(Op.MODIFIED, content, base=there)
            else:
                edits[path] = Edit(Op.MODIFIED, content)
            if how == "strict":
                edits[path] = dataclasses.replace(edits[path], lenient=False)
        return {
            path: edit
            for path, edit in edits.items()
            if not fits or all(self.models[name].objection(path, edit) is None for name in names)
        }

    @precondition(lambda self: self._free())
    @rule(
        first=which,
        count=st.integers(1, 3),
        wanted=wishes,
        kind=st.sampled_from(Kind),
        fits=st.sampled_from([True, True, False]),
        policy=policies,
        steps=how_far,
    )
    def patch(
        self, *, first: int, count: int, wanted: Wishes, kind: Kind, fits: bool, policy: Policy, steps: int
    ) -> None:
        free = self._free()
        names = [self._pick(free, first + n) for n in range(min(count, len(free)))]
        build = next(self.numbers)
        edits = self._edits(wanted, names, build, fits=fits)
        if not edits:
            return
        patch = self.packages.enter_context(
            package(
                self.base,
                build,
                targets=names,
                kind=kind,
                **package_arguments(edits),
            )
        )
        txn = self.store.begin(action="apply", patch=info(patch), targets=names, asked_by="test")
        self.open.append(Open(txn, "apply", names, policy, patch, edits))
        self._go_on(self.open[-1], steps)

    def _can_go_back(self) -> list[str]:
        return [name for name in self._free() if self.models[name].way_back is not None]

    @precondition(lambda self: self._can_go_back())
    @rule(first=which, count=st.integers(1, 2), policy=policies, steps=how_far)
    def roll_back(self, first: int, count: int, policy: Policy, steps: int) -> None:
        able = self._can_go_back()
        names = [self._pick(able, first + n) for n in range(min(count, len(able)))]
        goals = {name: goal for name in names if (goal := self.models[name].way_back) is not None}
        numbers = {
            name: found for name in names if (found := self.store.preview.rollback_target(name)) is not None
        }
        txn = self.store.begin(action="rollback", patch=None, targets=names, asked_by="test")
        self.open.append(Open(txn, "rollback", names, policy, goals=goals, numbers=numbers))
        self._go_on(self.open[-1], steps)

    def _stage(self, store: Store, each: Open, name: str) -> StagedTarget:
        if each.patch is not None:
            return store.stage(each.txn, name, each.patch, policy=each.policy)
        return store.stage_rollback(each.txn, name, each.numbers[name], policy=each.policy)

    def _objections(self, each: Open) -> list[str]:
        """Why the next target cannot be staged."""
        model = self.models[each.next]
        if each.patch is None and not each.goals[each.next].there:
            return ["patch.not_found"]  # It was pruned meanwhile.
        if each.policy != "refuse":
            return []
        return model.objections(each.edits or model.edits_back(each.goals[each.next]))

    def _staged(self, each: Open) -> None:
        model = self.models[each.next]
        if each.patch is None:
            each.moves[each.next] = model.stage_back(each.goals[each.next], each.policy)
            return
        build, patch = each.patch.manifest.build, each.patch.id
        each.moves[each.next] = model.stage(each.edits, each.policy, build=build, patch=patch)

    def _act(self, store: Store, each: Open) -> None:
        """The next call of a transaction."""
        if not each.staged:
            staged = self._stage(store, each, each.next)
            each.saved = {plan.path: Path(plan.saved) for plan in staged.files if plan.saved is not None}
        elif not each.switched:
            store.switch(each.txn)
        else:
            store.commit(each.txn)
            store.finish(each.txn, verdict="committed")

    def _acted(self, each: Open) -> None:
        """What it has done, if it did not fail."""
        if not each.staged:
            name = each.next
            self._staged(each)
            saved = {path: file.read_bytes() for path, file in each.saved.items()}
            assert saved == each.moves[name].saves
        elif not each.switched:
            for name in each.targets:
                self.models[name].switch(each.moves[name])
            each.switched = True
        else:
            self._committed(each)

    @precondition(lambda self: self.open)
    @rule(number=which, steps=st.integers(1, 6))
    def go_on(self, number: int, steps: int) -> None:
        self._go_on(self._pick(self.open, number), steps)

    def _go_on(self, each: Open, steps: int) -> None:
        for _ in range(steps):
            if each not in self.open:
                return
            expected = [] if each.staged else self._objections(each)
            if expected or (each.staged and not each.switched and each.spoilt):
                with pytest.raises(AsyncsupError) as caught:
                    self._act(self.store, each)
                assert not expected or SAME.get(caught.value.error_code, "") in map(SAME.get, expected)
                COUNTS[f"refused: {caught.value.error_code}{' at the switch' * each.staged}"] += 1
                self._undo(each)
                return
            self._act(self.store, each)
            self._acted(each)

    @precondition(lambda self: self.open)
    @rule(number=which, point=points)
    def fail(self, number: int, point: str) -> None:
        """There is an error at a point of the next call, or somebody takes it back after that."""
        each = self._pick(self.open, number)
        try:
            with self._failing_at(point):
                self._act(self.store, each)
        except (AsyncsupError, OSError):
            COUNTS["failed at a point"] += 1
            if each.switched and point == "store.finish.recorded":
                self._committed(each)  # Nothing that fails after the confirmation undoes it.
            else:
                self._undo(each)
            return
        self._acted(each)
        if each in self.open:
            self._undo(each)

    # --- crashes --------------------------------------------------------------------------------------------

    def _crash(self) -> None:
        self.store.close()
        self._restart()

    @rule(
        number=which,
        point=points,
        does=st.sampled_from(["next call", "next call", "next call", "recover", "prune", "release"]),
    )
    def crash(self, number: int, point: str, does: str) -> None:
        """The supervisor is killed while it is at something; it dies at the point, or right afterwards."""
        if does == "next call" and self.open:
            each = self._pick(self.open, number)
            passed = self._in_child(lambda store: self._act(store, each), point)
            if "store.commit.recorded" in passed:
                self._committed(each)
            self._restart()
        elif does == "release" and self._free():
            name = self._pick(self._free(), number)
            self._in_child(lambda store: store.release(name), point)
            self._restart()
            self._release(name)
        elif does == "prune":
            name = self._pick(list(self.targets), number)
            self._in_child(lambda store: store.prune(name, 1), point)
            self._restart()
            self.store.prune(name, 1)
            self.models[name].prune(1)
        else:
            self._in_child(lambda store: store.recover(), point)
            self._restart()

    # --- programs -------------------------------------------------------------------------------------------

    def _touched(self, name: str, path: str) -> None:
        for each in self.open:
            if name in each.moves and not each.switched:
                each.spoilt |= self.models[name].is_spoilt_by(each.moves[name], path)

    @rule(
        number=which,
        path=st.sampled_from([*PATHS, "log", "log", "data/db"]),
        how=st.sampled_from(["write", "save", "remove"]),
    )
    def program_acts(self, number: int, path: str, how: str) -> None:
        name = self._pick(list(self.targets), number)
        file, model = self.targets[name].root / path, self.models[name]
        content = b"%s %d" % (how.encode(), next(self.numbers))
        if how != "save" and path not in model.visible():
            return
        if how == "save":
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name("saving")
            temporary.write_bytes(content)
            temporary.replace(file)
            model.save(path, content)
        elif how == "write":
            if os.geteuid() != 0:
                file.chmod(file.stat().st_mode | 0o200)
            file.write_bytes(content)
            model.write(path, content)
        elif path != "data/db":
            file.unlink()
            model.remove(path)
        self._touched(name, path)

    @rule(number=which, lets_go=st.booleans())
    def reader(self, number: int, lets_go: bool) -> None:
        """One takes a snapshot, or lets go of it."""
        if lets_go and self.pins:
            pin = self._pick(self.pins, number)
            self.pins.remove(pin)
            os.close(pin[0])
            pin[1].folder.pins -= 1
            return
        name = self._pick(list(self.targets), number)
        if self.targets[name].layout is Layout.TREE and not self.targets[name].root.is_symlink():
            return  # It would read the root itself, which nothing pins.
        fd = os.open(self.store.current_link(name), os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_SH)
        generation = self.models[name].current
        generation.folder.pins += 1
        self.pins.append((fd, generation))

    # --- upkeep ---------------------------------------------------------------------------------------------

    def _move(self, name: str) -> Move | None:
        """What is under way on a target, as far as it is staged."""
        return next((each.moves[name] for each in self.open if name in each.moves), None)

    @rule(number=which, keep=st.integers(0, 3))
    def prune(self, number: int, keep: int) -> None:
        name = self._pick(list(self.targets), number)
        COUNTS["generations pruned"] += len(self.store.prune(name, keep))
        self.models[name].prune(keep, self._move(name))

    def _release(self, name: str) -> None:
        self.store.release(name)
        root = self.targets[name].root
        assert not any(path.is_symlink() for path in (root, *root.rglob("*")))
        self.models[name].release()

    @precondition(lambda self: self._free())
    @rule(number=which, what=st.sampled_from(["release", "layout", "root"]))
    def reconfigure(self, number: int, what: str) -> None:
        name = self._pick(self._free(), number)
        if what == "release":
            self._release(name)
        elif not self.open:
            self._change_layout(name) if what == "layout" else self._move_root(name)

    def _change_layout(self, name: str) -> None:
        """It takes a release, where anything is managed."""
        before, model = self.targets[name], self.models[name]
        layout = Layout.TREE if before.layout is Layout.OVERLAY else Layout.OVERLAY
        managed = any(map(model.current.is_managed, model.current.rows))
        if managed or (before.layout is Layout.TREE and before.root.is_symlink()):
            with pytest.raises(StateError) as caught:
                self.store.register([replace(before, layout=layout, persist=())])
            assert caught.value.error_code == "state.layout_changed"
            self._release(name)
        self._lay_out(name, layout)
        self._crash()

    def _move_root(self, name: str) -> None:
        before, model = self.targets[name], self.models[name]
        moved = self.base / f"{name}-root-{next(self.numbers)}"
        before.root.rename(moved)
        if any(map(model.is_detached, model.current.rows)) and isinstance(model, OverlayModel):
            with pytest.raises(StateError) as caught:
                self.store.register([replace(before, root=moved)])
            assert caught.value.error_code == "state.root_changed"
            moved.rename(before.root)
            return
        self.targets[name] = replace(before, root=moved)
        self._crash()

    # --- what always holds ----------------------------------------------------------------------------------

    @invariant()
    def files_are_what_they_should_be(self) -> None:
        for name, model in self.models.items():
            found, odd = look(self.targets[name].root)
            expected = model.visible()
            assert found == expected, f"{name}: {found} instead of {expected}"
            assert name not in self._free() or not odd, f"{name}: {odd} left over"

    @invariant()
    def the_store_says_so(self) -> None:
        for name, model in self.models.items():
            state = self.store.state(name)
            assert state.build == model.current.build, name
            assert (self.store.preview.rollback_target(name) is None) == (model.way_back is None), name

    @invariant()
    def what_is_pinned_stays(self) -> None:
        for fd, generation in self.pins:
            for path in filter(generation.is_managed, generation.files.keys() - generation.vague):
                with os.fdopen(os.open(path, os.O_RDONLY, dir_fd=fd), "rb") as file:
                    assert file.read() == generation.files[path].content, path

    @invariant()
    def history_agrees(self) -> None:
        under_way = {each.txn for each in self.open}
        told = [
            (entry["action"], entry["verdict"], tuple(entry["targets"]))
            for entry in reversed(self.store.history.latest(limit=1000))
            if entry["txn"] not in under_way
        ]
        assert sorted(told) == sorted(self.ended)


# --- what must not be left to chance ------------------------------------------------------------------------

PATCH: Final = partial(
    StoreMachine.patch,
    first=0, count=2, wanted=[("a", "modify")], kind=Kind.WARM, fits=True, policy="refuse", steps=9,
)  # fmt: skip
CRASH: Final = partial(StoreMachine.crash, number=0, does="next call")

WRITTEN: Final[Sequence[Callable[[StoreMachine], None]]] = (
    PATCH,
    PATCH,
    partial(StoreMachine.roll_back, first=0, count=2, policy="refuse", steps=9),
    partial(StoreMachine.program_acts, number=0, path="a", how="write"),
    partial(PATCH, fits=False),
    partial(PATCH, fits=False, policy="overwrite"),
    partial(PATCH, steps=1),
    partial(CRASH, point="store.stage.recorded"),
    partial(PATCH, steps=3),
    partial(CRASH, point="store.commit.recorded"),
    partial(PATCH, steps=2),
    partial(StoreMachine.fail, number=0, point="store.switch.renamed"),
    PATCH,
    partial(StoreMachine.prune, number=0, keep=1),
    partial(StoreMachine.crash, number=0, point="store.release.begun", does="release"),
    PATCH,
)
MUST_HAPPEN: Final = (
    *("apply committed when switched", "rollback committed when switched", "refused: gate.drift"),
    *("killed at a point", "failed at a point", "apply rolled_back when staged", "generations pruned"),
)


def tell_counts(tell: Tell) -> None:
    tell(", ".join(f"{what}: {count}" for what, count in sorted(COUNTS.items())))


def test_whatever_is_to_happen_does(tell: Tell) -> None:
    COUNTS.clear()
    machine = StoreMachine()
    try:
        for number, step in enumerate(WRITTEN):
            try:
                step(machine)
                machine.files_are_what_they_should_be()
                machine.the_store_says_so()
                machine.what_is_pinned_stays()
                machine.history_agrees()
            except Exception as error:
                error.add_note(f"in step {number}: {step}")
                raise
    finally:
        machine.teardown()
    tell_counts(tell)
    assert [what for what in MUST_HAPPEN if not COUNTS[what]] == []


@pytest.mark.timeout(3600 if EVERYTHING else 600)
def test_the_store_does_what_the_model_does(tell: Tell) -> None:
    COUNTS.clear()
    run_state_machine_as_test(
        seed(SEED)(StoreMachine),
        settings=settings(
            max_examples=5000 if EVERYTHING else 40,
            stateful_step_count=60,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=EVERYTHING,
            # To make a failing play shorter takes minutes.
            phases=[Phase.generate, Phase.shrink] if EVERYTHING else [Phase.generate],
        ),
    )
    tell_counts(tell)
