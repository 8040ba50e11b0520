"""For the tests that fail every system call: which there are, and what becomes of one and of the rest."""

from __future__ import annotations

import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from power_kit import check, check_goes_on, check_programs, check_released, check_staging, faults_of
from power_model import State
from power_plays import (
    Play,
    Promises,
    Scene,
    begin,
    patched,
    patched_twice,
    promise,
    switch_and_confirm,
    untouched,
)
from traced import Run, mark, traced

from asyncsup.errors import AsyncsupError
from asyncsup.patch.facts import Layout
from asyncsup.patch.store import Store

OPEN: Final = ("open", "openat")
GROWING: Final = (
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "mkdir", "mkdirat"),
    *("write", "pwrite64", "fsync", "fdatasync", "syncfs"),
)
"""What needs room, if only in a folder; a file system may also find out later, when it is to sync."""
CALLS: Final = (*OPEN, *GROWING, "unlink", "unlinkat", "rmdir", "ftruncate")
# Not every architecture has all of them. `-xx`: a path is known from any other text.
OPTIONS: Final = ("-f", "-y", "-xx", "-s", "65536", "-e", f"trace={','.join(f'?{name}' for name in CALLS)}")

_CALL: Final = re.compile(r"(?:(\d+) +)?(\w+)\((.*)")
_MARK: Final = re.compile(r'-1, "((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True, slots=True)
class Point:
    """A system call that concerns the disk of a scene.

    Attributes:
        number: of how many there are in its trace.
        thread: who makes it.
        when: how-manieth of its name it is, in its thread.
        before: how often each name has been called by then, in its thread.
        text: for people.
    """

    number: int
    thread: str
    call: str
    when: int
    creates: bool
    before: Mapping[str, int]
    text: str

    @property
    def errors(self) -> list[str]:
        """With which it may fail."""
        found = ["EIO"]
        if self.call in OPEN:
            found.append("EMFILE")
        if self.call in GROWING or self.creates:
            found.append("ENOSPC")
        return found


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of a system call.

    Attributes:
        what: KILL, before it is carried out; or its error.
        lasting: so does everything after it that would fail of the same.
    """

    point: Point
    what: str = "KILL"
    lasting: bool = False

    def __str__(self) -> str:
        return f"{self.what}{', and from then on,' if self.lasting else ''} at {self.point.text}"

    @property
    def kind(self) -> str:
        return f"{self.what}, lasting" if self.lasting else self.what

    @property
    def options(self) -> list[str]:
        if self.what == "KILL":
            injected = [f"{self.point.call}:signal=KILL:when={self.point.when}"]
        elif not self.lasting:
            injected = [f"{self.point.call}:error={self.what}:when={self.point.when}"]
        else:
            calls = {"EIO": CALLS, "EMFILE": OPEN, "ENOSPC": GROWING}[self.what]
            injected = [
                f"?{call}:error={self.what}:when={self.point.before.get(call, 0) + 1}+" for call in calls
            ]
        return [word for each in injected for word in ("-e", f"inject={each}")]


def points_in(trace: Iterable[str], folder: Path) -> list[Point]:
    """The calls that name something below `folder`; between the marks ``begin`` and ``end``, if there are."""
    needle = "".join(f"\\x{byte:02x}" for byte in os.fsencode(folder))
    counts: dict[str, Counter[str]] = {}
    found: list[Point] = []
    for line in trace:
        match = _CALL.match(line)
        if match is None:
            continue  # A signal, an end, or a call that is resumed.
        thread, call, arguments = match[1] or "", match[2], match[3]
        word = _mark(call, arguments)
        if word == "begin":
            found = []
        elif word == "end":
            break
        seen = counts.setdefault(thread, Counter())
        if needle in arguments:
            creates = call in OPEN and "O_CREAT" in arguments
            text = f"{call}({_readable(arguments).replace(f'{folder}/', '')}"
            found.append(Point(len(found), thread, call, seen[call] + 1, creates, dict(seen), text))
        seen[call] += 1
    return found


def _mark(call: str, arguments: str) -> str:
    match = _MARK.match(arguments) if call == "write" else None
    return "" if match is None else _bytes(match[1]).decode().removeprefix("mark ")


def _bytes(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal.replace("\\x", ""))


def _readable(arguments: str) -> str:
    text = re.sub(r"(?:\\x[0-9a-f]{2})+", lambda match: os.fsdecode(_bytes(match[0])), arguments)
    return text if len(text) < 300 else f"{text[:300]}..."


def promised(trace: Iterable[str], promises: Promises) -> Promises:
    """What holds at the end of a trace."""
    for line in trace:
        match = _CALL.match(line)
        word = "" if match is None else _mark(match[2], match[3])
        if word.startswith("promise "):
            promises = promises.after(word.removeprefix("promise "))
    return promises


# --- a process that is killed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A scene that can be set back to how it is now.

    Attributes:
        standing: what is promised of it.
        faults: what strace does to system calls anyway.
    """

    scene: Scene
    standing: Promises
    beginning: State
    faults: Sequence[str] = ()

    @classmethod
    def of(cls, scene: Scene, promises: Promises, faults: Sequence[str] = ()) -> Stage:
        """As the scene is now."""
        return cls(scene, promises, State.read(scene.disk), faults)

    @classmethod
    def before(cls, play: Play | Attempt, base: Path, layouts: Mapping[str, Layout]) -> Stage:
        """A new scene, in which it can begin."""
        elsewhere = play.elsewhere if isinstance(play, Play) else 0
        scene = Scene.of(play, base, layouts) if isinstance(play, Play) else Scene(base, layouts=layouts)
        play.before(scene)
        at = frozenset({play.at})
        pinned = (scene.state / "state" / "current").is_symlink()
        promises = Promises(seen=at, kept=at, pinned=pinned)
        return cls.of(scene, promises, faults_of(scene, elsewhere))

    def play(self, act: Callable[[Scene], None], *options: str) -> Run:
        """Play from the beginning."""
        self.beginning.write()
        return traced(lambda: act(self.scene), *OPTIONS, *self.faults, *options, folder=self.scene.side)

    def points(self, act: Callable[[Scene], None]) -> list[Point]:
        run = self.play(act)
        check(run.status == 0, f"it failed: {run.errors}")
        faulted = {fault.partition("=")[2].partition(":")[0] for fault in self.faults}
        return [point for point in points_in(run.trace, self.scene.disk) if point.call not in faulted]

    def killed(self, act: Callable[[Scene], None], point: Point) -> Promises:
        """Kill it at a point; the files are one build at once. Returns what is promised then."""
        run = self.play(act, *Fault(point).options)
        check(run.status == -9, f"it ended with {run.status} and was not killed: {run.errors}")
        promises = promised(run.trace, self.standing)
        check_programs(self.scene, self.scene.really_sees(), promises, promises.seen)
        return promises

    def failed(self, act: Callable[[Scene], None], fault: Fault) -> Promises:
        """The same with another fault, which it outlives."""
        run = self.play(act, *fault.options)
        check(run.status == 0, f"it did not take it well: {run.errors}")
        check(any("INJECTED" in line for line in run.trace), "nothing has failed")
        promises = promised(run.trace, self.standing)
        check_programs(self.scene, self.scene.really_sees(), promises, promises.seen)
        return promises


# --- a call that fails --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """Something that a supervisor does with a store, and does not end of.

    Attributes:
        before: brings a scene to where it can begin, with files of build `at`.
        act: raises an `AsyncsupError` when it has failed, and what it had done is undone.
        new: the build it leads to.
    """

    name: str
    before: Callable[[Scene], None]
    act: Callable[[Scene, Store], None]
    at: int
    new: int

    def __str__(self) -> str:
        return self.name


NOT_UNDONE: Final = "and undoing it failed: "


@contextmanager
def undoing(store: Store, txn: int, old: int) -> Iterator[None]:
    """As a supervisor does it: what fails is undone, and what became of it is written down."""
    failure: AsyncsupError | None = None
    verdict = "committed"
    try:
        yield
    except AsyncsupError as error:
        failure, verdict = error, "rolled_back"
        for undo in (store.switch_back, store.abort):
            try:
                undo(txn)
            except AsyncsupError as second:
                verdict = "rollback_failed"
                error.add_note(f"{NOT_UNDONE}{second}")
        if verdict == "rolled_back":
            promise(seen=[old], kept=[old])
    code = None if failure is None else failure.error_code
    try:
        store.finish(txn, verdict=verdict, code=code)
    except AsyncsupError:
        pass  # The report says it, and the next patch or start tries again.
    else:
        if verdict != "rollback_failed":
            promise(verdicts={txn: [verdict, code]})
    if failure is not None:
        raise failure


def try_patch(scene: Scene, store: Store, number: int, *, after: int) -> None:
    with scene.package(number, after=after) as patch:
        txn = begin(store, patch, *scene.names)
        with undoing(store, txn, after):
            for name in scene.names:
                store.stage(txn, name, patch)
            switch_and_confirm(store, txn, after, number)
        for name in scene.names:
            with suppress(OSError, AsyncsupError):  # It is committed all the same, as the report says.
                store.prune(name, 1)


def try_rollback(scene: Scene, store: Store, number: int, *, after: int) -> None:
    txn = store.begin(action="rollback", patch=None, targets=scene.names, asked_by="test")
    promise(begun=[txn])
    with undoing(store, txn, after):
        for name in scene.names:
            generation = store.preview.rollback_target(name)
            assert generation is not None
            store.stage_rollback(txn, name, generation)
        switch_and_confirm(store, txn, after, number)


def try_release(scene: Scene, store: Store) -> None:
    for name in scene.names:
        store.release(name)


FIRST: Final = Attempt("first patch", untouched, partial(try_patch, number=200, after=100), 100, 200)
THIRD: Final = Attempt("third patch", patched_twice, partial(try_patch, number=400, after=300), 300, 400)
ROLLBACK: Final = Attempt("rollback", patched_twice, partial(try_rollback, number=200, after=300), 300, 200)
RELEASE: Final = Attempt("release", patched, try_release, 200, 200)
ATTEMPTS: Final = (FIRST, THIRD, ROLLBACK, RELEASE)


def survive(scene: Scene, attempt: Attempt) -> None:
    """In the traced process: whatever fails once, it is told, nothing has changed, and all goes on."""
    with closing(scene.open()) as store:
        promise(pinned=True)
        before = _descriptors()
        builds = _attempt(scene, store, attempt, once=True)
        check(_descriptors() == before, f"descriptors were {before}, are {_descriptors()}")
        promises = Promises(pinned=True)
        build = check_programs(scene, scene.really_sees(), promises, builds)
        if attempt is RELEASE:
            attempt.act(scene, store)
            for each in scene.targets:
                check_released(each)
        check_goes_on(scene, store, build, promises)
        for name in scene.names:
            store.prune(name, 1)
        check_staging(scene)
        promise(seen=[build], kept=[build])


def _attempt(scene: Scene, store: Store, attempt: Attempt, *, once: bool) -> frozenset[int]:
    """Returns the builds that there may be afterwards."""
    mark("begin")
    try:
        attempt.act(scene, store)
    except AsyncsupError as error:
        mark("end")
        check(error.error_code != "internal", "it was not foreseen")
        failures = [note for note in getattr(error, "__notes__", ()) if note.startswith(NOT_UNDONE)]
        check(not (failures and once), f"{error.message}; {failures}")
        return frozenset({attempt.at})
    mark("end")
    return frozenset({attempt.new})


def endure(scene: Scene, attempt: Attempt) -> None:
    """In the traced process: something fails, and goes on failing to the end."""
    try:
        with closing(scene.open()) as store:
            promise(pinned=True)
            _attempt(scene, store, attempt, once=False)
    except Exception:
        os.writev(2, [traceback.format_exc().encode()])  # `write` may be what fails.
        raise


def _descriptors() -> list[str]:
    with os.scandir("/proc/self/fd") as entries:
        return sorted(str(Path(entry.path).readlink()) for entry in entries)


def open_or_say_why(scene: Scene) -> None:
    try:
        with closing(scene.open()):
            pass
    except AsyncsupError as error:
        check(error.error_code != "internal", "it was not foreseen")
