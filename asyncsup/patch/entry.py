"""Which files of its root a target's own command executes: a process goes on with what it has read of them.

Nothing is guessed. A script counts where it is certain that its interpreter runs it; a file that is merely an
argument (``nginx -c conf/nginx.conf``) is a resource like any other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from asyncsup.config.settings import TargetConfig
from asyncsup.config.values import INSTANCE


class _Options(msgspec.Struct, frozen=True, kw_only=True):
    """What may stand before the script.

    Attributes:
        alone: options that are complete; of no others is it known whether the next word belongs to them.
        with_value: options that the next word belongs to.
    """

    alone: re.Pattern[str]
    with_value: frozenset[str] = frozenset()


_INTERPRETERS: Final = {
    re.compile(r"python[0-9.]*|pypy[0-9.]*"): _Options(
        alone=re.compile(r"-[bBdEhiIOPqsSuvVx]+|-[XW].+"),
        with_value=frozenset({"-X", "-W", "--check-hash-based-pycs"}),
    ),
    re.compile(r"(ba|da|k|mk|z|a)?sh"): _Options(
        alone=re.compile(r"-[aefhklmnprtuvxBCEHPT]+|--(norc|noprofile|posix|restricted|verbose)"),
        with_value=frozenset({"-o", "+o", "-O", "+O", "--rcfile", "--init-file"}),
    ),
    re.compile(r"node|nodejs"): _Options(
        alone=re.compile(
            r"--(?!(eval|print|run)=)[a-z-]+=.+|--(enable-source-maps|expose-gc|no-warnings|trace-warnings)"
        ),
        with_value=frozenset({"-r", "--require", "--import", "--loader", "-C", "--conditions"}),
    ),
    re.compile(r"ruby[0-9.]*"): _Options(
        alone=re.compile(r"-[wWvUd]+|-W[0-2]|-[IrE].+"), with_value=frozenset({"-I", "-r", "-E"})
    ),
    re.compile(r"perl[0-9.]*"): _Options(
        alone=re.compile(r"-[wWtTuUX]+|-[IMm].+"), with_value=frozenset({"-I"})
    ),
    re.compile(r"php[0-9.]*"): _Options(
        alone=re.compile(r"-[nqH]+|-d.+"), with_value=frozenset({"-c", "-d", "-z"})
    ),
    re.compile(r"java"): _Options(
        alone=re.compile(r"-[DX].+|-(server|ea|esa)|--[a-z-]+=.+"),
        with_value=frozenset({"-jar", "-cp", "-classpath", "--class-path", "--add-opens", "--add-exports"}),
    ),
}


def program_files(config: TargetConfig) -> frozenset[str]:
    """The paths, relative to the root, of the program and of its script; empty where they are elsewhere."""
    if config.root is None:
        return frozenset()
    found = [config.command[0] if "/" in config.command[0] else None, _script(config.command)]
    return frozenset(
        path
        for word in found
        if word is not None and INSTANCE not in word
        for path in _below(config.root, config.directory / word)
    )


def _script(command: Sequence[str]) -> str | None:
    """The word that names what an interpreter runs; None where that is not certain."""
    name = Path(command[0]).name
    options = next((known for pattern, known in _INTERPRETERS.items() if pattern.fullmatch(name)), None)
    words = iter(command[1:])
    for word in words if options is not None else ():
        assert options is not None
        if word == "--":
            return next(words, None)
        if word == "-jar" and name == "java":
            return next(words, None)
        if word in options.with_value:
            next(words, None)
        elif not word.startswith(("-", "+")):
            return None if name == "java" else word  # a class, found on the class path
        elif not options.alone.fullmatch(word):
            return None
    return None


def _below(root: Path, path: Path) -> list[str]:
    """How a patch of `root` would name the file: as it is written, and where it really is."""
    real = os.path.realpath(root)
    ways = (
        (os.path.normpath(root), os.path.normpath(path)),
        (real, os.path.realpath(path)),
        # A managed file is a link of the root, whose own name counts.
        (real, f"{os.path.realpath(path.parent)}/{path.name}"),
    )
    return [inner[len(outer) + 1 :] for outer, inner in ways if inner.startswith(f"{outer}/")]
