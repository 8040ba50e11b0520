"""The manifest of the prototype's packages, read as it is. Pure.

The prototype ("Patching-Mechanism") packed a folder ``patch/`` with a manifest of three lists and the sources
in two flat folders::

    patch/manifest.json   {"justres": true, "region": "us-east-1", "build": "300",
                           "newfiles": [{"name": "res.json", "path": "/work/rest/"}],
                           "modfiles": [...], "delfiles": [...]}
    patch/new/res.json
    patch/mod/...

It becomes an ordinary `Manifest`, and from there on goes through the same checks and the same transaction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from asyncsup.errors import UsageError
from asyncsup.patch.manifest import (
    MAX_INTEGER,
    FileChange,
    Kind,
    Manifest,
    Op,
    Reader,
    json_type,
    load_object,
    read_path,
    report_collisions,
    shorten,
)

FOLDER: Final = "patch/"
MANIFEST: Final = "patch/manifest.json"
FOLDERS: Final = frozenset({"patch/", "patch/new/", "patch/mod/", "patch/del/"})

_KEYS: Final = ("justres", "region", "build", "newfiles", "modfiles", "delfiles")
_LISTS: Final = (("delfiles", Op.DELETED), ("modfiles", Op.MODIFIED), ("newfiles", Op.NEW))
_SOURCES: Final[Mapping[Op, str]] = {
    Op.NEW: "patch/new/",
    Op.MODIFIED: "patch/mod/",
    Op.DELETED: "patch/del/",
}
_DECIMAL = re.compile(r"[0-9]{1,16}")
_CRC32_DECIMAL = re.compile(r"[0-9]{1,10}")
_CRC32_HEX = re.compile(r"0[xX][0-9a-fA-F]{1,8}|[0-9a-fA-F]{8}")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._+-]+")


class PrototypeFile(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a list: what happens to which path, and which entry of the archive stands for it.

    The entry of a deleted file need not exist; where it does, nobody reads it.
    """

    path: str
    op: Op
    source: str


class Prototype(msgspec.Struct, frozen=True, kw_only=True):
    """What the prototype's manifest says; `files` in the order in which the prototype acted."""

    region: str
    build: int
    kind: Kind
    files: tuple[PrototypeFile, ...]


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """Digest (lower-case hex) and size in bytes of one source."""

    sha256: str
    size: int


def parse_prototype(raw: bytes) -> Prototype:
    """Read and check the bytes of a ``patch/manifest.json``.

    Raises:
        PatchMalformedError: as `parse_manifest` does, with the same codes.
    """
    reader = Reader()
    value = load_object(raw)
    reader.known(value, _KEYS, "")
    warm = reader.optional(value, "justres", "", reader.boolean, False)
    files: list[PrototypeFile] = []
    named: list[tuple[str, str]] = []
    for key, op in _LISTS:
        for index, item in enumerate(_list(value.get(key, []), key, reader)):
            file = _read_file(item, f"{key}[{index}]", op, reader)
            if file is not None:
                files.append(file)
                named.append((f"{key}[{index}]", file.path))
    prototype = Prototype(
        region=reader.required(value, "region", "", reader.label, ""),
        build=reader.required(value, "build", "", lambda item, where: _read_build(item, where, reader), 0),
        kind=Kind.WARM if warm else Kind.COLD,
        files=tuple(files),
    )
    if not reader.count and not files:
        reader.problem("", "the manifest lists no file at all; a patch changes at least one")
    report_collisions(named, reader)
    reader.finish()
    return prototype


def to_manifest(prototype: Prototype, *, name: str, contents: Mapping[str, Content]) -> Manifest:
    """The same in the words of format 1.

    The prototype overwrote whatever a new file met, created a modified file that was missing, and did not
    mind deleting one that was gone; each change says so for itself.

    Args:
        name: the patch's name; see `name_from_file`.
        contents: by entry name, for every new and modified file.
    """
    files = []
    for file in prototype.files:
        if file.op is Op.DELETED:
            files.append(FileChange(path=file.path, op=file.op, missing_ok=True))
        else:
            content = contents[file.source]
            files.append(
                FileChange(
                    path=file.path,
                    op=file.op,
                    sha256=content.sha256,
                    size=content.size,
                    missing_ok=file.op is Op.MODIFIED,
                    replace=file.op is Op.NEW,
                )
            )
    return Manifest(
        name=name,
        version=str(prototype.build),
        build=prototype.build,
        kind=prototype.kind,
        targets=(),
        regions=(prototype.region,),
        files=tuple(files),
    )


def with_root_name(manifest: Manifest, root_name: str) -> Manifest:
    """The manifest with its paths relative to a root folder called `root_name`.

    The prototype's paths begin at its installation folder (``/work/job.json``), of which the target's root
    (``work``) may be a part: a first component that equals the root's own name is stripped. A root that is
    the installation folder itself has another name, and nothing is stripped. Manifests of format 1 (those
    which name targets) are relative to the root already and come back unchanged.

    Raises:
        PatchMalformedError: ``manifest.duplicate`` or ``manifest.prefix_conflict``: two paths fall together.
    """
    prefix = f"{root_name}/"
    if manifest.targets or not any(change.path.startswith(prefix) for change in manifest.files):
        return manifest
    files = tuple(replace(change, path=change.path.removeprefix(prefix)) for change in manifest.files)
    reader = Reader()
    report_collisions([("", change.path) for change in files], reader)
    reader.finish()
    return replace(manifest, files=files)


def name_from_file(file_name: str) -> str:
    """A patch name made of the package's file name, ``prototype`` where nothing is left of it."""
    stem = file_name[:-4] if file_name.lower().endswith(".zip") else file_name
    name = _NOT_IN_NAMES.sub("-", stem).strip("-._+")
    return name[:128] or "prototype"


def parse_crc32(text: str) -> int:
    """A CRC-32 as an operator types it: decimal as the prototype printed it, ``0x…``, or 8 hex digits.

    Digits only are decimal; write ``0x`` in front of a hexadecimal number without letters.

    Raises:
        UsageError: it is none of these, or does not fit into 32 bits.
    """
    text = text.strip()
    if _CRC32_DECIMAL.fullmatch(text) and int(text) < 1 << 32:
        return int(text)
    if _CRC32_HEX.fullmatch(text) and not text.isdecimal():
        return int(text, 16)
    raise UsageError(
        f"{text[:80]!r} is not a CRC-32: give it in decimal (851398428) or hexadecimal (0x32bf3b1c)",
        code="usage.crc32",
    )


def _list(value: Any, where: str, reader: Reader) -> list[Any]:
    if isinstance(value, list):
        return value
    reader.problem(where, f"must be an array of objects, got {json_type(value)}")
    return []


def _read_file(value: Any, where: str, op: Op, reader: Reader) -> PrototypeFile | None:
    before = reader.count
    entry = reader.object(value, where)
    if not isinstance(value, dict):
        return None
    reader.known(entry, ("name", "path"), where)
    name = reader.required(entry, "name", where, reader.string, "")
    folder = reader.required(entry, "path", where, reader.string, "")
    if reader.count > before:
        return None
    if "/" in name:
        reader.problem(
            f"{where}.name", f"{shorten(name)} must be a plain file name, without `/`", "manifest.path"
        )
        return None
    # One leading slash is how the prototype wrote "relative to the installation folder".
    folder = folder.removeprefix("/")
    path = read_path(f"{folder.removesuffix('/')}/{name}" if folder else name, where, reader)
    return PrototypeFile(path=path, op=op, source=_SOURCES[op] + name) if path else None


def _read_build(value: Any, where: str, reader: Reader) -> int:
    if type(value) is int:  # its JSON reader took a number for a string as well
        return reader.integer(value, where)
    if isinstance(value, str) and _DECIMAL.fullmatch(value) and int(value) < MAX_INTEGER:
        return int(value)
    reader.problem(
        where, f"must be a decimal number as a string, at least 0 and below 2^53, got {shorten(value)}"
    )
    return 0
