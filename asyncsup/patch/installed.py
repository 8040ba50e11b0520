"""What a target really has: the old side of a patch that is built for one installation.

Read from the state directory, without its lock: whether a supervisor runs does not matter.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
from msgspec.structs import replace

from asyncsup.errors import PatchNotFoundError
from asyncsup.patch import fs, paths
from asyncsup.patch.build import Source
from asyncsup.patch.database import FileRow, TargetRow
from asyncsup.patch.statedir import StateDirectory


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """The files of one generation, as programs see them.

    Attributes:
        delivered: the paths whose files a patch has brought. All others are the program's own, or were there
            before the first patch.
    """

    target: str
    generation: int
    build: int
    files: Mapping[str, Source]
    delivered: frozenset[str]

    def without_foreign(self, wanted: Mapping[str, object]) -> tuple[dict[str, Source], list[str]]:
        """The files to compare with those that are `wanted`, and the paths of those to leave alone: neither
        wanted, nor brought by a patch."""
        foreign = sorted(self.files.keys() - wanted.keys() - self.delivered)
        return {path: self.files[path] for path in self.files.keys() - set(foreign)}, foreign


@contextmanager
def installed(state_dir: Path, target: str, generation: int | None) -> Iterator[Installed]:
    """A generation of a target, by default the current one; it is not pruned while the block lasts.

    Raises:
        PatchNotFoundError: it is not kept, or never was.
        TargetNotFoundError: the state directory knows no such target.
        StateError, OSError: the state directory cannot be read.
    """
    with closing(StateDirectory.look(state_dir)) as state:
        row = state.database.target(target)
        number = state.number(target) if generation is None else generation
        folder = _folder_of(state, row, number)
        with fs.opened(folder) as fd:
            fcntl.flock(fd, fcntl.LOCK_SH)
            rows = state.database.files(target, number)
            files = _regular_files(folder, row.persist, rows)
            if row.layout == "overlay":
                files = {**_regular_files(row.root, (), {}), **files}
            yield Installed(
                target=target,
                generation=number,
                build=state.database.generation(target, number).build,
                files=dict(sorted(files.items())),
                delivered=frozenset(
                    path for path, known in rows.items() if known.sha256 and known.origin is not None
                ),
            )


def _folder_of(state: StateDirectory, row: TargetRow, number: int) -> Path:
    known = state.database.find_generation(row.name, number)
    if known is not None and known.place == "root" and number == state.number(row.name):
        return row.root
    if known is None or not state.exists(row.name, number):
        kept = [
            str(g.number) for g in state.database.generations(row.name) if state.exists(row.name, g.number)
        ]
        raise PatchNotFoundError(
            f"{row.name} has no generation {number} (any more); kept are {', '.join(kept) or 'none'}",
            target=row.name,
        )
    return state.generation(row.name, number)


def _regular_files(root: Path, persist: tuple[str, ...], rows: Mapping[str, FileRow]) -> dict[str, Source]:
    """What a patch could change. Links, among them those into the store, and devices are passed over."""
    found: dict[str, Source] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                path = prefix + entry.name
                if entry.name.startswith(paths.PRIVATE_PREFIX) or path in persist:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{path}/")
                elif entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    source = Source(
                        file=root / path, size=status.st_size, mode=stat.S_IMODE(status.st_mode) & 0o777
                    )
                    known = rows.get(path)
                    # Files of patches have lost their write bits, which are written down.
                    delivered = known is not None and known.origin is not None
                    found[path] = replace(source, mode=known.mode) if delivered and known else source
    return found
