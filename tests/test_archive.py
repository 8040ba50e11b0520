"""The structure of a zip file: what is refused, with which code, and what still passes."""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zip_forge
from hostile_packages import NOISE, zeros
from zip_forge import FILES, JOB, NOTE, Part, extra, forge, manifest_part, native, streamed

from asyncsup.config import PatchLimits as Limits
from asyncsup.errors import PatchMalformedError
from asyncsup.patch import archive
from asyncsup.patch.archive import scan
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


VALID = native(*FILES)
DIRECTORY_OFFSET = struct.unpack("<I", VALID[-6:-2])[0]


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
    error = refuse(native(replace(JOB, both={"crc": 1})))
    assert error.details["file"] == "patch.zip"
    assert error.details["entry"] == "files/job.json"
    assert "patch.zip" in error.message
    assert "files/job.json" in error.message


# --- limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "value", "code"),
    [
        ("files", 2, "zip.count"),
        ("file_size", len(JOB.data) - 1, "zip.file_size"),
        ("total_size", len(JOB.data), "zip.total_size"),
        ("package_size", len(VALID) - 1, "zip.package_size"),
        ("manifest_size", 100, "manifest.size"),
    ],
)
def test_limits_are_enforced_and_say_which_setting_they_are(limit: str, value: int, code: str) -> None:
    error = refuse(VALID, Limits(**{limit: value}))
    assert error.error_code == code
    assert f"the limit is {value} (`{limit}` in [patch.limits])" in error.message


def test_the_ratio_can_be_set() -> None:
    data = native(zeros(2 << 20), Part(name="files/noise", data=NOISE[: 64 << 10], method=0))
    error = refuse(data)
    assert error.error_code == "zip.ratio"
    assert "the limit is 200 (`ratio` in [patch.limits])" in error.message
    assert accept(data, Limits(ratio=2000))["zeros"] == bytes(2 << 20)


def test_limits_admit_what_just_fits() -> None:
    size = len(MANIFEST.data) + len(JOB.data) + len(NOTE.data)
    accept(VALID, Limits(files=3, total_size=size, package_size=len(VALID)))


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


def test_setgid_folder_that_info_zip_records_is_accepted(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "files").chmod(0o2755)
    if not (tmp_path / "files").stat().st_mode & stat.S_ISGID:
        pytest.fail("this file system keeps no setgid bit")
    subprocess.run(["zip", "-q", "-r", "out.zip", "manifest.json", "files"], cwd=tmp_path, check=True)
    assert accept((tmp_path / "out.zip").read_bytes()) == CONTENT


def test_python_folder_written_as_a_deflated_string_is_accepted() -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("manifest.json", MANIFEST.data)
        writer.writestr("files/", b"")
        for part in FILES:
            writer.writestr(part.raw_name.decode(), part.data)
    assert set(accept(sink.getvalue())) == {"job.json", "rest/note.txt"}


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


HUGE = Limits(package_size=1 << 40, file_size=1 << 40, total_size=1 << 41)


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
