"""Every place in the store's sources that makes something durable, and on whose behalf a recorded sync was.

The places are read from the sources, so a sync that is added is found. In a traced child `name_syncs` leaves
a word before each sync; so it is known which of the recorded ones would be missing without the place.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from power_model import Mark, Operation, Sync
from traced import mark

from asyncsup.patch import fs
from asyncsup.patch.database import Database

FOLDER: Final = Path(fs.__file__).parent
MODULES: Final = (
    "carrying", "confirmed", "database", "fs", "overlay", "overlay_files", "pointer", "pruning", "recovery",
    "registration", "statedir", "store", "target_files", "tree", "tree_files",
)  # fmt: skip

NOW: Final = "now"
AT_THE_BARRIER: Final = "at the barrier"
WRITE: Final = "write"

INSIDE: Final = frozenset({"Registration._register", "Registration._begin_anew", "Store._add_transaction"})
"""Functions that are called in a write only, and so do not end one."""


@dataclass(frozen=True, slots=True)
class Site:
    """A call in the sources.

    Attributes:
        kind: it syncs now; or has something synced at the next barrier; or writes to the database, durably.
    """

    module: str
    function: str
    first_line: int
    last_line: int
    kind: str
    text: str
    repeat: int = 1

    def __str__(self) -> str:
        again = f" ({self.repeat})" if self.repeat > 1 else ""
        return f"{self.module}.{self.function}: {self.text}{again}"

    def is_at(self, place: str) -> bool:
        module, _, line = place.partition(":")
        return module == self.module and self.first_line <= int(line) <= self.last_line


class _Finder(ast.NodeVisitor):
    def __init__(self, module: str, source: str, writers: frozenset[str]) -> None:
        self.found: list[Site] = []
        self._module = module
        self._lines = source.splitlines()
        self._writers = writers
        self._where: list[str] = []
        self._in_write = 0

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_named(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_named(node)

    def _visit_named(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        self._where.append(node.name)
        self.generic_visit(node)
        self._where.pop()

    def visit_With(self, node: ast.With) -> None:
        writes = [
            item for item in node.items if _name(item.context_expr).endswith(("database.write", "self.write"))
        ]
        for item in node.items:
            self.visit(item)
        self._in_write += len(writes)
        for each in node.body:
            self.visit(each)
        self._in_write -= len(writes)

    def _is_in_write(self) -> bool:
        return self._in_write > 0 or ".".join(self._where) in INSIDE

    def visit_Call(self, node: ast.Call) -> None:
        name = _name(node)
        kind = None
        if name in {"os.fsync", "_libc.syncfs", "fs.sync_directory", "durability.file", "durability.barrier"}:
            kind = NOW
        elif name == "durability.directory":
            kind = AT_THE_BARRIER
        elif self._module != "database" and not self._is_in_write() and _is_durable(node):
            owner, _, method = name.rpartition(".")
            if owner.endswith("database") and method in self._writers:
                kind = WRITE
        if kind is not None:
            text = " ".join(self._text(node).split())
            text = text if len(text) < 60 else f"{name}(...)"
            function = ".".join(self._where)
            repeat = 1 + sum((site.function, site.text) == (function, text) for site in self.found)
            last = node.end_lineno or node.lineno
            self.found.append(Site(self._module, function, node.lineno, last, kind, text, repeat))
        self.generic_visit(node)

    def _text(self, node: ast.Call) -> str:
        """As `ast.get_source_segment`, which splits the whole source for each."""
        assert node.end_lineno is not None
        lines = self._lines[node.lineno - 1 : node.end_lineno]
        lines[-1] = lines[-1].encode()[: node.end_col_offset].decode()
        lines[0] = lines[0].encode()[node.col_offset :].decode()
        return "\n".join(lines)


def _name(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _is_durable(node: ast.Call) -> bool:
    return not any(k.arg == "durable" and ast.unparse(k.value) == "False" for k in node.keywords)


def _writers() -> frozenset[str]:
    """The methods of the database that end with a durable write."""
    found = {"write"}
    for node in ast.walk(ast.parse((FOLDER / "database.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            calls = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
            if any(_name(call) == "self.write" and _is_durable(call) for call in calls):
                found.add(node.name)
    return frozenset(found)


def sync_sites() -> list[Site]:
    found = []
    writers = _writers()
    for module in MODULES:
        source = (FOLDER / f"{module}.py").read_text()
        finder = _Finder(module, source, writers)
        finder.visit(ast.parse(source))
        found += finder.found
    return found


# --- in the traced child ------------------------------------------------------------------------------------


def _places(frame: FrameType | None) -> list[str]:
    """Where in the sources a frame and its callers are, innermost first."""
    found = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == FOLDER:
            found.append(f"{path.stem}:{frame.f_lineno}")
        frame = frame.f_back
    return found


def name_syncs() -> None:
    """From here on every sync of the store says in the trace where it comes from. For a child: that stays."""
    real_fsync, real_syncfs = os.fsync, fs._libc.syncfs
    real_directory, real_write = fs.Durability.directory, Database.write
    asked_for: defaultdict[tuple[int, int, int], list[str]] = defaultdict(list)
    writing: list[str] = []

    def key(durability: object, fd: int) -> tuple[int, int, int]:
        status = os.fstat(fd)
        return id(durability), status.st_dev, status.st_ino

    def tell(by: Sequence[str], asked_by: Sequence[str] = ()) -> None:
        mark(f"sync {json.dumps({'by': by, 'asked_by': asked_by})}")

    def directory(self: fs.Durability, fd: int) -> None:
        real_directory(self, fd)
        if key(self, fd)[1:] in self._folders:
            asked_for[key(self, fd)].append(_places(sys._getframe(1))[0])

    def fsync(fd: int) -> None:
        frame = sys._getframe(1)
        of_barrier = frame.f_code is fs.Durability.barrier.__code__
        tell(_places(frame), asked_for.pop(key(frame.f_locals["self"], fd)) if of_barrier else ())
        real_fsync(fd)
        tell(writing)

    def syncfs(fd: int) -> int:
        tell(_places(sys._getframe(1)))
        result = int(real_syncfs(fd))
        tell(writing)
        return result

    @contextmanager
    def write(self: Database, *, durable: bool = True) -> Iterator[Any]:
        outermost = not writing
        if outermost:
            # Past contextlib, whoever has asked for it.
            writing.extend(_places(sys._getframe(2)) if durable else ["nobody:0"])
            tell(writing)
        with real_write(self, durable=durable) as sql:
            yield sql
        if outermost:
            writing.clear()
            tell(writing)

    for owner, name, replacement in (
        (os, "fsync", fsync),
        (fs._libc, "syncfs", syncfs),
        (fs.Durability, "directory", directory),
        (Database, "write", write),
    ):
        setattr(owner, name, replacement)


# --- in a recording -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recorded:
    """A sync in a recording.

    Attributes:
        number: of the operation.
        by: where in the sources it comes from.
        asked_by: who has asked for it, where it was made at a barrier.
    """

    number: int
    by: Sequence[str]
    asked_by: Sequence[str]


def recorded_syncs(operations: Iterable[Operation]) -> list[Recorded]:
    found = []
    words: dict[str, list[str]] = {}
    for number, operation in enumerate(operations):
        if isinstance(operation, Mark) and operation.name.startswith("sync "):
            words = json.loads(operation.name.removeprefix("sync "))
        elif isinstance(operation, Sync):
            found.append(Recorded(number, words.get("by", []), words.get("asked_by", [])))
    return found


def syncs_of(site: Site, syncs: Iterable[Recorded]) -> list[int]:
    """Numbers of the syncs that would be missing without a site."""
    if site.kind == AT_THE_BARRIER:
        return [sync.number for sync in syncs if sync.asked_by and all(map(site.is_at, sync.asked_by))]
    return [sync.number for sync in syncs if any(map(site.is_at, sync.by))]
