"""What a target's files should be: the model that state machines hold the store and the supervisor against.

A file's content is a `Cell`; every generation that shares the file has the same cell, as it has the same hard
link. So what somebody writes through one of them shows in all. A target's model is the stack of its
generations, what stands in its root, and nothing else: no pointer, no database, no order of syncs.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final

from asyncsup.patch.manifest import Op
from asyncsup.patch.plan import Policy

Tree = dict[str, bytes]


@dataclass(eq=False)
class Cell:
    """A file, whatever its names are."""

    content: bytes


def cells(contents: Mapping[str, bytes]) -> dict[str, Cell]:
    """Files that are there from the beginning."""
    return {path: Cell(content) for path, content in contents.items()}


LINK: Final = Cell(b"")
"""In the root of an overlay: what stands there is what the current generation has."""

ADOPTED: Final = object()
Origin = object
"""Which version of a file a generation has, as far as patches go: the generation that the patch has made,
`ADOPTED`, or None where no patch has ever touched the name. Generations differ by patches where these do."""


@dataclass(frozen=True)
class Edit:
    """What a patch does to one file.

    Attributes:
        base: the content that it was made for; None when it does not say.
        lenient: it does not mind that a new file exists, or that one to be changed does not.
    """

    op: Op
    content: bytes | None = None
    base: bytes | None = None
    lenient: bool = False


def package_arguments(edits: Mapping[str, Edit]) -> dict[str, Any]:
    """The changes as `store_kit.package` takes them."""
    options: dict[str, dict[str, Any]] = {path: {} for path in edits}
    for path, edit in edits.items():
        if edit.lenient:
            options[path]["replace" if edit.op is Op.NEW else "missing_ok"] = True
        if edit.base is not None:
            options[path]["base_sha256"] = hashlib.sha256(edit.base).hexdigest()
    return {
        "new": {path: edit.content for path, edit in edits.items() if edit.op is Op.NEW},
        "modified": {path: edit.content for path, edit in edits.items() if edit.op is Op.MODIFIED},
        "deleted": [path for path, edit in edits.items() if edit.op is Op.DELETED],
        "options": options,
    }


@dataclass(frozen=True)
class Row:
    """What a patch has made of a name; `delivered` is None when it has deleted it. An adopted file is the
    program's own until a patch replaces it."""

    delivered: bytes | None
    origin: Origin


@dataclass(eq=False)
class Folder:
    """Where a generation lies; so many readers have it pinned. A tree that is released stays where it is."""

    pins: int = 0


@dataclass(eq=False)
class Generation:
    """
    Attributes:
        kept: names under which something stands that is no patch's, with the origin of what would be there.
        files: an overlay's managed files, or all files of a tree.
        there: it has not been pruned.
        vague: names of which a failed patch has left this or that; nobody sees the difference but a reader
            who has the generation pinned.
    """

    build: int
    patch: str | None
    parent: Generation | None
    rows: dict[str, Row] = field(default_factory=dict)
    kept: dict[str, Origin] = field(default_factory=dict)
    files: dict[str, Cell] = field(default_factory=dict)
    there: bool = True
    folder: Folder = field(default_factory=Folder)
    vague: set[str] = field(default_factory=set)

    def is_managed(self, path: str) -> bool:
        row = self.rows.get(path)
        return row is not None and row.delivered is not None

    def is_delivered(self, path: str) -> bool:
        return self.is_managed(path) and self.rows[path].origin is not ADOPTED

    def is_drifted(self, path: str) -> bool:
        """Delivered by a patch, and changed since."""
        return (
            self.is_delivered(path)
            and path in self.files
            and self.files[path].content != self.rows[path].delivered
        )

    def origin(self, path: str) -> Origin:
        if path in self.kept:
            return self.kept[path]
        row = self.rows.get(path)
        return None if row is None else row.origin


@dataclass(eq=False)
class Move:
    """A transaction's part in a target.

    Attributes:
        changed: what it changes; what it names and keeps is not among them.
        kept: what it keeps.
        saves: contents of which there has to be a copy, because they are overwritten.
    """

    source: Generation
    destination: Generation
    changed: Set[str]
    kept: Set[str]
    saves: Mapping[str, bytes]


class FilesModel(ABC):
    """The files of one target. What is to be done comes in pairs of calls: `stage` or `stage_back`, then
    `undo` or `switch`; after a `switch`, `undo` or `commit`."""

    def __init__(self, files: Mapping[str, Cell], build: int) -> None:
        del files
        self.current = Generation(build=build, patch=None, parent=None)
        self.generations = [self.current]

    # --- what a program sees and does -----------------------------------------------------------------------

    @abstractmethod
    def cells(self) -> dict[str, Cell]:
        """Every file a program finds."""

    def visible(self) -> Tree:
        """What is in them."""
        return {path: cell.content for path, cell in self.cells().items()}

    @abstractmethod
    def pinned(self) -> Tree:
        """What a snapshot of the SDK shows."""

    def matches(self, edits: Mapping[str, Edit]) -> bool:
        """Whether the files are what a patch would make them."""
        visible = self.visible()
        return all(
            visible.get(path) == edit.content and not self.is_detached(path) for path, edit in edits.items()
        )

    @abstractmethod
    def write(self, path: str, content: bytes) -> None:
        """The program writes into a file that is there, in place."""

    @abstractmethod
    def save(self, path: str, content: bytes) -> None:
        """The program puts a file of its own in place of whatever is there."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """The program removes what it finds under a name."""

    # --- what stands in the way -----------------------------------------------------------------------------

    @abstractmethod
    def is_detached(self, path: str) -> bool:
        """Managed, and replaced or removed since."""

    def objection(self, path: str, edit: Edit) -> str | None:
        """The code with which a change of this file would be refused where drift is."""
        content = self.visible().get(path)
        if content is None and edit.op is Op.DELETED and edit.lenient:
            return None
        if content is not None and content in {edit.base, edit.content}:
            return None
        if self.is_detached(path):
            return "gate.detached"
        if self.current.is_drifted(path) or path in self.current.kept:
            return "gate.drift"
        if content is None:
            return "gate.conflict" if edit.op is not Op.NEW and not edit.lenient else None
        if edit.op is Op.NEW and not edit.lenient:
            return "gate.conflict"
        return "gate.base" if edit.base is not None else None

    def objections(self, edits: Mapping[str, Edit]) -> list[str]:
        """The codes of all files that cannot be changed."""
        return [code for path, edit in edits.items() if (code := self.objection(path, edit)) is not None]

    def edits_back(self, goal: Generation) -> dict[str, Edit]:
        """What going back to an earlier generation does."""
        edits = {}
        for path in self.differing(self.current, goal):
            there = path in self.current.kept or self._has(self.current, path)
            becomes = self._has(goal, path)
            if not there and not becomes:
                continue
            op = Op.MODIFIED if there and becomes else Op.NEW if becomes else Op.DELETED
            content = goal.rows[path].delivered if goal.is_delivered(path) else None
            edits[path] = Edit(op, content, lenient=op is not Op.NEW)
        return edits

    @abstractmethod
    def _has(self, generation: Generation, path: str) -> bool:
        """Whether a generation has a file of that name, as far as is known of it."""

    # --- transactions ---------------------------------------------------------------------------------------

    @property
    def way_back(self) -> Generation | None:
        """The generation a rollback leads to."""
        parent = self.current.parent
        return parent if parent is not None and parent.there else None

    def stage(self, edits: Mapping[str, Edit], policy: Policy, *, build: int, patch: str) -> Move:
        """The generation a patch makes; nobody sees a difference."""
        source, new = self.current, Generation(build=build, patch=patch, parent=self.current)
        move = self._move(new, edits, policy)
        new.rows, new.files = self._inherited(move, source)
        new.kept = {path: origin for path, origin in source.kept.items() if path not in edits}
        new.kept.update({path: source.origin(path) for path in move.kept})
        for path in sorted(move.changed):
            new.rows[path] = Row(edits[path].content, new)
            new.files.pop(path, None)
            if (content := edits[path].content) is not None:
                new.files[path] = Cell(content)
        self._make_way(move)
        return move

    def stage_back(self, goal: Generation, policy: Policy) -> Move:
        """A way back to a generation; or, where files are kept, to one like it."""
        edits = self.edits_back(goal)
        move = self._move(goal, edits, policy)
        if move.kept:
            like = Generation(build=goal.build, patch=goal.patch, parent=goal.parent, rows=dict(goal.rows))
            like.kept = {**goal.kept, **{path: goal.origin(path) for path in move.kept}}
            move.destination = like
            self._fill_like(move, goal)
        self._make_way(move)
        return move

    def _move(self, destination: Generation, edits: Mapping[str, Edit], policy: Policy) -> Move:
        visible = self.visible()
        odd = {path for path, edit in edits.items() if self.objection(path, edit) is not None}
        assert not odd or policy != "refuse"
        kept = odd if policy == "keep" else set()
        return Move(
            source=self.current,
            destination=destination,
            changed=edits.keys() - kept,
            kept=kept,
            saves={
                path: visible[path] for path in odd - kept if path in visible and self._is_somebodys(path)
            },
        )

    def _is_somebodys(self, path: str) -> bool:
        """Content that no patch has brought."""
        now = self.current
        ours = now.is_delivered(path) and not self.is_detached(path)
        return not ours or now.is_drifted(path) or path in now.kept

    @abstractmethod
    def _inherited(self, move: Move, source: Generation) -> tuple[dict[str, Row], dict[str, Cell]]:
        """What a new generation has of the one it is made from."""

    @abstractmethod
    def _fill_like(self, move: Move, goal: Generation) -> None:
        """Make the destination like `goal`, but for what is kept."""

    @abstractmethod
    def _make_way(self, move: Move) -> None:
        """Prepare the root."""

    @abstractmethod
    def is_spoilt_by(self, move: Move, path: str) -> bool:
        """Whether it must not be switched to any more when a program changes a file after it was staged."""

    @abstractmethod
    def switch(self, move: Move) -> None: ...

    @abstractmethod
    def undo(self, move: Move) -> None:
        """It is off, wherever it was."""

    @abstractmethod
    def cut_off(self, links: Mapping[str, bool]) -> None:
        """Staging was cut off: of the names concerned, which are links in the root by now."""

    def commit(self, move: Move) -> None:
        if move.destination not in self.generations:
            self.generations.append(move.destination)

    def differing(self, first: Generation, second: Generation) -> list[str]:
        """The paths in which patches have made two generations differ."""
        names = first.rows.keys() | second.rows.keys() | first.kept.keys() | second.kept.keys()
        return sorted(path for path in names if first.origin(path) is not second.origin(path))

    # --- upkeep ---------------------------------------------------------------------------------------------

    def prune(self, keep: int, move: Move | None = None) -> None:
        """Keep so many on the way back, and what somebody holds; `move` is under way."""
        each = self.current if move is None else move.source
        kept = {each} if move is None else {each, move.destination}
        while each.parent is not None and keep:
            each, keep = each.parent, keep - 1
            kept.add(each)
        for each in self.generations:
            each.there &= each in kept or each.folder.pins > 0

    @abstractmethod
    def release(self) -> None:
        """All files are the program's own again, and there is no way back."""

    def _start_anew(self) -> None:
        old = self.current
        self.current = Generation(build=old.build, patch=old.patch, parent=None)
        self.generations.append(self.current)


class OverlayModel(FilesModel):
    """The root holds the program's files and links to managed ones."""

    def __init__(self, files: Mapping[str, Cell], build: int) -> None:
        super().__init__(files, build)
        self.root = dict(files)

    def cells(self) -> dict[str, Cell]:
        found = {}
        for path, there in self.root.items():
            cell = self.current.files.get(path) if there is LINK else there
            if cell is not None:
                found[path] = cell
        return found

    def pinned(self) -> Tree:
        """The generation first: what was put in place of its files is not read."""
        managed = {path: cell.content for path, cell in self.current.files.items()}
        return {**self.visible(), **managed}

    def write(self, path: str, content: bytes) -> None:
        there = self.root[path]
        (self.current.files[path] if there is LINK else there).content = content

    def save(self, path: str, content: bytes) -> None:
        self.root[path] = Cell(content)

    def remove(self, path: str) -> None:
        del self.root[path]

    def is_detached(self, path: str) -> bool:
        return self.current.is_managed(path) and self.root.get(path) is not LINK

    def _has(self, generation: Generation, path: str) -> bool:
        return generation.is_managed(path)

    def _inherited(self, move: Move, source: Generation) -> tuple[dict[str, Row], dict[str, Cell]]:
        # What stands in the root in place of a link is read there, and is nowhere else.
        left = {path for path in move.kept if self.root.get(path) is not LINK}
        rows = {path: row for path, row in source.rows.items() if path not in left}
        return rows, {path: cell for path, cell in source.files.items() if path not in left}

    def _fill_like(self, move: Move, goal: Generation) -> None:
        """What is kept becomes an ordinary file of the root."""
        like = move.destination
        like.files = {path: cell for path, cell in goal.files.items() if path not in move.kept}
        for path in move.kept:
            like.rows.pop(path, None)
            if self.root.get(path) is LINK:
                self.root[path] = Cell(self.current.files[path].content)

    def _make_way(self, move: Move) -> None:
        for path in sorted(move.changed):
            if self.root.get(path, LINK) is not LINK:
                self.adopt(path)
            elif path not in self.root and self.current.is_managed(path):
                self._forget(path)
        for path in move.changed & move.destination.files.keys():
            self.root[path] = LINK

    def alike(self, path: str) -> Sequence[Generation]:
        """Those that can be gone back to and have, as far as patches go, the same version as the current."""
        origin = self.current.origin(path)
        return [each for each in self.generations if each.there and each.origin(path) is origin]

    def adopt(self, path: str) -> None:
        """An ordinary file becomes a link, and goes into every generation that would have left it there."""
        cell, origin = self.root[path], self.current.origin(path)
        for each in self.alike(path):
            each.rows[path] = Row(cell.content, ADOPTED)
            each.files[path] = cell
            if origin is not None:
                each.kept.setdefault(path, origin)
            elif path in each.kept:
                each.kept[path] = ADOPTED
        self.root[path] = LINK

    def cut_off(self, links: Mapping[str, bool]) -> None:
        for path, is_link in links.items():
            there = self.root.get(path, LINK)
            if there is not LINK and is_link:
                self.adopt(path)
            elif path in self.root and there is LINK and not is_link:
                self.root[path] = Cell(self.visible()[path])  # It was to be kept.
            for generation in self.alike(path):
                generation.vague.add(path)

    def _forget(self, path: str) -> None:
        """A name that was removed goes from every generation that would show it again."""
        origin = self.current.origin(path)
        for each in self.alike(path):
            each.rows.pop(path, None)
            each.files.pop(path, None)
            each.kept[path] = origin

    def is_spoilt_by(self, move: Move, path: str) -> bool:
        shown = move.source.is_managed(path) or move.destination.is_managed(path)
        return path in move.changed and shown

    def switch(self, move: Move) -> None:
        self.current = move.destination

    def undo(self, move: Move) -> None:
        self.current = move.source
        self._unlink()

    def commit(self, move: Move) -> None:
        super().commit(move)
        self._unlink()

    def _unlink(self) -> None:
        """Links that lead nowhere go."""
        for path, there in list(self.root.items()):
            if there is LINK and path not in self.current.files:
                del self.root[path]

    def release(self) -> None:
        for path, there in list(self.root.items()):
            if there is LINK:
                cell = self.current.files[path]
                # The program has its own file back, not a copy.
                self.root[path] = Cell(cell.content) if self.current.is_delivered(path) else cell
        self._start_anew()


class TreeModel(FilesModel):
    """The root is the current generation; what is the program's own goes along wherever that is."""

    def __init__(self, files: Mapping[str, Cell], build: int) -> None:
        super().__init__(files, build)
        self.current.files = dict(files)

    def cells(self) -> dict[str, Cell]:
        return dict(self.current.files)

    def pinned(self) -> Tree:
        return self.visible()

    def write(self, path: str, content: bytes) -> None:
        self.current.files[path].content = content

    def save(self, path: str, content: bytes) -> None:
        self.current.files[path] = Cell(content)

    def remove(self, path: str) -> None:
        del self.current.files[path]

    def is_detached(self, path: str) -> bool:
        return self.current.is_managed(path) and path not in self.current.files

    def _has(self, generation: Generation, path: str) -> bool:
        return generation.is_managed(path) if path in generation.rows else path in generation.files

    def _inherited(self, move: Move, source: Generation) -> tuple[dict[str, Row], dict[str, Cell]]:
        return dict(source.rows), dict(source.files)

    def _fill_like(self, move: Move, goal: Generation) -> None:
        own = {path: cell for path, cell in self.current.files.items() if path not in move.changed}
        theirs = {path: cell for path, cell in goal.files.items() if path in move.changed}
        move.destination.files = {**own, **theirs}

    def _make_way(self, move: Move) -> None:
        """Nothing to do: a tree that is not current is not seen."""

    def is_spoilt_by(self, move: Move, path: str) -> bool:
        return path in move.changed

    def switch(self, move: Move) -> None:
        self._carry(move, move.source, move.destination)
        self.current = move.destination

    def cut_off(self, links: Mapping[str, bool]) -> None:
        """Nobody sees anything of it."""

    def undo(self, move: Move) -> None:
        if self.current is move.destination:
            self._carry(move, move.destination, move.source)
        self.current = move.source

    def _carry(self, move: Move, source: Generation, destination: Generation) -> None:
        """In place: after a release two generations are one folder."""
        patched = set(self.differing(move.source, move.destination)) - move.kept
        for path in destination.files.keys() - patched:
            del destination.files[path]
        destination.files.update({path: c for path, c in source.files.items() if path not in patched})

    def release(self) -> None:
        before = self.current
        self._start_anew()
        self.current.files, self.current.folder = before.files, before.folder
