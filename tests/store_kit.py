"""For the tests of the store: patches as real packages, roots as real folders, and what a program sees."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncsup.errors import PatchRefusedError
from asyncsup.patch.facts import Layout, PatchInfo, TargetRoot
from asyncsup.patch.manifest import FileChange, Kind, Manifest, Op, encode_manifest
from asyncsup.patch.package import Package, open_package
from asyncsup.patch.plan import Policy
from asyncsup.patch.store import Store

Tree = dict[str, bytes]

MEMORY = Path("/dev/shm")


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where that is possible: a test that cuts no power need not wait for a disk."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        yield Path(folder)


def write_tree(root: Path, files: Mapping[str, bytes]) -> None:
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def seen(root: Path) -> Tree:
    """Every file a program finds below its root; a name that leads nowhere is a file that is not there, and
    the names used for a swap are nobody's files."""
    found = {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".asyncsup~")]
        for name in names:
            if name.startswith(".asyncsup~"):
                continue
            path = Path(folder, name)
            if path.is_file():
                found[str(path.relative_to(root))] = path.read_bytes()
    return found


def look(root: Path) -> tuple[Tree, list[str]]:
    """What a program finds below its root, and what no program has put there: links that lead nowhere, and
    names of the store's own."""
    found, odd = {}, []
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = f"{folder}/{name}"
            try:
                with open(path, "rb") as file:  # noqa: PTH123 - done often
                    content = file.read()
            except FileNotFoundError:
                odd.append(path)
                continue
            if name.startswith(".asyncsup~"):
                odd.append(path)
            else:
                found[path[len(str(root)) + 1 :]] = content
    odd += [name for name in os.listdir(root.parent) if name.startswith(".asyncsup~")]  # noqa: PTH208
    return found, odd


def leftovers(root: Path) -> list[str]:
    """Names of ours beside the program's files, and links that lead nowhere."""
    return sorted(
        str(path) for path in (root, *root.rglob("*"), *root.parent.iterdir())
        if path.name.startswith(".asyncsup~") or (path.is_symlink() and not path.exists())
    )  # fmt: skip


def change(path: str, op: Op, content: bytes | None = None, **more: Any) -> FileChange:
    if content is None:
        return FileChange(path=path, op=op, **more)
    return FileChange(
        path=path,
        op=op,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        **more,
    )


def package(
    folder: Path,
    build: int,
    *,
    new: Mapping[str, bytes] | None = None,
    modified: Mapping[str, bytes] | None = None,
    deleted: Iterable[str] = (),
    targets: Iterable[str] = ("web",),
    kind: Kind = Kind.WARM,
    region: str = "local",
    name: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Package:
    """A patch package, written and opened again; `options` are more fields of single `FileChange`s."""
    options = options or {}
    contents = {**(new or {}), **(modified or {})}
    changes = [
        *(change(p, Op.NEW, c, **options.get(p, {})) for p, c in (new or {}).items()),
        *(change(p, Op.MODIFIED, c, **options.get(p, {})) for p, c in (modified or {}).items()),
        *(change(p, Op.DELETED, **options.get(p, {})) for p in deleted),
    ]
    manifest = Manifest(
        name="patch",
        version=f"1.{build}",
        build=build,
        kind=kind,
        targets=tuple(targets),
        regions=(region,),
        files=tuple(changes),
    )
    path = folder / f"{name or f'patch-{build}'}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", encode_manifest(manifest))
        for entry, content in contents.items():
            archive.writestr(f"files/{entry}", content)
    return open_package(path)


def info(patch: Package) -> PatchInfo:
    manifest = patch.manifest
    return PatchInfo(
        id=patch.id,
        name=manifest.name,
        version=manifest.version,
        build=manifest.build,
        kind=manifest.kind.value,
    )


def begin(store: Store, patch: Package, *targets: str, by_hand: bool = False) -> int:
    names = targets or ("web",)
    return store.begin(action="apply", patch=info(patch), targets=names, asked_by="test", by_hand=by_hand)


def staged(store: Store, patch: Package, *targets: str, policy: Policy = "refuse") -> int:
    """A transaction, staged and ready to switch."""
    txn = begin(store, patch, *targets)
    for target in targets or ("web",):
        store.stage(txn, target, patch, policy=policy)
    return txn


def apply(store: Store, patch: Package, *targets: str, policy: Policy = "refuse") -> int:
    txn = staged(store, patch, *targets, policy=policy)
    store.switch(txn)
    store.commit(txn)
    store.finish(txn, verdict="committed")
    return txn


def roll_back(store: Store, *targets: str, policy: Policy = "refuse") -> int:
    targets = targets or ("web",)
    txn = store.begin(action="rollback", patch=None, targets=targets, asked_by="test")
    for target in targets:
        generation = store.preview.rollback_target(target)
        assert generation is not None
        store.stage_rollback(txn, target, generation, policy=policy)
    store.switch(txn)
    store.commit(txn)
    store.finish(txn, verdict="committed")
    return txn


def open_store(base: Path, *targets: TargetRoot) -> Store:
    """A store as a supervisor opens it: registered and recovered."""
    store = Store.open(base / "state")
    try:
        store.register(targets)
        store.recover()
    except BaseException:
        store.close()
        raise
    return store


def target(base: Path, layout: Layout, name: str = "web", **more: Any) -> TargetRoot:
    root = base / f"{name}-root"
    root.mkdir(exist_ok=True)
    return TargetRoot(name=name, root=root, layout=layout, **more)


FILES = {"app.json": b"one", "rules/eu.json": b"eu", "rules/us.json": b"us", "run.sh": b"#!/bin/sh\n"}


class Bench:
    """A store, its base folder, and targets with `FILES` in their roots."""

    def __init__(self, base: Path, stack: ExitStack, layout: Layout, *names: str, **options: Any) -> None:
        self.base = base
        self.targets = [target(base, layout, name, **options) for name in names or ("web",)]
        for each in self.targets:
            write_tree(each.root, FILES)
            (each.root / "run.sh").chmod(0o755)
        self.stack = stack
        self.store = open_store(base, *self.targets)
        stack.callback(self.close)

    def close(self) -> None:
        self.store.close()

    @property
    def root(self) -> Path:
        return self.targets[0].root

    def put(self, path: str, content: bytes) -> None:
        (self.root / path).write_bytes(content)

    def reopen(self, *targets: TargetRoot) -> None:
        self.store.close()
        self.store = open_store(self.base, *(targets or self.targets))

    def patch(self, build: int, **changes: Any) -> Package:
        return self.stack.enter_context(package(self.base, build, **changes))


def refused_at_staging(b: Bench, patch: Package) -> PatchRefusedError:
    """Stage it in vain; nothing may be left of the attempt."""
    before = seen(b.root)
    txn = begin(b.store, patch)
    with pytest.raises(PatchRefusedError) as caught:
        b.store.stage(txn, "web", patch)
    assert seen(b.root) == before
    b.store.abort(txn)
    assert leftovers(b.root) == []
    return caught.value


class Meddling:
    """A package during whose first extraction something else happens, as it may on a live system."""

    def __init__(self, patch: Package, meddle: Callable[[], object]) -> None:
        self.package = patch
        self.id = patch.id
        self.manifest: Manifest = patch.manifest
        self._meddle: Callable[[], object] | None = meddle

    def extract(self, change: FileChange, fd: int, progress: Callable[[int], None] | None = None) -> None:
        self.package.extract(change, fd, progress)
        self._once()

    def rebuild(
        self, change: FileChange, base: int, fd: int, progress: Callable[[int], None] | None = None
    ) -> None:
        self.package.rebuild(change, base, fd, progress)
        self._once()

    def _once(self) -> None:
        if self._meddle is not None:
            meddle, self._meddle = self._meddle, None
            meddle()


@contextmanager
def benches() -> Iterator[Callable[..., Bench]]:
    """What the `bench` fixtures of the tests are: ``bench(layout, *names, **options of the targets)``."""
    with memory_folder() as base, ExitStack() as stack:
        yield lambda layout, *names, **options: Bench(base, stack, layout, *names, **options)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own at `folder`."""
    folder.mkdir(exist_ok=True)
    # Not open to everybody, as it would be: a state directory must not.
    command = ["mount", "-t", "tmpfs", "-o", f"mode=755,{options}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
