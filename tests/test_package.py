"""Packages: digests, that archive and manifest name the same files, and taking content out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zip_forge
from msgspec import structs
from zip_forge import FILES, JOB, NOTE, Part, folder, forge, manifest_part, native

from asyncsup.config import PatchLimits as Limits
from asyncsup.errors import PatchMalformedError, PatchNotFoundError, UsageError
from asyncsup.patch.archive import CHUNK
from asyncsup.patch.manifest import FileChange, Kind, Op
from asyncsup.patch.package import Package, open_package
from asyncsup.patch.prototype import with_root_name

VALID = native(*FILES)
PROTOTYPE = zip_forge.prototype()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "patch.zip"


def refuse(path: Path, data: bytes | None = None, **keys: Any) -> PatchMalformedError:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(PatchMalformedError) as caught, open_package(path, **keys) as package:
        package.verify()
    assert caught.value.exit_status == 21
    assert caught.value.message.startswith(f"{path.name}: ")
    return caught.value


def extract(package: Package, change: FileChange, destination: Path) -> bytes:
    with destination.open("xb", buffering=0) as file:
        package.extract(change, file.fileno())
    return destination.read_bytes()


# --- a native package ---------------------------------------------------------------------------------------


def test_native_package_is_described(path: Path) -> None:
    data = forge(
        manifest_part(*FILES),
        Part(name="signatures/alice.sig", data=b"one"),
        Part(name="signatures/bob@host.sig", data=b"two", method=0),
        *FILES,
    )
    path.write_bytes(data)
    with open_package(path) as package:
        assert package.path == path
        assert package.id == hashlib.sha256(data).hexdigest()
        assert package.size == len(data)
        assert package.format == "asyncsup.patch/1"
        assert package.manifest.name == "pricing-rules"
        assert package.manifest_bytes == manifest_part(*FILES).data
        assert package.signatures == {"alice": b"one", "bob@host": b"two"}


def test_content_is_extracted_with_progress(path: Path, tmp_path: Path) -> None:
    path.write_bytes(VALID)
    with open_package(path) as package:
        job, note = package.manifest.files
        done: list[int] = []
        with (tmp_path / "out").open("xb", buffering=0) as file:
            file.write(b"in front: ")
            package.extract(job, file.fileno(), done.append)
        assert (tmp_path / "out").read_bytes() == b"in front: " + JOB.data
        assert sum(done) == len(JOB.data)
        assert extract(package, note, tmp_path / "note") == NOTE.data


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_content_of_any_size_is_extracted(path: Path, tmp_path: Path, method: int, size: int) -> None:
    data = (b"some text %d, " * (size // 10 + 1) % tuple(range(size // 10 + 1)))[:size]
    path.write_bytes(native(Part(name="files/x", data=data, method=method)))
    with open_package(path) as package:
        assert extract(package, package.manifest.files[0], tmp_path / "x") == data


def test_incompressible_content_is_extracted(path: Path, tmp_path: Path) -> None:
    data = os.urandom(2 * CHUNK + 5)
    path.write_bytes(native(Part(name="files/x", data=data)))
    with open_package(path) as package:
        assert extract(package, package.manifest.files[0], tmp_path / "x") == data


def test_files_are_extracted_by_several_threads_at_once(path: Path, tmp_path: Path) -> None:
    parts = [Part(name=f"files/f{n}", data=os.urandom(1000) * 3000, method=8 * (n % 2)) for n in range(8)]
    path.write_bytes(native(*parts))
    gate = threading.Barrier(4)

    def work(change: FileChange) -> bytes:
        gate.wait(30)
        return extract(package, change, tmp_path / change.path)

    with open_package(path) as package, ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(work, package.manifest.files))
    assert contents == [part.data for part in parts]


def test_change_that_is_not_in_the_package_is_a_programming_error(path: Path) -> None:
    path.write_bytes(VALID)
    with open_package(path) as package:
        job = package.manifest.files[0]
        for change in (
            structs.replace(job, path="other"),
            structs.replace(job, size=1),
            FileChange(path="job.json", op=Op.DELETED),
        ):
            with pytest.raises(ValueError, match="no new or modified file"):
                package.extract(change, -1)


def test_failing_disk_is_an_error_of_the_disk(path: Path) -> None:
    path.write_bytes(VALID)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with open_package(path) as package, pytest.raises(OSError, match="No space left"):
            package.extract(package.manifest.files[0], full)
    finally:
        os.close(full)


def test_package_is_closed_once_and_for_all(path: Path) -> None:
    path.write_bytes(VALID)
    package = open_package(path)
    package.close()
    package.close()
    with pytest.raises(ValueError, match="closed"):
        package.verify()


def test_refused_package_leaves_no_descriptor_open(path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for data in (b"", VALID + b"x", native(JOB)[:-1], native(replace(JOB, both={"crc": 1}))):
        refuse(path, data)
    refuse(path, VALID, sha256="0" * 64)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- digests ------------------------------------------------------------------------------------------------


def test_digests_that_match_are_accepted(path: Path) -> None:
    path.write_bytes(VALID)
    digest = hashlib.sha256(VALID).hexdigest()
    open_package(path, sha256=digest, crc32=zlib.crc32(VALID)).close()
    open_package(path, sha256=digest.upper()).close()


def test_other_sha256_is_refused_before_anything_is_read(path: Path) -> None:
    error = refuse(path, b"not even a zip", sha256="0" * 64)
    assert error.error_code == "digest.sha256"
    assert hashlib.sha256(b"not even a zip").hexdigest() in error.message


def test_other_crc32_is_refused(path: Path) -> None:
    """L1"""
    error = refuse(path, PROTOTYPE, crc32=851398428)
    assert error.error_code == "digest.crc32"
    assert str(zlib.crc32(PROTOTYPE)) in error.message
    assert "851398428" in error.message


@pytest.mark.parametrize("data", [VALID, PROTOTYPE], ids=["native", "prototype"])
def test_one_byte_flipped_anywhere_is_noticed_by_either_digest(path: Path, data: bytes) -> None:
    for at in range(0, len(data), 7):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert refuse(path, flipped, crc32=zlib.crc32(data)).error_code == "digest.crc32"
        assert refuse(path, flipped, sha256=hashlib.sha256(data).hexdigest()).error_code == "digest.sha256"


@pytest.mark.parametrize("keys", [{"sha256": "abc"}, {"sha256": "g" * 64}, {"crc32": -1}, {"crc32": 1 << 32}])
def test_impossible_digest_is_a_usage_error(path: Path, keys: dict[str, Any]) -> None:
    path.write_bytes(VALID)
    with pytest.raises(UsageError):
        open_package(path, **keys)


# --- manifest and archive -----------------------------------------------------------------------------------


def digest_of(part: Part, **keys: Any) -> dict[str, Any]:
    return zip_forge.change(part, **keys)


MISFITS: dict[str, tuple[bytes, str]] = {
    # M1
    "file listed but absent": (forge(manifest_part(*FILES), JOB), "manifest.missing_file"),
    "file present but not listed": (forge(manifest_part(JOB), *FILES), "manifest.extra_file"),
    "folder where a file is listed": (
        forge(manifest_part(*FILES), folder("files/job.json/"), NOTE),
        "manifest.missing_file",
    ),
    "content of a deleted file": (
        forge(manifest_part(files=[{"path": "job.json", "op": "deleted"}]), JOB),
        "manifest.extra_file",
    ),
    "entry beside the layout": (
        forge(manifest_part(*FILES), *FILES, Part(name="README")),
        "manifest.extra_file",
    ),
    "folder beside the layout": (
        forge(manifest_part(*FILES), *FILES, folder("META-INF/")),
        "manifest.extra_file",
    ),
    "signature by another name": (
        forge(manifest_part(*FILES), *FILES, Part(name="signatures/alice.asc")),
        "manifest.extra_file",
    ),
    "signature deeper": (
        forge(manifest_part(*FILES), *FILES, Part(name="signatures/a/b.sig")),
        "manifest.extra_file",
    ),
    # M2
    "other content": (
        forge(manifest_part(*FILES), replace(JOB, data=JOB.data.replace(b"300", b"301")), NOTE),
        "digest.sha256",
    ),
    "other size": (
        forge(manifest_part(*FILES), replace(JOB, data=JOB.data + b" "), NOTE),
        "manifest.file_size",
    ),
    "manifest not first": (forge(JOB, manifest_part(*FILES), NOTE), "manifest.not_first"),
    "manifest missing": (forge(*FILES), "manifest.missing"),
    "manifest is a folder": (forge(folder("manifest.json/"), *FILES), "manifest.missing"),
    "manifest damaged": (
        forge(replace(manifest_part(*FILES), both={"crc": 1}), *FILES),
        "zip.crc",
    ),
    "manifest that is none": (forge(Part(name="manifest.json", data=b"{}"), *FILES), "manifest.format"),
    "both layouts": (
        forge(manifest_part(*FILES), *FILES, Part(name="patch/manifest.json")),
        "manifest.extra_file",
    ),
    "same digest claimed for other content": (
        forge(
            manifest_part(files=[digest_of(JOB), digest_of(JOB, path="twin")]),
            JOB,
            replace(JOB, name="files/twin", data=JOB.data.replace(b"300", b"301")),
        ),
        "digest.sha256",
    ),
    "same digest claimed for another size": (
        forge(
            manifest_part(files=[digest_of(JOB), digest_of(JOB, path="twin", size=1)]),
            JOB,
            Part(name="files/twin", data=b"x"),
        ),
        "digest.sha256",
    ),
}


@pytest.mark.parametrize("fault", MISFITS)
def test_archive_that_does_not_fit_its_manifest_is_refused(path: Path, fault: str) -> None:
    data, code = MISFITS[fault]
    error = refuse(path, data)
    assert error.error_code == code, error.message


def test_manifest_first_in_the_directory_only_is_refused(path: Path) -> None:
    """A streaming reader would meet the other entry first."""
    data = forge(NOTE, manifest_part(NOTE))
    start = data.index(b"PK\1\2")
    records = [b"PK\1\2" + record for record in data[start:-22].split(b"PK\1\2")[1:]]
    swapped = data[:start] + records[1] + records[0] + data[-22:]
    assert refuse(path, swapped).error_code == "manifest.not_first"


def test_every_file_that_does_not_fit_is_reported(path: Path) -> None:
    error = refuse(path, forge(manifest_part(*FILES), Part(name="files/other"), Part(name="README")))
    assert [problem["code"] for problem in error.details["problems"]] == [
        "manifest.missing_file",
        "manifest.missing_file",
        "manifest.extra_file",
        "manifest.extra_file",
    ]


def test_folder_entries_are_accepted(path: Path) -> None:
    folders = [folder(name) for name in ("files/", "files/rest/", "files/empty/", "signatures/")]
    path.write_bytes(forge(manifest_part(*FILES), *folders, *FILES))
    with open_package(path) as package:
        package.verify()
        assert package.signatures == {}


def test_patch_that_only_deletes_needs_no_content(path: Path) -> None:
    path.write_bytes(forge(manifest_part(files=[{"path": "job.json", "op": "deleted"}])))
    with open_package(path) as package:
        package.verify()


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(manifest_size=100), "manifest.size"),
        (Limits(signature_size=2), "manifest.size"),
        (Limits(signatures=1), "zip.count"),
    ],
)
def test_manifest_and_signatures_are_limited(path: Path, limits: Limits, code: str) -> None:
    signatures = [Part(name=f"signatures/{n}.sig", data=b"one") for n in range(2)]
    data = forge(manifest_part(*FILES), *signatures, *FILES)
    path.write_bytes(data)
    open_package(path).close()
    assert refuse(path, limits=limits).error_code == code


def test_signatures_are_counted_before_any_of_them_is_read(path: Path) -> None:
    damaged = [Part(name=f"signatures/{n}.sig", data=b"one", both={"crc": 1}) for n in range(3)]
    data = forge(manifest_part(*FILES), *damaged, *FILES)
    assert refuse(path, data, limits=Limits(signatures=2)).error_code == "zip.count"
    assert refuse(path, data, limits=Limits(signatures=3)).error_code == "zip.crc"


def test_no_signature_is_read_of_a_package_that_is_refused_anyway(path: Path) -> None:
    damaged = Part(name="signatures/alice.sig", data=b"one", both={"crc": 1})
    assert refuse(path, forge(manifest_part(*FILES), damaged)).error_code == "manifest.missing_file"


def test_files_that_are_only_deleted_count_as_well(path: Path) -> None:
    files = [{"path": f"{number}.txt", "op": "deleted"} for number in range(3)]
    path.write_bytes(forge(manifest_part(files=files)))
    open_package(path, limits=Limits(files=3)).close()
    error = refuse(path, limits=Limits(files=2))
    assert error.error_code == "zip.count"
    assert "3 files, the limit is 2 (`files` in [patch.limits])" in error.message


def test_a_delta_itself_is_no_larger_than_what_it_may_be_made_of(path: Path) -> None:
    base, delta = "0" * 64, Part(name="deltas/job.json", data=b"d" * 10)
    change = {
        **zip_forge.change(JOB, base_sha256=base, op="modified"),
        "size": 4,
        "delta": {
            "format": "zstd-patch",
            "base_sha256": base,
            "sha256": hashlib.sha256(delta.data).hexdigest(),
            "size": 10,
        },
    }
    path.write_bytes(forge(manifest_part(files=[change]), delta))
    open_package(path, limits=Limits(delta_size=10)).close()
    error = refuse(path, limits=Limits(delta_size=9))
    assert error.error_code == "delta.size"
    assert "`delta_size` in [patch.limits]" in error.message


def test_depth_of_a_deleted_path_is_limited_too(path: Path) -> None:
    data = forge(manifest_part(files=[{"path": "a/b/c", "op": "deleted"}]))
    path.write_bytes(data)
    open_package(path, limits=Limits(path_depth=3)).close()
    assert refuse(path, limits=Limits(path_depth=2)).error_code == "manifest.path"


# --- the file itself ----------------------------------------------------------------------------------------


def test_missing_file_is_not_found(path: Path) -> None:
    with pytest.raises(PatchNotFoundError):
        open_package(path)


def test_fifo_does_not_hold_anyone_up(path: Path) -> None:
    os.mkfifo(path)
    assert refuse(path).error_code == "zip.unreadable"


def test_folder_is_refused(path: Path) -> None:
    path.mkdir()
    assert refuse(path).error_code == "zip.unreadable"


def test_loop_of_links_is_refused(path: Path) -> None:
    path.symlink_to(path)
    assert refuse(path).error_code == "zip.unreadable"


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    ("touch", "otherwise"), [(append, "zip.truncated"), (os.utime, None)], ids=["half", "whole"]
)
def test_file_that_is_still_being_written_is_called_changed(
    path: Path, touch: Callable[[Path], None], otherwise: str | None
) -> None:
    """Whatever was seen of it, valid or not: what is wrong with it is that it is not complete."""
    # Long enough to hash that a write comes in between.
    part = Part(name="files/x", data=bytes(32 << 20), method=0)
    path.write_bytes(native(part)[: None if otherwise is None else 32 << 20])
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.is_set():
            touch(path)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        deadline = time.monotonic() + 30
        code = None
        while code != "zip.changed":
            assert time.monotonic() < deadline, "no read met a write"
            try:
                open_package(path).close()
                code = None
            except PatchMalformedError as error:
                code = error.error_code
            assert code in {"zip.changed", otherwise}
    finally:
        stop.set()
        writer.join()


def test_content_that_changes_after_opening_is_noticed(path: Path, tmp_path: Path) -> None:
    path.write_bytes(VALID)
    with open_package(path) as package:
        at = VALID.index(NOTE.data)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"S")
        with pytest.raises(PatchMalformedError) as caught:
            extract(package, package.manifest.files[1], tmp_path / "out")
        assert caught.value.error_code == "zip.crc"
        assert caught.value.message.startswith("patch.zip: ")


def test_file_that_becomes_shorter_after_opening_is_noticed(path: Path, tmp_path: Path) -> None:
    path.write_bytes(VALID)
    with open_package(path) as package:
        os.truncate(path, VALID.index(NOTE.data) + 3)
        with pytest.raises(PatchMalformedError) as caught:
            extract(package, package.manifest.files[1], tmp_path / "out")
        assert caught.value.error_code == "zip.changed"


# --- the prototype's packages -------------------------------------------------------------------------------


def test_prototype_package_becomes_a_complete_manifest(path: Path, tmp_path: Path) -> None:
    path.write_bytes(PROTOTYPE)
    with open_package(path, crc32=zlib.crc32(PROTOTYPE)) as package:
        assert package.format == "prototype"
        assert package.signatures == {}
        manifest = package.manifest
        assert (manifest.name, manifest.version, manifest.build) == ("patch", "300", 300)
        assert (manifest.kind, manifest.targets, manifest.regions) == (Kind.WARM, (), ("us-east-1",))
        deleted, modified, new = manifest.files
        assert deleted == FileChange(path="work/libs/lib.txt", op=Op.DELETED, missing_ok=True)
        assert modified.sha256 == hashlib.sha256(b'{"job": 2}').hexdigest()
        assert modified.size == 10
        assert extract(package, modified, tmp_path / "a") == b'{"job": 2}'
        assert extract(package, new, tmp_path / "b") == b'{"res": "res res res res res"}'


def test_prototype_content_is_found_when_the_root_is_known(path: Path, tmp_path: Path) -> None:
    path.write_bytes(PROTOTYPE)
    with open_package(path) as package:
        modified = with_root_name(package.manifest, "work").files[1]
        assert modified.path == "job.json"
        assert extract(package, modified, tmp_path / "a") == b'{"job": 2}'


def test_prototype_source_that_serves_two_destinations_is_extracted_twice(path: Path, tmp_path: Path) -> None:
    items = [{"name": "job.json", "path": "/work/a/"}, {"name": "job.json", "path": "/work/b/"}]
    path.write_bytes(zip_forge.prototype(zip_forge.prototype_manifest(modfiles=items)))
    with open_package(path) as package:
        for index, change in enumerate(package.manifest.files[1:3]):
            assert extract(package, change, tmp_path / str(index)) == b'{"job": 2}'


PROTOTYPE_MISFITS: dict[str, tuple[bytes, str]] = {
    # L4
    "new source missing": (zip_forge.prototype(without="patch/new/res.json"), "manifest.missing_file"),
    "mod source missing": (zip_forge.prototype(without="patch/mod/job.json"), "manifest.missing_file"),
    "source not listed": (
        zip_forge.prototype(also=(Part(name="patch/new/more.json"),)),
        "manifest.extra_file",
    ),
    "source in the wrong folder": (
        zip_forge.prototype(
            zip_forge.prototype_manifest(newfiles=[{"name": "job.json", "path": "/work/"}], modfiles=None)
        ),
        "manifest.missing_file",
    ),
    "file beside the layout": (zip_forge.prototype(also=(Part(name="readme.txt"),)), "manifest.extra_file"),
    "folder in a folder": (zip_forge.prototype(also=(folder("patch/new/deep/"),)), "manifest.extra_file"),
    "file in del that is not deleted": (
        zip_forge.prototype(also=(Part(name="patch/del/other.txt"),)),
        "manifest.extra_file",
    ),
    "source damaged": (
        zip_forge.prototype(
            without="patch/new/res.json",
            also=(Part(name="patch/new/res.json", data=b"res", both={"crc": 1}),),
        ),
        "zip.crc",
    ),
    "manifest that is none": (zip_forge.prototype(b"[]"), "manifest.schema"),
}


@pytest.mark.parametrize("fault", PROTOTYPE_MISFITS)
def test_prototype_archive_that_does_not_fit_its_manifest_is_refused(path: Path, fault: str) -> None:
    data, code = PROTOTYPE_MISFITS[fault]
    error = refuse(path, data)
    assert error.error_code == code, error.message


def test_prototype_copy_of_a_deleted_file_is_ignored(path: Path) -> None:
    """The prototype had a folder for them and never read it."""
    path.write_bytes(zip_forge.prototype(also=(Part(name="patch/del/lib.txt", data=b"old"),)))
    with open_package(path) as package:
        assert package.manifest.files[0].op is Op.DELETED


def test_prototype_package_without_folder_entries_is_accepted(path: Path) -> None:
    parts = [
        Part(name="patch/new/res.json", data=b"res"),
        Part(name="patch/mod/job.json", data=b"job"),
        Part(name="patch/manifest.json", data=zip_forge.prototype_manifest()),
    ]
    path.write_bytes(forge(*parts))
    open_package(path).close()


def test_files_of_a_prototype_are_counted(path: Path) -> None:
    listed = [{"name": f"{number}.txt", "path": "/"} for number in range(4)]
    manifest = {"region": "eu", "build": "1", "delfiles": listed}
    data = forge(Part(name="patch/manifest.json", data=json.dumps(manifest).encode()))
    assert refuse(path, data, limits=Limits(files=3)).error_code == "zip.count"


def test_depth_of_a_prototype_destination_is_limited(path: Path) -> None:
    path.write_bytes(PROTOTYPE)
    open_package(path, limits=Limits(path_depth=3)).close()
    assert refuse(path, limits=Limits(path_depth=2)).error_code == "manifest.path"


# --- speed and memory ---------------------------------------------------------------------------------------


@pytest.fixture
def many(path: Path) -> Iterator[Path]:
    parts = [Part(name=f"files/d{n % 100}/f{n}.txt", data=b"%d" % n, method=0) for n in range(10_000)]
    path.write_bytes(native(*parts))
    yield path


def test_package_of_ten_thousand_files_opens_quickly(many: Path) -> None:
    """0.2 s on an idle machine; the bound is what would be noticed, CPU time because machines are shared."""
    before = time.process_time()
    with open_package(many) as package:
        assert len(package.manifest.files) == 10_000
    assert time.process_time() - before < 2.0


def peak_kib() -> int:
    """The most memory this process has had since `reset_peak`, in KiB."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak)


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()


def test_large_file_is_not_held_in_memory(path: Path, tmp_path: Path) -> None:
    size = 192 << 20
    zeros = hashlib.sha256()
    crc = 0
    for _ in range(size >> 20):
        zeros.update(bytes(1 << 20))
        crc = zlib.crc32(bytes(1 << 20), crc)
    change = {"path": "x", "op": "new", "sha256": zeros.hexdigest(), "size": size}
    part = Part(name="files/x", method=0, both={"crc": crc, "compressed": size, "size": size})
    whole = forge(manifest_part(files=[change]), part)
    directory = whole.index(b"PK\1\2")
    with path.open("wb") as file:  # sparse: the zeros are a hole
        file.write(whole[:directory])
        file.seek(size, os.SEEK_CUR)
        end = len(whole) - 22
        file.write(whole[directory:end])
        file.write(whole[end : end + 16] + (directory + size).to_bytes(4, "little") + b"\0\0")
    before = reset_peak()
    with open_package(path) as package, (tmp_path / "out").open("wb", buffering=0) as out:
        package.extract(package.manifest.files[0], out.fileno())
        assert out.tell() == size
    assert peak_kib() - before < 16 << 10


def test_manifest_bytes_are_exactly_those_of_the_archive(path: Path) -> None:
    """They are what signatures are made over: nothing may be normalised."""
    raw = json.dumps(zip_forge.manifest(*FILES), indent=7).encode() + b"\n\n"
    path.write_bytes(forge(Part(name="manifest.json", data=raw), *FILES))
    with open_package(path) as package:
        assert package.manifest_bytes == raw


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    root = Path(__file__).parent.parent
    names = ["archive", "package", "manifest", "prototype", "gates", "build"]
    names += ["look", "plan", "overlay", "overlay_files", "target_files", "tree", "tree_files"]
    source = "".join((root / f"asyncsup/patch/{name}.py").read_text() for name in names)
    code = r"(?:zip|manifest|digest|gate|build|usage)\.[a-z0-9_]+"
    used = set(re.findall(rf'"({code})"', source)) - {"manifest.json"}
    rules = set(re.findall(r'rule="(\w+)"', (root / "asyncsup/patch/paths.py").read_text()))
    # Entry names may lie in asyncsup's own folder: what the manifest may list decides.
    used |= {f"zip.name_{rule}" for rule in rules - {"private"}} | {"manifest.json"}
    used |= {
        f"{family}.{kind}" for family in ("zip", "manifest") for kind in ("duplicate", "prefix_conflict")
    }
    documented = set(re.findall(rf"`({code})`", (root / "docs/patch-format.md").read_text()))
    assert documented == used
