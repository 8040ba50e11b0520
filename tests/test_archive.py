"""The structure of a zip file: what is refused, with which code, and what still passes."""

from __future__ import annotations

import io
import os
import random
import shutil
import stat
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zip_forge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zip_forge import FILES, JOB, NOTE, Part, extra, folder, forge, manifest_part, native, streamed

from asyncsup.errors import PatchMalformedError
from asyncsup.patch import archive
from asyncsup.patch.archive import Limits, scan
from asyncsup.patch.package import Package, open_package

MANIFEST = manifest_part(*FILES)


@contextmanager
def opened(
    data: bytes, limits: Limits = archive.DEFAULT_LIMITS, name: str = "patch.zip"
) -> Iterator[Package]:
    with tempfile.TemporaryDirectory() as folder_name:
        path = Path(folder_name) / name
        path.write_bytes(data)
        with open_package(path, limits=limits) as package:
            yield package
        assert [found.name for found in Path(folder_name).iterdir()] == [name]


def read_all(package: Package) -> dict[str, bytes]:
    """Content of every new and modified file by path, taken out as staging does."""
    contents = {}
    for change in package.manifest.files:
        if change.sha256 is not None:
            with tempfile.TemporaryFile(buffering=0) as file:
                package.extract(change, file.fileno())
                file.seek(0)
                contents[change.path] = file.read()
    return contents


def accept(data: bytes, limits: Limits = archive.DEFAULT_LIMITS) -> dict[str, bytes]:
    with opened(data, limits) as package:
        package.verify()
        return read_all(package)


def refuse(data: bytes, limits: Limits = archive.DEFAULT_LIMITS) -> PatchMalformedError:
    with pytest.raises(PatchMalformedError) as caught:
        accept(data, limits)
    assert caught.value.exit_status == 21
    assert caught.value.message.startswith("patch.zip: ")
    return caught.value


def beside(*parts: Part) -> bytes:
    """A valid package, and `parts` after it."""
    return forge(MANIFEST, JOB, NOTE, *parts)


def instead(part: Part) -> bytes:
    """A valid package, but for `part`, which stands where `job.json` stood."""
    return forge(MANIFEST, part, NOTE)


def named(name: str | bytes, **keys: Any) -> bytes:
    return beside(Part(name=name, data=b"x", **keys))


VALID = native(*FILES)
END = VALID[-22:]
DIRECTORY_OFFSET = struct.unpack("<I", END[16:20])[0]


def end64(*, offset: int | None = None, count: int = 3, **fields: int) -> bytes:
    """A ZIP64 end record and its locator for `VALID`."""
    place = len(VALID) - 22 if offset is None else offset
    size = len(VALID) - 22 - DIRECTORY_OFFSET
    values = {
        "size": 44, "made": 45, "needed": 45, "disk": 0, "directory_disk": 0, "disk_count": count,
        "count": count, "directory_size": size, "directory_offset": DIRECTORY_OFFSET, **fields,
    }  # fmt: skip
    return struct.pack("<4sQ2H2I4Q", b"PK\6\6", *values.values()) + struct.pack(
        "<4sIQI", b"PK\6\7", 0, place, 1
    )


def quoted_overlap() -> bytes:
    """CVE-2024-0450: the stored content of one entry is the header and content of the next."""
    inner = Part(name="files/inner", data=b"shared content", method=0)
    body = forge(inner)
    header_and_content = body[: body.index(b"PK\1\2")]
    outer = Part(name="files/outer", data=header_and_content, method=0)
    data = forge(MANIFEST, *FILES, outer, replace(inner, in_body=False))
    place = data.index(header_and_content)
    # The record of `inner`, the last of the directory, points into the content of `outer`.
    record = data.rindex(b"PK\1\2")
    return data[: record + 42] + struct.pack("<I", place) + data[record + 46 :]


def concatenated() -> bytes:
    return VALID + VALID


def comment_with_end_record() -> bytes:
    inner = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)
    return forge(MANIFEST, *FILES, comment=inner)


def zeros(size: int) -> Part:
    return Part(name="files/zeros", data=b"\0" * size)


NOISE = random.Random(1).randbytes(1 << 20)
MODES = {
    "symlink": stat.S_IFLNK | 0o777,
    "fifo": stat.S_IFIFO | 0o644,
    "character device": stat.S_IFCHR | 0o644,
    "block device": stat.S_IFBLK | 0o644,
    "socket": stat.S_IFSOCK | 0o644,
}

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "1 parent folder": (lambda: named("files/../../etc/x"), "zip.name_traversal"),
    "2 absolute": (lambda: named("/etc/x"), "zip.name_absolute"),
    "3 drive": (lambda: named("C:x"), "zip.name_drive"),
    "4 backslash": (lambda: named("files\\..\\..\\x"), "zip.name_backslash"),
    "5 NUL": (lambda: named("files/a\0b"), "zip.name_control"),
    "6 newline": (lambda: named("files/a\nb"), "zip.name_control"),
    "6 escape": (lambda: named("files/a\x1b[2Jb"), "zip.name_control"),
    "6 C1 control": (lambda: named("files/a\u009bb"), "zip.name_control"),
    "7 empty": (lambda: named(""), "zip.name_empty"),
    "8 empty component": (lambda: named("files//x"), "zip.name_traversal"),
    "8 dot component": (lambda: named("files/./x"), "zip.name_traversal"),
    "9 long component": (lambda: named("files/" + "x" * 256), "zip.name_long"),
    "9 long component in bytes": (lambda: named("files/" + "é" * 128), "zip.name_long"),
    "9 long path": (lambda: named("files/" + "/".join(["x" * 200] * 6)), "zip.name_long"),
    "10 depth": (lambda: named("files/" + "a/" * 399 + "a"), "zip.name_depth"),
    "11 not UTF-8": (lambda: named(b"files/\xff\xfe", flags=1 << 11), "zip.name_encoding"),
    "11 overlong UTF-8": (lambda: named(b"files/\xc0\xaf", flags=1 << 11), "zip.name_encoding"),
    "12 UTF-8 without the flag": (lambda: named("files/é".encode(), flags=0), "zip.name_encoding"),
    "13 NFD": (lambda: named("files/e\u0301"), "zip.name_nfc"),
    "14 bidi override": (lambda: named("files/a\u202egnp.exe"), "zip.name_control"),
    "14 zero width": (lambda: named("files/a\u200bb"), "zip.name_control"),
    "15 trailing dot": (lambda: named("files/x."), "zip.name_trailing"),
    "15 trailing space": (lambda: named("files/x /y"), "zip.name_trailing"),
    "15 version that unzip leaves out": (lambda: named("files/x;1"), "zip.name_trailing"),
    "15 empty version that unzip leaves out": (lambda: named("files/x;"), "zip.name_trailing"),
    "16 reserved CON": (lambda: named("files/CON.txt"), "zip.name_reserved"),
    "16 reserved NUL": (lambda: named("files/nul"), "zip.name_reserved"),
    "17 same name twice": (lambda: beside(JOB), "zip.duplicate"),
    "17 file and folder of one name": (lambda: beside(folder("files/job.json/")), "zip.duplicate"),
    "18 names that differ in case": (
        lambda: beside(Part(name="files/A/x"), Part(name="files/a/X")),
        "zip.duplicate",
    ),
    "18 names that fold together": (
        lambda: beside(Part(name="files/straße"), Part(name="files/STRASSE")),
        "zip.duplicate",
    ),
    "19 file and path below it": (lambda: beside(Part(name="files/job.json/x")), "zip.prefix_conflict"),
    "19 deeper, in other case": (lambda: beside(Part(name="files/Job.json/x/y")), "zip.prefix_conflict"),
    "20 symlink": (
        lambda: instead(replace(JOB, attributes=MODES["symlink"] << 16)),
        "zip.file_type",
    ),
    "21 symlink and a path through it": (
        lambda: beside(
            Part(name="files/link", data=b"/etc", attributes=MODES["symlink"] << 16),
            Part(name="files/link/x"),
        ),
        "zip.file_type",
    ),
    "20 reparse point": (lambda: instead(replace(JOB, made_by=20, attributes=0x420)), "zip.file_type"),
    "22 file marked as folder": (lambda: instead(replace(JOB, attributes=0x10)), "zip.file_type"),
    "22 volume label": (lambda: instead(replace(JOB, attributes=0x08)), "zip.file_type"),
    "22 unknown system": (lambda: instead(replace(JOB, made_by=1 << 8 | 20)), "zip.file_type"),
    **{
        f"22 {kind}": (lambda mode=mode: instead(replace(JOB, attributes=mode << 16)), "zip.file_type")  # type: ignore[misc]
        for kind, mode in MODES.items()
    },
    "23 setuid": (lambda: instead(replace(JOB, attributes=0o104755 << 16)), "zip.mode"),
    "23 setgid": (lambda: instead(replace(JOB, attributes=0o102755 << 16)), "zip.mode"),
    "23 sticky": (lambda: instead(replace(JOB, attributes=0o101755 << 16)), "zip.mode"),
    "23 sticky folder": (
        lambda: beside(replace(folder("files/d/"), attributes=0o41777 << 16)),
        "zip.mode",
    ),
    "24 folder with data": (lambda: beside(folder("files/d/", data=b"x")), "zip.file_type"),
    "24 folder with a checksum": (lambda: beside(folder("files/d/", both={"crc": 5})), "zip.file_type"),
    "24 folder with hidden data": (
        lambda: beside(Part(name="files/d/", payload=b"\x01\x00", attributes=0o40755 << 16)),
        "zip.file_type",
    ),
    "25 encrypted": (lambda: instead(replace(JOB, flags=1 << 0)), "zip.encrypted"),
    "25 strongly encrypted": (lambda: instead(replace(JOB, flags=1 << 6)), "zip.encrypted"),
    "25 masked headers": (lambda: instead(replace(JOB, flags=1 << 13)), "zip.encrypted"),
    "25 AES": (
        lambda: instead(replace(JOB, central_extra=extra(0x9901, b"\2\0AE\3\0\0"))),
        "zip.encrypted",
    ),
    "25 patched data": (lambda: instead(replace(JOB, flags=1 << 5)), "zip.flags"),
    "26 descriptor missing": (lambda: instead(replace(streamed(JOB), descriptor=b"")), "zip.header_mismatch"),
    "26 descriptor lies": (
        lambda: instead(replace(streamed(JOB), descriptor=b"PK\7\x08" + bytes(12))),
        "zip.header_mismatch",
    ),
    "26 descriptor without the flag": (
        lambda: instead(replace(JOB, descriptor=zip_forge.plain_descriptor(JOB))),
        "zip.gap",
    ),
    "26 bytes after the descriptor": (
        lambda: instead(replace(streamed(JOB), descriptor=zip_forge.plain_descriptor(JOB) + b"junk")),
        "zip.gap",
    ),
    "26 descriptor and other sizes before": (
        lambda: instead(replace(streamed(JOB), local={"size": 5})),
        "zip.header_mismatch",
    ),
    "27 bzip2": (lambda: instead(replace(JOB, method=12)), "zip.method"),
    "28 other local name": (
        lambda: instead(replace(JOB, local_name=b"files/jab.json")),
        "zip.header_mismatch",
    ),
    **{
        f"29 other local {name}": (
            lambda name=name: instead(replace(JOB, local={name: 3})),  # type: ignore[misc]
            "zip.header_mismatch",
        )
        for name in ("version", "flags", "method", "time", "date", "crc", "compressed", "size")
    },
    "30 wrong CRC": (lambda: instead(replace(JOB, both={"crc": 1})), "zip.crc"),
    "31 entry missing in the directory": (
        lambda: beside(Part(name="files/hidden", data=b"x", in_directory=False)),
        "zip.gap",
    ),
    "31 last entry missing in the directory": (
        lambda: forge(MANIFEST, JOB, Part(name="files/hidden", data=b"x", in_directory=False), NOTE),
        "zip.gap",
    ),
    "32 two records, one entry": (
        lambda: beside(Part(name="files/other.txt", data=NOTE.data, method=0, in_body=False)),
        "zip.overlap",
    ),
    "33 quoted overlap": (quoted_overlap, "zip.overlap"),
    "34 bytes in front, offsets adjusted": (
        lambda: forge(replace(MANIFEST, before=b"#!/bin/sh\n"), *FILES),
        "zip.gap",
    ),
    "34 bytes in front": (lambda: b"#!/bin/sh\n" + VALID, "zip.framing"),
    "35 bytes after the end": (lambda: VALID + b"trailing", "zip.trailing"),
    "35 one byte after the end": (lambda: VALID + b"\0", "zip.trailing"),
    "36 end record in the comment": (comment_with_end_record, "zip.framing"),
    "36 comment": (lambda: forge(MANIFEST, *FILES, comment=b"hello"), "zip.comment"),
    "37 two archives": (concatenated, "zip.framing"),
    "38 gap between entries": (lambda: beside(replace(zeros(5), before=b"gap")), "zip.gap"),
    "38 gap before the directory": (
        lambda: forge(
            MANIFEST, *FILES, Part(name="", in_directory=False, before=b"gap", local_name=b"", payload=b"")
        ),
        "zip.gap",
    ),
    "38 bytes between directory and end": (
        lambda: forge(MANIFEST, *FILES, before_end=b"between"),
        "zip.framing",
    ),
    "39 ZIP64 mark on a size": (lambda: instead(replace(JOB, central={"size": 0xFFFFFFFF})), "zip.zip64"),
    "39 ZIP64 mark on an offset": (
        lambda: instead(replace(JOB, central={"offset": 0xFFFFFFFF})),
        "zip.zip64",
    ),
    "39 ZIP64 mark on the directory": (
        lambda: forge(MANIFEST, *FILES, end={"offset": 0xFFFFFFFF}),
        "zip.zip64",
    ),
    "39 ZIP64 field for a small size": (
        lambda: instead(
            replace(
                JOB, central={"size": 0xFFFFFFFF}, central_extra=extra(1, struct.pack("<Q", len(JOB.data)))
            )
        ),
        "zip.zip64",
    ),
    "39 local ZIP64 field": (
        lambda: instead(
            replace(
                JOB,
                local={"size": 0xFFFFFFFF, "compressed": 0xFFFFFFFF},
                local_extra=extra(1, struct.pack("<2Q", len(JOB.data), len(JOB.content))),
            )
        ),
        "zip.zip64",
    ),
    "40 ZIP64 record that nothing demands": (lambda: VALID[:-22] + end64() + END, "zip.zip64"),
    "40 ZIP64 locator points elsewhere": (lambda: VALID[:-22] + end64(offset=7) + END, "zip.zip64"),
    "40 ZIP64 record of unknown size": (lambda: VALID[:-22] + end64(size=45) + END, "zip.zip64"),
    "40 ZIP64 version": (lambda: VALID[:-22] + end64(needed=62) + END, "zip.version"),
    "40 ZIP64 disks": (lambda: VALID[:-22] + end64(disk=1) + END, "zip.multidisk"),
    "40 ZIP64 contradicts": (lambda: VALID[:-22] + end64(count=70000) + END, "zip.zip64"),
    "41 count too low": (lambda: forge(MANIFEST, *FILES, end={"disk_count": 2, "count": 2}), "zip.framing"),
    "41 count too high": (lambda: forge(MANIFEST, *FILES, end={"disk_count": 4, "count": 4}), "zip.framing"),
    "42 disk number": (lambda: forge(MANIFEST, *FILES, end={"disk": 1}), "zip.multidisk"),
    "42 disk of the directory": (lambda: forge(MANIFEST, *FILES, end={"directory_disk": 1}), "zip.multidisk"),
    "42 entries on this disk": (lambda: forge(MANIFEST, *FILES, end={"disk_count": 2}), "zip.multidisk"),
    "42 entry on another disk": (lambda: instead(replace(JOB, central={"disk": 1})), "zip.multidisk"),
    "43 truncated in the end record": (lambda: VALID[:-1], "zip.truncated"),
    "43 truncated in the directory": (lambda: VALID[: DIRECTORY_OFFSET + 20], "zip.truncated"),
    "43 truncated in the content": (lambda: VALID[:60], "zip.truncated"),
    "43 truncated in a comment": (lambda: forge(MANIFEST, *FILES, comment=b"hello")[:-2], "zip.truncated"),
    "43 empty file": (lambda: b"", "zip.truncated"),
    "43 three bytes": (lambda: VALID[:3], "zip.truncated"),
    "43 something else": (lambda: b"\x1f\x8b" + bytes(200), "zip.not_a_zip"),
    "44 zeros 1000 to 1": (lambda: native(zeros(64 << 20)), "zip.ratio"),
    "44 bomb in a large package": (
        lambda: native(zeros(4 << 20), Part(name="files/noise", data=NOISE, method=0)),
        "zip.ratio",
    ),
    "44 many small bombs": (
        lambda: native(*(replace(zeros(1 << 20), name=f"files/zeros{n}") for n in range(4))),
        "zip.ratio",
    ),
    "45 declares 10 bytes, inflates to 64 MiB": (
        lambda: native(Part(name="files/x", data=b"0123456789", payload=zip_forge.deflate(bytes(64 << 20)))),
        "zip.size",
    ),
    "45 declares more than it inflates to": (
        lambda: native(Part(name="files/x", data=b"0123456789", payload=zip_forge.deflate(b"01234"))),
        "zip.size",
    ),
    "46 junk after the deflate end": (
        lambda: native(replace(JOB, payload=JOB.content + b"junk")),
        "zip.size",
    ),
    "47 65000 empty entries": (
        lambda: forge(MANIFEST, *(Part(name=f"files/{n}", method=0) for n in range(65000))),
        "zip.count",
    ),
    "48 empty archive": (forge, "zip.empty"),
    "49 second name": (
        lambda: instead(replace(JOB, central_extra=extra(0x7075, b"\1" + bytes(4) + b"files/other"))),
        "zip.extra",
    ),
    "49 second name, local": (
        lambda: instead(replace(JOB, local_extra=extra(0x7075, b"\1" + bytes(4) + b"files/other"))),
        "zip.extra",
    ),
    "50 unknown extra": (lambda: instead(replace(JOB, central_extra=extra(0x1234))), "zip.extra"),
    "50 unknown local extra": (lambda: instead(replace(JOB, local_extra=extra(0x000D))), "zip.extra"),
    "50 repeated extra": (
        lambda: instead(replace(JOB, local_extra=extra(0x5455) + extra(0x5455))),
        "zip.extra",
    ),
    "50 extra cut off": (lambda: instead(replace(JOB, central_extra=b"UT\x09\0\3")), "zip.extra"),
    "50 extra without a header": (lambda: instead(replace(JOB, local_extra=b"UT")), "zip.extra"),
    "51 stored, other compressed size": (
        lambda: forge(MANIFEST, JOB, replace(NOTE, both={"size": len(NOTE.data) + 1})),
        "zip.size",
    ),
    "52 corrupt deflate": (lambda: native(replace(JOB, payload=b"\xff" * 30)), "zip.deflate"),
    "52 deflate cut off": (lambda: native(replace(JOB, payload=JOB.content[:-9])), "zip.deflate"),
    "52 nothing to inflate": (lambda: native(replace(JOB, payload=b"")), "zip.deflate"),
    "53 comment on a record": (lambda: instead(replace(JOB, comment=b"hello")), "zip.comment"),
    "54 version needed": (lambda: instead(replace(JOB, both={"version": 51})), "zip.version"),
    "54 ZIP64's version without ZIP64": (lambda: instead(replace(JOB, both={"version": 45})), "zip.version"),
    "record is longer than the directory": (
        lambda: VALID[: VALID.rindex(b"PK\1\2") + 32] + b"\xff\xff" + VALID[VALID.rindex(b"PK\1\2") + 34 :],
        "zip.framing",
    ),
    "record points behind the directory": (
        lambda: forge(MANIFEST, JOB, replace(NOTE, central={"offset": 1 << 30})),
        "zip.gap",
    ),
    "record points at no header": (
        lambda: instead(replace(JOB, local={"version": 20}, local_extra=b"", before=b"")).replace(
            b"PK\3\4", b"PK\3\5"
        ),
        "zip.framing",
    ),
}


def test_package_without_a_fault_is_accepted() -> None:
    assert accept(VALID) == {"job.json": JOB.data, "rest/note.txt": NOTE.data}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_archive_is_refused_with_its_code(fault: str) -> None:
    make, code = HOSTILE[fault]
    error = refuse(make())
    assert error.error_code == code, error.message
    assert error.message.isprintable()


IN_CONTENT = {"30", "45", "46", "52"}
STRUCTURAL = [fault for fault in HOSTILE if fault.split()[0] not in IN_CONTENT]


@pytest.mark.parametrize("fault", STRUCTURAL)
def test_structure_is_refused_before_anything_is_inflated(fault: str) -> None:
    """The scan alone refuses it: no entry is read, so none can have been extracted."""
    make, code = HOSTILE[fault]
    with tempfile.TemporaryFile() as file:
        data = make()
        file.write(data)
        file.flush()
        with pytest.raises(PatchMalformedError) as caught:
            scan(file.fileno(), len(data))
        assert caught.value.error_code == code


def test_no_more_is_ever_handed_over_than_was_declared() -> None:
    data = native(Part(name="files/x", data=b"0123456789", payload=zip_forge.deflate(bytes(64 << 20))))
    with opened(data) as package, tempfile.TemporaryFile(buffering=0) as out:
        with pytest.raises(PatchMalformedError):
            package.extract(package.manifest.files[0], out.fileno())
        assert out.tell() <= 10


@pytest.mark.parametrize("part", FILES)
def test_content_that_is_cut_off_while_it_streams_is_noticed(part: Part) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(VALID)
        file.flush()
        entries = {entry.name: entry for entry in scan(file.fileno(), len(VALID))}
        entry = entries[part.raw_name.decode()]
        os.truncate(file.fileno(), entry.data_offset + 3)
        with pytest.raises(PatchMalformedError) as caught:
            list(archive.stream(file.fileno(), entry))
        assert caught.value.error_code == "zip.changed"


def test_file_that_became_shorter_than_it_was_is_noticed() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(VALID)
        file.flush()
        with pytest.raises(PatchMalformedError) as caught:
            scan(file.fileno(), len(VALID) + 10)
        assert caught.value.error_code == "zip.changed"


def test_error_names_file_and_entry() -> None:
    error = refuse(instead(replace(JOB, both={"crc": 1})))
    assert error.details["file"] == "patch.zip"
    assert error.details["entry"] == "files/job.json"
    assert "patch.zip" in error.message
    assert "files/job.json" in error.message


# --- limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(files=2), "zip.count"),
        (Limits(file_bytes=len(JOB.data) - 1), "zip.file_size"),
        (Limits(total_bytes=len(JOB.data)), "zip.total_size"),
        (Limits(package_bytes=len(VALID) - 1), "zip.package_size"),
    ],
)
def test_limits_are_enforced(limits: Limits, code: str) -> None:
    assert refuse(VALID, limits).error_code == code


def test_limits_admit_what_just_fits() -> None:
    size = len(MANIFEST.data) + len(JOB.data) + len(NOTE.data)
    accept(VALID, Limits(files=3, total_bytes=size, package_bytes=len(VALID)))


def test_path_depth_limit_counts_components_below_the_root() -> None:
    part = replace(JOB, name="files/a/b/c")
    accept(native(part), Limits(path_depth=3))
    assert refuse(native(part), Limits(path_depth=2)).error_code == "manifest.path"
    assert refuse(native(part), Limits(path_depth=1)).error_code == "zip.name_depth"


def test_small_file_may_compress_well() -> None:
    part = zeros(1 << 20)
    noise = Part(name="files/noise", data=NOISE[: 8 << 10], method=0)
    assert len(part.data) // len(part.content) > archive.DEFAULT_LIMITS.ratio
    assert accept(native(part, noise))["zeros"] == part.data


def test_stored_zeros_are_no_bomb() -> None:
    part = replace(zeros(3 << 20), method=0)
    assert accept(native(part))["zeros"] == part.data


# --- what writers really write ------------------------------------------------------------------------------


def write_tree(root: Path) -> None:
    """A valid package, unpacked, with folders worth an entry of their own."""
    (root / "files/rest").mkdir(parents=True)
    (root / "files/job.json").write_bytes(JOB.data * 50)
    (root / "files/rest/note.txt").write_bytes(NOTE.data)
    parts = (replace(JOB, data=JOB.data * 50), NOTE)
    (root / "manifest.json").write_bytes(manifest_part(*parts).data)


CONTENT = {"job.json": JOB.data * 50, "rest/note.txt": NOTE.data}


@pytest.mark.parametrize("options", [[], ["-X"], ["-9"], ["-1"], ["-0"], ["-D"]])
def test_info_zip_archives_are_accepted(tmp_path: Path, options: list[str]) -> None:
    write_tree(tmp_path)
    command = ["zip", "-q", "-r", *options, "out.zip", "manifest.json", "files"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert accept((tmp_path / "out.zip").read_bytes()) == CONTENT


def test_info_zip_streaming_into_a_pipe_is_accepted(tmp_path: Path) -> None:
    write_tree(tmp_path)
    command = ["zip", "-q", "-r", "-", "manifest.json", "files"]
    data = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE).stdout
    assert data[6] & 1 << 3, "zip did not use data descriptors; the test proves nothing"
    assert accept(data) == CONTENT


def test_setgid_folder_that_info_zip_records_is_accepted(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "files").chmod(0o2755)
    if not (tmp_path / "files").stat().st_mode & stat.S_ISGID:
        pytest.fail("this file system keeps no setgid bit")
    subprocess.run(["zip", "-q", "-r", "out.zip", "manifest.json", "files"], cwd=tmp_path, check=True)
    assert accept((tmp_path / "out.zip").read_bytes()) == CONTENT


class Pipe(io.RawIOBase):
    """Takes bytes and cannot seek."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
@pytest.mark.parametrize("streaming", [False, True])
def test_python_archives_are_accepted(tmp_path: Path, method: int, *, streaming: bool) -> None:
    write_tree(tmp_path)
    sink: Any = Pipe() if streaming else io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as writer:
        for name in ("manifest.json", "files", "files/job.json", "files/rest", "files/rest/note.txt"):
            writer.write(tmp_path / name, name)
    data = bytes(sink.data) if streaming else sink.getvalue()
    assert bool(data[6] & 1 << 3) is streaming
    assert accept(data) == CONTENT


def test_python_folder_written_as_a_deflated_string_is_accepted() -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("manifest.json", MANIFEST.data)
        writer.writestr("files/", b"")
        for part in FILES:
            writer.writestr(part.raw_name.decode(), part.data)
    assert set(accept(sink.getvalue())) == {"job.json", "rest/note.txt"}


def test_java_archive_is_accepted() -> None:
    content = b'{"price": 300, "price of": "price"}\n'
    assert accept(zip_forge.JAVA) == {"rés/job.json": content, "plain.txt": b"stored\n"}


def test_jar_archive_is_accepted() -> None:
    assert accept(zip_forge.JAR) == {"rest/job.json": b'{"price": 300, "price of": "price"}\n'}


def test_seven_zip_archive_is_accepted() -> None:
    assert accept(zip_forge.SEVEN_ZIP) == {
        "work/rest/res.txt": b"price price price price price price\n",
        "work/job.json": b'{"job": 2}\n',
    }


@pytest.mark.skipif(shutil.which("java") is None, reason="the embedded archives stand for it")
def test_jar_on_this_machine_is_accepted(tmp_path: Path) -> None:
    write_tree(tmp_path)
    subprocess.run(["jar", "-cfM", "out.zip", "manifest.json", "files"], cwd=tmp_path, check=True)
    assert accept((tmp_path / "out.zip").read_bytes()) == CONTENT


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_data_descriptors_are_accepted_when_they_tell_the_truth(*, signed: bool, known: bool) -> None:
    parts = [streamed(part, signed=signed, known=known) for part in (MANIFEST, *FILES)]
    assert set(accept(forge(*parts))) == {"job.json", "rest/note.txt"}


def test_descriptor_whose_crc_looks_like_its_signature_is_read_right() -> None:
    """A descriptor may leave its signature out, and a CRC-32 may be equal to that signature."""
    wanted = struct.unpack("<I", b"PK\7\x08")[0]
    data = b"looks like a signature" + forge_crc(b"looks like a signature", wanted)
    assert zlib.crc32(data) == wanted
    part = Part(name="files/x", data=data, method=0)
    for signed in (True, False):
        assert accept(native(streamed(part, signed=signed))) == {"x": data}


def forge_crc(data: bytes, wanted: int) -> bytes:
    """Four bytes that, appended to `data`, give it the CRC-32 `wanted`."""
    table = _crc_table()
    by_top = {value >> 24: index for index, value in enumerate(table)}
    register = wanted ^ 0xFFFFFFFF
    indices = []
    for _ in range(4):  # backwards, from the register that is wanted
        index = by_top[register >> 24]
        indices.append(index)
        register = ((register ^ table[index]) << 8 | index) & 0xFFFFFFFF
    register = zlib.crc32(data) ^ 0xFFFFFFFF
    suffix = bytearray()
    for index in reversed(indices):
        suffix.append((register ^ index) & 0xFF)
        register = table[index] ^ register >> 8
    return bytes(suffix)


def _crc_table() -> list[int]:
    table = []
    for index in range(256):
        value = index
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        table.append(value)
    return table


@pytest.mark.parametrize("kind", [0x5455, 0x7875, 0x7855, 0x5855, 0x000A, 0xCAFE])
def test_extras_with_times_and_owners_are_accepted(kind: int) -> None:
    part = replace(JOB, local_extra=extra(kind, bytes(9)), central_extra=extra(kind, bytes(5)))
    accept(native(part))


@pytest.mark.parametrize("bits", [1 << 1, 1 << 2, 1 << 1 | 1 << 2, 1 << 11])
def test_harmless_flags_are_accepted(bits: int) -> None:
    accept(native(replace(JOB, flags=bits)))


@pytest.mark.parametrize("made_by", [20, 3 << 8 | 30, 3 << 8 | 63, 10 << 8 | 20, 19 << 8 | 21])
def test_systems_that_mark_plain_files_are_accepted(made_by: int) -> None:
    accept(native(replace(JOB, made_by=made_by, attributes=0x20)))


def test_directory_may_list_entries_in_another_order() -> None:
    data = forge(replace(MANIFEST), *FILES)
    start, size = DIRECTORY_OFFSET, len(data) - 22 - DIRECTORY_OFFSET
    directory = data[start : start + size]
    first, second, third = (b"PK\1\2" + record for record in directory.split(b"PK\1\2")[1:])
    shuffled = data[:start] + first + third + second + data[start + size :]
    assert set(accept(shuffled)) == {"job.json", "rest/note.txt"}


# --- ZIP64, where it is demanded ----------------------------------------------------------------------------


def many_entries(content: bytes) -> bytes:
    """An archive that needs ZIP64 for the number of its entries, the first of which holds `content`."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as writer:
        writer.writestr(zipfile.ZipInfo("first"), content)
        for index in range(65_535):
            writer.writestr(zipfile.ZipInfo(f"f{index}"), b"")
    return sink.getvalue()


def test_zip64_locator_must_point_at_the_record_that_precedes_it() -> None:
    """CVE-2025-8291 at its best: what it points at is a perfect record, hidden in a file's content."""
    size = 56
    record = many_entries(bytes(size))[-98:-42]
    data = many_entries(record)
    assert data[-98:-42] == record
    hidden = data.index(record)
    assert hidden < 100
    pointing_there = data[:-34] + struct.pack("<Q", hidden) + data[-26:]
    without_signature = data[:-98] + b"PK\6\5" + data[-94:]
    limits = Limits(files=70_000)
    with tempfile.TemporaryFile() as file:
        for variant in (data, pointing_there, without_signature):
            file.seek(0)
            file.write(variant)
            file.flush()
            if variant is data:
                assert len(scan(file.fileno(), len(data), limits)) == 65_536
                continue
            with pytest.raises(PatchMalformedError) as caught:
                scan(file.fileno(), len(data), limits)
            assert caught.value.error_code == "zip.zip64"


HUGE = Limits(package_bytes=1 << 40, file_bytes=1 << 40, total_bytes=1 << 41)


@pytest.mark.parametrize("size", [(1 << 32) + 5, (1 << 31) + 5])
def test_zip64_entries_that_python_writes_are_accepted(size: int) -> None:
    """Sparse: the headers are real, nobody reads the gigabytes of zeros between them."""
    with tempfile.TemporaryFile() as file:
        info = zipfile.ZipInfo("huge")
        info.CRC, info.file_size, info.compress_size, info.header_offset = 0, size, size, 0
        with zipfile.ZipFile(file, "w") as writer:
            file.write(info.FileHeader())
            file.seek(size, os.SEEK_CUR)
            writer.filelist.append(info)
            writer.start_dir = file.tell()
            writer._didModify = True  # type: ignore[attr-defined]
        total = file.seek(0, os.SEEK_END)
        (entry_found,) = scan(file.fileno(), total, HUGE)
        assert entry_found.size == size
        # And what a size demands is refused where the two places contradict one another.
        extra_at = 30 + len("huge") + 4
        file.seek(extra_at)
        file.write(struct.pack("<Q", size + 1))
        file.flush()
        with pytest.raises(PatchMalformedError) as caught:
            scan(file.fileno(), total, HUGE)
        assert caught.value.error_code == "zip.header_mismatch"


# --- fuzzing ------------------------------------------------------------------------------------------------

SEEDS = (
    VALID,
    forge(*(streamed(part) for part in (MANIFEST, *FILES))),
    forge(MANIFEST, folder("files/"), folder("files/rest/"), *FILES),
    zip_forge.prototype(),
    zip_forge.JAVA,
    zip_forge.JAR,
    zip_forge.SEVEN_ZIP,
)
FUZZ_LIMITS = Limits(package_bytes=1 << 20, file_bytes=1 << 16, total_bytes=1 << 17)
INTERESTING = (0, 1, 2, 3, 4, 8, 10, 20, 45, 0x7F, 0x80, 0xFF)

Mutation = tuple[str, float, float, int]
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(("set", "bit", "header", "insert", "delete", "copy", "swap")),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.sampled_from(INTERESTING), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, mutations: list[Mutation]) -> bytes:
    value = bytearray(data)
    for kind, where, how, byte in mutations:
        if not value:
            return b""
        at = int(where * len(value))
        length = int(how * 40)
        if kind == "set":
            value[at] = byte
        elif kind == "bit":
            value[at] ^= 1 << byte % 8
        elif kind == "header":
            # Aim at the headers, where the structure is.
            starts = [i for i in range(len(value) - 4) if value[i : i + 2] == b"PK" and value[i + 2] < 8]
            if starts:
                at = min(starts[int(where * len(starts))] + length, len(value) - 1)
                value[at] = byte
        elif kind == "insert":
            value[at:at] = bytes([byte]) * max(1, length)
        elif kind == "delete":
            del value[at : at + max(1, length)]
        elif kind == "copy":
            value[at:at] = value[int(how * len(value)) :][: byte + 1]
        else:
            other = int(how * len(value))
            value[at], value[other] = value[other], value[at]
    return bytes(value)


@given(seed=st.sampled_from(SEEDS), mutations=MUTATIONS)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_package_is_refused_or_means_the_same_to_other_readers(
    seed: bytes, mutations: list[Mutation]
) -> None:
    data = mutate(seed, mutations)
    try:
        with opened(data, FUZZ_LIMITS) as package:
            contents = read_all(package)
            prototype = package.format == "prototype"
    except PatchMalformedError as error:
        assert error.error_code.split(".")[0] in {"zip", "manifest", "digest"}
        return
    with zipfile.ZipFile(io.BytesIO(data)) as reader:
        theirs = {info.filename: reader.read(info) for info in reader.infolist() if not info.is_dir()}
    if data != seed:
        assert unzip(data) == theirs
    if prototype:
        del theirs["patch/manifest.json"]
        assert sorted(contents.values()) == sorted(theirs.values())
    else:
        del theirs["manifest.json"]
        assert {f"files/{path}": content for path, content in contents.items()} == theirs


def unzip(data: bytes) -> dict[str, bytes]:
    """What Info-ZIP makes of it."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "patch.zip").write_bytes(data)
        command = ["unzip", "-q", "patch.zip", "-d", "out"]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        subprocess.run(command, cwd=name, env=environment, check=True, stdin=subprocess.DEVNULL)
        out = Path(name) / "out"
        for parent, folders, files in os.walk(out):
            for folder_name in folders:
                (Path(parent) / folder_name).chmod(0o700)
            for file_name in files:
                file = Path(parent) / file_name
                file.chmod(0o600)  # a mutant may have taken every permission away
                found[str(file.relative_to(out))] = file.read_bytes()
    return found


@given(data=st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    assert refuse(data).error_code.startswith("zip.")


@given(seed=st.sampled_from(SEEDS), cut=st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_package_that_is_still_on_its_way_is_called_truncated(seed: bytes, cut: float) -> None:
    """The inbox waits for such a file instead of rejecting it."""
    assert refuse(seed[: int(cut * len(seed))]).error_code == "zip.truncated"
