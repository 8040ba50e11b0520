"""A supervisor against a model of it: patches that go through, are refused, fail and wait, several at a time;
stops, starts and kills of targets meanwhile; programs that change their files; crashes at any point.

After each step every file of every target must be what the model (`files_model.py`) says; every process must
be the one it was, unless the step was about to replace it; every process must have been told, and of the
right build; what is stopped stays stopped; and the history must tell what happened.

By default the same plays are given each time (`chance.py`). ``ASYNCSUP_TESTS=all`` looks for new ones,
for longer.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from chance import EVERYTHING, SEED
from conftest import Asked, Serve, targets_in, wait_for
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
from store_kit import MEMORY, look, package, write_tree
from test_store_machine import POINTS
from told import Tell

from asyncsup import failpoints
from asyncsup.errors import AsyncsupError, RemoteError
from asyncsup.patch.build import build_prototype_patch
from asyncsup.patch.doctor import diagnose
from asyncsup.patch.manifest import Kind, Op

PROGRAMS: Final = Path(__file__).parent / "programs"
ORIGINAL: Final[Tree] = {
    "a.txt": b"original-a",
    "b.txt": b"original-b",
    "d/e.txt": b"original-e",
    "log": b"the-program's",
}
PATHS: Final = ("a.txt", "b.txt", "sub/c.txt", "d/e.txt", "f.txt")
SHOWN: Final = ("a.txt", "b.txt", "sub/c.txt")
"""What the programs tell of."""

KEEP: Final = 2
BUILD: Final = 100


@dataclass(frozen=True)
class Kit:
    """How a target is configured; `count` is of its instances."""

    layout: str
    program: str
    count: int = 1
    more: str = ""

    @property
    def has_sdk(self) -> bool:
        return self.program == "patchable.py"


KITS: Final = {
    "hand": Kit("overlay", "light.py", more='restart = "unless-stopped"\npatch = { commit = "manual" }\n'),
    "pair": Kit("tree", "light.py", count=2),
    "sdk": Kit("overlay", "patchable.py", more='patch = { wait_max = "1h" }\n'),
    "tree": Kit("tree", "light.py"),
}
NAMES: Final = tuple(KITS)

COUNTS: Final[Counter[str]] = Counter()
"""What the plays have brought about, to be told at the end: what never happens is not tested."""


@dataclass(eq=False)
class Target:
    """What should be known of a target.

    Attributes:
        up: it is to run.
        pids: of its instances; None for one that must be new, and `ANY` where it may be.
        before: pids that a new one must not have.
        one_new: one of the instances must be, whichever.
        told: what each instance may say; usually one thing.
        highest: the highest build it was ever brought to.
    """

    files: FilesModel
    up: bool = True
    pids: list[int | None] = field(default_factory=list)
    before: set[int] = field(default_factory=set)
    one_new: bool = False
    told: list[set[str]] = field(default_factory=list)
    highest: int = 0


ANY: Final = 0


@dataclass(eq=False)
class Patch:
    """A package, and what it is for; ``targets`` is empty for one of the prototype's."""

    id: str
    path: Path
    build: int
    kind: Kind
    region: str
    targets: Sequence[str]
    edits: Mapping[str, Edit]
    held: bool = False


@dataclass(eq=False)
class Flight:
    """A patch under way.

    Attributes:
        waiting: the request, while a target asks to wait; None when it waits for its commit.
        names: the targets it has hold of; of these it changes those that have `moves`.
    """

    patch: Patch
    waiting: Asked | None
    names: Sequence[str]
    moves: dict[str, Move]
    txn: int


ON_THE_WAY: Final = [
    point
    for point in POINTS
    if not point.startswith(("store.release", "store.repair", "store.switch_back", "store.abort"))
]
which = st.integers(0, 11)
Wishes = list[tuple[str, str]]
wishes: st.SearchStrategy[Wishes] = st.lists(
    st.tuples(
        st.sampled_from(PATHS),
        st.sampled_from(["modify", "modify", "modify", "new", "delete", "based"]),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda item: item[0],
)


@dataclass(frozen=True)
class Fault:
    """How a target misbehaves during a patch, and the code that comes of it.

    Attributes:
        only: "sdk" or "light", where not every program can do it.
        dies: a process of its own ends, and is started again.
        stuck: it takes a time-out, and an operator afterwards.
    """

    step: str
    how: str
    code: str
    only: str = ""
    dies: bool = False
    stuck: bool = False

    def fits(self, kit: Kit) -> bool:
        return self.only in {"", "sdk" if kit.has_sdk else "light"}

    def acts_on(self, kind: Kind) -> bool:
        return self.step == "prepare" or (self.step == "reload") == (kind is Kind.WARM)

    @property
    def behaviour(self) -> dict[str, Any]:
        return {self.step: self.how, "once": self.dies}


FAULTS: Final = (
    Fault("prepare", "refuse", "patch.not_allowed", "sdk"),
    Fault("prepare", "wait", "", "sdk"),
    Fault("prepare", "wait", "", "sdk"),
    Fault("prepare", "never", "patch.no_answer", "sdk", stuck=True),
    Fault("prepare", "die", "patch.target_died", "sdk", dies=True),
    Fault("reload", "fail", "patch.rolled_back", "sdk"),
    Fault("reload", "die", "patch.rolled_back", dies=True),
    Fault("reload", "never", "patch.rollback_failed", "light", stuck=True),
    Fault("start", "die", "patch.rolled_back", dies=True),
)


class SupervisorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        memory = MEMORY if os.access(MEMORY, os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="as-", dir=memory))
        self.serve = Serve(self.folder)
        self.serve.alone = True  # the machine itself starts it again
        self.failpoint = self.folder / "failpoint"
        self.serve.environ[failpoints.VARIABLE] = f"@{self.failpoint}"
        self.targets: dict[str, Target] = {}
        self.kinds: dict[Generation, Kind] = {}
        self.flights: list[Flight] = []
        self.behind: tuple[Patch, Asked, list[str], str] | None = None
        self.patches: list[Patch] = []
        self.builds = itertools.count(BUILD + 100, 100)
        self.numbers = itertools.count(1)
        self.committed: list[tuple[str, tuple[str, ...]]] = []
        """Action and targets of every transaction that was committed, oldest first."""
        text = [f'[patch]\ntrust = "none"\nprobation = "0s"\nkeep = {KEEP}\nack_timeout = "20s"\n']
        text.append(f'[defaults]\nbuild = {BUILD}\nrestart_delay = "20ms"\nmin_uptime = "1ms"\n')
        text.append('start_timeout = "60s"\nstart_limit_interval = "0s"\n')
        for name, kit in KITS.items():
            write_tree(self.root(name), ORIGINAL)
            (self.folder / f"{name}.work").mkdir()
            quick = [] if kit.has_sdk else ["-S", "-E"]
            command = json.dumps([sys.executable, *quick, str(PROGRAMS / kit.program)])
            how = 'protocol = "sdk"\n' if kit.has_sdk else 'protocol = "notify"\nreload_signal = "HUP"\n'
            text.append(
                f'[target.{name}]\ncommand = {command}\nroot = "{name}"\ndirectory = "{name}.work"\n'
                f'layout = "{kit.layout}"\ninstances = {kit.count}\n{how}{kit.more}'
            )
            model = (OverlayModel if kit.layout == "overlay" else TreeModel)(cells(ORIGINAL), BUILD)
            self.targets[name] = Target(model)
        self.serve.write("".join(text))
        try:
            self.start()
        except BaseException:
            self.clear_away()  # nobody calls `teardown` of what was never made
            raise

    def teardown(self) -> None:
        try:
            for flight in self.flights:
                self.client.call("patch.abort", id=str(flight.txn))
            self.client.close()
            assert self.serve.stop() == 0
            self.examine()
        finally:
            errors = self.serve.errors()
            self.clear_away()
        assert "Traceback" not in errors, errors[-5000:]

    def clear_away(self) -> None:
        if self.serve.process is not None and self.serve.process.poll() is None:
            self.serve.kill()
        self.end_orphans()
        shutil.rmtree(self.folder)

    def examine(self) -> None:
        """Nothing is wrong with the state directory but what programs have done to their files."""
        drift = {"file.written", "file.replaced", "file.removed"}
        found = diagnose(self.folder / ".asyncsup")
        assert [each for each in found.problems if each.code not in drift] == []

    # --- helpers --------------------------------------------------------------------------------------------

    def root(self, name: str) -> Path:
        return self.folder / name

    def behave(self, name: str, behaviour: Mapping[str, Any]) -> None:
        temporary = self.folder / "behaviour.new"
        temporary.write_text(json.dumps(behaviour))
        temporary.replace(self.folder / f"{name}.work" / "behaviour.json")

    def in_flight(self) -> set[str]:
        return {name for flight in self.flights for name in flight.names}

    def free(self) -> list[str]:
        taken = self.in_flight() | (set(self.behind[2]) if self.behind is not None else set())
        return [name for name in NAMES if name not in taken]

    def pick(self, items: Sequence[Any], number: int) -> Any:
        return items[number % len(items)]

    def saying(self, name: str) -> set[str]:
        """What an instance says that has just been told, or started."""
        target, kit = self.targets[name], KITS[name]
        content = target.files.pinned() if kit.has_sdk else target.files.visible()
        shown = " ".join(f"{path}={content[path].decode()}" for path in SHOWN if path in content)
        build = f"build={target.files.current.build} " if kit.has_sdk else ""
        return {f"one {build}{shown}"}

    def tell(self, name: str) -> None:
        """Every instance that runs has been told of what is there now."""
        self.targets[name].told = [self.saying(name) for _ in range(KITS[name].count)]

    def renewed(self, name: str) -> None:
        """Every instance that is to run has been started again."""
        target = self.targets[name]
        target.before = {pid for pid in target.pids if pid}
        target.pids = [None] * KITS[name].count
        self.tell(name)

    # --- the supervisor -------------------------------------------------------------------------------------

    def start(self, *, crashed: bool = False) -> None:
        """Start it; after a crash it knows what was stopped."""
        self.client = self.serve.start()
        for name, target in self.targets.items():
            target.pids = []
            target.up = target.up or not (crashed or "unless-stopped" in KITS[name].more)
            self.renewed(name)

    def orphans(self) -> list[int]:
        """The processes of the targets."""
        return targets_in(self.folder)

    def end_orphans(self) -> None:
        def ended() -> bool:
            pids = self.orphans()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_for(ended, "the orphans to end")

    def interrupted(self, *, crashed: bool = False) -> None:
        """The supervisor has ended, one way or another; so has everything that was under way. Only what waits
        for its commit waits on over a crash, if nobody had to take it up who has died of that."""
        for flight in list(self.flights):
            if crashed and flight.waiting is None and not any(self.targets[n].up for n in flight.moves):
                COUNTS["waits for its commit over a crash"] += 1
                continue
            self.undone(flight)
        if self.behind is not None:
            answer = self.behind[1].answer()
            assert isinstance(answer, AsyncsupError)
            self.behind = None
        for name in NAMES:
            self.behave(name, {})

    @rule(gently=st.booleans())
    def restart_supervisor(self, gently: bool) -> None:
        self.client.close()
        if gently:
            assert self.serve.stop() == 0
            self.interrupted()
        else:
            self.serve.kill()
            # Right now, before any recovery, this is what programs find.
            self.files_are_whole()
            self.end_orphans()
            self.interrupted(crashed=True)
        self.start(crashed=not gently)
        COUNTS["restarts of the supervisor" if gently else "crashes of the supervisor"] += 1

    # --- patches --------------------------------------------------------------------------------------------

    def edits(self, wanted: Wishes, names: Sequence[str], build: int, *, prototype: bool) -> dict[str, Edit]:
        """Changes that are in nobody's way as far as the first target goes."""
        model = self.targets[names[0]].files
        visible = model.visible()
        edits = {}
        for path, how in wanted:
            there, content = visible.get(path), f"{path[0]}-{build}".encode()
            if how == "delete":
                edit = Edit(Op.DELETED, lenient=prototype or there is None)
            elif how == "new" or there is None:
                edit = Edit(Op.NEW, content, lenient=prototype or there is not None)
            else:
                base = there if how == "based" and not prototype else None
                edit = Edit(Op.MODIFIED, content, base=base, lenient=prototype)
            if model.objection(path, edit) is None:
                edits[path] = edit
        return edits

    def make(
        self,
        names: Sequence[str],
        edits: Mapping[str, Edit],
        build: int,
        kind: Kind = Kind.WARM,
        *,
        region: str = "local",
        prototype: bool = False,
    ) -> Patch:
        path = self.folder / f"patch-{build}-{next(self.numbers)}.zip"
        if prototype:
            contents = {p: e.content for p, e in edits.items() if e.content is not None}
            build_prototype_patch(
                output=path,
                region=region,
                build=build,
                warm=kind is Kind.WARM,
                new={f"/{p}": c for p, c in contents.items() if edits[p].op is Op.NEW},
                modified={f"/{p}": c for p, c in contents.items() if edits[p].op is Op.MODIFIED},
                deleted=[f"/{p}" for p, e in edits.items() if e.op is Op.DELETED],
            )
        else:
            more = package_arguments(edits)
            package(
                self.folder, build, targets=names, kind=kind, region=region, name=path.stem, **more
            ).close()
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        patch = Patch(found, path, build, kind, region, () if prototype else tuple(names), edits)
        self.patches.append(patch)
        return patch

    def gate(self, patch: Patch, name: str, *, retry: bool) -> str | None:
        """The code with which a target refuses a patch at the gates; None when it does not."""
        target = self.targets[name]
        build = target.files.current.build
        if patch.region != "local":
            return "gate.region"
        if self.is_there(patch, name):
            return None
        if patch.build == build:
            return "gate.build_conflict"
        if patch.build < max(build, target.highest):
            return "gate.build"
        if patch.held and not retry:
            return "gate.held"
        codes = target.files.objections(patch.edits)
        return codes[0] if codes else None

    def is_there(self, patch: Patch, name: str) -> bool:
        model = self.targets[name].files
        same = model.current.patch == patch.id or model.matches(patch.edits)
        return patch.build == model.current.build and same

    def submit(
        self, patch: Patch, names: Sequence[str], fault: Fault | None, victim: str, *, retry: bool = False
    ) -> None:
        """Apply a patch to free targets, and see what comes of it."""
        COUNTS["submitted"] += 1
        params: dict[str, Any] = {"path": str(patch.path), "retry_held": retry}
        if not patch.targets:
            params["target"] = names[0]
        refused = [code for name in names if (code := self.gate(patch, name, retry=retry)) is not None]
        parts = [] if refused else [name for name in names if not self.is_there(patch, name)]
        if victim not in parts or not self.targets[victim].up:
            fault = None
        if fault is not None:
            self.behave(victim, fault.behaviour)
            if fault.how == "wait":
                self.take_off(patch, names, parts, params)
                return
        try:
            report, code = self.client.call("patch.apply", params), ""
        except RemoteError as error:
            report, code = error.details["report"], error.error_code
        if refused:
            assert code in refused, report
            assert report["verdict"] == "refused"
            COUNTS[f"refused: {code}"] += 1
        elif not parts:
            assert report["verdict"] == "already", report
            COUNTS["already there"] += 1
        elif fault is not None:
            assert code == fault.code, report
            self.failed(patch, parts, fault, victim, report)
        else:
            self.went_through(patch, names, parts, report)

    def stage(self, patch: Patch, parts: Sequence[str]) -> dict[str, Move]:
        moves = {}
        for name in parts:
            model = self.targets[name].files
            moves[name] = model.stage(patch.edits, "refuse", build=patch.build, patch=patch.id)
            self.kinds[moves[name].destination] = patch.kind
        return moves

    def went_through(
        self, patch: Patch, names: Sequence[str], parts: Sequence[str], report: Mapping[str, Any]
    ) -> None:
        moves = self.stage(patch, parts)
        self.switched(moves, patch.kind)
        if "hand" in parts:
            assert report["verdict"] == "uncommitted", report
            self.flights.append(Flight(patch, None, names, moves, report["txn"]))
            COUNTS["waits for its commit"] += 1
            return
        assert report["verdict"] == "committed", report
        self.commit("apply", moves)
        patch.held = False

    def switched(self, moves: Mapping[str, Move], kind: Kind) -> None:
        """The files are new, and everybody has been told."""
        for name, move in moves.items():
            self.targets[name].files.switch(move)
            if kind is Kind.COLD:
                self.renewed(name)
            else:
                self.tell(name)

    def commit(self, action: str, moves: Mapping[str, Move]) -> None:
        for name, move in moves.items():
            target = self.targets[name]
            target.files.commit(move)
            target.files.prune(KEEP)
            if action == "apply":
                target.highest = max(target.highest, move.destination.build)
        self.committed.append((action, tuple(sorted(moves))))
        COUNTS[f"{action} over {len(moves)}"] += 1

    def failed(
        self, patch: Patch, parts: Sequence[str], fault: Fault, victim: str, report: Mapping[str, Any]
    ) -> None:
        """One of the targets has not gone along."""
        COUNTS[f"failed: {fault.step} {fault.how}"] += 1
        self.behave(victim, {})
        touched = fault.step != "prepare"
        assert (report["verdict"] == "target_refused") is not touched, report
        patch.held = touched
        for name, move in self.stage(patch, parts).items():
            self.targets[name].files.undo(move)
            if touched:
                self.told_again(name, patch.kind)
        if (fault.dies and patch.kind is Kind.WARM) or (fault.step == "prepare" and fault.dies):
            self.one_died(victim)
        if fault.stuck:
            # The operator does what he is told.
            self.client.call("restart", names=[victim])
            self.renewed(victim)

    def told_again(self, name: str, kind: Kind) -> None:
        if kind is Kind.COLD:
            self.renewed(name)
        else:
            self.tell(name)

    def one_died(self, name: str) -> None:
        """One of the instances, and was started again."""
        target, now = self.targets[name], self.saying(name)
        target.before = {pid for pid in target.pids if pid}
        target.pids = [ANY] * KITS[name].count
        target.one_new = True
        target.told = [now | before for before in target.told]

    @precondition(lambda self: self.free())
    @rule(
        first=which,
        count=st.sampled_from([1, 1, 2, 3, 4]),
        wanted=wishes,
        kind=st.sampled_from([Kind.WARM, Kind.WARM, Kind.COLD]),
        odd=st.sampled_from(["", "", "", "", "region", "old", "prototype"]),
        fault=st.sampled_from([None, None, None, *FAULTS]),
        victim=which,
    )
    def patch(
        self,
        *,
        first: int,
        count: int,
        wanted: Wishes,
        kind: Kind,
        odd: str,
        fault: Fault | None,
        victim: int,
    ) -> None:
        free = self.free()
        prototype = odd == "prototype"
        names = sorted({self.pick(free, first + n) for n in range(1 if prototype else count)})
        build = next(self.builds)
        edits = self.edits(wanted, names, build, prototype=prototype)
        if not edits:
            return
        patch = self.make(
            names,
            edits,
            1 if odd == "old" else build,
            kind,
            region="elsewhere" if odd == "region" else "local",
            prototype=prototype,
        )
        able = [name for name in names if fault is not None and fault.fits(KITS[name])]
        if fault is None or not able or not fault.acts_on(kind) or (fault.stuck and victim % 2):
            self.submit(patch, names, None, names[0])
        else:
            self.submit(patch, names, fault, self.pick(able, victim))

    @precondition(lambda self: self.patches and not self.flights and self.behind is None)
    @rule(number=which, retry=st.booleans())
    def patch_again(self, number: int, retry: bool) -> None:
        """A package that was there before, with whatever outcome."""
        patch = self.pick(self.patches[-6:], number)
        names = patch.targets or [self.pick(NAMES, number)]
        self.submit(patch, names, None, names[0], retry=retry)

    # --- under way ------------------------------------------------------------------------------------------

    def take_off(
        self, patch: Patch, names: Sequence[str], parts: Sequence[str], params: Mapping[str, Any]
    ) -> None:
        """A target asks it to wait."""
        asked = Asked(self.serve.endpoint, "patch.apply", **params)

        def waits() -> Any:
            events = self.client.call("events.since", seq=0)["events"]
            return next((e for e in events if e.get("step") == "wait" and e.get("patch") == patch.id), None)

        event = wait_for(waits, f"{patch.path.name} to be asked to wait")
        self.flights.append(Flight(patch, asked, names, self.stage(patch, parts), event["txn"]))
        COUNTS["asked to wait"] += 1

    def undone(self, flight: Flight) -> None:
        """It is off. Who was told of it has been told that it is."""
        self.flights.remove(flight)
        for name, move in flight.moves.items():
            self.targets[name].files.undo(move)
            if flight.waiting is None and self.targets[name].up:
                self.told_again(name, flight.patch.kind)
        if flight.waiting is not None:
            self.behave("sdk", {})
            assert isinstance(flight.waiting.answer(), AsyncsupError)
        COUNTS[f"taken back while it waits for its {'go-ahead' if flight.waiting else 'commit'}"] += 1

    @precondition(lambda self: self.flights)
    @rule(number=which)
    def let_go(self, number: int) -> None:
        """The target goes ahead, or the operator says that all is well."""
        flight: Flight = self.pick(self.flights, number)
        if flight.waiting is None:
            report = self.client.call("patch.commit", id=str(flight.txn))
        else:
            self.behave("sdk", {})
            report, flight.waiting = flight.waiting.result(), None
            self.switched(flight.moves, flight.patch.kind)
            if "hand" in flight.moves:
                assert report["verdict"] == "uncommitted", report
                return
        assert report["verdict"] == "committed", report
        self.flights.remove(flight)
        self.commit("apply", flight.moves)
        flight.patch.held = False
        self.next_in_line()

    @precondition(lambda self: self.flights)
    @rule(number=which)
    def abort(self, number: int) -> None:
        flight: Flight = self.pick(self.flights, number)
        report = self.client.call("patch.abort", id=str(flight.txn))
        assert report["verdict"] == ("rolled_back" if flight.waiting is None else "refused"), report
        COUNTS[f"aborted: {report['verdict']}"] += 1
        self.undone(flight)
        self.next_in_line()

    @precondition(lambda self: self.flights and self.behind is None)
    @rule(number=which, more=which, wanted=wishes, waits=st.booleans())
    def patch_a_busy_target(self, number: int, more: int, wanted: Wishes, waits: bool) -> None:
        """Another patch for a target of one that is under way: it waits, or says that the target is busy."""
        flight: Flight = self.pick(self.flights, number)
        blocked = self.pick(flight.names, number)
        names = sorted({blocked, *([self.pick(self.free(), more)] if self.free() else [])})
        build = next(self.builds)
        edits = {p: Edit(Op.MODIFIED, f"{p[0]}-{build}".encode(), lenient=True) for p, _ in wanted}
        patch = self.make(names, edits, build)
        params = {"path": str(patch.path), "wait_busy": waits}
        if not waits:
            with pytest.raises(RemoteError) as caught:
                self.client.call("patch.apply", params)
            assert caught.value.error_code == "target.busy"
            COUNTS["said that it is busy"] += 1
            return
        asked = Asked(self.serve.endpoint, "patch.apply", **params)
        self.behind = (patch, asked, names, blocked)
        wait_for(
            lambda: [w for w in self.status(blocked)["waiting"] if w["operation"] == "patch"],
            "the patch to be queued",
        )
        COUNTS["queued"] += 1

    def next_in_line(self) -> None:
        """A patch that has waited for its turn may have it now."""
        if self.behind is None or set(self.behind[2]) & self.in_flight():
            return
        patch, asked, names, _ = self.behind
        self.behind = None
        answer = asked.answer()
        refused = [code for name in names if (code := self.gate(patch, name, retry=False)) is not None]
        if refused:
            assert isinstance(answer, RemoteError)
            assert answer.error_code in refused
            return
        assert not isinstance(answer, AsyncsupError), answer.message
        self.went_through(patch, names, [name for name in names if not self.is_there(patch, name)], answer)

    # --- going back -----------------------------------------------------------------------------------------

    def chain(self, name: str) -> list[Generation]:
        found: list[Generation] = []
        each: Generation | None = self.targets[name].files.current
        while each is not None:
            found.append(each)
            each = each.parent
        return found

    @precondition(lambda self: self.free())
    @rule(number=which, together=st.booleans())
    def roll_back(self, number: int, together: bool) -> None:
        name = self.pick(self.free(), number)
        goals, code = self.goals(name, together=together)
        if set(goals) - set(self.free()):
            return  # It would have to wait.
        params = {"target": name, "together" if together else "only": True}
        if code is None:
            codes = [
                found
                for each, goal in goals.items()
                for found in self.targets[each].files.objections(self.targets[each].files.edits_back(goal))
            ]
        else:
            codes = [code]
        if codes:
            with pytest.raises(RemoteError) as caught:
                self.client.call("patch.rollback", params)
            assert caught.value.error_code in codes, caught.value.message
            COUNTS[f"rollback refused: {caught.value.error_code}"] += 1
            return
        kinds = {self.kinds[self.targets[each].files.current] for each in goals}
        report = self.client.call("patch.rollback", params)
        assert report["verdict"] == "committed", report
        moves = {each: self.targets[each].files.stage_back(goal, "refuse") for each, goal in goals.items()}
        self.switched(moves, Kind.COLD if Kind.COLD in kinds else Kind.WARM)
        self.commit("rollback", moves)

    def goals(self, name: str, *, together: bool) -> tuple[dict[str, Generation], str | None]:
        """Where a rollback leads to, by target; or the code with which it is refused."""
        goal = self.targets[name].files.way_back
        if goal is None:
            return {}, "patch.not_found"
        goals, patch = {name: goal}, self.targets[name].files.current.patch
        for other in NAMES if together else ():
            chain = self.chain(other)
            depth = max((n for n, each in enumerate(chain[:-1], 1) if each.patch == patch), default=0)
            if other == name or not depth:
                continue
            if any(each.patch != patch for each in chain[:depth]):
                return {}, "gate.later_patch"
            if not chain[depth].there:
                return {}, "patch.not_found"
            goals[other] = chain[depth]
        return goals, None

    @rule(number=which, keep=st.integers(0, 2))
    def prune(self, number: int, keep: int) -> None:
        name = self.pick(NAMES, number)
        pruned = self.client.call("patch.prune", target=name, keep=keep)["pruned"]
        COUNTS["generations pruned"] += sum(map(len, pruned.values()))
        move = next((flight.moves[name] for flight in self.flights if name in flight.moves), None)
        self.targets[name].files.prune(keep, move)

    @precondition(lambda self: self.free())
    @rule(number=which)
    def release(self, number: int) -> None:
        name = self.pick(self.free(), number)
        self.client.call("target.release", target=name)
        self.targets[name].files.release()
        assert not any(path.is_symlink() for path in (self.root(name), *self.root(name).rglob("*")))
        COUNTS["released"] += 1

    # --- processes ------------------------------------------------------------------------------------------

    @rule(number=which)
    def stop(self, number: int) -> None:
        """Whatever is under way on it is taken back, on all targets."""
        name = self.pick(NAMES, number)
        self.client.call("stop", names=[name])
        self.targets[name].up = False
        if self.behind is not None:
            _, asked, names, blocked = self.behind
            if name in names and name <= blocked:
                assert isinstance(asked.answer(), AsyncsupError)
                self.behind = None
        for flight in list(self.flights):
            if name in flight.names:
                self.undone(flight)
        self.next_in_line()

    @precondition(lambda self: self.free())
    @rule(number=which, verb=st.sampled_from(["start", "restart"]))
    def start_target(self, number: int, verb: str) -> None:
        name = self.pick(self.free(), number)
        target = self.targets[name]
        self.client.call(verb, names=[name])
        if verb == "restart" or not target.up:
            target.up = True
            self.renewed(name)

    @rule(number=which, index=which)
    def kill(self, number: int, index: int) -> None:
        """A process dies; of a patch that waits for its commit, that is the end."""
        name = self.pick(NAMES, number)
        target = self.targets[name]
        index %= KITS[name].count
        flight = next((flight for flight in self.flights if name in flight.names), None)
        if not target.up or (flight is not None and (flight.waiting is not None or name not in flight.moves)):
            return
        pid = target.pids[index]
        assert pid
        os.kill(pid, signal.SIGKILL)
        COUNTS["processes killed"] += 1
        if flight is not None:
            txn = str(flight.txn)
            wait_for(
                lambda: self.client.call("patch.show", id=txn)["verdict"] == "rolled_back", "the way back"
            )
            flight.patch.held = True
            self.undone(flight)
            if flight.patch.kind is Kind.WARM:
                target.before, target.pids[index] = {pid}, None
            self.next_in_line()
        else:
            target.before, target.pids[index] = {pid}, None
            target.told[index] = self.saying(name)

    @rule(
        number=which,
        path=st.sampled_from([*PATHS, "log", "log"]),
        how=st.sampled_from(["write", "save", "remove"]),
    )
    def program_acts(self, number: int, path: str, how: str) -> None:
        """Somebody changes a file, which may be the program or a person."""
        name = self.pick(NAMES, number)
        file, model = self.root(name) / path, self.targets[name].files
        if how != "save" and path not in model.visible():
            return
        moves = [flight.moves[name] for flight in self.flights if name in flight.moves]
        if any(model.is_spoilt_by(move, path) for move in moves):
            return  # What comes of that is for the store's machine.
        content = b"%s-%d" % (how.encode(), next(self.numbers))
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
        else:
            file.unlink()
            model.remove(path)

    # --- what fails inside ----------------------------------------------------------------------------------

    @precondition(lambda self: not self.flights and self.behind is None)
    @rule(
        first=which,
        count=st.integers(1, 4),
        wanted=wishes,
        kind=st.sampled_from(Kind),
        point=st.sampled_from(ON_THE_WAY),
        does=st.sampled_from(["kill", "kill", "error"]),
    )
    def patch_and_fail_inside(
        self, *, first: int, count: int, wanted: Wishes, kind: Kind, point: str, does: str
    ) -> None:
        """The supervisor dies at a point of a patch, or an operation of the disk fails there."""
        names = sorted({self.pick(NAMES, first + n) for n in range(count)} - {"hand"})
        build = next(self.builds)
        edits = self.edits(wanted, names, build, prototype=False) if names else {}
        if not edits or any(self.targets[name].files.objections(edits) for name in names):
            return
        patch = self.make(names, edits, build, kind)
        start = self.serve.stderr.stat().st_size
        self.arm(f"*:trace,{point}:{does}")
        answer = Asked(self.serve.endpoint, "patch.apply", path=str(patch.path)).answer()
        self.failpoint.unlink()
        with self.serve.stderr.open("rb") as file:
            file.seek(start)
            passed = file.read().decode(errors="replace").split()
        died = does == "kill" and point in passed
        switched, committed = ("store.switch.renamed" in passed), ("store.commit.recorded" in passed)
        if point in passed:
            COUNTS[f"{does} inside: {'committed' if committed else 'undone'}"] += 1
        moves = self.stage(patch, names) if switched else {}
        for name, move in moves.items():
            self.targets[name].files.switch(move)
        if died:
            assert isinstance(answer, AsyncsupError)
            assert self.serve.process is not None
            assert self.serve.process.wait(100) == -signal.SIGKILL
            self.client.close()
            self.files_are_whole()
        if committed:
            self.commit("apply", moves)
        elif switched:
            for name, move in moves.items():
                self.targets[name].files.undo(move)
        else:
            for name in names:
                self.targets[name].files.cut_off({p: (self.root(name) / p).is_symlink() for p in edits})
        if died:
            self.end_orphans()
            self.start(crashed=True)
            for name in names:
                self.client.call("patch.prune", target=name, keep=KEEP)
            return
        if not committed:
            assert isinstance(answer, RemoteError)
            patch.held = answer.error_code in {"patch.rolled_back", "patch.rollback_failed"}
        for name in names:
            target, now = self.targets[name], self.saying(name)
            if kind is Kind.COLD:
                target.before = {pid for pid in target.pids if pid}
                target.pids = [None if committed else ANY] * KITS[name].count
            target.told = [now if committed else now | before for before in target.told]

    def arm(self, text: str) -> None:
        temporary = self.folder / "failpoint.new"
        temporary.write_text(text)
        temporary.replace(self.failpoint)

    # --- what always holds ----------------------------------------------------------------------------------

    def status(self, name: str) -> Any:
        return self.client.call("status", names=[name])["targets"][0]

    def files_are_whole(self) -> None:
        for name, target in self.targets.items():
            found, _ = look(self.root(name))
            expected = target.files.visible()
            assert found == expected, f"{name}: {found} instead of {expected}"

    @invariant()
    def files_are_what_they_should_be(self) -> None:
        self.files_are_whole()
        for name in self.free():
            _, odd = look(self.root(name))
            assert not odd, f"{name}: {odd} left over"

    @invariant()
    def processes_are_what_they_should_be(self) -> None:
        deadline = time.monotonic() + 100
        while True:
            found = {target["name"]: target for target in self.client.call("status")["targets"]}
            wrong = {name: fault for name in NAMES if (fault := self.fault(name, found[name])) is not None}
            if not wrong:
                break
            assert time.monotonic() < deadline, wrong
            time.sleep(0.01)
        for name, target in self.targets.items():
            target.pids = [instance["pid"] for instance in found[name]["instances"]]
            target.told = [{instance["status_text"]} for instance in found[name]["instances"]]
            target.one_new = False

    def fault(self, name: str, found: Any) -> str | None:
        """What is not as it should be with a target, so far."""
        target = self.targets[name]
        flying = name in self.in_flight() or (self.behind is not None and name in self.behind[2])
        if (found["busy"] is not None) and not flying:
            return f"is busy with {found['busy']}"
        if found["build"] != target.files.current.build:
            return f"is at build {found['build']}, not {target.files.current.build}"
        for index, instance in enumerate(found["instances"]):
            if not target.up:
                if (instance["state"], instance["pid"]) != ("stopped", None):
                    return f"{index} is {instance['state']}"
                continue
            if instance["state"] != "running":
                return f"{index} is {instance['state']}: {instance['detail']}"
            wanted = target.pids[index]
            if wanted is None and instance["pid"] in target.before:
                return f"{index} is still process {instance['pid']}"
            if wanted and wanted != instance["pid"]:
                return f"{index} is process {instance['pid']}, not {wanted}"
            if instance["status_text"].strip() not in {text.strip() for text in target.told[index]}:
                return f"{index} says {instance['status_text']!r}, not {target.told[index]}"
        new = [instance["pid"] for instance in found["instances"] if instance["pid"] not in target.before]
        if target.one_new and len(new) != 1:
            return f"{len(new)} instances are new, and not one"
        return None

    @invariant()
    def history_agrees(self) -> None:
        under_way = {flight.txn for flight in self.flights}
        entries = self.client.call("patch.history", limit=1000)["transactions"]
        done = [entry for entry in reversed(entries) if entry["txn"] not in under_way]
        assert all(entry["verdict"] for entry in done)
        told = [(e["action"], tuple(sorted(e["targets"]))) for e in done if e["verdict"] == "committed"]
        assert sorted(told) == sorted(self.committed)


# --- what must not be left to chance ------------------------------------------------------------------------


def fault(step: str, how: str) -> Fault:
    return next(each for each in FAULTS if (each.step, each.how) == (step, how))


SDK, TREE = NAMES.index("sdk"), NAMES.index("tree")
PATCH: Final = partial(
    SupervisorMachine.patch,
    first=SDK, count=1, wanted=[("a.txt", "modify")], kind=Kind.WARM, odd="", fault=None, victim=0,
)  # fmt: skip
BOTH: Final = partial(PATCH, count=2)
HAND: Final = partial(PATCH, first=NAMES.index("hand"))
KILLED_INSIDE: Final = partial(
    SupervisorMachine.patch_and_fail_inside,
    first=SDK, count=2, wanted=[("b.txt", "modify")], kind=Kind.WARM, does="kill",
)  # fmt: skip

WRITTEN: Final[Sequence[Callable[[SupervisorMachine], None]]] = (
    BOTH,
    PATCH,
    partial(SupervisorMachine.roll_back, number=SDK, together=False),
    partial(BOTH, fault=fault("prepare", "refuse")),
    partial(BOTH, fault=fault("reload", "fail")),
    partial(PATCH, fault=fault("prepare", "never")),
    # The next process is ready as soon as it says so, whatever became of the reload of the one before.
    partial(PATCH, first=NAMES.index("pair"), fault=fault("reload", "die")),
    # Files are looked at before anybody is asked: those of the second target are not as they were.
    partial(SupervisorMachine.program_acts, number=TREE, path="a.txt", how="write"),
    BOTH,
    partial(PATCH, wanted=[("b.txt", "modify")]),
    partial(SupervisorMachine.prune, number=SDK, keep=0),
    partial(BOTH, wanted=[("b.txt", "modify")], fault=fault("prepare", "wait")),
    partial(SupervisorMachine.abort, number=0),
    HAND,
    partial(SupervisorMachine.abort, number=0),
    HAND,
    partial(SupervisorMachine.restart_supervisor, gently=False),
    partial(KILLED_INSIDE, point="store.switch.recorded"),
    partial(KILLED_INSIDE, point="store.commit.recorded"),
    partial(SupervisorMachine.restart_supervisor, gently=True),
    PATCH,
)
MUST_HAPPEN: Final = (
    *("submitted", "crashes of the supervisor", "kill inside: undone", "kill inside: committed"),
    *("restarts of the supervisor", "failed: prepare refuse", "failed: reload fail", "failed: prepare never"),
    "failed: reload die",
    *("refused: gate.drift", "rollback over 1", "generations pruned"),
    *("aborted: refused", "aborted: rolled_back"),
)
"""Submit, crash, restart, nack, time-out, drift, rollback, prune, abort."""


def tell_counts(tell: Tell) -> None:
    tell(", ".join(f"{what}: {count}" for what, count in sorted(COUNTS.items())))


@pytest.mark.timeout(900)
def test_whatever_is_to_happen_does(tell: Tell) -> None:
    COUNTS.clear()
    machine = SupervisorMachine()
    try:
        for number, step in enumerate(WRITTEN):
            try:
                step(machine)
                machine.files_are_what_they_should_be()
                machine.processes_are_what_they_should_be()
                machine.history_agrees()
            except Exception as error:
                error.add_note(f"in step {number}: {step}")
                raise
    finally:
        machine.teardown()
    tell_counts(tell)
    assert [what for what in MUST_HAPPEN if not COUNTS[what]] == []


@pytest.mark.timeout(3600 if EVERYTHING else 900)
def test_the_supervisor_does_what_the_model_does(tell: Tell) -> None:
    COUNTS.clear()
    run_state_machine_as_test(
        seed(SEED)(SupervisorMachine),
        settings=settings(
            max_examples=300 if EVERYTHING else 3,
            stateful_step_count=60 if EVERYTHING else 30,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # With real processes the way to a smaller example is a long one.
            phases=[Phase.generate],
        ),
    )
    tell_counts(tell)
