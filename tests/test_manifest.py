"""Manifests of format 1 and of the prototype: what is believed, what is refused and where."""

from __future__ import annotations

import json
import os.path
import time
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import zip_forge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncsup.errors import PatchMalformedError, UsageError
from asyncsup.patch.manifest import (
    MAX_REGIONS,
    MAX_TARGETS,
    FileChange,
    Kind,
    Manifest,
    Op,
    Requires,
    encode_manifest,
    parse_manifest,
)
from asyncsup.patch.paths import path_fault
from asyncsup.patch.prototype import (
    Content,
    name_from_file,
    parse_crc32,
    parse_prototype,
    to_manifest,
    with_root_name,
)

SHA = "a" * 64
OTHER = "b" * 64
NEW = {"path": "rest/res.json", "op": "new", "sha256": SHA, "size": 812}
MISSING = object()


def raw(**keys: Any) -> bytes:
    """A valid manifest with other values for `keys`; MISSING leaves one out."""
    value = {**zip_forge.manifest(), "files": [NEW], **keys}
    return json.dumps({key: item for key, item in value.items() if item is not MISSING}).encode()


def raw_file(**keys: Any) -> bytes:
    value = {**NEW, **keys}
    return raw(files=[{key: item for key, item in value.items() if item is not MISSING}])


def refuse(data: bytes) -> PatchMalformedError:
    with pytest.raises(PatchMalformedError) as caught:
        parse_manifest(data)
    assert caught.value.exit_status == 21
    return caught.value


def problems(error: PatchMalformedError) -> list[tuple[str, str]]:
    return [(problem["path"], problem["code"]) for problem in error.details["problems"]]


# --- what is read -------------------------------------------------------------------------------------------


def test_every_field_is_read() -> None:
    manifest = parse_manifest(
        raw(
            created="2026-11-22T10:00:00Z",
            expires="2027-02-22T01:00:00.5+02:00",
            requires={"build_min": 290, "build_max": 299},
            build_floor=250,
            downgrade=True,
            files=[
                {**NEW, "mode": "0755", "replace": True},
                {"path": "job.json", "op": "modified", "sha256": SHA, "size": 75, "base_sha256": OTHER},
                {"path": "libs/lib.txt", "op": "deleted", "missing_ok": True, "base_sha256": OTHER},
            ],
            probation=10,
            notes="two\nlines",
            **{"x-ticket": {"id": ["OPS-1", 2**60, None, 1.5]}},
        )
    )
    assert manifest == Manifest(
        name="pricing-rules",
        version="2.3.0",
        build=300,
        kind=Kind.WARM,
        targets=("pricer",),
        regions=("us-east-1",),
        created=datetime(2026, 11, 22, 10, tzinfo=UTC),
        expires=datetime(2027, 2, 21, 23, 0, 0, 500_000, tzinfo=UTC),
        requires=Requires(build_min=290, build_max=299),
        build_floor=250,
        downgrade=True,
        files=(
            FileChange(path="rest/res.json", op=Op.NEW, sha256=SHA, size=812, mode=0o755, replace=True),
            FileChange(path="job.json", op=Op.MODIFIED, sha256=SHA, size=75, base_sha256=OTHER),
            FileChange(path="libs/lib.txt", op=Op.DELETED, missing_ok=True, base_sha256=OTHER),
        ),
        probation=10.0,
        notes="two\nlines",
        extra={"x-ticket": {"id": ["OPS-1", 2**60, None, 1.5]}},
    )


def test_what_is_optional_may_be_left_out() -> None:
    manifest = parse_manifest(raw())
    assert manifest.created is None
    assert manifest.expires is None
    assert manifest.requires == Requires()
    assert manifest.build_floor is None
    assert manifest.downgrade is False
    assert manifest.probation is None
    assert manifest.notes == ""
    assert manifest.extra == {}
    assert manifest.files[0].mode is None


def test_own_keys_are_ignored_at_every_level() -> None:
    manifest = parse_manifest(raw(requires={"x-a": 1}, files=[{**NEW, "x-b": 2}], **{"x-c": 3}))
    assert manifest.extra == {"x-c": 3}


# --- what is refused ----------------------------------------------------------------------------------------

BAD: dict[str, tuple[bytes, str, str]] = {
    # M3, M4, M6: JSON
    "not JSON": (b"{", "", "manifest.json"),
    "nothing": (b"", "", "manifest.json"),
    "trailing bytes": (raw() + b"x", "", "manifest.json"),
    "duplicate key": (raw()[:-1] + b', "build": 301}', "", "manifest.json"),
    "duplicate key in a file": (raw().replace(b'"size"', b'"op": "new", "size"'), "", "manifest.json"),
    "NaN": (raw().replace(b"300", b"NaN"), "", "manifest.json"),
    "infinity": (raw().replace(b"300", b"Infinity"), "", "manifest.json"),
    "infinite by its exponent": (raw().replace(b"300", b"1e999"), "", "manifest.json"),
    "byte order mark": (b"\xef\xbb\xbf" + raw(), "", "manifest.json"),
    "UTF-16": (raw().decode().encode("utf-16"), "", "manifest.json"),
    "lone surrogate": (raw().replace(b"pricing-rules", b"\\ud800"), "", "manifest.json"),
    "bytes that are no UTF-8": (raw().replace(b"pricing-rules", b"\xff"), "", "manifest.json"),
    "deep nesting": (
        raw(**{"x-deep": 0}).replace(b": 0", b": " + b"[" * 2000 + b"]" * 2000),
        "",
        "manifest.json",
    ),
    "nesting beyond the limit": (
        raw(**{"x-deep": 0}).replace(b": 0", b": " + b"[" * 40 + b"]" * 40),
        "",
        "manifest.json",
    ),
    "deep nesting of objects": (b'{"x-a":' * 900 + b"1" + b"}" * 900, "", "manifest.json"),
    "integer of 5000 digits": (
        raw(**{"x-n": 0}).replace(b": 0", b": " + b"9" * 5000),
        "",
        "manifest.json",
    ),
    # M5: builds
    "build as a string": (raw(build="300"), "build", "manifest.schema"),
    "build as a fraction": (raw(build=300.0), "build", "manifest.schema"),
    "build as a boolean": (raw(build=True), "build", "manifest.schema"),
    "build null": (raw(build=None), "build", "manifest.schema"),
    "negative build": (raw(build=-1), "build", "manifest.schema"),
    "build of 2^53": (raw(build=2**53), "build", "manifest.schema"),
    "build of 10^29": (raw(build=10**29), "build", "manifest.schema"),
    # M7: keys
    "unknown key": (raw(target=["pricer"]), "target", "manifest.unknown_key"),
    "unknown key in requires": (raw(requires={"min": 1}), "requires.min", "manifest.unknown_key"),
    "unknown key in a file": (raw_file(sha=SHA), "files[0].sha", "manifest.unknown_key"),
    "key with control characters": (raw(**{"a\x1bb": 1}), r"'a\x1bb'", "manifest.unknown_key"),
    # other types and values
    "array": (b"[]", "", "manifest.schema"),
    "another schema": (raw(schema="asyncsup.patch/2"), "schema", "manifest.format"),
    "no schema": (raw(schema=MISSING), "schema", "manifest.format"),
    "no name": (raw(name=MISSING), "name", "manifest.schema"),
    "empty name": (raw(name=""), "name", "manifest.schema"),
    "name with a slash": (raw(name="../x"), "name", "manifest.schema"),
    "name with a newline": (raw(name="a\n"), "name", "manifest.schema"),
    "version as a number": (raw(version=2), "version", "manifest.schema"),
    "no build": (raw(build=MISSING), "build", "manifest.schema"),
    "kind in capitals": (raw(kind="WARM"), "kind", "manifest.schema"),
    "kind as an object": (raw(kind={}), "kind", "manifest.schema"),
    "no targets": (raw(targets=MISSING), "targets", "manifest.schema"),
    "empty targets": (raw(targets=[]), "targets", "manifest.schema"),
    "targets as a string": (raw(targets="pricer"), "targets", "manifest.schema"),
    "target twice": (raw(targets=["a", "a"]), "targets", "manifest.schema"),
    "target as a number": (raw(targets=["a", 1]), "targets[1]", "manifest.schema"),
    "empty regions": (raw(regions=[]), "regions", "manifest.schema"),
    "empty region": (raw(regions=[""]), "regions[0]", "manifest.schema"),
    "region with an escape": (raw(regions=["a\x1b[2J"]), "regions[0]", "manifest.schema"),
    "created without an offset": (raw(created="2026-11-22T10:00:00"), "created", "manifest.schema"),
    "created as a date": (raw(created="2026-11-22"), "created", "manifest.schema"),
    "created on a day that is none": (raw(created="2026-02-30T10:00:00Z"), "created", "manifest.schema"),
    "created before the calendar": (raw(created="0001-01-01T00:00:00+23:59"), "created", "manifest.schema"),
    "created as a number": (raw(created=1), "created", "manifest.schema"),
    "expired when created": (
        raw(created="2026-11-22T10:00:00Z", expires="2026-11-22T10:00:00Z"),
        "expires",
        "manifest.schema",
    ),
    "requires as a number": (raw(requires=290), "requires", "manifest.schema"),
    "requires nothing possible": (
        raw(requires={"build_min": 3, "build_max": 2}),
        "requires",
        "manifest.schema",
    ),
    "requires a fraction": (raw(requires={"build_min": 3.5}), "requires.build_min", "manifest.schema"),
    "floor as a string": (raw(build_floor="1"), "build_floor", "manifest.schema"),
    "more targets than anybody has": (
        raw(targets=[f"t{n}" for n in range(MAX_TARGETS + 1)]),
        "targets",
        "manifest.schema",
    ),
    "more regions than there are": (
        raw(regions=[f"r{n}" for n in range(MAX_REGIONS + 1)]),
        "regions",
        "manifest.schema",
    ),
    "downgrade without end": (raw(downgrade=True), "downgrade", "manifest.schema"),
    "downgrade with a lower bound only": (
        raw(downgrade=True, requires={"build_min": 300}),
        "downgrade",
        "manifest.schema",
    ),
    "downgrade as a number": (raw(downgrade=1), "downgrade", "manifest.schema"),
    "probation negative": (raw(probation=-1), "probation", "manifest.schema"),
    "probation as a boolean": (raw(probation=True), "probation", "manifest.schema"),
    "probation of years": (raw(probation=1e9), "probation", "manifest.schema"),
    "notes as a list": (raw(notes=[]), "notes", "manifest.schema"),
    "notes with an escape": (raw(notes="\x1b[2J"), "notes", "manifest.schema"),
    "notes that turn text around": (raw(notes="\u202eabc"), "notes", "manifest.schema"),
    "notes without end": (raw(notes="x" * 20_000), "notes", "manifest.schema"),
    "no files": (raw(files=MISSING), "files", "manifest.schema"),
    "empty files": (raw(files=[]), "files", "manifest.schema"),
    "files as an object": (raw(files={}), "files", "manifest.schema"),
    "file as a string": (raw(files=["job.json"]), "files[0]", "manifest.schema"),
    "file without anything": (raw(files=[{}]), "files[0]", "manifest.schema"),
    "file without a path": (raw_file(path=MISSING), "files[0].path", "manifest.schema"),
    "path as a number": (raw_file(path=1), "files[0].path", "manifest.schema"),
    "file without an op": (raw_file(op=MISSING), "files[0].op", "manifest.schema"),
    "unknown op": (raw_file(op="replaced"), "files[0].op", "manifest.schema"),
    "new without a digest": (raw_file(sha256=MISSING), "files[0].sha256", "manifest.schema"),
    "new without a size": (raw_file(size=MISSING), "files[0].size", "manifest.schema"),
    "modified without a digest": (
        raw_file(op="modified", sha256=MISSING),
        "files[0].sha256",
        "manifest.schema",
    ),
    "digest in capitals": (raw_file(sha256="A" * 64), "files[0].sha256", "manifest.schema"),
    "digest too short": (raw_file(sha256="a" * 63), "files[0].sha256", "manifest.schema"),
    "digest with a newline": (raw_file(sha256="a" * 64 + "\n"), "files[0].sha256", "manifest.schema"),
    "negative size": (raw_file(size=-1), "files[0].size", "manifest.schema"),
    "size as a fraction": (raw_file(size=812.0), "files[0].size", "manifest.schema"),
    "base of a new file": (raw_file(base_sha256=OTHER), "files[0].base_sha256", "manifest.schema"),
    "missing_ok of a new file": (raw_file(missing_ok=True), "files[0].missing_ok", "manifest.schema"),
    "replace of a modified file": (
        raw_file(op="modified", replace=True),
        "files[0].replace",
        "manifest.schema",
    ),
    "deleted with a digest": (
        raw_file(op="deleted", size=MISSING),
        "files[0].sha256",
        "manifest.schema",
    ),
    "deleted with a size": (raw_file(op="deleted", sha256=MISSING), "files[0].size", "manifest.schema"),
    "deleted with a mode": (
        raw_file(op="deleted", sha256=MISSING, size=MISSING, mode="0644"),
        "files[0].mode",
        "manifest.schema",
    ),
    "missing_ok as a string": (
        raw_file(op="modified", missing_ok="yes"),
        "files[0].missing_ok",
        "manifest.schema",
    ),
    "mode as a number": (raw_file(mode=420), "files[0].mode", "manifest.schema"),
    "mode with setuid": (raw_file(mode="4755"), "files[0].mode", "manifest.schema"),
    "mode with setuid, five digits": (raw_file(mode="04755"), "files[0].mode", "manifest.schema"),
    "mode with sticky": (raw_file(mode="1777"), "files[0].mode", "manifest.schema"),
    "mode that is not octal": (raw_file(mode="0888"), "files[0].mode", "manifest.schema"),
    "mode in words": (raw_file(mode="rw-r--r--"), "files[0].mode", "manifest.schema"),
    # M9: paths that cannot stand beside one another
    "path twice": (raw(files=[NEW, {**NEW, "op": "modified"}]), "files[1].path", "manifest.duplicate"),
    "path new and deleted": (
        raw(files=[NEW, {"path": NEW["path"], "op": "deleted"}]),
        "files[1].path",
        "manifest.duplicate",
    ),
    "paths that differ in case": (
        raw(files=[NEW, {**NEW, "path": "rest/RES.json"}]),
        "files[1].path",
        "manifest.duplicate",
    ),
    "path below a file": (
        raw(files=[NEW, {**NEW, "path": "rest/res.json/x"}]),
        "files[1].path",
        "manifest.prefix_conflict",
    ),
    "path below a file that comes later": (
        raw(files=[{**NEW, "path": "rest/res.json/x"}, NEW]),
        "files[0].path",
        "manifest.prefix_conflict",
    ),
    "path below a file in other case": (
        raw(files=[NEW, {**NEW, "path": "Rest/res.JSON/x/y"}]),
        "files[1].path",
        "manifest.prefix_conflict",
    ),
}

# M8
BAD_PATHS = {
    "empty": "",
    "absolute": "/etc/passwd",
    "parent": "../x",
    "parent within": "a/../../x",
    "parent at the end": "a/..",
    "dot": "./x",
    "double slash": "a//b",
    "slash at the end": "a/",
    "backslash": "a\\b",
    "drive": "c:/x",
    "NUL": "a\0b",
    "newline": "a\nb",
    "delete": "a\x7fb",
    "bidi": "a\u202eb",
    "zero width": "a\u200db",
    "line separator": "a\u2028b",
    "NFD": unicodedata.normalize("NFD", "é"),
    "trailing dot": "a./b",
    "trailing space": "a/b ",
    "reserved": "a/Aux.txt",
    "long component": "x" * 256,
    "long component in bytes": "é" * 128,
    "long": "/".join(["x" * 200] * 6),
    "deep": "/".join("x" * 65),
    "own folder": ".asyncsup/state.db",
    "own folder, deeper, in capitals": "a/.ASYNCSUP/x",
    "own files": "a/.asyncsup~next",
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_manifest_is_refused_at_the_right_place(fault: str) -> None:
    data, where, code = BAD[fault]
    error = refuse(data)
    assert problems(error) == [(where, code)], error.message
    assert error.error_code == code
    assert error.message.isprintable()
    assert error.message.startswith(f"manifest: {where}: " if where else "the manifest ")


@pytest.mark.parametrize("fault", BAD_PATHS)
def test_path_that_leaves_the_root_or_means_two_things_is_refused(fault: str) -> None:
    error = refuse(raw_file(path=BAD_PATHS[fault]))
    assert problems(error) == [("files[0].path", "manifest.path")]
    assert error.message.isprintable()


@pytest.mark.parametrize(
    "path",
    ["a", "a/b.c", "rés/Ünï.txt", ".hidden", "a b/c", "-x", "~", "日本語", "x" * 255, "...x", "console"],
)
def test_ordinary_path_is_accepted(path: str) -> None:
    assert parse_manifest(raw_file(path=path)).files[0].path == path


def test_unknown_key_names_the_nearest_known_one() -> None:
    message = refuse(raw(regoins=["us-east-1"])).message
    assert "'regions'" in message
    assert "x-" in message


def test_every_problem_is_reported_at_once() -> None:
    error = refuse(
        raw(
            build="300",
            kind="hot",
            regoins=[],
            files=[{**NEW, "mode": "4755"}, {"path": "/x", "op": "new"}, {"path": "y"}],
        )
    )
    assert problems(error) == [
        ("regoins", "manifest.unknown_key"),
        ("build", "manifest.schema"),
        ("kind", "manifest.schema"),
        ("files[0].mode", "manifest.schema"),
        ("files[1].path", "manifest.path"),
        ("files[1].sha256", "manifest.schema"),
        ("files[1].size", "manifest.schema"),
        ("files[2].op", "manifest.schema"),
    ]
    assert error.details["problem_count"] == 8
    assert error.error_code == "manifest.unknown_key"


def test_list_of_problems_is_bounded() -> None:
    error = refuse(raw(files=[{**NEW, "path": f"../{index}"} for index in range(500)]))
    assert error.details["problem_count"] == 500
    assert len(error.details["problems"]) == 100
    assert len(error.message) < 1000


HOSTILE_SIZES = {
    "a million unknown keys": lambda: b"{" + b",".join(b'"k%d":0' % n for n in range(1_000_000)) + b"}",
    "a huge unknown key": lambda: b'{"' + b"build" * 3_000_000 + b'":0}',
    "the last of many keys twice": lambda: (
        b"{" + b",".join(b'"x-%d":0' % (n % 999_999) for n in range(1_000_000)) + b"}"
    ),
    "a million files that are none": lambda: raw(files=[]).replace(b"[]", b"[" + b"0," * 1_000_000 + b"0]"),
    "millions of files that are empty": lambda: raw(files=[]).replace(
        b"[]", b"[" + b"{}," * 5_000_000 + b"{}]"
    ),
    "as many as are read": lambda: raw(files=[]).replace(b"[]", b"[" + b"{}," * 990_000 + b"{}]"),
    "millions of empty values": lambda: b'{"x-a":[' + b"[]," * 5_000_000 + b"[]]}",
    "a huge path": lambda: raw_file(path="a/" * 5_000_000),
    "a huge value": lambda: raw(kind=["x" * 10_000_000]),
}


@pytest.mark.parametrize("size", HOSTILE_SIZES)
def test_hostile_manifest_of_the_largest_size_is_refused_quickly(size: str) -> None:
    """All these are below the limit of 16 MiB. CPU time, because machines are shared."""
    data = HOSTILE_SIZES[size]()
    before = time.process_time()
    error = refuse(data)
    assert time.process_time() - before < 10
    assert len(error.message) < 1000
    assert len(error.details["problems"]) <= 100


# --- writing ------------------------------------------------------------------------------------------------


def test_encoding_has_one_line_for_each_file() -> None:
    manifest = parse_manifest(raw(files=[NEW, {**NEW, "path": "b"}], created="2026-11-22T10:00:00+00:00"))
    assert encode_manifest(manifest).decode() == (
        "{\n"
        '  "schema": "asyncsup.patch/1",\n'
        '  "name": "pricing-rules",\n'
        '  "version": "2.3.0",\n'
        '  "build": 300,\n'
        '  "kind": "warm",\n'
        '  "targets": ["pricer"],\n'
        '  "regions": ["us-east-1"],\n'
        '  "created": "2026-11-22T10:00:00Z",\n'
        '  "files": [\n'
        f'    {{"path": "rest/res.json", "op": "new", "sha256": "{SHA}", "size": 812}},\n'
        f'    {{"path": "b", "op": "new", "sha256": "{SHA}", "size": 812}}\n'
        "  ]\n"
        "}\n"
    )


def test_naive_time_is_not_written() -> None:
    manifest = parse_manifest(raw())
    with pytest.raises(ValueError, match="time zone"):
        encode_manifest(
            Manifest(
                **{name: getattr(manifest, name) for name in ("name", "version", "build", "kind", "files")},
                targets=("a",),
                regions=("b",),
                created=datetime(2026, 1, 1),
            )
        )


DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
INTEGERS = st.integers(0, 2**53 - 1)
LABELS = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=20
).filter(str.isprintable)
COMPONENTS = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "S"), include_characters="-_.")
    , min_size=1, max_size=12,
)  # fmt: skip
PATHS = (
    st.lists(COMPONENTS, min_size=1, max_size=4)
    .map(lambda parts: unicodedata.normalize("NFC", "/".join(parts)))
    .filter(lambda path: path_fault(path) is None)
)
TIMES = st.datetimes(
    datetime(1971, 1, 1), datetime(2900, 1, 1), timezones=st.sampled_from([UTC, timezone(timedelta(hours=5))])
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | LABELS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LABELS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changes(draw: st.DrawFn, path: str) -> FileChange:
    op = draw(st.sampled_from(Op))
    if op is Op.DELETED:
        return FileChange(
            path=path, op=op, base_sha256=draw(st.none() | DIGESTS), missing_ok=draw(st.booleans())
        )
    return FileChange(
        path=path,
        op=op,
        sha256=draw(DIGESTS),
        size=draw(INTEGERS),
        mode=draw(st.none() | st.integers(0, 0o777)),
        base_sha256=draw(st.none() | DIGESTS) if op is Op.MODIFIED else None,
        missing_ok=op is Op.MODIFIED and draw(st.booleans()),
        replace=op is Op.NEW and draw(st.booleans()),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    # A number in front keeps generated paths apart.
    names = draw(st.lists(PATHS, min_size=1, max_size=4))
    created, expires = sorted(draw(st.tuples(TIMES, TIMES).filter(lambda pair: pair[0] != pair[1])))
    low, high = sorted(draw(st.tuples(INTEGERS, INTEGERS)))
    return Manifest(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,20}", fullmatch=True)),
        version=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+~:-]{0,20}", fullmatch=True)),
        build=draw(INTEGERS),
        kind=draw(st.sampled_from(Kind)),
        targets=tuple(draw(st.lists(LABELS, min_size=1, max_size=3, unique=True))),
        regions=tuple(draw(st.lists(LABELS, min_size=1, max_size=3, unique=True))),
        files=tuple(draw(changes(f"{index}/{path}")) for index, path in enumerate(names)),
        created=draw(st.sampled_from([None, created])),
        expires=draw(st.sampled_from([None, expires])),
        requires=Requires(build_min=draw(st.sampled_from([None, low])), build_max=high),
        build_floor=draw(st.none() | INTEGERS),
        downgrade=draw(st.booleans()),
        probation=draw(st.none() | st.floats(0, 86400)),
        notes=draw(
            st.text(st.characters(codec="utf-8", categories=("L", "M", "N", "P", "S", "Zs")), max_size=40)
        ),
        extra={f"x-{key}": value for key, value in draw(st.dictionaries(LABELS, JSON, max_size=2)).items()},
    )


@given(manifests())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_written_is_read_back_equal(manifest: Manifest) -> None:
    encoded = encode_manifest(manifest)
    assert parse_manifest(encoded) == manifest
    assert encode_manifest(parse_manifest(encoded)) == encoded


# --- fuzzing ------------------------------------------------------------------------------------------------

FULL = raw(
    created="2026-11-22T10:00:00Z",
    requires={"build_min": 290},
    files=[NEW, {"path": "libs/lib.txt", "op": "deleted", "missing_ok": True}],
    notes="x",
)


def check_parsed(data: bytes) -> None:
    """Either refused, or a manifest that keeps every rule and survives being written."""
    try:
        manifest = parse_manifest(data)
    except PatchMalformedError as error:
        assert error.error_code.startswith("manifest.")
        assert error.message.isprintable()
        return
    assert type(manifest.build) is int
    assert manifest.targets
    assert manifest.regions
    for change in manifest.files:
        assert os.path.normpath(f"/root/{change.path}") == f"/root/{change.path}"
        assert (change.sha256 is None) == (change.size is None) == (change.op is Op.DELETED)
    assert parse_manifest(encode_manifest(manifest)) == manifest
    assert json.loads(data)["build"] == manifest.build


@given(
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 4)), max_size=3
    )
)
@settings(max_examples=300, deadline=None)
def test_mutated_manifest_is_refused_or_sound(mutations: list[tuple[float, bytes, int]]) -> None:
    value = bytearray(FULL)
    for where, piece, removed in mutations:
        at = int(where * len(value))
        value[at : at + removed] = piece
    check_parsed(bytes(value))


@given(
    key=st.sampled_from(sorted(json.loads(FULL))),
    value=JSON | st.text(max_size=10) | st.lists(JSON, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_any_value_for_any_key_is_refused_or_sound(key: str, value: Any) -> None:
    check_parsed(json.dumps({**json.loads(FULL), key: value}).encode())


@given(key=st.sampled_from(["path", "op", "sha256", "size", "mode", "base_sha256", "missing_ok"]), value=JSON)
@settings(max_examples=200, deadline=None)
def test_any_value_in_a_file_is_refused_or_sound(key: str, value: Any) -> None:
    check_parsed(raw_file(**{key: value}))


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_as_a_path_is_refused_or_stays_below_the_root(path: str) -> None:
    if path_fault(path) is None:
        assert os.path.normpath(f"/root/{path}") == f"/root/{path}"
        assert path.isprintable()


# --- the prototype ------------------------------------------------------------------------------------------


def refuse_prototype(data: bytes) -> PatchMalformedError:
    with pytest.raises(PatchMalformedError) as caught:
        parse_prototype(data)
    return caught.value


CONTENTS: Mapping[str, Content] = {
    "patch/new/res.json": Content(sha256=SHA, size=1),
    "patch/mod/job.json": Content(sha256=OTHER, size=2),
}


def prototype(**keys: Any) -> Manifest:
    parsed = parse_prototype(zip_forge.prototype_manifest(**keys))
    return to_manifest(parsed, name="patch", contents=CONTENTS)


def test_prototype_becomes_a_manifest() -> None:
    assert prototype() == Manifest(
        name="patch",
        version="300",
        build=300,
        kind=Kind.WARM,
        targets=(),
        regions=("us-east-1",),
        files=(
            FileChange(path="work/libs/lib.txt", op=Op.DELETED, missing_ok=True),
            FileChange(path="work/job.json", op=Op.MODIFIED, sha256=OTHER, size=2, missing_ok=True),
            FileChange(path="work/rest/res.json", op=Op.NEW, sha256=SHA, size=1, replace=True),
        ),
    )


@pytest.mark.parametrize(("justres", "kind"), [(True, Kind.WARM), (False, Kind.COLD), (None, Kind.COLD)])
def test_prototype_without_justres_is_cold(justres: bool | None, kind: Kind) -> None:
    assert prototype(justres=justres).kind is kind


@pytest.mark.parametrize("build", ["300", "0300", 300])
def test_prototype_build_is_decimal(build: Any) -> None:
    assert prototype(build=build).build == 300


def test_prototype_lists_may_be_left_out() -> None:
    assert [file.path for file in prototype(newfiles=None, delfiles=None).files] == ["work/job.json"]


@pytest.mark.parametrize(
    ("folder", "path"),
    [("/work/", "work/job.json"), ("work", "work/job.json"), ("/", "job.json"), ("", "job.json")],
)
def test_prototype_destination_is_path_and_name(folder: str, path: str) -> None:
    files = prototype(modfiles=[{"name": "job.json", "path": folder}], newfiles=None).files
    assert path in [file.path for file in files]


def test_prototype_root_name_is_stripped_once() -> None:
    manifest = prototype(delfiles=[{"name": "x", "path": "/work/work/"}, {"name": "work", "path": "/"}][:1])
    paths = [file.path for file in with_root_name(manifest, "work").files]
    assert paths == ["work/x", "job.json", "rest/res.json"]


def test_prototype_paths_stay_when_the_root_has_another_name() -> None:
    assert with_root_name(prototype(), "app") == prototype()


def test_native_manifest_is_relative_to_its_root_already() -> None:
    manifest = parse_manifest(raw_file(path="work/job.json"))
    assert with_root_name(manifest, "work") is manifest


def test_prototype_paths_that_fall_together_below_the_root_are_refused() -> None:
    manifest = prototype(delfiles=[{"name": "job.json", "path": "/"}])
    assert len(manifest.files) == 3
    with pytest.raises(PatchMalformedError) as caught:
        with_root_name(manifest, "work")
    assert caught.value.error_code == "manifest.duplicate"


def test_prototype_source_may_serve_two_destinations() -> None:
    files = prototype(
        modfiles=[{"name": "job.json", "path": "/a/"}, {"name": "job.json", "path": "/b/"}]
    ).files
    assert [file.sha256 for file in files if file.op is Op.MODIFIED] == [OTHER, OTHER]


def item(name: Any = "res.json", path: Any = "/work/rest/") -> list[dict[str, Any]]:
    return [{"name": name, "path": path}]


BAD_PROTOTYPES: dict[str, tuple[dict[str, Any], str, str]] = {
    # L2
    "name with a slash": ({"newfiles": item("a/b")}, "newfiles[0].name", "manifest.path"),
    "name that is the parent": ({"newfiles": item("..")}, "newfiles[0]", "manifest.path"),
    "empty name": ({"delfiles": item("")}, "delfiles[0]", "manifest.path"),
    "path with the parent": ({"modfiles": item(path="/work/../../etc/")}, "modfiles[0]", "manifest.path"),
    "path with a backslash": ({"modfiles": item(path="\\work\\")}, "modfiles[0]", "manifest.path"),
    "path with two slashes": ({"newfiles": item(path="//work/")}, "newfiles[0]", "manifest.path"),
    "path in asyncsup's own folder": ({"newfiles": item(path="/.asyncsup/")}, "newfiles[0]", "manifest.path"),
    # L3
    "build not decimal": ({"build": "3.0.0"}, "build", "manifest.schema"),
    "build with a sign": ({"build": "+300"}, "build", "manifest.schema"),
    "build negative": ({"build": "-1"}, "build", "manifest.schema"),
    "build in Arabic digits": ({"build": "٣"}, "build", "manifest.schema"),
    "build empty": ({"build": ""}, "build", "manifest.schema"),
    "build too large": ({"build": str(2**53)}, "build", "manifest.schema"),
    "build a fraction": ({"build": 300.0}, "build", "manifest.schema"),
    "no build": ({"build": None}, "build", "manifest.schema"),
    # L5
    "two entries, one destination": ({"newfiles": item() + item()}, "newfiles[1]", "manifest.duplicate"),
    "deleted and new": ({"delfiles": item()}, "newfiles[0]", "manifest.duplicate"),
    "destinations that differ in case": (
        {"newfiles": item() + item("RES.json")},
        "newfiles[1]",
        "manifest.duplicate",
    ),
    "destination below a file": (
        {"newfiles": item() + item(path="/work/rest/res.json/")},
        "newfiles[1]",
        "manifest.prefix_conflict",
    ),
    # types
    "no region": ({"region": None}, "region", "manifest.schema"),
    "region as a list": ({"region": ["us-east-1"]}, "region", "manifest.schema"),
    "justres as a string": ({"justres": "true"}, "justres", "manifest.schema"),
    "list as an object": ({"newfiles": {}}, "newfiles", "manifest.schema"),
    "item as a string": ({"newfiles": ["res.json"]}, "newfiles[0]", "manifest.schema"),
    "item without a path": ({"newfiles": [{"name": "res.json"}]}, "newfiles[0].path", "manifest.schema"),
    "item without a name": ({"newfiles": [{"path": "/work/"}]}, "newfiles[0].name", "manifest.schema"),
    "unknown key": ({"modfile": []}, "modfile", "manifest.unknown_key"),
    "no file at all": ({"newfiles": [], "modfiles": [], "delfiles": []}, "", "manifest.schema"),
}


@pytest.mark.parametrize("fault", BAD_PROTOTYPES)
def test_bad_prototype_manifest_is_refused_at_the_right_place(fault: str) -> None:
    keys, where, code = BAD_PROTOTYPES[fault]
    error = refuse_prototype(zip_forge.prototype_manifest(**keys))
    assert problems(error) == [(where, code)], error.message
    assert error.message.isprintable()


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"build": "1", "build": "2"}'])
def test_prototype_manifest_that_is_no_object_is_refused(data: bytes) -> None:
    assert refuse_prototype(data).error_code in {"manifest.json", "manifest.schema"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("851398428", 851398428),
        ("4294967295", 2**32 - 1),
        ("0", 0),
        (" 851398428\n", 851398428),
        ("0x32bf3b1c", 0x32BF3B1C),
        ("0X32BF3B1C", 0x32BF3B1C),
        ("0x1", 1),
        ("32bf3b1c", 0x32BF3B1C),
        ("12345678", 12345678),
    ],
)
def test_crc32_is_read_as_an_operator_types_it(text: str, value: int) -> None:
    assert parse_crc32(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "4294967296", "-1", "0x", "0x123456789", "1.5", "abc", "٣", "99999999999"]
)
def test_text_that_is_no_crc32_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_crc32(text)


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        ("patch.zip", "patch"),
        ("case 1- Warm Handover.ZIP", "case-1--Warm-Handover"),
        (".zip", "prototype"),
        ("…", "prototype"),
        ("x" * 300, "x" * 128),
    ],
)
def test_prototype_is_named_after_its_file(file_name: str, name: str) -> None:
    assert name_from_file(file_name) == name
