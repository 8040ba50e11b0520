"""Which paths a patch may name. Pure.

One set of rules for everything that becomes a path below a target's root: entry names of an archive, paths of
a manifest, destinations of the prototype. They are stricter than Linux is, so that a package means the same
on every machine it is built, looked at or unpacked on.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final, Literal

import msgspec

MAX_COMPONENT_BYTES: Final = 255
"""What Linux file systems take as one name."""

MAX_PATH_BYTES: Final = 1024
"""Leaves three quarters of PATH_MAX for what stands in front of the path: root, generation, staging area."""

MAX_DEPTH: Final = 64

PRIVATE_PREFIX: Final = ".asyncsup"
"""Names that begin so are asyncsup's own (state directory, staging links)."""

_DRIVE = re.compile(r"[A-Za-z]:")
# A number of the kind VMS puts behind names: `unzip` leaves it out, and would unpack `a;1` as `a`.
_FILE_VERSION = re.compile(r";[0-9]*$")
# What Windows takes for a device whatever the extension; a package with such a file cannot be unpacked there.
_RESERVED = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9\u00b9\u00b2\u00b3])(?:\.|$)")


class PathFault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a path is refused: a short stable name for the rule, and a clause for people."""

    rule: str
    message: str


@lru_cache(maxsize=1 << 14)
def path_fault(path: str, *, max_depth: int = MAX_DEPTH, private: bool = True) -> PathFault | None:
    """The first rule that `path` breaks, or None when it may be used.

    Args:
        max_depth: how many components it may have.
        private: refuse components that are asyncsup's own.
    """
    if not path:
        return PathFault(rule="empty", message="is empty")
    # Control characters, format characters (invisible or direction-changing), lone surrogates, spaces other
    # than the ordinary one, and what Unicode has not assigned yet and may one day normalise.
    if not path.isprintable():
        culprit = next(character for character in path if not character.isprintable())
        return PathFault(
            rule="control", message=f"holds U+{ord(culprit):04X}, which is a control character or invisible"
        )
    if "\\" in path:
        return PathFault(rule="backslash", message="holds a backslash; components are separated by `/`")
    if path[0] == "/":
        return PathFault(rule="absolute", message="is absolute; it must be relative")
    if _DRIVE.match(path):
        return PathFault(rule="drive", message="begins with a drive letter; it must be relative")
    components = path.split("/")
    if len(components) > max_depth:
        return PathFault(rule="depth", message=f"has {len(components)} components, the limit is {max_depth}")
    for component in components:
        fault = _component_fault(component)
        if fault is not None and (private or fault.rule != "private"):
            return fault
    if len(path) > MAX_PATH_BYTES // 4 and len(path.encode()) > MAX_PATH_BYTES:
        return PathFault(rule="long", message=f"is longer than {MAX_PATH_BYTES} bytes")
    return None


@lru_cache(maxsize=1 << 14)
def _component_fault(component: str) -> PathFault | None:
    if component in {"", ".", ".."}:
        return PathFault(rule="traversal", message="has an empty, `.` or `..` component")
    if not component.isascii() and not unicodedata.is_normalized("NFC", component):
        return PathFault(rule="nfc", message="is not in Unicode normal form NFC")
    if len(component.encode()) > MAX_COMPONENT_BYTES:
        return PathFault(rule="long", message=f"has a component of more than {MAX_COMPONENT_BYTES} bytes")
    if component[-1] in {".", " "}:
        return PathFault(rule="trailing", message="has a component that ends in a dot or a space")
    if _FILE_VERSION.search(component):
        message = "has a component that ends in a semicolon, or one and digits, which some readers leave out"
        return PathFault(rule="trailing", message=message)
    folded = component.casefold()
    if _RESERVED.match(folded):
        return PathFault(rule="reserved", message="has a component that is a device name on Windows")
    if folded.startswith(PRIVATE_PREFIX):
        return PathFault(
            rule="private", message=f"has a component in asyncsup's own `{PRIVATE_PREFIX}` names"
        )
    return None


def collision_key(path: str) -> str:
    """Equal for paths that some file system takes for the same: Unicode canonical caseless matching."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())


class Collision(msgspec.Struct, frozen=True, kw_only=True):
    """Two paths that cannot both be: equal but for case, or one a file where the other needs a folder."""

    kind: Literal["duplicate", "prefix_conflict"]
    index: int
    path: str
    other: str


def collisions(paths: Iterable[tuple[str, bool]]) -> Iterator[Collision]:
    """Every collision among `paths`, given as (path, is a folder); `index` counts in the order given."""
    entries = [(collision_key(path), path, is_folder) for path, is_folder in paths]
    seen: dict[str, str] = {}
    files: dict[str, str] = {}
    for index, (key, path, is_folder) in enumerate(entries):
        if key in seen:
            yield Collision(kind="duplicate", index=index, path=path, other=seen[key])
            continue
        seen[key] = path
        if not is_folder:
            files[key] = path
    clear: set[str] = {""}
    for index, (key, path, _) in enumerate(entries):
        parent = key.rpartition("/")[0]
        passed = []
        while parent not in clear:
            if parent in files:
                yield Collision(kind="prefix_conflict", index=index, path=path, other=files[parent])
                break
            passed.append(parent)
            parent = parent.rpartition("/")[0]
        else:
            clear.update(passed)
