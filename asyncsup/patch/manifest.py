"""The manifest of a patch, format 1: strict JSON in, typed values out, and back. Pure.

Everything is checked before anything is believed, and every problem is reported at once: `parse_manifest`
raises one `PatchMalformedError` whose ``details["problems"]`` names the JSON path, the code and the cause of
each. ``docs/patch-format.md`` is the specification.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, NoReturn, TypeVar

import msgspec
import orjson

from asyncsup.errors import PatchMalformedError
from asyncsup.patch import paths

SCHEMA: Final = "asyncsup.patch/1"
MAX_INTEGER: Final = 2**53
"""Builds and sizes stay below it: the largest integers that every JSON reader keeps exact."""

DELTA_FORMAT: Final = "zstd-patch"

MAX_TARGETS: Final = 1000
MAX_REGIONS: Final = 100
MAX_PROBATION: Final = 7 * 86400.0
MAX_NOTES: Final = 16 << 10
MAX_NESTING: Final = 32
MAX_VALUES: Final = 2_000_000
"""Keys and values in all: 50,000 changes with everything that can be said of each, and as much again. Without
a bound, 16 MiB of ``[],[],`` cost a gigabyte and minutes."""

MAX_PROBLEMS: Final = 100
"""No error lists more; it says how many there were."""

MAX_COUNTED: Final = 10_000
"""Nobody looks for more problems than this."""

DEFAULT_MODE: Final = 0o644
"""Of a file whose `FileChange` has no mode and that was not there before."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~:-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MODE = re.compile(r"0[0-7]{3}")
_BIDI_CONTROLS: Final = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:\.\d{1,6})?(?:Z|[+-]\d{2}:\d{2})", re.ASCII)

T = TypeVar("T")
Choice = TypeVar("Choice", "Kind", "Op")


class Kind(StrEnum):
    """Warm: resources change and the target is told. Cold: the program changes and is restarted."""

    WARM = "warm"
    COLD = "cold"


class Op(StrEnum):
    """What happens to one file."""

    NEW = "new"
    MODIFIED = "modified"
    DELETED = "deleted"


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What a package holds of a modified file in place of its content: its difference to the old content.

    Args:
        base_sha256: digest of the old content.
        sha256, size: of the delta itself.
    """

    base_sha256: str
    sha256: str
    size: int


class FileChange(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a patch.

    Args:
        path: relative to the target's root, components separated by ``/``.
        sha256: lower-case hex digest of the new content; None when the file is deleted.
        size: bytes of the new content; None when the file is deleted.
        mode: permission bits; None keeps those of the old file, else `DEFAULT_MODE`.
        base_sha256: digest the old content must have; None accepts any.
        missing_ok: a deleted file may already be gone, a modified one may be missing and is then created.
        replace: a new file may overwrite one that is there.
        delta: the content comes as a difference to the old one.
    """

    path: str
    op: Op
    sha256: str | None = None
    size: int | None = None
    mode: int | None = None
    base_sha256: str | None = None
    missing_ok: bool = False
    replace: bool = False
    delta: Delta | None = None


class Requires(msgspec.Struct, frozen=True, kw_only=True):
    """Between which builds the target must be, both included; None is no bound."""

    build_min: int | None = None
    build_max: int | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a patch is and does.

    Args:
        build: the build the target has afterwards; the only ordering key.
        targets: empty only for packages in the prototype's format, which do not say.
        created, expires: aware datetimes in UTC.
        build_floor: no target this patch was applied to goes below it again, not even by a downgrade.
        downgrade: the patch may lower a target's build (honoured only when signed).
        probation: seconds in which the patch can still undo itself; None leaves it to the configuration.
        extra: top-level ``x-`` keys, unchanged.
    """

    name: str
    version: str
    build: int
    kind: Kind
    targets: tuple[str, ...]
    regions: tuple[str, ...]
    files: tuple[FileChange, ...]
    created: datetime | None = None
    expires: datetime | None = None
    requires: Requires = Requires()
    build_floor: int | None = None
    downgrade: bool = False
    probation: float | None = None
    notes: str = ""
    extra: Mapping[str, Any] = msgspec.field(default_factory=dict)


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong with a manifest: where (a JSON path), which rule, and what would do."""

    code: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


def parse_manifest(raw: bytes) -> Manifest:
    """Read and check the exact bytes of a ``manifest.json``.

    Raises:
        PatchMalformedError: with the code of the first problem and all of them in ``details["problems"]``.
    """
    reader = Reader()
    manifest = _read_manifest(load_object(raw), reader)
    reader.finish()
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON for people: a fixed order of keys, one line for each file, ends in a newline.

    `parse_manifest` gives the same value back, if the value keeps the rules (nothing is checked here).
    """
    lines = [f"  {_json(key)}: {_json(value)}" for key, value in _head(manifest).items()]
    files = ",\n".join(f"    {_json(_file_object(change))}" for change in manifest.files)
    lines.append(f'  "files": [\n{files}\n  ]' if files else '  "files": []')
    lines.extend(f"  {_json(key)}: {_json(value)}" for key, value in _foot(manifest).items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


# --- JSON ---------------------------------------------------------------------------------------------------


def load_json(raw: bytes) -> Any:
    """Parse JSON that every reader reads alike.

    orjson decides what is JSON (no NaN, no byte order mark, no lone surrogate, no trailing bytes). The
    standard library then tells duplicate keys and keeps large integers exact, neither of which orjson does.

    Raises:
        PatchMalformedError: ``manifest.json``.
    """
    # Each key and value but the first has one of these in front of it. Some may stand inside of strings.
    if sum(map(raw.count, (b",", b":", b"[", b"{"))) > MAX_VALUES:
        _refuse_json(f"the manifest has more than {MAX_VALUES} values; split the patch")
    try:
        shape = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        _refuse_json(f"the manifest is not valid JSON: {error}")
    if _nesting(shape) > MAX_NESTING:
        _refuse_json(f"the manifest is nested more than {MAX_NESTING} deep")
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique_object)
    except ValueError as error:
        # Nothing is known that only one of the two takes; should there be something, it is no manifest.
        _refuse_json(f"the manifest is not valid JSON: {error}")


def load_object(raw: bytes) -> dict[str, Any]:
    """Parse JSON whose outermost value is an object.

    Raises:
        PatchMalformedError: ``manifest.json`` or ``manifest.schema``.
    """
    value = load_json(raw)
    if isinstance(value, dict):
        return value
    message = f"the manifest must be an object, got {json_type(value)}"
    raise malformed([Problem(code="manifest.schema", where="", message=message)])


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        # `add` gives None: the first key that is in there already.
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        _refuse_json(
            f"the manifest has the key {shorten(twice)} twice in one object, and readers disagree on it"
        )
    return value


def _nesting(value: Any) -> int:
    depth = 0
    level = [value]
    while level:
        depth += 1
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below
    return depth


def _refuse_json(message: str) -> NoReturn:
    raise malformed([Problem(code="manifest.json", where="", message=message)])


def malformed(problems: Sequence[Problem], count: int | None = None) -> PatchMalformedError:
    """One error for all of `problems`, of which there is at least one.

    Args:
        count: how many there are, if `problems` are only the first of them.
    """
    count = len(problems) if count is None else count
    if count == 1:
        message = f"manifest: {problems[0]}" if problems[0].where else problems[0].message
    else:
        listed = "; ".join(str(problem) for problem in problems[:3])
        more = f"; and {count - 3} more" if count > 3 else ""
        message = f"the manifest has {count} problems: {listed}{more}"
    return PatchMalformedError(
        message,
        code=problems[0].code,
        problems=[
            {"path": item.where, "code": item.code, "message": item.message}
            for item in problems[:MAX_PROBLEMS]
        ],
        problem_count=count,
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# --- reading ------------------------------------------------------------------------------------------------


class Reader:
    """Takes values out of JSON objects, collecting what is wrong with them instead of stopping at the first.

    Where a value is wrong a harmless one of the right type is returned in its place: the caller goes on to
    find the other problems, and throws the result away when there are any.
    """

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self.count = 0
        """How many problems there are; only the first `MAX_PROBLEMS` are kept."""

    def problem(self, where: str, message: str, code: str = "manifest.schema") -> None:
        self.count += 1
        if self.count <= MAX_PROBLEMS:
            self._problems.append(Problem(code=code, where=where, message=message))
        elif self.count >= MAX_COUNTED:
            self.finish()

    def finish(self) -> None:
        """Raise one error for all problems, if there are any."""
        if self.count:
            raise malformed(self._problems, self.count)

    def object(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self.problem(where, f"must be an object, got {json_type(value)}")
        return {}

    def known(self, value: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
        """Every key must be one of `keys` or begin with ``x-``."""
        import difflib  # noqa: PLC0415 - only on the way to an error

        known = tuple(keys)
        for key in value:
            if key in known or key.startswith("x-"):
                continue
            # Looking for similar words is slow, and a hostile manifest may have a million keys or a huge one.
            similar = len(key) <= 80 and self.count < MAX_PROBLEMS
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0) if similar else []
            hint = f", did you mean {near[0]!r}?" if near else ""
            self.problem(
                join(where, key if key.isidentifier() and len(key) <= 80 else shorten(key)),
                f"unknown key{hint} (own keys begin with `x-`)",
                "manifest.unknown_key",
            )

    def required(
        self, value: Mapping[str, Any], key: str, where: str, read: Callable[[Any, str], T], otherwise: T
    ) -> T:
        if key not in value:
            self.problem(join(where, key), "is missing")
            return otherwise
        return read(value[key], join(where, key))

    def optional(
        self, value: Mapping[str, Any], key: str, where: str, read: Callable[[Any, str], T], otherwise: T
    ) -> T:
        return read(value[key], join(where, key)) if key in value else otherwise

    def boolean(self, value: Any, where: str) -> bool:
        if isinstance(value, bool):
            return value
        self.problem(where, f"must be true or false, got {json_type(value)}")
        return False

    def string(self, value: Any, where: str) -> str:
        if isinstance(value, str):
            return value
        self.problem(where, f"must be a string, got {json_type(value)}")
        return ""

    def integer(self, value: Any, where: str) -> int:
        if type(value) is not int:
            self.problem(where, f"must be an integer, got {json_type(value)}")
            return 0
        if not 0 <= value < MAX_INTEGER:
            self.problem(where, f"must be at least 0 and below 2^53, got {shorten(value)}")
            return 0
        return value

    def pattern(self, value: Any, where: str, pattern: re.Pattern[str], description: str) -> str:
        if isinstance(value, str) and pattern.fullmatch(value):
            return value
        got = shorten(value) if isinstance(value, str) else json_type(value)
        self.problem(where, f"must be {description}, got {got}")
        return ""

    def label(self, value: Any, where: str) -> str:
        """A name that people read: not empty, one line, nothing invisible."""
        text = self.string(value, where)
        if isinstance(value, str) and not (
            0 < len(text) <= 128 and text.isprintable() and text == text.strip()
        ):
            self.problem(where, f"must be 1 to 128 printable characters, got {shorten(value)}")
        return text

    def labels(self, value: Any, where: str, most: int) -> tuple[str, ...]:
        if not isinstance(value, list):
            self.problem(where, f"must be an array of strings, got {json_type(value)}")
            return ()
        if len(value) > most:
            self.problem(where, f"must name at most {most}, got {len(value)}")
            return ()
        if not value:
            self.problem(where, "must name at least one")
        names = tuple(self.label(item, f"{where}[{index}]") for index, item in enumerate(value))
        if len(set(names)) != len(names):
            self.problem(where, "names one twice")
        return names


def join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def json_type(value: object) -> str:
    """What `value` is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a fraction"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def shorten(value: object) -> str:
    """A value out of a package, harmless on a terminal and of bounded length."""
    # Python refuses to print integers of thousands of digits.
    text = hex(value) if type(value) is int and value.bit_length() > 256 else repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


_KEYS: Final = (
    "schema", "name", "version", "build", "kind", "targets", "regions", "created", "expires", "requires",
    "build_floor", "downgrade", "files", "probation", "notes",
)  # fmt: skip
_REQUIRES_KEYS: Final = ("build_min", "build_max")
_FILE_KEYS: Final = ("path", "op", "sha256", "size", "mode", "base_sha256", "missing_ok", "replace", "delta")
_DELTA_KEYS: Final = ("format", "base_sha256", "sha256", "size")


def _read_manifest(value: dict[str, Any], reader: Reader) -> Manifest:
    schema = value.get("schema")
    if schema != SCHEMA:
        got = "nothing" if "schema" not in value else shorten(schema)
        reader.problem("schema", f"must be {SCHEMA!r}, got {got}", "manifest.format")
    reader.known(value, _KEYS, "")
    created = reader.optional(value, "created", "", _reads_time(reader), None)
    expires = reader.optional(value, "expires", "", _reads_time(reader), None)
    if created is not None and expires is not None and expires <= created:
        reader.problem("expires", "must be later than created")
    _check_downgrade(value, reader)
    return Manifest(
        name=reader.required(
            value,
            "name",
            "",
            lambda item, where: reader.pattern(
                item, where, _NAME, "1 to 128 letters, digits and `._+-`, the first a letter or digit"
            ),
            "",
        ),
        version=reader.required(
            value,
            "version",
            "",
            lambda item, where: reader.pattern(
                item, where, _VERSION, "1 to 64 letters, digits and `._+~:-`, the first a letter or digit"
            ),
            "",
        ),
        build=reader.required(value, "build", "", reader.integer, 0),
        kind=reader.required(value, "kind", "", _reads_choice(reader, Kind), None) or Kind.COLD,
        targets=reader.required(
            value, "targets", "", lambda item, where: reader.labels(item, where, MAX_TARGETS), ()
        ),
        regions=reader.required(
            value, "regions", "", lambda item, where: reader.labels(item, where, MAX_REGIONS), ()
        ),
        created=created,
        expires=expires,
        requires=reader.optional(
            value, "requires", "", lambda item, where: _read_requires(item, where, reader), Requires()
        ),
        build_floor=reader.optional(value, "build_floor", "", reader.integer, None),
        downgrade=reader.optional(value, "downgrade", "", reader.boolean, False),
        files=reader.required(value, "files", "", lambda item, where: _read_files(item, where, reader), ()),
        probation=reader.optional(
            value, "probation", "", lambda item, where: _read_probation(item, where, reader), None
        ),
        notes=reader.optional(value, "notes", "", lambda item, where: _read_notes(item, where, reader), ""),
        extra={key: item for key, item in value.items() if key.startswith("x-")},
    )


def _reads_choice(reader: Reader, choices: type[Choice]) -> Callable[[Any, str], Choice | None]:
    def read(value: Any, where: str) -> Choice | None:
        for choice in choices:
            if value == choice.value:
                return choice
        names = ", ".join(f"{choice.value!r}" for choice in choices)
        reader.problem(where, f"must be one of {names}, got {shorten(value)}")
        return None

    return read


def _reads_time(reader: Reader) -> Callable[[Any, str], datetime | None]:
    def read(value: Any, where: str) -> datetime | None:
        try:
            if isinstance(value, str) and _TIME.fullmatch(value):
                return datetime.fromisoformat(value).astimezone(UTC)
        except (ValueError, OverflowError):
            pass  # the pattern fits, the day or hour does not exist: the same problem
        reader.problem(where, f"must be an RFC 3339 time with an offset, got {shorten(value)}")
        return None

    return read


def _check_downgrade(value: Mapping[str, Any], reader: Reader) -> None:
    """What is signed stays signed: whoever has kept a downgrade could lower every later build with it."""
    requires = value.get("requires")
    ends = "expires" in value or (isinstance(requires, dict) and "build_max" in requires)
    if value.get("downgrade") is True and not ends:
        reader.problem(
            "downgrade", "needs expires or requires.build_max, so that it cannot be repeated for ever"
        )


def _read_requires(value: Any, where: str, reader: Reader) -> Requires:
    requires = reader.object(value, where)
    reader.known(requires, _REQUIRES_KEYS, where)
    low = reader.optional(requires, "build_min", where, reader.integer, None)
    high = reader.optional(requires, "build_max", where, reader.integer, None)
    if low is not None and high is not None and low > high:
        reader.problem(where, f"build_min {low} is above build_max {high}")
    return Requires(build_min=low, build_max=high)


def _read_probation(value: Any, where: str, reader: Reader) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_PROBATION:
        reader.problem(where, f"must be seconds from 0 to {MAX_PROBATION:.0f}, got {shorten(value)}")
        return None
    return float(value)


def _read_notes(value: Any, where: str, reader: Reader) -> str:
    notes = reader.string(value, where)
    if len(notes) > MAX_NOTES:
        reader.problem(where, f"must have at most {MAX_NOTES} characters")
    # They are printed on terminals, where escape sequences would be obeyed and text turned around.
    if any(
        (unicodedata.category(character) == "Cc" and character not in "\n\t")
        or unicodedata.bidirectional(character) in _BIDI_CONTROLS
        for character in notes
    ):
        reader.problem(where, "must not hold bidi or control characters other than newline and tab")
    return notes


def _read_files(value: Any, where: str, reader: Reader) -> tuple[FileChange, ...]:
    if not isinstance(value, list):
        reader.problem(where, f"must be an array of objects, got {json_type(value)}")
        return ()
    if not value:
        reader.problem(where, "must not be empty; a patch changes at least one file")
    files = tuple(_read_file(item, f"{where}[{index}]", reader) for index, item in enumerate(value))
    report_collisions([(f"{where}[{index}].path", change.path) for index, change in enumerate(files)], reader)
    return files


def report_collisions(named: Sequence[tuple[str, str]], reader: Reader) -> None:
    """One problem for each path that cannot stand beside another one, given as (where, path)."""
    # An empty path is one that was refused already.
    named = [(where, path) for where, path in named if path]
    for collision in paths.collisions((path, False) for _, path in named):
        if collision.kind == "duplicate":
            message = f"{shorten(collision.path)} is already named by {shorten(collision.other)}"
        else:
            message = f"{shorten(collision.path)} lies below {shorten(collision.other)}, which is a file"
        reader.problem(named[collision.index][0], message, f"manifest.{collision.kind}")


def _read_file(value: Any, where: str, reader: Reader) -> FileChange:
    entry = reader.object(value, where)
    if not entry:
        if isinstance(value, dict):
            reader.problem(where, "is empty; it needs path and op")
        return FileChange(path="", op=Op.DELETED)
    reader.known(entry, _FILE_KEYS, where)
    path = reader.required(entry, "path", where, lambda item, at: read_path(item, at, reader), "")
    op = reader.required(entry, "op", where, _reads_choice(reader, Op), None)

    def digest(item: Any, at: str) -> str | None:
        return reader.pattern(item, at, _SHA256, "64 lower-case hexadecimal digits") or None

    def integer(item: Any, at: str) -> int | None:
        return reader.integer(item, at)

    content = reader.optional if op in {None, Op.DELETED} else reader.required
    if op is not None:
        allowed = _ALLOWED[op]
        for key in _FILE_KEYS[2:]:
            if key in entry and key not in allowed:
                reader.problem(join(where, key), f"does not go with op {op.value!r}")
    return FileChange(
        path=path,
        op=op or Op.DELETED,
        sha256=content(entry, "sha256", where, digest, None),
        size=content(entry, "size", where, integer, None),
        mode=reader.optional(entry, "mode", where, lambda item, at: _read_mode(item, at, reader), None),
        base_sha256=reader.optional(entry, "base_sha256", where, digest, None),
        missing_ok=reader.optional(entry, "missing_ok", where, reader.boolean, False),
        replace=reader.optional(entry, "replace", where, reader.boolean, False),
        delta=reader.optional(
            entry, "delta", where, lambda item, at: _read_delta(item, at, entry, reader), None
        ),
    )


def _read_delta(value: Any, where: str, change: Mapping[str, Any], reader: Reader) -> Delta | None:
    entry = reader.object(value, where)
    reader.known(entry, _DELTA_KEYS, where)

    def digest(item: Any, at: str) -> str:
        return reader.pattern(item, at, _SHA256, "64 lower-case hexadecimal digits")

    def known_format(item: Any, at: str) -> None:
        if item != DELTA_FORMAT:
            reader.problem(at, f"must be {DELTA_FORMAT!r}, got {shorten(item)}")

    reader.required(entry, "format", where, known_format, None)
    delta = Delta(
        base_sha256=reader.required(entry, "base_sha256", where, digest, ""),
        sha256=reader.required(entry, "sha256", where, digest, ""),
        size=reader.required(entry, "size", where, reader.integer, 0),
    )
    if change.get("base_sha256") != entry.get("base_sha256"):
        reader.problem(join(where, "base_sha256"), "must be the file's own base_sha256 once more")
    if change.get("missing_ok"):
        reader.problem(where, "does not go with missing_ok: without the old content there is no new one")
    return delta


_ALLOWED: Final[Mapping[Op, frozenset[str]]] = {
    Op.NEW: frozenset({"sha256", "size", "mode", "replace"}),
    Op.MODIFIED: frozenset({"sha256", "size", "mode", "base_sha256", "missing_ok", "delta"}),
    Op.DELETED: frozenset({"base_sha256", "missing_ok"}),
}


def read_path(value: Any, where: str, reader: Reader) -> str:
    """A path below the root; empty where it is refused."""
    if not isinstance(value, str):
        reader.problem(where, f"must be a string, got {json_type(value)}")
        return ""
    fault = paths.path_fault(value)
    if fault is not None:
        reader.problem(where, f"{shorten(value)} {fault.message}", "manifest.path")
        return ""
    return value


def _read_mode(value: Any, where: str, reader: Reader) -> int | None:
    if isinstance(value, str) and _MODE.fullmatch(value):
        return int(value, 8)
    reader.problem(
        where,
        f'must be permission bits as a string such as "0644" (no set-id or sticky bit), got {shorten(value)}',
    )
    return None


# --- writing ------------------------------------------------------------------------------------------------


def _head(manifest: Manifest) -> dict[str, Any]:
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "name": manifest.name,
        "version": manifest.version,
        "build": manifest.build,
        "kind": manifest.kind.value,
        "targets": list(manifest.targets),
        "regions": list(manifest.regions),
    }
    for key, moment in (("created", manifest.created), ("expires", manifest.expires)):
        if moment is not None:
            value[key] = _encode_time(moment)
    requires = {
        key: bound
        for key, bound in (
            ("build_min", manifest.requires.build_min),
            ("build_max", manifest.requires.build_max),
        )
        if bound is not None
    }
    if requires:
        value["requires"] = requires
    if manifest.build_floor is not None:
        value["build_floor"] = manifest.build_floor
    if manifest.downgrade:
        value["downgrade"] = True
    return value


def _foot(manifest: Manifest) -> dict[str, Any]:
    value: dict[str, Any] = {}
    if manifest.probation is not None:
        value["probation"] = manifest.probation
    if manifest.notes:
        value["notes"] = manifest.notes
    value.update(sorted(manifest.extra.items()))
    return value


def _file_object(change: FileChange) -> dict[str, Any]:
    value: dict[str, Any] = {"path": change.path, "op": change.op.value}
    if change.sha256 is not None:
        value["sha256"] = change.sha256
    if change.size is not None:
        value["size"] = change.size
    if change.mode is not None:
        value["mode"] = f"{change.mode:04o}"
    if change.base_sha256 is not None:
        value["base_sha256"] = change.base_sha256
    if change.missing_ok:
        value["missing_ok"] = True
    if change.replace:
        value["replace"] = True
    if change.delta is not None:
        value["delta"] = {
            "format": DELTA_FORMAT,
            "base_sha256": change.delta.base_sha256,
            "sha256": change.delta.sha256,
            "size": change.delta.size,
        }
    return value


def _encode_time(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise ValueError(f"{moment!r} has no time zone")
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
