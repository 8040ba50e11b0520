"""A file system that has lost its power: which states it may come back in.

`Recorder` reads what strace has seen a program do and makes operations of it. An operation is durable once a
sync has covered it. Of the others any subset may have reached the disk when the power goes, as long as it is
possible:

* the content of a file (in pages), its mode and times, and each of its names are independent of each other;
* ``fsync`` of a file covers its content, mode and times, not its names; of a folder, the names in it and the
  texts of links that were made in it, not what they lead to; ``fdatasync`` content alone; ``syncfs``
  everything;
* a link that is created is there with its text or not at all; but one that is moved before its folder has
  been synced may have lost it (nobody can sync a link but through its folder);
* a rename is one operation, also a swap and one across folders, and durable when every folder that gained a
  name by it has been synced;
* an operation on a name needs the name to be as it was then: nothing is renamed that was never created.

That is weaker than what ext4, XFS or btrfs promise.
"""

from __future__ import annotations

import functools
import os
import random
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PAGE_BYTES: Final = 4096
FOLDER: Final = stat.S_IFDIR
FILE: Final = stat.S_IFREG
LINK: Final = stat.S_IFLNK
LOST: Final = ".lost-text"

# `?`: not every architecture has it.
SYSCALLS: Final = (
    "?open,openat,?creat,write,pwrite64,writev,pwritev,?pwritev2,truncate,ftruncate,fallocate,copy_file_range,"
    "sendfile,splice,lseek,mmap,?rename,?renameat,renameat2,?link,linkat,?symlink,symlinkat,?unlink,unlinkat,"
    "?mkdir,mkdirat,?rmdir,?mknod,mknodat,?chmod,fchmod,fchmodat,?fchmodat2,?utime,?utimes,?futimesat,utimensat,"
    "fsync,fdatasync,syncfs,sync,sync_file_range,msync"
)
STRACE_OPTIONS: Final = ("-y", "-xx", "-s", "99999999", "-e", f"trace={SYSCALLS}")

Changes = tuple[tuple[int, str, "int | None", "int | None"], ...]
"""Names that an operation changes at once: folder, name, what was there and what is there then."""


@dataclass(slots=True)
class Node:
    """A file, folder or link, as it was created or found; what came later is in operations.

    Attributes:
        text: where a link leads; of one that was created, once that is on disk.
    """

    type: int
    mode: int
    text: str = ""
    data: bytes = b""
    mtime: int | None = None
    created: bool = False


@dataclass(frozen=True, slots=True)
class Names:
    changes: Changes
    anchors: frozenset[int]


@dataclass(frozen=True, slots=True)
class Data:
    """A write, or without `data` the size set to `offset`."""

    node: int
    offset: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Meta:
    node: int
    mode: int | None = None
    mtime: int | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Where a link leads, which has been created as `name` in `folder`."""

    node: int
    folder: int
    name: str


@dataclass(frozen=True, slots=True)
class Sync:
    """`node` None: of everything."""

    node: int | None
    data_only: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    name: str


Operation = Names | Data | Meta | Text | Sync | Mark


@dataclass(frozen=True, slots=True)
class Place:
    """A name in a folder; ``""`` for the folder itself. `where` is the folder's path, without links."""

    folder: int
    name: str
    where: str


@dataclass(slots=True)
class State:
    """One content of the disk: the names in every folder, and which writes each node has received.

    Attributes:
        base: the real folder it is the content of; links with absolute texts lead below it.
        nodes: shared by all states of one recording.
    """

    base: str
    nodes: list[Node]
    names: dict[int, dict[str, int]]
    received: dict[int, tuple[Data | Meta | Text, ...]] = field(default_factory=dict)
    root: int = 0

    def copy(self) -> State:
        """Another one that can be changed: what is in the two dictionaries is never changed itself."""
        return State(self.base, self.nodes, dict(self.names), dict(self.received), self.root)

    def can_apply(self, operation: Operation) -> bool:
        return not isinstance(operation, Names) or all(
            self.names.get(folder, {}).get(name) == before for folder, name, before, _ in operation.changes
        )

    def apply(self, operation: Operation) -> None:
        if isinstance(operation, Names):
            for folder, name, _, after in operation.changes:
                names = dict(self.names.get(folder, {}))
                if after is None:
                    names.pop(name, None)
                else:
                    names[name] = after
                self.names[folder] = names
        elif isinstance(operation, Data | Meta | Text):
            self.received[operation.node] = (*self.received.get(operation.node, ()), operation)

    def content(self, node: int) -> bytes:
        content = bytearray(self.nodes[node].data)
        for change in self.received.get(node, ()):
            if not isinstance(change, Data):
                continue
            if change.data is None:
                content[:] = content[: change.offset].ljust(change.offset, b"\0")
            else:
                content.extend(bytes(max(0, change.offset - len(content))))
                content[change.offset : change.offset + len(change.data)] = change.data
        return bytes(content)

    def text(self, node: int) -> str:
        """Where a link leads: nowhere, if it is there and its text is not."""
        whole = not self.nodes[node].created or node in self.received
        return self.nodes[node].text if whole else LOST

    def mode(self, node: int) -> int:
        modes = [c.mode for c in self.received.get(node, ()) if isinstance(c, Meta) and c.mode is not None]
        return modes[-1] if modes else self.nodes[node].mode

    def mtime(self, node: int) -> int | None:
        """None where nobody has set one: that of the last write."""
        mtime = self.nodes[node].mtime
        for change in self.received.get(node, ()):
            if isinstance(change, Data):
                mtime = None
            elif isinstance(change, Meta) and change.mtime is not None:
                mtime = change.mtime
        return mtime

    def walk(self) -> Iterator[tuple[str, int]]:
        """Every name that can be reached, with what it stands for; the root is ``""``."""
        pending = [("", self.root)]
        while pending:
            path, node = pending.pop()
            yield path, node
            for name, inner in sorted(self.names.get(node, {}).items(), reverse=True):
                pending.append((f"{path}/{name}", inner))

    def key(self) -> object:
        """Equal for states that are the same to everybody."""
        parts: list[object] = []
        pending, known = [self.root], set[int]()
        while pending:
            node = pending.pop()
            if node in known:
                continue
            known.add(node)
            if node in self.names:
                parts.append((node, frozenset(self.names[node].items())))
                pending += self.names[node].values()
            if node in self.received:
                parts.append((node, tuple(map(id, self.received[node]))))
        return frozenset(parts)

    # --- as a program sees it -------------------------------------------------------------------------------

    def place(self, path: str) -> Place | None:
        """Where the name `path` (absolute) is. None outside of `base`, or where there is no such folder."""
        for _ in range(40):
            path = os.path.normpath(path)
            if path != self.base and not path.startswith(f"{self.base}/"):
                return None
            folder, where = self.root, self.base
            *folders, name = path[len(self.base) + 1 :].split("/")
            for depth, part in enumerate(folders):
                inner = self.names[folder].get(part)
                if inner is None:
                    return None
                if self.nodes[inner].type == LINK:
                    path = _join(where, self.text(inner), *folders[depth + 1 :], name)
                    break
                if self.nodes[inner].type != FOLDER:
                    return None
                folder, where = inner, f"{where}/{part}"
            else:
                return Place(folder, name, where)
        return None

    def at(self, place: Place) -> int | None:
        """The node that stands there; a link is not followed."""
        return place.folder if place.name == "" else self.names[place.folder].get(place.name)

    def behind(self, place: Place | None) -> Place | None:
        """Where the link at a place leads in the end, be something there or not."""
        for _ in range(40):
            node = None if place is None else self.at(place)
            if place is None or node is None or self.nodes[node].type != LINK:
                return place
            place = self.place(_join(place.where, self.text(node)))
        return None

    def find(self, path: str) -> tuple[int, str] | None:
        """The node that `path` leads to, all links followed, and its path without links."""
        place = self.behind(self.place(path))
        node = None if place is None else self.at(place)
        if place is None or node is None:
            return None
        return node, _join(place.where, place.name).rstrip("/")

    def seen(self, path: str, *, but_for: str) -> dict[str, bytes]:
        """Every file a program finds below `path`, links followed; names that begin with `but_for` are not
        looked at."""
        files: dict[str, bytes] = {}
        pending = [(path, "", self.find(path))]
        while pending:
            path, shown, found = pending.pop()
            if found is None:
                continue
            node, where = found
            if self.nodes[node].type == FILE:
                files[shown[1:]] = self.content(node)
                continue
            for name, inner in self.names[node].items():
                if name.startswith(but_for):
                    continue
                there = f"{where}/{name}"
                is_link = self.nodes[inner].type == LINK
                pending.append((there, f"{shown}/{name}", self.find(there) if is_link else (inner, there)))
        return files

    # --- to and from real folders ---------------------------------------------------------------------------

    @classmethod
    def read(cls, folder: Path) -> State:
        """What is in a real folder."""
        state = cls(str(folder), [], {})
        known: dict[int, int] = {}
        pending = [(folder, None, "")]
        while pending:
            path, parent, name = pending.pop()
            status = path.lstat()
            node = known.get(status.st_ino)
            if node is None:
                node = known[status.st_ino] = len(state.nodes)
                type_ = stat.S_IFMT(status.st_mode)
                state.nodes.append(
                    Node(
                        type_,
                        stat.S_IMODE(status.st_mode),
                        text=str(path.readlink()) if type_ == LINK else "",
                        data=path.read_bytes() if type_ == FILE else b"",
                        mtime=status.st_mtime_ns,
                    )
                )
                if type_ == FOLDER:
                    state.names[node] = {}
                    pending += [(inner, node, inner.name) for inner in path.iterdir()]  # type: ignore[misc]
            if parent is not None:
                state.names[parent][name] = node
        return state

    def write(self) -> None:
        """Make the real folder hold exactly this."""
        empty(self.base)
        old = os.umask(0)
        try:
            made: dict[int, str] = {}
            for path, node in self.walk():
                where = f"{self.base}{path}"
                kind = self.nodes[node].type
                if kind == FOLDER:
                    if path:
                        os.mkdir(where, self.mode(node))  # noqa: PTH102
                elif node in made:
                    os.link(made[node], where, follow_symlinks=False)
                else:
                    made[node] = where
                    if kind == LINK:
                        os.symlink(self.text(node), where)  # noqa: PTH211
                    else:
                        self._write_file(node, where)
        finally:
            os.umask(old)

    def _write_file(self, node: int, where: str) -> None:
        fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self.mode(node))
        try:
            os.write(fd, self.content(node))
            mtime = self.mtime(node)
            if mtime is not None:
                os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)

    def describe(self) -> dict[str, tuple[int, int, str | bytes]]:
        """For comparisons with what is really there."""
        return {
            path: (
                self.nodes[node].type,
                0 if self.nodes[node].type == LINK else self.mode(node),
                self.text(node)
                if self.nodes[node].type == LINK
                else self.content(node)
                if self.nodes[node].type == FILE
                else "",
            )
            for path, node in self.walk()
        }


def _join(*parts: str) -> str:
    return os.path.join(*parts)  # noqa: PTH118 - texts, not paths of this machine


def empty(folder: Path | str) -> None:
    """Remove everything in a real folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                empty(entry.path)
                os.rmdir(entry.path)  # noqa: PTH106
            else:
                os.unlink(entry.path)  # noqa: PTH108


# --- what strace saw ----------------------------------------------------------------------------------------

_CALL = re.compile(r"(?:\d+ +)?(\w+)\((.*)\) += (-?\d+|\?)(.*)")
_DESCRIPTOR = re.compile(r"(AT_FDCWD|-?\d+)(?:<((?:\\x[0-9a-f]{2})*)>(\(deleted\))?)?")
_SECONDS = re.compile(r"tv_sec=(\d+)[^,]*, tv_nsec=(\d+)")
_NOT_MODELLED: Final = frozenset(
    {"writev", "pwritev", "pwritev2", "truncate", "fallocate", "copy_file_range", "sendfile", "splice",
     "mknod", "mknodat", "utime", "utimes", "futimesat", "sync_file_range", "msync"}
)  # fmt: skip


def _text(hexadecimal: str) -> str:
    return os.fsdecode(_bytes(hexadecimal))


def _bytes(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal.strip('"').replace("\\x", ""))


class Recorder:
    """Operations on files, from traces of programs that ran one after the other.

    Args:
        operations: what was done before.
        but_for: names of files whose content is nobody's business.
    Attributes:
        start: before the first operation; everything in it is durable.
        operations: what was done, in order.
        live: what every program sees: the start and all operations.
    """

    def __init__(
        self, start: State, operations: Iterable[Operation] = (), *, but_for: Collection[str] = ()
    ) -> None:
        self.start = start.copy()
        self.live = start.copy()
        self.operations: list[Operation] = []
        self._offsets: dict[int, int] = {}
        self._but_for = but_for
        for operation in operations:
            self._add(operation)

    def feed(self, trace: Iterable[str]) -> None:
        """Add what one program did.

        Raises:
            ValueError: it did something that is not modelled.
        """
        self._offsets = {}
        for line in trace:
            match = _CALL.fullmatch(line)
            if match is None or match[3] == "?":
                continue  # A signal, an exit, or a call it did not survive.
            if "mark" in (line_mark := _mark_in(match)):
                self.operations.append(Mark(line_mark.removeprefix("mark ")))
            elif not match[3].startswith("-"):
                self._call(match[1], match[2].split(", "), int(match[3]), match[4], line)

    def _call(self, name: str, arguments: list[str], result: int, rest: str, line: str) -> None:
        handler = getattr(self, f"_on_{name}", None)
        if handler is not None:
            handler(arguments, result, rest)
        elif name in _NOT_MODELLED and any(self._descriptor(each) is not None for each in arguments):
            raise ValueError(f"not modelled: {line[:400]}")
        elif name not in _NOT_MODELLED:
            raise ValueError(f"not known: {line[:400]}")

    # --- where an argument leads ----------------------------------------------------------------------------

    def _descriptor(self, argument: str) -> int | None:
        """The node that a descriptor stands for; None for one that is outside, or has no name (any more)."""
        match = _DESCRIPTOR.fullmatch(argument)
        if match is None or not match[2] or match[3]:
            return None
        return self._node_at(_text(match[2]))

    def _writable(self, argument: str) -> int | None:
        """Like `_descriptor`; None also for one whose content does not matter."""
        node = self._descriptor(argument)
        match = _DESCRIPTOR.fullmatch(argument)
        if node is None or match is None or _text(match[2]).rpartition("/")[2] in self._but_for:
            return None
        return node

    def _node_at(self, path: str) -> int | None:
        place = self.live.place(path)
        return None if place is None else self.live.at(place)

    def _named(self, descriptor: str, name: str) -> Place | None:
        text = _text(name)
        if not text.startswith("/"):
            match = _DESCRIPTOR.fullmatch(descriptor)
            if match is None or not match[2]:
                raise ValueError(f"relative to what? {descriptor} {text}")
            text = f"{_text(match[2])}/{text}"
        return self.live.place(text)

    # --- operations -----------------------------------------------------------------------------------------

    def _add(self, operation: Operation) -> None:
        if not self.live.can_apply(operation):
            raise ValueError(f"the trace does not fit: {operation}")
        self.operations.append(operation)
        self.live.apply(operation)

    def _names(self, *changes: tuple[int, str, int | None, int | None]) -> None:
        gained = frozenset(folder for folder, _, _, after in changes if after is not None)
        self._add(Names(changes, gained or frozenset(folder for folder, *_ in changes)))

    def _create(self, place: Place | None, node: Node) -> None:
        if place is None:
            return
        self.live.nodes.append(node)
        number = len(self.live.nodes) - 1
        if node.type == FOLDER:
            self.live.names[number] = {}
            self.start.names[number] = {}
        self._names((place.folder, place.name, None, number))

    def _opened(self, place: Place | None, flags: str, mode: str | None, fd: int) -> None:
        self._offsets[fd] = 0
        if place is None:
            return
        there = self.live.at(place)
        if there is None:
            assert mode is not None, flags
            self._create(place, Node(FILE, int(mode, 8) & ~0o022))
        elif "O_TRUNC" in flags.split("|") and self.live.content(there):
            self._add(Data(there, 0, None))

    def _on_openat(self, arguments: list[str], result: int, rest: str) -> None:
        descriptor, name, flags, *mode = arguments
        place = self._named(descriptor, name)
        if "O_NOFOLLOW" not in flags and "O_EXCL" not in flags:
            place = self.live.behind(place)
        self._opened(place, flags, mode[0] if mode else None, result)

    def _on_open(self, arguments: list[str], result: int, rest: str) -> None:
        self._on_openat(["AT_FDCWD", *arguments], result, rest)

    def _on_creat(self, arguments: list[str], result: int, rest: str) -> None:
        self._on_openat(["AT_FDCWD", arguments[0], "O_CREAT|O_TRUNC", arguments[1]], result, rest)

    def _on_lseek(self, arguments: list[str], result: int, rest: str) -> None:
        self._offsets[int(arguments[0].partition("<")[0])] = result

    def _written(self, descriptor: str, data: bytes, offset: int) -> None:
        node = self._writable(descriptor)
        if node is None:
            return
        while data:
            size = PAGE_BYTES - offset % PAGE_BYTES
            self._add(Data(node, offset, data[:size]))
            data, offset = data[size:], offset + size

    def _on_write(self, arguments: list[str], result: int, rest: str) -> None:
        fd = int(arguments[0].partition("<")[0])
        if self._descriptor(arguments[0]) is None:
            return
        self._written(arguments[0], _bytes(arguments[1])[:result], self._offsets[fd])
        self._offsets[fd] += result

    def _on_pwrite64(self, arguments: list[str], result: int, rest: str) -> None:
        self._written(arguments[0], _bytes(arguments[1])[:result], int(arguments[3]))

    def _on_ftruncate(self, arguments: list[str], result: int, rest: str) -> None:
        node = self._writable(arguments[0])
        if node is not None and len(self.live.content(node)) != int(arguments[1]):
            self._add(Data(node, int(arguments[1]), None))

    def _on_mmap(self, arguments: list[str], result: int, rest: str) -> None:
        if "MAP_SHARED" not in arguments[3] or "PROT_WRITE" not in arguments[2]:
            return
        match = _DESCRIPTOR.fullmatch(arguments[4])
        if match is not None and match[2] and self._descriptor(arguments[4]) is not None:
            # SQLite makes it anew when it is the first to open the database.
            assert _text(match[2]).endswith("-shm"), _text(match[2])

    def _move(self, source: Place | None, goal: Place | None, *, swap: bool) -> None:
        if source is None or goal is None:
            assert source is goal is None, "a rename into or out of the folder that is watched"
            return
        moved, replaced = self.live.at(source), self.live.at(goal)
        if moved != replaced:  # Renaming one name of a file to another does nothing.
            self._names(
                (source.folder, source.name, moved, replaced if swap else None),
                (goal.folder, goal.name, replaced, moved),
            )

    def _on_rename(self, arguments: list[str], result: int, rest: str) -> None:
        self._on_renameat(["AT_FDCWD", arguments[0], "AT_FDCWD", arguments[1]], result, rest)

    def _on_renameat(self, arguments: list[str], result: int, rest: str) -> None:
        first, old, second, new = arguments
        self._move(self._named(first, old), self._named(second, new), swap=False)

    def _on_renameat2(self, arguments: list[str], result: int, rest: str) -> None:
        first, old, second, new, flags = arguments
        assert flags in {"0", "RENAME_EXCHANGE", "RENAME_NOREPLACE"}, flags
        self._move(self._named(first, old), self._named(second, new), swap=flags == "RENAME_EXCHANGE")

    def _on_link(self, arguments: list[str], result: int, rest: str) -> None:
        self._on_linkat(["AT_FDCWD", arguments[0], "AT_FDCWD", arguments[1]], result, rest)

    def _on_linkat(self, arguments: list[str], result: int, rest: str) -> None:
        first, old, second, new, *_ = arguments
        source, goal = self._named(first, old), self._named(second, new)
        if goal is not None:
            assert source is not None, "a link to a file outside of the folder that is watched"
            self._names((goal.folder, goal.name, None, self.live.at(source)))

    def _on_symlink(self, arguments: list[str], result: int, rest: str) -> None:
        self._on_symlinkat([arguments[0], "AT_FDCWD", arguments[1]], result, rest)

    def _on_symlinkat(self, arguments: list[str], result: int, rest: str) -> None:
        text, descriptor, name = arguments
        place = self._named(descriptor, name)
        if place is not None:
            self._add(Text(len(self.live.nodes), place.folder, place.name))
            self._create(place, Node(LINK, 0o777, text=_text(text), created=True))

    def _on_unlink(self, arguments: list[str], result: int, rest: str) -> None:
        self._on_unlinkat(["AT_FDCWD", *arguments], result, rest)

    _on_rmdir = _on_unlink

    def _on_unlinkat(self, arguments: list[str], result: int, rest: str) -> None:
        place = self._named(arguments[0], arguments[1])
        if place is not None:
            self._names((place.folder, place.name, self.live.at(place), None))

    def _on_mkdir(self, arguments: list[str], result: int, rest: str) -> None:
        self._on_mkdirat(["AT_FDCWD", *arguments], result, rest)

    def _on_mkdirat(self, arguments: list[str], result: int, rest: str) -> None:
        mode = int(arguments[2], 8) & ~0o022
        self._create(self._named(arguments[0], arguments[1]), Node(FOLDER, mode))

    def _meta(self, node: int | None, *, mode: int | None = None, mtime: int | None = None) -> None:
        if node is not None:
            self._add(Meta(node, mode=mode, mtime=mtime))

    def _on_chmod(self, arguments: list[str], result: int, rest: str) -> None:
        self._on_fchmodat(["AT_FDCWD", *arguments], result, rest)

    def _on_fchmodat(self, arguments: list[str], result: int, rest: str) -> None:
        place = self._named(arguments[0], arguments[1])
        self._meta(None if place is None else self.live.at(place), mode=int(arguments[2], 8))

    _on_fchmodat2 = _on_fchmodat

    def _on_fchmod(self, arguments: list[str], result: int, rest: str) -> None:
        self._meta(self._descriptor(arguments[0]), mode=int(arguments[1], 8))

    def _on_utimensat(self, arguments: list[str], result: int, rest: str) -> None:
        seconds = _SECONDS.findall(", ".join(arguments[2:]))[-1]
        assert arguments[1] == "NULL", "times are set through a descriptor"
        self._meta(self._descriptor(arguments[0]), mtime=int(seconds[0]) * 10**9 + int(seconds[1]))

    def _on_fsync(self, arguments: list[str], result: int, rest: str) -> None:
        node = self._descriptor(arguments[0])
        if node is not None:
            self._add(Sync(node))

    def _on_fdatasync(self, arguments: list[str], result: int, rest: str) -> None:
        node = self._descriptor(arguments[0])
        if node is not None:
            self._add(Sync(node, data_only=True))

    def _on_syncfs(self, arguments: list[str], result: int, rest: str) -> None:
        if self._descriptor(arguments[0]) is not None:
            self._add(Sync(None))

    def _on_sync(self, arguments: list[str], result: int, rest: str) -> None:
        self._add(Sync(None))


def _mark_in(match: re.Match[str]) -> str:
    if match[1] != "write" or not match[2].startswith("-1, "):
        return ""
    return _text(match[2].split(", ")[1])


# --- which states there may be ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """Right after the operation before `number`.

    Attributes:
        floor: what is durable.
        pending: numbers of the operations that are not.
    """

    number: int
    floor: State
    pending: Sequence[int]


class History:
    """The operations of a recording, and what the syncs among them cover."""

    def __init__(self, start: State, operations: Sequence[Operation]) -> None:
        self.start = start
        self.operations = operations
        self._needs: list[list[int]] = []
        last: dict[tuple[int, str], int] = {}
        for number, operation in enumerate(operations):
            places = (
                [(folder, name) for folder, name, _, _ in operation.changes]
                if isinstance(operation, Names)
                else []
            )
            self._needs.append([last[place] for place in places if place in last])
            last.update(dict.fromkeys(places, number))

    def path_of(self, node: int) -> str:
        """The last name that a node was given, for people."""
        paths = {self.start.root: "."}
        everything = [
            (folder, name, inner)
            for folder, names in self.start.names.items()
            for name, inner in names.items()
        ]
        for operation in self.operations:
            if isinstance(operation, Names):
                everything += [(folder, name, new) for folder, name, _, new in operation.changes if new]
        for folder, name, inner in everything:
            paths[inner] = f"{paths.get(folder, folder)}/{name}"
        return paths.get(node, f"node {node}")

    def describe(self, number: int) -> str:
        """One operation, for people."""
        if number < 0:
            return "nothing"
        operation = self.operations[number]
        if isinstance(operation, Names):
            changes = ", ".join(
                f"{self.path_of(folder)}/{name}: {before} -> {after}"
                for folder, name, before, after in operation.changes
            )
            return f"{number} names {changes}"
        if isinstance(operation, Text):
            return f"{number} text of {self.path_of(operation.folder)}/{operation.name}"
        if isinstance(operation, Mark):
            return f"{number} {operation.name}"
        where = "everything" if operation.node is None else self.path_of(operation.node)
        if isinstance(operation, Data):
            size = "size" if operation.data is None else len(operation.data)
            return f"{number} data {where} [{operation.offset}, {size}]"
        return f"{number} {type(operation).__name__.lower()} {where}"

    def crash_points(self, without: Collection[int] = ()) -> Iterator[CrashPoint]:
        """Every one, from before the first operation to after the last.

        Args:
            without: numbers of syncs that are left out.
        """
        floor = self.start
        waiting: dict[int, set[int]] = {}
        yield CrashPoint(0, floor, [])
        for number, operation in enumerate(self.operations):
            if isinstance(operation, Names):
                waiting[number] = set(operation.anchors)
            elif isinstance(operation, Data | Meta):
                waiting[number] = {operation.node}
            elif isinstance(operation, Text):
                waiting[number] = {operation.folder}
            elif isinstance(operation, Sync) and number not in without:
                done = self._covered_by(operation, waiting)
                if done:
                    floor = floor.copy()  # The points before have the old one.
                for each in sorted(done):
                    del waiting[each]
                    floor.apply(self.operations[each])
            yield CrashPoint(number + 1, floor, list(waiting))

    @functools.cached_property
    def pending(self) -> list[frozenset[int]]:
        """What is not durable at each crash point."""
        return [frozenset(point.pending) for point in self.crash_points()]

    def _covered_by(self, sync: Sync, waiting: dict[int, set[int]]) -> set[int]:
        done: set[int] = set()
        for number, nodes in waiting.items():
            if sync.node is None:
                nodes.clear()
            elif not (sync.data_only and isinstance(self.operations[number], Meta)):
                nodes.discard(sync.node)
            if not nodes:
                done.add(number)
        # What a durable name has come from must have happened as well.
        pending = list(done)
        while pending:
            for earlier in self._needs[pending.pop()]:
                if earlier in waiting and earlier not in done:
                    done.add(earlier)
                    pending.append(earlier)
        return done

    def state(self, point: CrashPoint, chosen: Iterable[int]) -> State:
        """With those of the pending operations that are `chosen` and possible."""
        state = point.floor.copy()
        for number in sorted(chosen):
            operation = self.operations[number]
            if state.can_apply(operation):
                state.apply(operation)
        for number in point.pending:
            operation = self.operations[number]
            if (
                isinstance(operation, Text)
                and state.names.get(operation.folder, {}).get(operation.name) == operation.node
            ):
                state.apply(operation)
        return state

    def units(self, pending: Iterable[int]) -> list[list[int]]:
        """Pending operations in groups: each change of names, and per file its content and its mode."""
        groups: defaultdict[object, list[int]] = defaultdict(list)
        for number in pending:
            operation = self.operations[number]
            key = number if isinstance(operation, Names) else (type(operation), _node(operation))
            groups[key].append(number)
        return list(groups.values())

    def choices(self, point: CrashPoint, dice: random.Random, samples: int) -> Iterator[list[int]]:
        """Which of those pending to keep: none, all, each alone, all but each, and some at random."""
        units = self.units(point.pending)
        yield []
        yield list(point.pending)
        for unit in units:
            yield unit
            yield [number for number in point.pending if number not in unit]
        for _ in range(samples if len(units) > 1 or len(point.pending) > 1 else 0):
            chosen: list[int] = []
            for unit in units:
                keep = dice.choice((0.0, 0.5, 1.0) if len(unit) > 1 else (0.0, 1.0))
                chosen += [number for number in unit if dice.random() < keep]
            yield chosen


def _node(operation: Operation) -> int | None:
    return None if isinstance(operation, Names | Mark) else operation.node
