"""Every bad input that research/patching.md lists in section 6.2, each in an otherwise valid package.

A row of the note is a row here: ``zip-01`` to ``zip-54`` are archives, ``M1`` to ``M26`` manifests and gates,
``T1`` to ``T9`` signatures, ``L1`` to ``L7`` the prototype's packages. `CASES` are the packages; `ELSEWHERE`
says of what no package can show which tests do, `MEANINGLESS` of rows that have no meaning here why.
"""

from __future__ import annotations

import hashlib
import json
import random
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Final

import zip_forge
from ssh_kit import key
from test_manifest import BAD_PATHS
from zip_forge import FILES, JOB, NOTE, Part, extra, folder, forge, manifest_part, streamed

from asyncsup.patch import delta

SIGNERS: Final = ("alice", "bob")
"""Whoever has to sign: both of them."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What is around a fault: everything that makes a package valid.

    Args:
        signers: who signs the manifest.
    """

    signers: tuple[str, ...] = ()

    def sign(self, manifest: bytes) -> tuple[Part, ...]:
        return tuple(
            Part(name=f"signatures/{name}.sig", data=signature(name, manifest)) for name in self.signers
        )

    def of(self, manifest: bytes | Part, *parts: Part, **keys: Any) -> bytes:
        """A package with this manifest, right or wrong, and these files."""
        first = manifest if isinstance(manifest, Part) else Part(name="manifest.json", data=manifest)
        return forge(first, *self.sign(first.data), *parts, **keys)

    def forge(self, *parts: Part, **keys: Any) -> bytes:
        """The valid package's manifest, which lists `FILES`, in front of `parts`."""
        return self.of(self.manifest, *parts, **keys)

    def native(self, *parts: Part, **keys: Any) -> bytes:
        """A package of `parts`, which its manifest lists; valid if they are."""
        return self.of(manifest_part(*parts, **keys), *parts)

    def beside(self, *parts: Part) -> bytes:
        """The valid package, and `parts` after it."""
        return self.forge(*FILES, *parts)

    def instead(self, part: Part) -> bytes:
        """The valid package, but for `part`, which stands where `job.json` stood."""
        return self.forge(part, NOTE)

    def named(self, name: str | bytes, **keys: Any) -> bytes:
        return self.beside(Part(name=name, data=b"x", **keys))

    @cached_property
    def manifest(self) -> Part:
        return manifest_part(*FILES)

    @property
    def signatures(self) -> tuple[Part, ...]:
        return self.sign(self.manifest.data)

    @property
    def count(self) -> int:
        return 1 + len(self.signers) + len(FILES)

    @property
    def valid(self) -> bytes:
        return self.forge(*FILES)

    @property
    def end(self) -> bytes:
        return self.valid[-22:]

    @property
    def directory_offset(self) -> int:
        (offset,) = struct.unpack("<I", self.end[16:20])
        return int(offset)

    def end64(self, *, offset: int | None = None, count: int | None = None, **fields: int) -> bytes:
        """A ZIP64 end record and its locator for the valid package."""
        valid, number = self.valid, self.count if count is None else count
        place = len(valid) - 22 if offset is None else offset
        values = {
            "size": 44, "made": 45, "needed": 45, "disk": 0, "directory_disk": 0, "disk_count": number,
            "count": number, "directory_size": len(valid) - 22 - self.directory_offset,
            "directory_offset": self.directory_offset, **fields,
        }  # fmt: skip
        return struct.pack("<4sQ2H2I4Q", b"PK\6\6", *values.values()) + struct.pack(
            "<4sIQI", b"PK\6\7", 0, place, 1
        )


@cache
def signature(name: str, manifest: bytes, namespace: str = "asyncsup-patch") -> bytes:
    return key(name).sign(manifest, namespace=namespace)


UNSIGNED: Final = Pack()
SIGNED: Final = Pack(signers=SIGNERS)

Make = Callable[[Pack], bytes]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One package.

    Args:
        row: of the note.
        code: what it is refused with; empty where it is accepted.
        note: where the verdict is another one than the note's, on purpose: why.
        asked: parameters of `patch.apply` beside the package.
        plan: what the plan for one that is accepted says.
    """

    row: str
    what: str
    make: Make
    code: str = ""
    note: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.row}: {self.what}"


def _zip(number: int, what: str, make: Any, code: str = "", note: str = "") -> Case:
    # 0: what the note does not have.
    row = f"zip-{number:02}" if number else "zip-more"
    return Case(row=row, what=what, make=make, code=code, note=note)


# --- archives -----------------------------------------------------------------------------------------------


def quoted_overlap(p: Pack) -> bytes:
    """CVE-2024-0450: the stored content of one entry is the header and content of the next."""
    inner = Part(name="files/inner", data=b"shared content", method=0)
    body = forge(inner)
    header_and_content = body[: body.index(b"PK\1\2")]
    outer = Part(name="files/outer", data=header_and_content, method=0)
    data = p.beside(outer, replace(inner, in_body=False))
    place = data.index(header_and_content)
    # The record of `inner`, the last of the directory, points into the content of `outer`.
    record = data.rindex(b"PK\1\2")
    return data[: record + 42] + struct.pack("<I", place) + data[record + 46 :]


def record_too_long(p: Pack) -> bytes:
    at = p.valid.rindex(b"PK\1\2") + 32
    return p.valid[:at] + b"\xff\xff" + p.valid[at + 2 :]


def comment_with_end_record(p: Pack) -> bytes:
    return p.forge(*FILES, comment=struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0))


def zeros(size: int) -> Part:
    return Part(name="files/zeros", data=b"\0" * size)


@cache
def _deflated_zeros() -> bytes:
    return zip_forge.deflate(bytes(64 << 20))


NOISE: Final = random.Random(1).randbytes(1 << 20)
MODES: Final = {
    "symlink": stat.S_IFLNK | 0o777,
    "fifo": stat.S_IFIFO | 0o644,
    "character device": stat.S_IFCHR | 0o644,
    "block device": stat.S_IFBLK | 0o644,
    "socket": stat.S_IFSOCK | 0o644,
}

ARCHIVES: Final = (
    _zip(1, "parent folder", lambda p: p.named("files/../../etc/x"), "zip.name_traversal"),
    _zip(2, "absolute", lambda p: p.named("/etc/x"), "zip.name_absolute"),
    _zip(3, "drive", lambda p: p.named("C:x"), "zip.name_drive"),
    _zip(4, "backslash", lambda p: p.named("files\\..\\..\\x"), "zip.name_backslash"),
    _zip(5, "NUL", lambda p: p.named("files/a\0b"), "zip.name_control"),
    _zip(6, "newline", lambda p: p.named("files/a\nb"), "zip.name_control"),
    _zip(6, "escape", lambda p: p.named("files/a\x1b[2Jb"), "zip.name_control"),
    _zip(6, "C1 control", lambda p: p.named("files/a\u009bb"), "zip.name_control"),
    _zip(7, "empty", lambda p: p.named(""), "zip.name_empty"),
    _zip(8, "empty component", lambda p: p.named("files//x"), "zip.name_traversal"),
    _zip(8, "dot component", lambda p: p.named("files/./x"), "zip.name_traversal"),
    _zip(9, "long component", lambda p: p.named("files/" + "x" * 256), "zip.name_long"),
    _zip(9, "long component in bytes", lambda p: p.named("files/" + "é" * 128), "zip.name_long"),
    _zip(9, "long path", lambda p: p.named("files/" + "/".join(["x" * 200] * 6)), "zip.name_long"),
    _zip(10, "depth", lambda p: p.named("files/" + "a/" * 399 + "a"), "zip.name_depth"),
    _zip(11, "not UTF-8", lambda p: p.named(b"files/\xff\xfe", flags=1 << 11), "zip.name_encoding"),
    _zip(11, "overlong UTF-8", lambda p: p.named(b"files/\xc0\xaf", flags=1 << 11), "zip.name_encoding"),
    _zip(12, "UTF-8 without the flag", lambda p: p.named("files/é".encode(), flags=0), "zip.name_encoding"),
    _zip(13, "NFD", lambda p: p.named("files/e\u0301"), "zip.name_nfc"),
    _zip(14, "bidi override", lambda p: p.named("files/a\u202egnp.exe"), "zip.name_control"),
    _zip(14, "zero width", lambda p: p.named("files/a\u200bb"), "zip.name_control"),
    _zip(15, "trailing dot", lambda p: p.named("files/x."), "zip.name_trailing"),
    _zip(15, "trailing space", lambda p: p.named("files/x /y"), "zip.name_trailing"),
    _zip(15, "version that unzip leaves out", lambda p: p.named("files/x;1"), "zip.name_trailing"),
    _zip(15, "empty version that unzip leaves out", lambda p: p.named("files/x;"), "zip.name_trailing"),
    _zip(16, "reserved CON", lambda p: p.named("files/CON.txt"), "zip.name_reserved"),
    _zip(16, "reserved NUL", lambda p: p.named("files/nul"), "zip.name_reserved"),
    _zip(17, "same name twice", lambda p: p.beside(JOB), "zip.duplicate"),
    _zip(17, "file and folder of one name", lambda p: p.beside(folder("files/job.json/")), "zip.duplicate"),
    _zip(
        18,
        "names that differ in case",
        lambda p: p.beside(Part(name="files/A/x"), Part(name="files/a/X")),
        "zip.duplicate",
    ),
    _zip(
        18,
        "names that fold together",
        lambda p: p.beside(Part(name="files/straße"), Part(name="files/STRASSE")),
        "zip.duplicate",
    ),
    _zip(
        19, "file and path below it", lambda p: p.beside(Part(name="files/job.json/x")), "zip.prefix_conflict"
    ),
    _zip(
        19,
        "deeper, in other case",
        lambda p: p.beside(Part(name="files/Job.json/x/y")),
        "zip.prefix_conflict",
    ),
    _zip(
        20,
        "symlink",
        lambda p: p.instead(replace(JOB, attributes=MODES["symlink"] << 16)),
        "zip.file_type",
    ),
    _zip(
        21,
        "symlink and a path through it",
        lambda p: p.beside(
            Part(name="files/link", data=b"/etc", attributes=MODES["symlink"] << 16),
            Part(name="files/link/x"),
        ),
        "zip.file_type",
    ),
    _zip(
        20, "reparse point", lambda p: p.instead(replace(JOB, made_by=20, attributes=0x420)), "zip.file_type"
    ),
    _zip(22, "file marked as folder", lambda p: p.instead(replace(JOB, attributes=0x10)), "zip.file_type"),
    _zip(22, "volume label", lambda p: p.instead(replace(JOB, attributes=0x08)), "zip.file_type"),
    _zip(22, "unknown system", lambda p: p.instead(replace(JOB, made_by=1 << 8 | 20)), "zip.file_type"),
    *(
        _zip(22, kind, lambda p, mode=mode: p.instead(replace(JOB, attributes=mode << 16)), "zip.file_type")
        for kind, mode in MODES.items()
    ),
    _zip(23, "setuid", lambda p: p.instead(replace(JOB, attributes=0o104755 << 16)), "zip.mode"),
    _zip(23, "setgid", lambda p: p.instead(replace(JOB, attributes=0o102755 << 16)), "zip.mode"),
    _zip(23, "sticky", lambda p: p.instead(replace(JOB, attributes=0o101755 << 16)), "zip.mode"),
    _zip(
        23,
        "sticky folder",
        lambda p: p.beside(replace(folder("files/d/"), attributes=0o41777 << 16)),
        "zip.mode",
    ),
    _zip(24, "folder with data", lambda p: p.beside(folder("files/d/", data=b"x")), "zip.file_type"),
    _zip(
        24, "folder with a checksum", lambda p: p.beside(folder("files/d/", both={"crc": 5})), "zip.file_type"
    ),
    _zip(
        24,
        "folder with hidden data",
        lambda p: p.beside(Part(name="files/d/", payload=b"\x01\x00", attributes=0o40755 << 16)),
        "zip.file_type",
    ),
    _zip(25, "encrypted", lambda p: p.instead(replace(JOB, flags=1 << 0)), "zip.encrypted"),
    _zip(25, "strongly encrypted", lambda p: p.instead(replace(JOB, flags=1 << 6)), "zip.encrypted"),
    _zip(25, "masked headers", lambda p: p.instead(replace(JOB, flags=1 << 13)), "zip.encrypted"),
    _zip(
        25,
        "AES",
        lambda p: p.instead(replace(JOB, central_extra=extra(0x9901, b"\2\0AE\3\0\0"))),
        "zip.encrypted",
    ),
    _zip(25, "patched data", lambda p: p.instead(replace(JOB, flags=1 << 5)), "zip.flags"),
    _zip(
        26,
        "descriptor that tells the truth",
        lambda p: p.instead(streamed(JOB)),
        note="accepted: Java, and Info-ZIP into a pipe, write nothing else; it must repeat the directory",
    ),
    _zip(
        50,
        "extra with times",
        lambda p: p.instead(replace(JOB, local_extra=extra(0x5455, bytes(9)))),
        note="accepted: Info-ZIP writes them always, and nobody here reads them",
    ),
    _zip(
        26,
        "descriptor missing",
        lambda p: p.instead(replace(streamed(JOB), descriptor=b"")),
        "zip.header_mismatch",
    ),
    _zip(
        26,
        "descriptor lies",
        lambda p: p.instead(replace(streamed(JOB), descriptor=b"PK\7\x08" + bytes(12))),
        "zip.header_mismatch",
    ),
    _zip(
        26,
        "descriptor without the flag",
        lambda p: p.instead(replace(JOB, descriptor=zip_forge.plain_descriptor(JOB))),
        "zip.gap",
    ),
    _zip(
        26,
        "bytes after the descriptor",
        lambda p: p.instead(replace(streamed(JOB), descriptor=zip_forge.plain_descriptor(JOB) + b"junk")),
        "zip.gap",
    ),
    _zip(
        26,
        "descriptor and other sizes before",
        lambda p: p.instead(replace(streamed(JOB), local={"size": 5})),
        "zip.header_mismatch",
    ),
    _zip(27, "bzip2", lambda p: p.instead(replace(JOB, method=12)), "zip.method"),
    _zip(
        28,
        "other local name",
        lambda p: p.instead(replace(JOB, local_name=b"files/jab.json")),
        "zip.header_mismatch",
    ),
    *(
        _zip(
            29,
            f"other local {name}",
            lambda p, name=name: p.instead(replace(JOB, local={name: 3})),
            "zip.header_mismatch",
        )
        for name in ("version", "flags", "method", "time", "date", "crc", "compressed", "size")
    ),
    _zip(30, "wrong CRC", lambda p: p.instead(replace(JOB, both={"crc": 1})), "zip.crc"),
    _zip(
        31,
        "entry missing in the directory",
        lambda p: p.beside(Part(name="files/hidden", data=b"x", in_directory=False)),
        "zip.gap",
    ),
    _zip(
        31,
        "last entry missing in the directory",
        lambda p: p.forge(JOB, Part(name="files/hidden", data=b"x", in_directory=False), NOTE),
        "zip.gap",
    ),
    _zip(
        32,
        "two records, one entry",
        lambda p: p.beside(Part(name="files/other.txt", data=NOTE.data, method=0, in_body=False)),
        "zip.overlap",
    ),
    _zip(33, "quoted overlap", quoted_overlap, "zip.overlap"),
    _zip(
        34,
        "bytes in front, offsets adjusted",
        lambda p: forge(replace(p.manifest, before=b"#!/bin/sh\n"), *p.signatures, *FILES),
        "zip.gap",
    ),
    _zip(34, "bytes in front", lambda p: b"#!/bin/sh\n" + p.valid, "zip.framing"),
    _zip(35, "bytes after the end", lambda p: p.valid + b"trailing", "zip.trailing"),
    _zip(35, "one byte after the end", lambda p: p.valid + b"\0", "zip.trailing"),
    _zip(36, "end record in the comment", comment_with_end_record, "zip.framing"),
    _zip(36, "comment", lambda p: p.forge(*FILES, comment=b"hello"), "zip.comment"),
    _zip(37, "two archives", lambda p: p.valid + p.valid, "zip.framing"),
    _zip(38, "gap between entries", lambda p: p.beside(replace(zeros(5), before=b"gap")), "zip.gap"),
    _zip(
        38,
        "gap before the directory",
        lambda p: p.forge(
            *FILES, Part(name="", in_directory=False, before=b"gap", local_name=b"", payload=b"")
        ),
        "zip.gap",
    ),
    _zip(
        38,
        "bytes between directory and end",
        lambda p: p.forge(*FILES, before_end=b"between"),
        "zip.framing",
    ),
    _zip(
        39,
        "ZIP64 mark on a size",
        lambda p: p.instead(replace(JOB, central={"size": 0xFFFFFFFF})),
        "zip.zip64",
    ),
    _zip(
        39,
        "ZIP64 mark on an offset",
        lambda p: p.instead(replace(JOB, central={"offset": 0xFFFFFFFF})),
        "zip.zip64",
    ),
    _zip(
        39,
        "ZIP64 mark on the directory",
        lambda p: p.forge(*FILES, end={"offset": 0xFFFFFFFF}),
        "zip.zip64",
    ),
    _zip(
        39,
        "ZIP64 field for a small size",
        lambda p: p.instead(
            replace(
                JOB, central={"size": 0xFFFFFFFF}, central_extra=extra(1, struct.pack("<Q", len(JOB.data)))
            )
        ),
        "zip.zip64",
    ),
    _zip(
        39,
        "local ZIP64 field",
        lambda p: p.instead(
            replace(
                JOB,
                local={"size": 0xFFFFFFFF, "compressed": 0xFFFFFFFF},
                local_extra=extra(1, struct.pack("<2Q", len(JOB.data), len(JOB.content))),
            )
        ),
        "zip.zip64",
    ),
    _zip(40, "ZIP64 record that nothing demands", lambda p: p.valid[:-22] + p.end64() + p.end, "zip.zip64"),
    _zip(
        40, "ZIP64 locator points elsewhere", lambda p: p.valid[:-22] + p.end64(offset=7) + p.end, "zip.zip64"
    ),
    _zip(40, "ZIP64 record of unknown size", lambda p: p.valid[:-22] + p.end64(size=45) + p.end, "zip.zip64"),
    _zip(40, "ZIP64 version", lambda p: p.valid[:-22] + p.end64(needed=62) + p.end, "zip.version"),
    _zip(40, "ZIP64 disks", lambda p: p.valid[:-22] + p.end64(disk=1) + p.end, "zip.multidisk"),
    _zip(40, "ZIP64 contradicts", lambda p: p.valid[:-22] + p.end64(count=70000) + p.end, "zip.zip64"),
    _zip(
        41,
        "count too low",
        lambda p: p.forge(*FILES, end={"disk_count": p.count - 1, "count": p.count - 1}),
        "zip.framing",
    ),
    _zip(
        41,
        "count too high",
        lambda p: p.forge(*FILES, end={"disk_count": p.count + 1, "count": p.count + 1}),
        "zip.framing",
    ),
    _zip(42, "disk number", lambda p: p.forge(*FILES, end={"disk": 1}), "zip.multidisk"),
    _zip(42, "disk of the directory", lambda p: p.forge(*FILES, end={"directory_disk": 1}), "zip.multidisk"),
    _zip(
        42,
        "entries on this disk",
        lambda p: p.forge(*FILES, end={"disk_count": p.count - 1}),
        "zip.multidisk",
    ),
    _zip(
        42, "entry on another disk", lambda p: p.instead(replace(JOB, central={"disk": 1})), "zip.multidisk"
    ),
    _zip(43, "truncated in the end record", lambda p: p.valid[:-1], "zip.truncated"),
    _zip(43, "truncated in the directory", lambda p: p.valid[: p.directory_offset + 20], "zip.truncated"),
    _zip(43, "truncated in the content", lambda p: p.valid[:60], "zip.truncated"),
    _zip(43, "truncated in a comment", lambda p: p.forge(*FILES, comment=b"hello")[:-2], "zip.truncated"),
    _zip(43, "empty file", lambda p: b"", "zip.truncated"),
    _zip(43, "three bytes", lambda p: p.valid[:3], "zip.truncated"),
    _zip(43, "something else", lambda p: b"\x1f\x8b" + bytes(200), "zip.not_a_zip"),
    _zip(
        44,
        "zeros 1000 to 1",
        lambda p: p.native(replace(zeros(64 << 20), payload=_deflated_zeros())),
        "zip.ratio",
    ),
    _zip(
        44,
        "bomb in a large package",
        lambda p: p.native(zeros(4 << 20), Part(name="files/noise", data=NOISE, method=0)),
        "zip.ratio",
    ),
    _zip(
        44,
        "many small bombs",
        lambda p: p.native(*(replace(zeros(1 << 20), name=f"files/zeros{n}") for n in range(4))),
        "zip.ratio",
    ),
    _zip(
        45,
        "declares 10 bytes, inflates to 64 MiB",
        lambda p: p.native(Part(name="files/x", data=b"0123456789", payload=_deflated_zeros())),
        "zip.size",
    ),
    _zip(
        45,
        "declares more than it inflates to",
        lambda p: p.native(Part(name="files/x", data=b"0123456789", payload=zip_forge.deflate(b"01234"))),
        "zip.size",
    ),
    _zip(
        46,
        "junk after the deflate end",
        lambda p: p.native(replace(JOB, payload=JOB.content + b"junk")),
        "zip.size",
    ),
    _zip(
        47,
        "65000 empty entries",
        lambda p: p.forge(*(Part(name=f"files/{n}", method=0) for n in range(65000))),
        "zip.count",
    ),
    _zip(48, "empty archive", lambda p: forge(), "zip.empty"),
    _zip(
        49,
        "second name",
        lambda p: p.instead(replace(JOB, central_extra=extra(0x7075, b"\1" + bytes(4) + b"files/other"))),
        "zip.extra",
    ),
    _zip(
        49,
        "second name, local",
        lambda p: p.instead(replace(JOB, local_extra=extra(0x7075, b"\1" + bytes(4) + b"files/other"))),
        "zip.extra",
    ),
    _zip(50, "unknown extra", lambda p: p.instead(replace(JOB, central_extra=extra(0x1234))), "zip.extra"),
    _zip(
        50, "unknown local extra", lambda p: p.instead(replace(JOB, local_extra=extra(0x000D))), "zip.extra"
    ),
    _zip(50, "times without any", lambda p: p.instead(replace(JOB, local_extra=extra(0x5455))), "zip.extra"),
    _zip(
        50,
        "repeated extra",
        lambda p: p.instead(replace(JOB, local_extra=2 * extra(0x5455, bytes(5)))),
        "zip.extra",
    ),
    _zip(50, "extra cut off", lambda p: p.instead(replace(JOB, central_extra=b"UT\x09\0\3")), "zip.extra"),
    _zip(50, "extra without a header", lambda p: p.instead(replace(JOB, local_extra=b"UT")), "zip.extra"),
    _zip(
        51,
        "stored, other compressed size",
        lambda p: p.forge(JOB, replace(NOTE, both={"size": len(NOTE.data) + 1})),
        "zip.size",
    ),
    _zip(52, "corrupt deflate", lambda p: p.native(replace(JOB, payload=b"\xff" * 30)), "zip.deflate"),
    _zip(52, "deflate cut off", lambda p: p.native(replace(JOB, payload=JOB.content[:-9])), "zip.deflate"),
    _zip(52, "nothing to inflate", lambda p: p.native(replace(JOB, payload=b"")), "zip.deflate"),
    _zip(53, "comment on a record", lambda p: p.instead(replace(JOB, comment=b"hello")), "zip.comment"),
    _zip(54, "version needed", lambda p: p.instead(replace(JOB, both={"version": 51})), "zip.version"),
    _zip(
        54,
        "ZIP64's version without ZIP64",
        lambda p: p.instead(replace(JOB, both={"version": 45})),
        "zip.version",
    ),
    _zip(
        0,
        "record is longer than the directory",
        record_too_long,
        "zip.framing",
    ),
    _zip(
        0,
        "record points behind the directory",
        lambda p: p.forge(JOB, replace(NOTE, central={"offset": 1 << 30})),
        "zip.gap",
    ),
    _zip(
        0,
        "record points at no header",
        lambda p: p.valid.replace(b"PK\3\4", b"PK\3\5"),
        "zip.framing",
    ),
)

# --- manifests ----------------------------------------------------------------------------------------------


def raw(**keys: Any) -> bytes:
    """The valid package's manifest, with other values for `keys`."""
    return manifest_part(*FILES, **keys).data


def deleted(path: str) -> dict[str, Any]:
    return {"path": path, "op": "deleted", "missing_ok": True}


def _with_change(*changes: dict[str, Any], **keys: Any) -> bytes:
    return raw(files=[*map(zip_forge.change, FILES), *changes], **keys)


def _manifest(row: str, what: str, manifest: bytes, code: str, note: str = "") -> Case:
    return Case(row=row, what=what, make=lambda p: p.of(manifest, *FILES), code=code, note=note)


MANIFESTS: Final = (
    Case(row="M1", what="file listed but absent", make=lambda p: p.forge(JOB), code="manifest.missing_file"),
    Case(
        row="M1",
        what="file present but not listed",
        make=lambda p: p.of(manifest_part(JOB), *FILES),
        code="manifest.extra_file",
    ),
    Case(
        row="M2",
        what="other content",
        make=lambda p: p.instead(replace(JOB, data=JOB.data.replace(b"300", b"301"))),
        code="digest.sha256",
    ),
    Case(
        row="M2",
        what="other size",
        make=lambda p: p.instead(replace(JOB, data=JOB.data + b" ")),
        code="manifest.file_size",
    ),
    _manifest("M3", "key twice", raw()[:-1] + b', "build": 301}', "manifest.json"),
    _manifest(
        "M3", "key twice in a file", raw().replace(b'"size"', b'"op": "new", "size"', 1), "manifest.json"
    ),
    _manifest("M3", "key twice, once escaped", raw()[:-1] + b', "buil\\u0064": 301}', "manifest.json"),
    _manifest("M4", "NaN", raw().replace(b"300", b"NaN", 1), "manifest.json"),
    _manifest("M4", "infinity", raw().replace(b"300", b"Infinity", 1), "manifest.json"),
    _manifest("M4", "infinite by its exponent", raw().replace(b"300", b"1e999", 1), "manifest.json"),
    _manifest("M4", "byte order mark", b"\xef\xbb\xbf" + raw(), "manifest.json"),
    _manifest("M4", "lone surrogate", raw(notes="X").replace(b"X", b"\\ud800"), "manifest.json"),
    _manifest("M4", "bytes that are no UTF-8", raw(notes="X").replace(b"X", b"\xff"), "manifest.json"),
    _manifest("M4", "something behind it", raw() + b"{}", "manifest.json"),
    *(
        _manifest("M5", f"build {build!r}", raw(build=build), "manifest.schema")
        for build in ("300", 300.0, True, -1, 10**29, 2**53, None)
    ),
    _manifest(
        "M6",
        "2000 deep",
        raw(**{"x-n": 0}).replace(b": 0", b": " + b"[" * 2000 + b"]" * 2000),
        "manifest.json",
    ),
    _manifest("M6", "900 objects deep", b'{"x-a":' * 900 + b"1" + b"}" * 900, "manifest.json"),
    _manifest(
        "M6",
        "100000 deep and never closed",
        raw(**{"x-n": 0}).replace(b": 0", b": " + b"[" * 100_000),
        "manifest.json",
    ),
    _manifest("M7", "unknown key", raw(target=["pricer"]), "manifest.unknown_key"),
    _manifest("M7", "unknown key of a file", _with_change(deleted("x") | {"sha": 1}), "manifest.unknown_key"),
    _manifest(
        "M7",
        "unknown required feature",
        raw(requires_features=["delta-v9"]),
        "manifest.unknown_key",
        note="there is no `requires_features`: whatever is not known is refused",
    ),
    *(
        _manifest("M8", f"path: {what}", _with_change(deleted(path)), "manifest.path")
        for what, path in BAD_PATHS.items()
    ),
    _manifest("M9", "path twice", _with_change(deleted("job.json")), "manifest.duplicate"),
    _manifest("M9", "paths that differ in case", _with_change(deleted("JOB.json")), "manifest.duplicate"),
    _manifest("M9", "path below a file", _with_change(deleted("Job.json/x")), "manifest.prefix_conflict"),
)

# --- gates --------------------------------------------------------------------------------------------------

REGION, BUILD, FLOOR = "us-east-1", 200, 150
BASE: Final = NOISE[:4096]
ROOT: Final = {
    "there.txt": b"written by the program",
    "same.txt": b"as delivered",
    "real/x.txt": b"x",
    "data.bin": BASE,
}
"""What lies in the root of the target `pricer`, beside `linked`, a link to `real`."""


def _gate(row: str, what: str, code: str, *, note: str = "", **keys: Any) -> Case:
    return Case(row=row, what=what, make=lambda p: p.native(*FILES, **keys), code=code, note=note)


def _file(row: str, what: str, code: str, *, note: str = "", **change: Any) -> Case:
    """A package with one change more, which stands in the way."""
    part = Part(name=f"files/{change.pop('path')}", data=change.pop("data", b"new"))
    listed = {**zip_forge.change(part), **change}
    added: tuple[Part, ...] = (part,)
    if listed["op"] == "deleted":
        listed, added = {key: listed[key] for key in ("path", *change)}, ()
    manifest = _with_change(listed)
    return Case(row=row, what=what, make=lambda p: p.of(manifest, *FILES, *added), code=code, note=note)


GATES: Final = (
    _file("M10", "parent is a link", "gate.path", path="linked/x.txt", op="modified"),
    _file("M10", "parent is a link, new file", "gate.path", path="linked/y.txt"),
    _file("M11", "new, and there already", "gate.conflict", path="there.txt"),
    _file("M12", "modified, and not there", "gate.conflict", path="gone.txt", op="modified"),
    _file("M12", "deleted, and not there", "gate.conflict", path="gone.txt", op="deleted"),
    _file("M13", "another base", "gate.base", path="there.txt", op="modified", base_sha256="0" * 64),
    _file("M13", "another base, deleted", "gate.base", path="there.txt", op="deleted", base_sha256="0" * 64),
    _gate("M15", "another region", "gate.region", regions=["eu-west-1"]),
    _gate("M15", "another target", "gate.target", targets=["other"]),
    _gate("M15", "one target that is here and one that is not", "gate.target", targets=["pricer", "other"]),
    _gate(
        "M15",
        "other hardware",
        "manifest.unknown_key",
        note="the format has no `hardware`: a region or a target says it",
        hardware=["aarch64"],
    ),
    _gate("M16", "lower build", "gate.build", build=BUILD - 1),
    Case(
        row="M17",
        what="what is there already",
        make=lambda p: p.of(
            raw(
                build=BUILD,
                files=[zip_forge.change(Part(name="files/same.txt", data=ROOT["same.txt"]), replace=True)],
            ),
            Part(name="files/same.txt", data=ROOT["same.txt"]),
        ),
        plan={"verdict": "already"},
    ),
    _gate("M18", "same build, other content", "gate.build_conflict", build=BUILD),
    _gate(
        "M19",
        "downgrade below its floor",
        "gate.floor",
        build=FLOOR - 1,
        build_floor=FLOOR,
        downgrade=True,
        expires="2090-01-01T00:00:00Z",
    ),
    _gate("M20", "needs a higher build", "gate.requires", requires={"build_min": BUILD + 1}),
    _gate("M20", "needs a lower build", "gate.requires", requires={"build_max": BUILD - 1}),
    _gate("M22", "expired", "gate.expired", expires="2020-01-01T00:00:00Z"),
    _gate(
        "M22",
        "made in the future",
        "",
        note="accepted: `created` is for people; who signs decides when, and `valid-after` of a key holds",
        created="2090-01-01T00:00:00Z",
    ),
    _gate("M25", "warm, where only cold is taken", "gate.kind", targets=["cold-only"]),
)

# --- deltas -------------------------------------------------------------------------------------------------

OTHER: Final = NOISE[4096:8192]
CHANGED: Final = BASE[:2000] + b"changed" + BASE[2000:]
MOVED, OTHER_MOVED = (b"changed" + content[2000:] + content[:2000] for content in (BASE, OTHER))


def _delta(what: str, raw: bytes, code: str, *, base: bytes = BASE, makes: bytes = CHANGED) -> Case:
    """A package with a delta to `base` that is to make `makes`, whatever it is."""
    part = Part(name="deltas/data.bin", data=raw, method=0)
    digest, before, after = (hashlib.sha256(data).hexdigest() for data in (raw, base, makes))
    listed = {
        "path": "data.bin", "op": "modified", "size": len(makes), "sha256": after, "base_sha256": before,
        "delta": {"format": "zstd-patch", "base_sha256": before, "sha256": digest, "size": len(raw)},
    }  # fmt: skip
    manifest = _with_change(listed)
    return Case(row="M26", what=what, make=lambda p: p.of(manifest, *FILES, part), code=code)


DELTAS: Final = (
    _delta("delta", delta.make(BASE, CHANGED), ""),
    _delta("to another file", delta.make(OTHER, CHANGED), "gate.base", base=OTHER),
    _delta("to another file than it says", delta.make(OTHER, OTHER_MOVED), "digest.sha256"),
    _delta("that makes another file", delta.make(BASE, CHANGED), "digest.sha256", makes=MOVED),
    _delta("cut off", delta.make(BASE, CHANGED)[:-3], "delta.invalid"),
    _delta("that is none", b"not a delta", "delta.invalid"),
)
"""Whether it is right shows only where its base is, so they are no cases for the package alone."""

# --- signatures ---------------------------------------------------------------------------------------------


def _signed(*named: tuple[str, bytes], manifest: bytes | None = None) -> bytes:
    """The valid package with these signatures instead of the right ones."""
    parts = (Part(name=f"signatures/{name}.sig", data=data) for name, data in named)
    raw_manifest = raw() if manifest is None else manifest
    return forge(Part(name="manifest.json", data=raw_manifest), *parts, *FILES)


def _trust(row: str, what: str, code: str, *named: Callable[[], tuple[str, bytes]]) -> Case:
    return Case(row=row, what=what, make=lambda _: _signed(*(each() for each in named)), code=code)


def _by(name: str, called: str = "", **keys: Any) -> Callable[[], tuple[str, bytes]]:
    manifest = keys.pop("manifest", raw())
    return lambda: (called or name, signature(name, manifest, **keys))


RESERIALISED: Final = json.dumps(json.loads(raw()), separators=(",", ":")).encode()

SIGNATURES: Final = (
    _trust("T1", "no signature", "trust.unsigned"),
    _trust("T2", "one key of two", "trust.threshold", _by("alice")),
    _trust("T2", "the same key twice", "trust.threshold", _by("alice"), _by("alice", "bob")),
    _trust("T2", "one key nobody knows", "trust.threshold", _by("alice"), _by("mallory")),
    _trust("T3", "for another purpose", "trust.namespace", _by("alice"), _by("bob", namespace="file")),
    _trust(
        "T3", "over another manifest", "trust.signature", _by("alice"), _by("bob", manifest=raw(build=301))
    ),
    _trust(
        "T7", "over JSON written anew", "trust.signature", _by("alice"), _by("bob", manifest=RESERIALISED)
    ),
    _trust("T-more", "only keys nobody knows", "trust.unknown_key", _by("mallory"), _by("trudy")),
    Case(
        row="T-more",
        what="cut off",
        make=lambda _: _signed(("alice", signature("alice", raw())[:-40]), ("bob", signature("bob", raw()))),
        code="trust.malformed",
    ),
    Case(
        row="T-more",
        what="manifest changed by one space",
        make=lambda p: _signed(
            *((name, signature(name, raw())) for name in SIGNERS), manifest=raw().replace(b": ", b":  ", 1)
        ),
        code="trust.signature",
    ),
    Case(
        row="T-more",
        what="a package that can have no signature",
        make=lambda _: zip_forge.prototype(),
        code="trust.unsigned",
        asked={"target": "pricer"},
    ),
)

# --- the prototype's packages -------------------------------------------------------------------------------


def _legacy(
    row: str,
    what: str,
    code: str,
    *,
    asked: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    **keys: Any,
) -> Case:
    layout = {key: keys.pop(key) for key in ("also", "without") if key in keys}
    return Case(
        row=row,
        what=what,
        make=lambda _: zip_forge.prototype(zip_forge.prototype_manifest(**keys), **layout),
        code=code,
        asked=asked or {},
        plan=plan or {},
    )


def _item(name: str = "res.json", path: str = "/work/rest/") -> list[dict[str, str]]:
    return [{"name": name, "path": path}]


LEGACY: Final = (
    _legacy("L1", "another CRC-32", "digest.crc32", asked={"crc32": "851398428"}),
    _legacy("L2", "name with a slash", "manifest.path", newfiles=_item("a/b")),
    _legacy("L2", "name that is the parent", "manifest.path", newfiles=_item("..")),
    _legacy("L2", "path with the parent", "manifest.path", newfiles=_item(path="/work/../../etc/")),
    _legacy("L3", "build with dots", "manifest.schema", build="3.0.0"),
    _legacy("L3", "build with a sign", "manifest.schema", build="+300"),
    _legacy("L3", "build in other digits", "manifest.schema", build="\u0663"),
    _legacy("L4", "source missing", "manifest.missing_file", without="patch/new/res.json"),
    _legacy("L4", "source not listed", "manifest.extra_file", also=(Part(name="patch/new/more.json"),)),
    _legacy("L5", "two entries, one destination", "manifest.duplicate", newfiles=_item() + _item()),
    _legacy("L5", "deleted and new", "manifest.duplicate", delfiles=_item()),
    _legacy("L6", "deletes what is not there", "", plan={"kind": "warm"}),
    _legacy("L7", "says nothing of justres", "", plan={"kind": "cold"}, justres=None),
)

CASES: Final = (*ARCHIVES, *MANIFESTS, *GATES, *DELTAS, *SIGNATURES, *LEGACY)

ELSEWHERE: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "M10": (
        "swapped in while it is staged",
        ("test_store_refusals.test_a_folder_swapped_for_a_link_during_staging_leads_nowhere",),
    ),
    "M14": (
        "the file has to be delivered first",
        ("test_store_refusals.test_a_leaf_the_program_has_replaced_is_detached",),
    ),
    "M21": (
        "no gate asks a target; one that does not answer `prepare` has refused",
        ("test_patching.test_a_target_that_does_not_give_its_go_ahead_keeps_everything",),
    ),
    "M22": (
        "the clock has to be behind the last time seen",
        ("test_audit_live.test_nothing_that_has_expired_comes_back_to_life_while_the_clock_is_behind",),
    ),
    "M23": (
        "the patch has to be rolled back first",
        ("test_patching.test_a_patch_on_hold_is_tried_again_only_when_told_to",),
    ),
    "M24": (
        "the disk has to be full",
        (
            "test_store.test_a_disk_too_small_for_the_patch_is_noticed_before_and_while_staging",
            "test_space.test_too_few_inodes_are_noticed_before_staging",
        ),
    ),
    "M26": (
        "without a supervisor, and with every policy on drift",
        (
            "test_delta.test_a_delta_to_another_file_is_refused_before_anything_is_staged",
            "test_delta.test_each_fault_of_a_delta_has_its_verdict",
        ),
    ),
}
"""Rows, or a part of them, that are no package: why, and the tests that show it."""

MEANINGLESS: Final[dict[str, str]] = {
    "T4": "there is one role; a key for something else has other `namespaces`",
    "T5": "no root document: `allowed_signers` is the operator's own file on each host",
    "T6": "the same; a key has `valid-before`, and a rollback asks for no signature",
    "T8": "no roll-out documents: `build` and `build_floor` of the patch itself, and its `expires`",
    "T9": "the same: a package stands for itself",
}
"""Rows about what does not exist here, and what is there instead."""
