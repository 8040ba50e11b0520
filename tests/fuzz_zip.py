"""Zip packages for fuzzing: mutators that know the format, and what must hold of whatever they make."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Final

import ssh_kit
import zip_forge
from fuzz_kit import FindingError, Tally, foreseen
from zip_forge import FILES, JOB, NOTE, Part, extra, folder, forge, manifest_part, native, streamed

from asyncsup.config import PatchLimits as Limits
from asyncsup.errors import PatchMalformedError
from asyncsup.patch import delta
from asyncsup.patch.manifest import Op
from asyncsup.patch.package import Package, open_package
from asyncsup.patch.prototype import parse_prototype

# --- archives: models ---------------------------------------------------------------------------------------
# A list of entries as `zip_forge` has them, changed and put together with right offsets.


@cache
def good_packages() -> tuple[bytes, ...]:
    """Good packages, as far as they can be had here from the tools that people have."""
    found = [
        native(*FILES),
        forge(*(streamed(part) for part in (manifest_part(*FILES), *FILES))),
        forge(manifest_part(*FILES), folder("files/"), folder("files/rest/"), *FILES),
        forge(
            manifest_part(*FILES),
            Part(name="signatures/alice.sig", data=ssh_kit.key().sign(manifest_part(*FILES).data)),
            *FILES,
        ),
        zip_forge.prototype(),
        zip_forge.JAVA,
        zip_forge.JAR,
        zip_forge.SEVEN_ZIP,
    ]
    commands = (
        ("zip", "-q", "-r", "out.zip", "manifest.json", "files"),
        ("zip", "-q", "-X", "-D", "-0", "-r", "out.zip", "manifest.json", "files"),
        ("bsdtar", "--format", "zip", "-cf", "out.zip", "manifest.json", "files"),
    )
    for command in commands:
        with tempfile.TemporaryDirectory() as name:
            if shutil.which(command[0]) is None:
                continue
            for part in (manifest_part(*FILES), *FILES):
                path = Path(name) / part.raw_name.decode()
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(part.data)
            subprocess.run(command, cwd=name, check=True, stdin=subprocess.DEVNULL)
            found.append((Path(name) / "out.zip").read_bytes())
    return tuple(found)


def native_parts() -> list[Part]:
    return [zip_forge.manifest_part(JOB, NOTE), JOB, NOTE]


BASE: Final = b"the old content of a file, of some length; " * 40
"""What a delta is made for."""


PATCHED: Final = BASE.replace(b"old", b"new", 3) + b"and an end"


def delta_parts() -> list[Part]:
    made = Part(name="deltas/d.txt", data=delta.make(BASE, PATCHED), method=0)
    return [manifest_part(files=[delta_change(made), zip_forge.change(JOB)]), made, JOB]


def delta_change(part: Part) -> dict[str, Any]:
    """What a manifest says of a file that comes as this delta."""
    digest, before, after = (hashlib.sha256(data).hexdigest() for data in (part.data, BASE, PATCHED))
    made = {"format": "zstd-patch", "base_sha256": before, "sha256": digest, "size": len(part.data)}
    return {
        "path": "d.txt", "op": "modified", "size": len(PATCHED), "sha256": after, "base_sha256": before,
        "delta": made,
    }  # fmt: skip


def prototype_parts() -> list[Part]:
    dos: dict[str, Any] = {"made_by": 20, "attributes": 0x20}
    return [
        Part(name="patch/", method=0, made_by=20, attributes=0x10),
        Part(name="patch/manifest.json", data=zip_forge.prototype_manifest(), **dos),
        Part(name="patch/mod/job.json", data=b'{"job": 2}', method=0, **dos),
        Part(name="patch/new/res.json", data=b'{"res": "res res res res res"}', **dos),
    ]


HARMLESS_EXTRAS: Final = (0x5455, 0x7875, 0x7855, 0x5855, 0x000A, 0xCAFE)
EXTRAS: Final = (
    *HARMLESS_EXTRAS,
    0x0001,
    0x7075,
    0x6375,
    0x9901,
    0x0017,
    0x000D,
    0x756E,
    0x4C41,
    0x1234,
    0x2605,
)
NAMES: Final = (
    "files/a", "files/B.txt", "files/deep/er/x", "files/é", "files/日本", "files/🎈", "files/a b", "files/-x",
    "files/a;1", "files/a;", "files/;2", "files/a;1;2", "files/%41", "files/a%2fb", "files/#U00e9", "files/*",
    "files/?", "files/[x]", "files/a|b", "files/a:b", "files/a<b>", 'files/"', "files/'", "files/$HOME",
    "files/~", "files/~x", "files/a~1", "files/.hidden", "files/..x", "files/x..", "files/...",
    "files/@LongLink", "files/\xad", "files/ﬀ", "files/ß", "files/ẞ", "files/İ", "files/\u0131",
    "files/\u017f", "files/K", "files/Å", "files/\u1e9b\u0323", "files/e\u0301", "files/../x",
    "/x", "files//x", "files/./x",
    "files\\x", "C:x", "files/CON", "files/com¹", "files/x.", "files/x ", "files/ x", "files/a\0b",
    "files/a\nb", "files/\x7f", "files/\u202e", "files/x/", "x", "files", "files/", "signatures/a.sig",
    "signatures/.sig", "signatures/a/b.sig", "META-INF/MANIFEST.MF", "manifest.json", "MANIFEST.JSON",
    "patch/manifest.json", "patch/new/res.json", "patch/new/x", "patch/del/lib.txt", "files/job.json/x",
    "files/Job.json", "files/rest", "__MACOSX/x", "",
)  # fmt: skip
MODES: Final = (
    0o100644,
    0o100755,
    0o100000,
    0o644,
    0,
    0o100777,
    0o120777,
    0o10644,
    0o40755,
    0o104755,
    0o102755,
)
SYSTEMS: Final = (0, 3, 7, 10, 11, 14, 19, 1, 2, 5, 6, 16, 30, 255)
FIELDS: Final = ("version", "flags", "method", "time", "date", "crc", "compressed", "size")
NUMBERS: Final = (
    0, 1, 2, 3, 4, 7, 8, 9, 10, 12, 20, 21, 22, 45, 46, 63, 64, 0x20, 0x21, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF,
    0x8000, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF,
)  # fmt: skip


def number(random: Random, bits: int) -> int:
    chosen = random.choice(NUMBERS) if random.random() < 0.6 else random.getrandbits(bits)
    return chosen & (1 << bits) - 1


def some_bytes(random: Random, most: int = 40) -> bytes:
    return random.randbytes(random.randrange(most + 1))


def compressed(random: Random, data: bytes) -> bytes:
    """The same content in another deflate stream, or not quite."""
    deflater = zlib.compressobj(
        random.randrange(10), zlib.DEFLATED, -15, random.randint(1, 9), random.randrange(5)
    )
    cut = random.randrange(len(data) + 1)
    flush = random.choice((zlib.Z_NO_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH))
    stream = deflater.compress(data[:cut]) + (deflater.flush(flush) if flush else b"")
    stream += deflater.compress(data[cut:]) + deflater.flush()
    kind = random.randrange(8)
    if kind == 0:
        return stream + some_bytes(random, 8)
    if kind == 1:
        return stream[: random.randrange(len(stream) + 1)]
    if kind == 2:
        return deflater_of_nothing(random) + stream
    return stream


def deflater_of_nothing(random: Random) -> bytes:
    """Stored blocks without content: legal, and there may be any number of them in front."""
    return b"\0\0\0\xff\xff" * random.randrange(4)


def _rename(random: Random, part: Part) -> Part:
    name = random.choice(NAMES)
    raw: str | bytes = name if random.random() < 0.9 else name.encode("utf-8")[:-1]
    return replace(part, name=raw)


def _content(random: Random, part: Part) -> Part:
    if part.raw_name == b"deltas/d.txt":
        # Another content of its own would be no frame at all.
        return replace(part, data=mutate_anything(random, part.data), payload=None)
    return replace(part, data=some_bytes(random) * random.choice((1, 1, 3)), payload=None)


def _recompress(random: Random, part: Part) -> Part:
    return replace(part, method=8, payload=compressed(random, part.data))


def _method(random: Random, part: Part) -> Part:
    return replace(part, method=random.choice((0, 0, 8, 8, 9, 12, 14, 93, 99)), payload=None)


def _flags(random: Random, part: Part) -> Part:
    return replace(
        part, flags=part.fields()["flags"] ^ 1 << random.choice((1, 2, 11, 1, 2, 11, 0, 3, 4, 5, 6, 13))
    )


def _made_by(random: Random, part: Part) -> Part:
    return replace(part, made_by=random.choice(SYSTEMS) << 8 | random.choice((0, 10, 20, 30, 45, 63, 255)))


def _attributes(random: Random, part: Part) -> Part:
    low = random.choice(
        (0, 0, 0x20, 0x01, 0x02, 0x04, 0x08, 0x10, 0x80, 0x400, 0x8000, random.getrandbits(16))
    )
    return replace(part, attributes=random.choice(MODES) << 16 | low)


def _extra(random: Random, part: Part) -> Part:
    kinds = HARMLESS_EXTRAS if random.random() < 0.6 else EXTRAS
    made = extra(random.choice(kinds), some_bytes(random, 20))
    if random.random() < 0.1:
        made = made[: random.randrange(len(made) + 1)]
    where = random.choice(("local_extra", "central_extra"))
    return replace(part, **{where: getattr(part, where) + made})


def _override(random: Random, part: Part) -> Part:
    name, where = random.choice(FIELDS), random.choice(("both", "local", "central"))
    bits = 32 if name in {"crc", "compressed", "size"} else 16
    right = part.fields()[name]
    value = (right + random.choice((-1, 1))) % (1 << bits) if random.random() < 0.3 else number(random, bits)
    changed: dict[str, Any] = {where: {**getattr(part, where), name: value}}
    return replace(part, **changed)


def _harmless_override(random: Random, part: Part) -> Part:
    """A time, or a lower version: what no reader minds."""
    name = random.choice(("time", "date", "version"))
    value = random.choice((10, 11, 20)) if name == "version" else number(random, 16)
    return replace(part, both={**part.both, name: value})


def _descriptor(random: Random, part: Part) -> Part:
    made = streamed(part, signed=random.random() < 0.6, known=random.random() < 0.4)
    if random.random() < 0.2:
        made = replace(made, descriptor=(made.descriptor or b"") + some_bytes(random, 6))
    return made


def _local_name(random: Random, part: Part) -> Part:
    return replace(part, local_name=random.choice(NAMES).encode())


def _before(random: Random, part: Part) -> Part:
    return replace(part, before=some_bytes(random, 12))


def _comment(random: Random, part: Part) -> Part:
    return replace(part, comment=some_bytes(random, 8))


def _hidden(random: Random, part: Part) -> Part:
    return replace(part, in_body=False) if random.random() < 0.5 else replace(part, in_directory=False)


PART_MUTATORS: Final[Sequence[tuple[int, Callable[[Random, Part], Part]]]] = (
    (4, _rename), (6, _content), (10, _recompress), (6, _method), (5, _flags), (6, _made_by),
    (6, _attributes), (8, _extra), (4, _override), (8, _harmless_override), (8, _descriptor),
    (1, _local_name), (1, _before), (1, _comment), (1, _hidden),
)  # fmt: skip


def mutate_model(random: Random, parts: Sequence[Part]) -> bytes:
    """Change some entries of a package, and put it together again, mostly with a manifest that fits."""
    changed = list(parts)
    for _ in range(random.choice((1, 1, 2, 3))):
        what = random.random()
        if what < 0.1:
            changed.insert(random.randrange(len(changed) + 1), random.choice(changed))
        elif what < 0.15 and len(changed) > 1:
            del changed[random.randrange(len(changed))]
        elif what < 0.2:
            at, other = random.randrange(len(changed)), random.randrange(len(changed))
            changed[at], changed[other] = changed[other], changed[at]
        elif what < 0.3:
            name = random.choice(NAMES)
            changed.append(folder(f"{name}/", data=some_bytes(random, 2) if random.random() < 0.1 else b""))
        elif what < 0.4:
            changed.append(Part(name=random.choice(NAMES), data=some_bytes(random)))
        else:
            at = random.randrange(len(changed))
            weights, mutators = zip(*PART_MUTATORS, strict=True)
            changed[at] = random.choices(mutators, weights)[0](random, changed[at])
    if random.random() < 0.7:
        changed = with_manifest(changed)
    keys: dict[str, Any] = {}
    if random.random() < 0.05:
        name = random.choice(("disk", "directory_disk", "disk_count", "count", "size", "offset", "comment"))
        keys["end"] = {name: number(random, 32 if name in {"size", "offset"} else 16)}
    if random.random() < 0.03:
        keys["comment"] = some_bytes(random)
    if random.random() < 0.03:
        keys["before_end"] = some_bytes(random)
    try:
        return forge(*changed, **keys)
    except struct.error:  # a field that has no room for what it was given
        return forge(*parts)


def with_manifest(parts: Sequence[Part]) -> list[Part]:
    """The entries, with a manifest that says of them what is right."""
    result = []
    for part in parts:
        if part.raw_name != b"manifest.json":
            result.append(part)
            continue
        listed = {}
        for each in parts:
            if each.raw_name.startswith(b"files/") and not each.raw_name.endswith(b"/"):
                name = each.raw_name.decode("utf-8", "replace").encode("utf-8", "replace").decode()
                listed[name] = zip_forge.change(Part(name=name, data=each.data))
        made = zip_forge.manifest()
        deltas = [delta_change(each) for each in parts if each.raw_name == b"deltas/d.txt"]
        made["files"] = [*listed.values(), *deltas] or made["files"]
        result.append(replace(part, data=json.dumps(made, ensure_ascii=False).encode(), payload=None))
    return result


# --- archives: bytes ----------------------------------------------------------------------------------------

_LOCAL = (
    ("H", 4), ("H", 6), ("H", 8), ("H", 10), ("H", 12), ("I", 14), ("I", 18), ("I", 22), ("H", 26), ("H", 28),
)  # fmt: skip
_CENTRAL = (
    ("H", 4), ("H", 6), ("H", 8), ("H", 10), ("H", 12), ("H", 14), ("I", 16), ("I", 20), ("I", 24), ("H", 28),
    ("H", 30), ("H", 32), ("H", 34), ("H", 36), ("I", 38), ("I", 42),
)  # fmt: skip
_END = (("H", 4), ("H", 6), ("H", 8), ("H", 10), ("I", 12), ("I", 16), ("H", 20))
_END64 = (("Q", 4), ("H", 12), ("H", 14), ("I", 16), ("I", 20), ("Q", 24), ("Q", 32), ("Q", 40), ("Q", 48))
_LOCATOR64 = (("I", 4), ("Q", 8), ("I", 16))
HEADERS: Final = {
    b"PK\3\4": _LOCAL, b"PK\1\2": _CENTRAL, b"PK\5\6": _END, b"PK\6\6": _END64,
    b"PK\6\7": _LOCATOR64,
}  # fmt: skip
# Where a local header and a central record say the same: offset in the one, in the other, and the format.
TWICE: Final = (
    (4, 6, "H"), (6, 8, "H"), (8, 10, "H"), (10, 12, "H"), (12, 14, "H"), (14, 16, "I"), (18, 20, "I"),
    (22, 24, "I"),
)  # fmt: skip


def headers(data: bytes | bytearray) -> list[tuple[int, bytes]]:
    return [
        (match.start(), match.group())
        for match in re.finditer(rb"PK(?:\x03\x04|\x01\x02|\x05\x06|\x06\x06|\x06\x07)", data)
        if match.start() + 56 <= len(data) or match.group() == b"PK\5\6"
    ]


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Change some fields or bytes of an archive, sometimes mending the end record."""
    value = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        random.choices(
            (_set_field, _set_both, _set_byte, _insert, _delete, _copy, _swap_names, _records),
            (6, 5, 3, 2, 2, 2, 2, 2),
        )[0](random, value)
    if random.random() < 0.4:
        mend_end(value)
    return bytes(value)


def mutate_anything(random: Random, data: bytes) -> bytes:
    """Change bytes without looking at them."""
    value = bytearray(data)
    for _ in range(random.choice((1, 1, 2))):
        random.choice((_set_byte, _insert, _delete, _copy))(random, value)
    return bytes(value)


def _set_field(random: Random, value: bytearray) -> None:
    found = headers(value)
    if not found:
        return
    at, kind = random.choice(found)
    code, offset = random.choice(HEADERS[kind])
    size = struct.calcsize(f"<{code}")
    if at + offset + size > len(value):
        return
    (old,) = struct.unpack_from(f"<{code}", value, at + offset)
    how = random.random()
    if how < 0.3:
        new = old + random.choice((-2, -1, 1, 2, 22, 30, 46))
    elif how < 0.5:
        new = old ^ 1 << random.randrange(8 * size)
    elif how < 0.6:
        new = random.choice(found)[0]
    else:
        new = number(random, 8 * size)
    struct.pack_into(f"<{code}", value, at + offset, new % (1 << 8 * size))


def _pairs(value: bytearray) -> list[tuple[int, int]]:
    """Local header and central record of each entry."""
    found = []
    for at, kind in headers(value):
        if kind == b"PK\1\2" and at + 46 <= len(value):
            (local,) = struct.unpack_from("<I", value, at + 42)
            if value[local : local + 4] == b"PK\3\4" and local + 30 <= len(value):
                found.append((local, at))
    return found


def _set_both(random: Random, value: bytearray) -> None:
    pairs = _pairs(value)
    if pairs:
        local, central = random.choice(pairs)
        in_local, in_central, code = random.choice(TWICE)
        new = number(random, 8 * struct.calcsize(code))
        struct.pack_into(f"<{code}", value, local + in_local, new)
        struct.pack_into(f"<{code}", value, central + in_central, new)


def _swap_names(random: Random, value: bytearray) -> None:
    """A letter of a name becomes another one, in both places."""
    pairs = _pairs(value)
    if not pairs:
        return
    local, central = random.choice(pairs)
    (size,) = struct.unpack_from("<H", value, central + 28)
    if size and central + 46 + size <= len(value) and local + 30 + size <= len(value):
        at = random.randrange(size)
        letter = random.choice(b"aZ09./\\:;%*?~ -_\x00\x01\x7f\x80\xc3\xa9\xff")
        value[central + 46 + at] = value[local + 30 + at] = letter


def _set_byte(random: Random, value: bytearray) -> None:
    if value:
        value[random.randrange(len(value))] = random.choice((random.randrange(256), 0, 0xFF, 0x50))


def _insert(random: Random, value: bytearray) -> None:
    at = random.choice((0, len(value), random.randrange(len(value) + 1), *(at for at, _ in headers(value))))
    value[at:at] = random.choice((some_bytes(random), b"PK\5\6" + bytes(18), b"PK\6\7" + bytes(16), b"\0"))


def _delete(random: Random, value: bytearray) -> None:
    at = random.randrange(len(value) + 1)
    del value[at : at + random.choice((1, 2, 4, 22, 46, random.randrange(200)))]


def _copy(random: Random, value: bytearray) -> None:
    start = random.randrange(len(value) + 1)
    piece = value[start : start + random.choice((4, 22, 46, 100, 400))]
    at = random.randrange(len(value) + 1)
    value[at : at + (len(piece) if random.random() < 0.5 else 0)] = piece


def _records(random: Random, value: bytearray) -> None:
    """Leave a record of the directory out, repeat it, or change places."""
    starts = [at for at, kind in headers(value) if kind == b"PK\1\2"]
    end = value.rfind(b"PK\5\6")
    if not starts or end < starts[-1]:
        return
    edges = [*starts, end]
    records = [bytes(value[a:b]) for a, b in pairwise(edges)]
    what = random.randrange(3)
    if what == 0:
        del records[random.randrange(len(records))]
    elif what == 1:
        records.append(random.choice(records))
    else:
        random.shuffle(records)
    value[starts[0] : end] = b"".join(records)


def mend_end(value: bytearray) -> None:
    """Make the end record say where the directory is and how many records it has."""
    end = value.rfind(b"PK\5\6")
    start = value.find(b"PK\1\2")
    if end < 0 or not 0 <= start < end or end + 22 > len(value):
        return
    count = value[start:end].count(b"PK\1\2") & 0xFFFF
    struct.pack_into("<HHII", value, end + 8, count, count, end - start, start)


# --- archives: what must hold -------------------------------------------------------------------------------

FUZZ_LIMITS: Final = Limits(package_size=1 << 20, file_size=1 << 16, total_size=1 << 17)


class PackageJudge:
    """Refused with a documented code, or accepted and the same to every other reader.

    Args:
        folder: in memory, for speed.
    """

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.folder = folder
        self.tally = tally
        self.tools = [tool for tool in ("unzip", "bsdtar") if shutil.which(tool)]
        self._compared: set[bytes] = set()
        self._deltas: dict[str, str] = {}

    def __call__(self, data: bytes) -> str:
        path = self.folder / "patch.zip"
        path.write_bytes(data)
        try:
            with open_package(path, limits=FUZZ_LIMITS) as package:
                ours = self._entries(package, data)
        except PatchMalformedError as error:
            return foreseen(error, data)
        digest = hashlib.sha256(data).digest()
        if digest not in self._compared:
            self._compared.add(digest)
            self._compare(data, path, ours)
        return "accepted"

    def _entries(self, package: Package, data: bytes) -> dict[str, bytes]:
        """What we take the archive's files to be, by the names they have in it."""
        self._deltas.clear()
        found = {f"signatures/{name}.sig": content for name, content in package.signatures.items()}
        native = package.format != "prototype"
        found["manifest.json" if native else "patch/manifest.json"] = package.manifest_bytes
        sources = (
            {}
            if native
            else {file.path: file.source for file in parse_prototype(package.manifest_bytes).files}
        )
        for change in package.manifest.files:
            if change.op is Op.DELETED:
                continue
            with tempfile.TemporaryFile(buffering=0, dir=self.folder) as out:
                if change.delta is None:
                    package.extract(change, out.fileno())
                else:
                    with tempfile.TemporaryFile(buffering=0, dir=self.folder) as base:
                        base.write(BASE)
                        base.seek(0)
                        package.rebuild(change, base.fileno(), out.fileno())
                out.seek(0)
                content = out.read()
            if len(content) != change.size or hashlib.sha256(content).hexdigest() != change.sha256:
                raise FindingError(f"{change.path} is not what the manifest says", data)
            if change.delta is not None:
                # What it makes is right; what it is made of has to be what others find in the archive.
                self._deltas[f"deltas/{change.path}"] = change.delta.sha256
                continue
            found[f"files/{change.path}" if native else sources[change.path]] = content
        return found

    def _compare(self, data: bytes, path: Path, ours: dict[str, bytes]) -> None:
        with zipfile.ZipFile(io.BytesIO(data)) as reader:
            theirs = {info.filename: reader.read(info) for info in reader.infolist() if not info.is_dir()}
        self._agree("zipfile", data, ours, theirs)
        for tool in self.tools:
            out = self.folder / "out"
            out.mkdir()
            command = (
                ["unzip", "-q", str(path), "-d", str(out)]
                if tool == "unzip"
                else ["bsdtar", "-xf", str(path), "-C", str(out)]
            )
            done = subprocess.run(
                command,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
            if done.returncode:
                raise FindingError(f"accepted, and {tool} says: {(done.stdout + done.stderr)[:500]!r}", data)
            self._agree(tool, data, ours, files_below(out))
            shutil.rmtree(out)

    def _agree(self, tool: str, data: bytes, ours: dict[str, bytes], theirs: dict[str, bytes]) -> None:
        for name, digest in self._deltas.items():
            if hashlib.sha256(theirs.pop(name, b"")).hexdigest() != digest:
                raise FindingError(f"{tool} reads another {name}", data)
        # What the prototype deletes may lie in the archive, and nobody reads it.
        theirs = {name: content for name, content in theirs.items() if not name.startswith("patch/del/")}
        if ours != theirs:
            names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
            raise FindingError(f"{tool} reads something else in {names[:5]!r}", data)
        self.tally.compared[tool] += 1


def files_below(folder: Path) -> dict[str, bytes]:
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders:
            (Path(parent) / name).chmod(0o700)
        for name in files:
            path = Path(parent) / name
            if path.is_symlink():
                found[str(path.relative_to(folder))] = b"a link to " + os.fsencode(path.readlink())
                continue
            path.chmod(0o600)  # a mutant may have taken every permission away
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found
