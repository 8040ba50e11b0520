"""For the tests that fail every step: targets under a real supervisor, faults in it, and what is visible.

A *play* is what is done while a step fails; a *variant* is on what it is done. A dry run of a play with
``*:trace`` says which points it passes, so a point that is added to the sources is found. What is to fail is
written into a file while the supervisor runs; so one supervisor can be failed at many points, one after the
other, and is found as it should be after each of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import warm_serve
from conftest import Serve, targets_in, wait_for
from store_kit import Tree, leftovers, package, seen, write_tree
from warm_serve import Warm

from asyncsup import failpoints
from asyncsup.client import ControlClient
from asyncsup.errors import AsyncsupError, RemoteError
from asyncsup.patch.manifest import Kind
from asyncsup.patch.plan import Policy
from target_sdk.protocol import ENV_TOKEN

PROGRAM: Final = (Path(__file__).parent / "programs" / "patchable.py").read_bytes()
NEW_PROGRAM: Final = PROGRAM.replace(b'VERSION = "one"', b'VERSION = "two"')
BROKEN_PROGRAM: Final = b"raise SystemExit(9)\n"

OLD_BUILD: Final = 200
OLD: Final[Tree] = {
    "program.py": PROGRAM,
    "a.txt": b"old-a",
    "b.txt": b"old-b",
    "gone.txt": b"to be deleted",
    "own.txt": b"the program's own",
    "own.state": b"saved once",
    "data/kept.txt": b"persistent",
}
TOUCHED: Final[Tree] = {"own.txt": b"brought", "lost.txt": b"brought as well"}
"""What patches bring and people change."""
MINE: Final = b"written by a person"

POINT: Final = re.compile(r"^(?:overseer|store|transaction|undo)\.[a-z_.]+$", re.MULTILINE)

PATIENCE: Final = 240.0
"""How long anything may take on a machine that has a lot else to do (seconds). Nothing depends on it but how
soon a test that has to fail does."""


@dataclass(frozen=True, order=True)
class Variant:
    """On what a play is played. With three targets the middle one has the other layout.

    Attributes:
        apart: the state directory is on another file system than the roots.
    """

    kind: str
    layout: str
    count: int
    apart: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-{self.layout}-{self.count}{'-apart' if self.apart else ''}"

    @property
    def layouts(self) -> list[str]:
        other = "tree" if self.layout == "overlay" else "overlay"
        return [other if n == 1 else self.layout for n in range(self.count)]


ALL_VARIANTS: Final = tuple(
    Variant(kind, layout, count)
    for kind in ("warm", "cold")
    for layout in ("overlay", "tree")
    for count in (1, 3)
)
PAIRWISE: Final = tuple(
    Variant(*values)
    for values in (("warm", "overlay", 1), ("cold", "tree", 1), ("warm", "tree", 3), ("cold", "overlay", 3))
)
"""Any two values of different dimensions occur together in one of these. Neighbours (the first two, the last
two) differ in kind and in layout; so two of them that are neighbours show both kinds and both layouts."""


@dataclass(frozen=True)
class Standing:
    """What the targets have; `patch` is the id of the patch it came from, if it was one."""

    build: int
    files: Tree
    patch: str = ""


@dataclass(frozen=True)
class Change:
    """A patch, and what it makes of the targets."""

    standing: Standing
    path: Path
    drift: Policy = "refuse"


class Scene:
    """A supervisor in a folder of its own, and targets ``t0``, ``t1``... in it."""

    def __init__(self, folder: Path, variant: Variant, state_dir: Path, *, settings: str = "") -> None:
        self.folder = folder
        self.variant = variant
        self.names = [f"t{n}" for n in range(variant.count)]
        self.state_dir = state_dir
        self.serve = Serve(folder)
        self.serve.alone = True
        self.now = Standing(OLD_BUILD, OLD)
        """What the targets have, as far as a patch or a rollback has been seen through."""
        self.before: Standing | None = None
        """What a rollback would lead to."""
        self.untouched = True
        """No file is managed."""
        self._newest_build = OLD_BUILD
        self._points = folder / "points"
        self._armed_at = 0
        self._arms = 0
        self._client: ControlClient | None = None
        self._set(settings)

    # --- the stage ------------------------------------------------------------------------------------------

    def _set(self, settings: str) -> None:
        self.folder.mkdir()
        # An operator's commit is a step as well.
        commit = "manual" if self.variant.count > 1 else "auto"
        text = [
            f'[supervisor]\nstate_dir = "{self.state_dir}"\nruntime_dir = ".asyncsup/run"\n',
            f'[patch]\ntrust = "none"\nprobation = "0s"\nack_timeout = "{PATIENCE:g}s"\nkeep = 1\n'
            f'wait_max = "{PATIENCE:g}s"\ncommit = "{commit}"\n{settings}',
            f'[defaults]\nprotocol = "sdk"\nbuild = {OLD_BUILD}\nrestart_delay = "50ms"\n'
            f'start_timeout = "{PATIENCE:g}s"\nstop_timeout = "2s"\n'
            # That they end together with their supervisor, again and again, is no fault of theirs.
            'restart_max_delay = "50ms"\nstart_limit_interval = "0s"\n',
        ]
        for name, layout in zip(self.names, self.variant.layouts, strict=True):
            write_tree(self.root(name), OLD)
            (self.folder / f"{name}.work").mkdir()
            # A cache of bytecode for every generation would have each of them compile the library once more.
            command = json.dumps(
                [sys.executable, "-X", "pycache_prefix=", str(self.root(name) / "program.py")]
            )
            text.append(
                f'[target.{name}]\nroot = "{name}"\nlayout = "{layout}"\ndirectory = "{name}.work"\n'
                f"command = {command}\n"
            )
            if layout == "tree":
                text.append('persist = ["data", "own.state"]\n')
        self.serve.write("".join(text))

    def as_on_the_first_day(self) -> None:
        self.now, self.before, self.untouched = Standing(OLD_BUILD, OLD), None, True

    def root(self, name: str) -> Path:
        return self.folder / name

    def behave(self, name: str, **behaviour: str) -> None:
        # In one step: the program may be reading it.
        temporary = self.folder / f"{name}.work" / "behaviour.new"
        temporary.write_text(json.dumps(behaviour))
        temporary.replace(temporary.with_name("behaviour.json"))

    def behave_well(self) -> None:
        for name in self.names:
            self.behave(name)

    # --- faults ---------------------------------------------------------------------------------------------

    def arm(self, *entries: str) -> None:
        """From now on these are the faults; passing any point is noted. What hangs is let go."""
        self._armed_at = len(self.serve.errors())
        self._write_points(entries)

    def let_go(self) -> None:
        """As `arm` with nothing, but `passed` goes on."""
        self._write_points(())

    def _write_points(self, entries: Sequence[str]) -> None:
        self._arms += 1
        fresh = self.folder / f"points.{self._arms % 2}"
        fresh.write_text(",".join(["*:trace", *entries]))
        fresh.replace(self._points)

    def passed(self) -> list[str]:
        """The points passed since `arm`, in order."""
        return POINT.findall(self.words())

    def words(self) -> str:
        """What the supervisor has said since `arm`."""
        return self.serve.errors()[self._armed_at :]

    # --- the supervisor -------------------------------------------------------------------------------------

    @property
    def client(self) -> ControlClient:
        if self._client is None:
            self._client = ControlClient(self.serve.endpoint)
        return self._client

    @property
    def process(self) -> subprocess.Popen[bytes] | Warm:
        assert self.serve.process is not None
        return self.serve.process

    def spawn(self) -> None:
        """Start `serve` without waiting for anything."""
        with self.serve.stderr.open("ab") as output:
            self.serve.process = warm_serve.spawn(
                self.serve.command(),
                env={**os.environ, failpoints.VARIABLE: f"@{self._points}"},
                output=output,
            )

    def comes_up(self) -> bool:
        """Start `serve`; whether it takes requests (True), or has ended before."""
        known = len(self.serve.errors())
        self.spawn()

        def outcome() -> str | None:
            if "ready at ipc://" in self.serve.errors()[known:]:
                return "ready"
            return None if self.process.poll() is None else "ended"

        return bool(self.wait_for(outcome, "the supervisor to be ready or to end") == "ready")

    def start(self) -> None:
        """Start `serve`, and wait until every target is up on the files it should have."""
        self.arm()
        assert self.comes_up(), "serve ended early"
        self.expect_processes()

    def stop(self) -> None:
        self.close_client()
        assert self.serve.stop(timeout=PATIENCE) == 0

    def close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def kill(self) -> None:
        """End the supervisor as the OOM killer would, and then its targets."""
        self.process.kill()
        self.killed()
        self.end_orphans()

    def killed(self) -> None:
        """Wait for its end by SIGKILL."""
        self.close_client()
        status = self.process.wait(PATIENCE)
        assert status == -signal.SIGKILL, f"serve ended with {status}"

    def tear_down(self) -> None:
        """End everything, whatever has gone wrong before."""
        self.close_client()
        if self.serve.process is not None and self.serve.process.poll() is None:
            self.serve.process.kill()
            self.serve.process.wait()
        self.end_orphans()

    @staticmethod
    def wait_for(condition: Callable[[], Any], what: str) -> Any:
        return wait_for(condition, what, PATIENCE, every=0.03)

    # --- processes ------------------------------------------------------------------------------------------

    def status(self) -> list[Any]:
        return list(self.client.call("status", timeout=PATIENCE)["targets"])

    def pids(self) -> list[int]:
        return [instance["pid"] for target in self.status() for instance in target["instances"]]

    def orphans(self) -> list[int]:
        """The processes of this scene's targets."""
        return targets_in(self.folder)

    def end_orphans(self) -> None:
        def left() -> bool:
            pids = self.orphans()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        self.wait_for(left, "the orphans to end")

    def check_environments(self) -> None:
        """What makes the supervisor fail is not for its targets."""
        for pid in self.pids():
            names = [v.partition(b"=")[0] for v in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
            assert ENV_TOKEN.encode() in names
            assert failpoints.VARIABLE.encode() not in names, f"process {pid} was given {names}"

    # --- what is visible ------------------------------------------------------------------------------------

    def visible(self) -> Tree:
        """The files of all targets, which must be the same."""
        trees = [seen(self.root(name)) for name in self.names]
        assert all(tree == trees[0] for tree in trees), "the targets differ"
        return trees[0]

    def expect_files(self, what: str) -> None:
        assert differences(self.now.files, self.visible()) == {}, what

    def said(self) -> str:
        """What every program says that has read the files."""
        files = self.now.files
        version = {PROGRAM: "one", NEW_PROGRAM: "two"}[files["program.py"]]
        names = [name for name in ("a.txt", "b.txt", "sub/c.txt") if name in files]
        return f"{version} build={self.now.build} " + " ".join(f"{n}={files[n].decode()}" for n in names)

    def expect_processes(self) -> None:
        """Every target is up, and has taken up the files."""

        def as_expected() -> bool:
            text = self.said()
            return all(
                (target["state"], target["build"], target["busy"]) == ("running", self.now.build, None)
                and all(instance["status_text"] == text for instance in target["instances"])
                for target in self.status()
            )

        try:
            self.wait_for(as_expected, "the targets to be up on the right files")
        except AssertionError as error:
            error.add_note(f"expected {self.said()!r}, have {self.status()}")
            raise

    # --- what is done ---------------------------------------------------------------------------------------

    def change(
        self, text: str, *, program: bytes | None = None, more: Tree | None = None, drift: Policy = "refuse"
    ) -> Change:
        """A patch on top of what is there, which changes, adds and deletes, and brings `more` besides."""
        self._newest_build += 1
        build = self._newest_build
        content = f"{text}{build}".encode()
        old = self.now.files
        files = {**old, "a.txt": content + b"-a", "b.txt": content + b"-b", **(more or {})}
        if program is not None:
            files["program.py"] = program
        # What is there now and then, or comes and goes with every second patch.
        for path in ("sub/c.txt", "gone.txt"):
            if files.pop(path, None) is None:
                files[path] = content + b"-c"
        new = {path: files[path] for path in sorted(files.keys() - old.keys())}
        common = sorted(files.keys() & old.keys())
        modified = {path: files[path] for path in common if files[path] != old[path]}
        with package(
            self.folder,
            build,
            new=new,
            modified=modified,
            deleted=sorted(old.keys() - files.keys()),
            targets=self.names,
            kind=Kind.COLD if program is not None else Kind.WARM,
        ) as made:
            return Change(Standing(build, files, made.id), made.path, drift)

    def submit(self, change: Change, client: ControlClient | None = None) -> Any:
        """Apply and, where that takes an operator, commit; returns the report."""
        client = client or self.client
        report = client.call("patch.apply", path=str(change.path), drift=change.drift, timeout=PATIENCE)
        if report["verdict"] == "uncommitted":
            report = client.call("patch.commit", id=str(report["txn"]), timeout=PATIENCE)
        return report

    def other_program(self) -> bytes | None:
        """The program a patch of this variant brings; None for a warm one."""
        if self.variant.kind == "warm":
            return None
        return NEW_PROGRAM if self.now.files["program.py"] == PROGRAM else PROGRAM

    def apply(self, more: Tree | None = None, *, drift: Policy = "refuse") -> None:
        """Apply another patch, which must go through: nothing of what has happened is in its way."""
        self.behave_well()
        change = self.change("next", program=self.other_program(), more=more, drift=drift)
        assert self.submit(change)["verdict"] == "committed"
        self.before, self.now, self.untouched = self.now, change.standing, False
        self.expect_processes()
        self.expect_files("after a patch")
        for name in self.names:
            assert leftovers(self.root(name)) == [], name

    def restart(self) -> None:
        self.behave_well()
        self.client.call("restart", names=self.names, timeout=PATIENCE)
        self.expect_processes()

    def release(self) -> None:
        """Make all files ordinary ones, as before the first patch."""
        for name in self.names:
            self.client.call("target.release", target=name, timeout=PATIENCE)
        self.before, self.untouched = None, True
        self.expect_released()

    def expect_released(self, names: Sequence[str] | None = None) -> None:
        """The files of all targets, or of these, are ordinary ones."""
        self.expect_files("after a release")
        for name in self.names if names is None else names:
            root = self.root(name)
            assert leftovers(root) == []
            assert [path for path in (root, *root.rglob("*")) if path.is_symlink()] == []

    def newest_transaction(self) -> Any:
        found = self.client.call("patch.history", timeout=PATIENCE)["transactions"]
        return found[0] if found else None


def differences(expected: Tree, found: Tree) -> dict[str, tuple[bytes | None, bytes | None]]:
    """By path, what a file should be and what it is."""
    return {
        path: (expected.get(path), found.get(path))
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    }


# --- plays --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What the play would make of things, if it were seen through.

    Attributes:
        reference: the patch that `patch abort` would have to end.
        package: the patch to apply.
    """

    standing: Standing
    before: Standing | None
    reference: str
    act: Callable[[ControlClient], Any]
    package: Path | None = None
    drift: Policy = "refuse"

    def is_reached(self, scene: Scene) -> None:
        scene.now, scene.before = self.standing, self.before


@dataclass(frozen=True)
class Play:
    """Something a supervisor does, with all targets up.

    Attributes:
        prepare: brings the scene to where it begins.
        aim: says what is then to be done.
        undone: it fails by itself, and is undone.
        is_patch: it is a transaction: in the history, and open to `patch abort`.
    """

    name: str
    prepare: Callable[[Scene], None]
    aim: Callable[[Scene], Goal]
    undone: bool = False
    is_patch: bool = True

    def __str__(self) -> str:
        return self.name

    def begin(self, scene: Scene) -> Goal:
        scene.behave_well()
        self.prepare(scene)
        scene.untouched = False
        return self.aim(scene)


def _never_patched(scene: Scene) -> None:
    if not scene.untouched:
        scene.release()


def _patched(scene: Scene) -> None:
    if scene.before is None:
        scene.apply()


def _applying(scene: Scene) -> Goal:
    return _goal(scene, scene.change("new", program=scene.other_program()))


def _failing(scene: Scene) -> Goal:
    """The last target does not take the patch up; so all of them go back."""
    if scene.variant.kind == "cold":
        return _goal(scene, scene.change("bad", program=BROKEN_PROGRAM))
    scene.behave(scene.names[-1], reload="fail")
    return _goal(scene, scene.change("bad"))


def _goal(scene: Scene, change: Change) -> Goal:
    return Goal(
        standing=change.standing,
        before=scene.now,
        reference=change.standing.patch,
        act=lambda client: scene.submit(change, client),
        package=change.path,
        drift=change.drift,
    )


def _rolling_back(scene: Scene, drift: Policy = "refuse") -> Goal:
    assert scene.before is not None
    return Goal(
        standing=scene.before,
        before=None,
        reference=scene.now.patch,
        act=lambda client: client.call(
            "patch.rollback", target="t0", together=True, drift=drift, timeout=PATIENCE
        ),
    )


def _touched(scene: Scene) -> None:
    """Patches have brought what people will change."""
    build = scene.now.build
    scene.apply({path: content + b" %d" % build for path, content in TOUCHED.items()}, drift="overwrite")


def _overwriting(scene: Scene) -> Goal:
    """One file was replaced, one removed, and the program has saved what persists anew."""
    for name in scene.names:
        root = scene.root(name)
        (root / "lost.txt").unlink()
        for path, content in (("own.txt", MINE), ("own.state", _saved(scene))):
            (root / "saved.tmp").write_bytes(content)
            (root / "saved.tmp").replace(root / path)
    files = {**scene.now.files, "own.txt": MINE, "own.state": _saved(scene)}
    del files["lost.txt"]
    scene.now = replace(scene.now, files=files)
    more = dict.fromkeys(TOUCHED, b"brought anew")
    return _goal(scene, scene.change("over", program=scene.other_program(), more=more, drift="overwrite"))


def _saved(scene: Scene) -> bytes:
    return b"saved at %d" % scene.now.build


def _keeping(scene: Scene) -> Goal:
    """One file was written through, as a program does that opens it to write."""
    for name in scene.names:
        path = (scene.root(name) / "own.txt").resolve()
        path.chmod(0o644)
        path.write_bytes(MINE)
    scene.now = replace(scene.now, files={**scene.now.files, "own.txt": MINE})
    assert scene.before is not None
    scene.before = replace(scene.before, files={**scene.before.files, "own.txt": MINE})
    return _rolling_back(scene, drift="keep")


def _releasing(scene: Scene) -> Goal:
    def act(client: ControlClient) -> None:
        for name in scene.names:
            client.call("target.release", target=name, timeout=PATIENCE)

    scene.before = None  # Whatever becomes of it, some targets have no way back then.
    return Goal(standing=scene.now, before=None, reference="", act=act)


FIRST_APPLY: Final = Play("first apply", _never_patched, _applying)
APPLY: Final = Play("apply", _patched, _applying)
UNDONE: Final = Play("undone apply", _never_patched, _failing, undone=True)
ROLLBACK: Final = Play("rollback", _patched, _rolling_back)
OVERWRITING: Final = Play("apply over drift", _touched, _overwriting)
KEEPING: Final = Play("rollback keeping drift", _touched, _keeping)
RELEASE: Final = Play("release", _patched, _releasing, is_patch=False)
PLAYS: Final = (FIRST_APPLY, APPLY, UNDONE, ROLLBACK, OVERWRITING, KEEPING, RELEASE)


@dataclass(frozen=True)
class Dry:
    """What a dry run of a play with a variant has passed, in order."""

    play: Play
    variant: Variant
    passed: Sequence[str]

    def __str__(self) -> str:
        return f"{self.play}, {self.variant}"

    def points(self) -> dict[str, int]:
        """How often each point is passed. Of a play that is undone, only what is passed on the way back."""
        passed = list(self.passed)
        if self.play.undone:
            first = next(n for n, point in enumerate(passed) if point.startswith("undo."))
            return {point: passed.count(point) for point in passed[first:]}
        return {point: passed.count(point) for point in passed}


@dataclass(frozen=True)
class Case:
    """A fault at one moment of a play: when a point is passed for the so-manieth time."""

    dry: Dry
    point: str
    fault: str
    times: int

    def __str__(self) -> str:
        return f"{self.dry}: {self.entry}"

    @property
    def entry(self) -> str:
        return f"{self.point}:{self.fault}:{self.times}"


def is_switched(passed: Sequence[str]) -> bool:
    """Whether programs see the new files by then."""
    return "store.switch.renamed" in passed and "store.switch_back.renamed" not in passed


def is_committed(passed: Sequence[str]) -> bool:
    """Whether it stays by then, whatever happens."""
    return "store.commit.recorded" in passed


def dry_run(scene: Scene, play: Play) -> Dry:
    """Play it with nothing failing but what the play itself is about."""
    scene.start()
    scene.check_environments()
    goal = play.begin(scene)
    scene.arm()
    try:
        goal.act(scene.client)
    except RemoteError as error:
        assert play.undone, error.message
        assert error.error_code == "patch.rolled_back", error.message
    else:
        assert not play.undone
        goal.is_reached(scene)
    scene.expect_processes()
    scene.expect_files("after the dry run")
    if not play.is_patch:
        scene.expect_released()
    passed = scene.passed()
    scene.stop()
    return Dry(play, scene.variant, passed)


# --- around a fault ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def asked(act: Callable[[ControlClient], Any], scene: Scene) -> Iterator[list[Any]]:
    """Ask for something while the block runs; the list then holds the answer, or the error."""
    outcome: list[Any] = []

    def ask() -> None:
        with ControlClient(scene.serve.endpoint) as client:
            try:
                outcome.append(act(client))
            except AsyncsupError as error:
                outcome.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield outcome
    except BaseException:
        scene.tear_down()  # or the thread would never end
        raise
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a client still waits"


# --- many at a time -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def scene_in(base: Path, name: str, variant: Variant, *, settings: str = "") -> Iterator[Scene]:
    """A scene that leaves nothing behind; a failure in the block is told with the supervisor's last words."""
    with contextlib.ExitStack() as stack:
        state_dir = base / name / ".asyncsup"
        if variant.apart:
            state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="as-state-")))
        scene = Scene(base / name, variant, state_dir, settings=settings)
        try:
            yield scene
        except Exception as error:
            words = scene.words().splitlines()
            error.add_note("\n".join(words[-60:]))
            raise
        finally:
            scene.tear_down()
            shutil.rmtree(scene.folder)
