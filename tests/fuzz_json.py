"""Manifests for fuzzing: a mutator that knows JSON's tokens, and two readers that must agree."""

from __future__ import annotations

import json
import os
import re
from copy import deepcopy
from random import Random
from typing import Any, Final

import orjson
import zip_forge
from fuzz_kit import FindingError, foreseen
from fuzz_zip import delta_change, delta_parts
from zip_forge import FILES, manifest_part

from asyncsup.errors import PatchMalformedError
from asyncsup.patch.manifest import encode_manifest, parse_manifest
from asyncsup.patch.prototype import parse_prototype

FULL: Final = manifest_part(
    files=[*map(zip_forge.change, FILES), delta_change(delta_parts()[1])],
    created="2026-11-22T10:00:00Z", expires="2090-01-01T00:00:00Z", requires={"build_min": 290},
    build_floor=1, downgrade=True, probation=1.5, notes="two\nlines", **{"x-ticket": {"id": ["OPS-1", None]}},
).data  # fmt: skip

JSON_PIECES: Final = (
    b"0", b"-0", b"1e2", b"1E400", b"-1", b"1.0", b"01", b"0x1", b"1_0", b"9007199254740991",
    b"9007199254740992", b"9" * 40, b"NaN", b"Infinity", b"-Infinity", b"null", b"true", b"True", b"[]",
    b"{}", b'""', b'"x"', b"'x'", b'"\\u0000"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\udc00\\ud800"',
    b'"\\u202e"', b'"\\x41"', b'"\xff"', b'"\xed\xa0\x80"', b'"\\u00e9"', b'"e\\u0301"', b"[[[[[[[[[[",
    b"]]]]", b"}", b",", b":", b'"', b"\\", b"/**/", b"#", b"\xef\xbb\xbf", b"\0", b"\x0b", b"\xc2\xa0",
    b"\x1e", b" ", b"\n", b'"build": 301, ', b'"\\u0062uild": 301, ', b'"x-a": 1, "x-a": 2, ',
    b'"path": "../x", ', b'"op": "deleted", ', b'"schema": "asyncsup.patch/2", ',
    b'"x-deep": ' + b"[" * 40 + b"]" * 40 + b", ",
)  # fmt: skip


_TOKEN = re.compile(rb'"(?:\\.|[^"\\])*"|[-+.\w]+|[][{},:]')
_VALUE = re.compile(rb'"(?:\\.|[^"\\])*"(?!\s*:)|[-+.\w]+')
_MEMBER = re.compile(rb'("(?:\\.|[^"\\])*")\s*:\s*("(?:\\.|[^"\\])*"|[-+.\w]+)')


VALUES: Final[tuple[Any, ...]] = (
    0, 1, -1, 200, 300, 301, 2**53 - 1, 2**53, 2**64, 10**40, 0.0, 300.0, 1.5, 1e300, True, False, None, "",
    "x", "300", "warm", "cold", "new", "modified", "deleted", "0644", "4755", "a" * 64, "A" * 64, "../x",
    "/x", "a/b", "a//b", "é", "e\u0301", "\u202e", "\0", "a\n", "2026-11-22T10:00:00Z", "2026-11-22",
    "x" * 3000, [], [[]], {}, {"x-a": 1}, ["pricer"], ["pricer", "pricer"], [""], "files/job.json",
    "job.json", "JOB.json", "rest", "CON", ".asyncsup/x", "a;1",
)  # fmt: skip
KEYS: Final = (
    "schema", "name", "version", "build", "kind", "targets", "regions", "created", "expires", "requires",
    "build_min", "build_max", "build_floor", "downgrade", "files", "probation", "notes", "path", "op",
    "sha256", "size", "mode", "base_sha256", "missing_ok", "replace", "justres", "region", "newfiles",
    "modfiles", "delfiles", "x-", "x-a", "X-a", "Build", "build ", "", "\u202e", "__proto__", "delta",
)  # fmt: skip


def mutate_json(random: Random, data: bytes) -> bytes:
    """Change what a manifest says, or how it is written."""
    value = json.loads(data)
    if random.random() < 0.5 or not _holders(value):
        return _mutate_tokens(random, data)
    for _ in range(random.choice((1, 1, 2, 3))):
        holder = random.choice(_holders(value))
        if isinstance(holder, dict):
            key = random.choice((*holder, *holder, random.choice(KEYS)))
            if random.random() < 0.2:
                holder.pop(key, None)
            else:
                holder[key] = deepcopy(random.choice((*VALUES, *holder.values())))
        elif holder and random.random() < 0.5:
            holder[random.randrange(len(holder))] = deepcopy(random.choice((*VALUES, *holder)))
        else:
            holder.append(deepcopy(random.choice((*VALUES, *holder))))
    written = json.dumps(
        value,
        ensure_ascii=random.random() < 0.5,
        indent=random.choice((None, None, 0, 3)),
        separators=random.choice((None, (",", ":"), (" , ", " :\t"))),
    )
    return written.encode("utf-8", "surrogatepass")


def _holders(value: Any) -> list[Any]:
    """Every object and array in a value, itself included."""
    found = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list):
            found.append(item)
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return found


def _mutate_tokens(random: Random, data: bytes) -> bytes:
    """Mostly values for values, so that it stays JSON."""
    value = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        pattern = random.choice((_VALUE, _VALUE, _VALUE, _MEMBER, _TOKEN))
        spans = [match.span() for match in pattern.finditer(bytes(value))]
        if not spans:
            break
        start, end = random.choice(spans)
        other = slice(*random.choice(spans))
        what = random.randrange(8)
        if what <= 2:
            value[start:end] = random.choice(JSON_PIECES)
        elif what <= 4:
            value[start:end] = value[other]
        elif what == 5:
            value[end:end] = (b"," if pattern is not _TOKEN else b"") + value[other]
        elif what == 6:
            value[random.randrange(start, end)] = random.randrange(256)
        else:
            del value[start:end]
    return bytes(value)


def judge_manifest(data: bytes) -> str:
    """Refused, or one value to every reader of JSON, and the same when it is written down."""
    try:
        manifest = parse_manifest(data)
    except PatchMalformedError as error:
        return foreseen(error, data)
    agree_on_json(data)
    if parse_manifest(encode_manifest(manifest)) != manifest:
        raise FindingError("another manifest when it is written down", data)
    if not 0 <= manifest.build < 2**53 or not manifest.targets or not manifest.regions or not manifest.files:
        raise FindingError("a manifest without what it must have", data)
    for change in manifest.files:
        if os.path.normpath(f"/root/{change.path}") != f"/root/{change.path}":
            raise FindingError(f"{change.path!r} leads out of the root", data)
    return "accepted"


def judge_prototype(data: bytes) -> str:
    try:
        prototype = parse_prototype(data)
    except PatchMalformedError as error:
        return foreseen(error, data)
    agree_on_json(data)
    for file in prototype.files:
        if os.path.normpath(f"/root/{file.path}") != f"/root/{file.path}":
            raise FindingError(f"{file.path!r} leads out of the root", data)
        if os.path.normpath(file.source) != file.source:
            raise FindingError(f"{file.source!r} leads out of its folder", data)
    return "accepted"


def agree_on_json(data: bytes) -> None:
    """No key twice, and two readers that share no code read the same value."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise FindingError("accepted with a key twice", data)
        return dict(pairs)

    slow, quick = json.loads(data, object_pairs_hook=unique), orjson.loads(data)
    if not alike(slow, quick):
        raise FindingError("orjson reads something else than the standard library", data)


def alike(slow: Any, quick: Any) -> bool:
    """Whether two readers mean the same; orjson makes fractions of integers beyond 64 bits."""
    if isinstance(slow, dict) and isinstance(quick, dict):
        return slow.keys() == quick.keys() and all(alike(slow[key], quick[key]) for key in slow)
    if isinstance(slow, list) and isinstance(quick, list):
        return len(slow) == len(quick) and all(map(alike, slow, quick))
    if type(slow) is int and isinstance(quick, float):
        return not -(1 << 63) <= slow < 1 << 64 and float(slow) == quick
    return type(slow) is type(quick) and slow == quick
