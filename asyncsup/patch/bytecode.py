"""Where the Python programs of a target keep their bytecode.

::

    pycache/TARGET/17/    PYTHONPYCACHEPREFIX of the programs started on a generation
    pycache/.shared/      what they have of everything outside their roots: the interpreter's library ...

Bytecode counts as fresh while its source has the size and the mtime second that it was compiled from, and a
patch may bring a source with both unchanged. So every generation has a prefix of its own. Python mirrors
absolute paths below it and keeps the bytecode of its library there, too. Lest every generation of each target
compile and store all that again, whatever does not lead to the target is a link into one shared folder.

See `sys.pycache_prefix <https://docs.python.org/3/library/sys.html#sys.pycache_prefix>`_ and PEP 552.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Final

from asyncsup.patch import fs

PYCACHE: Final = "pycache"
SHARED: Final = ".shared"
"""No target can have this name."""

MOST_NEIGHBOURS: Final = 128
"""A folder with more in it (``/tmp``) is no place for libraries, and linking it all would take its time."""


def prefix(state: Path, target: str, generation: int) -> Path:
    return Path(f"{state}/{PYCACHE}/{target}/{generation}")


def lay_out(state: Path, target: str, generation: int, root: Path) -> None:
    """Make the prefix of a generation, unless it is there. All of it is a cache: whatever fails is left out.

    Only for programs that run as the owner of the state directory, who may trust each other's bytecode.
    """
    own = prefix(state, target, generation)
    with contextlib.suppress(OSError):
        try:
            own.mkdir()
        except FileNotFoundError:
            own.parent.mkdir(parents=True, exist_ok=True)
            own.mkdir()
        for path in _outside("/", {str(root), str(state)}):
            shared, link = f"{state}/{PYCACHE}/{SHARED}{path}", Path(f"{own}{path}")
            if not os.access(shared, os.F_OK):
                # Python makes no folder behind a link that leads nowhere.
                Path(shared).mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(shared)
            except FileNotFoundError:
                link.parent.mkdir(parents=True)
                link.symlink_to(shared)


def _outside(folder: str, inner: Set[str]) -> Iterator[str]:
    """The uppermost folders that neither lie in one of `inner` nor lead to one. It is the start of a program
    that waits for this, so it does without pathlib."""
    folders = [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    for path in folders:
        if any(each == path or each.startswith(f"{path}/") for each in inner):
            if path not in inner:
                yield from _outside(path, inner)
        elif len(folders) <= MOST_NEIGHBOURS:
            yield path


def discard(state: Path, target: str, generation: int) -> None:
    """Remove what was compiled of a generation. A program that still runs on it compiles again."""
    with contextlib.suppress(FileNotFoundError), fs.opened(state / PYCACHE / target) as folder:
        fs.remove_tree(str(generation), folder)


def sweep(state: Path, target: str, live: Set[int]) -> None:
    """Remove bytecode of generations that are not there any more."""
    with contextlib.suppress(FileNotFoundError), fs.opened(state / PYCACHE / target) as folder:
        for name in fs.names(folder):
            if name.isdecimal() and int(name) not in live:
                fs.remove_tree(name, folder)
