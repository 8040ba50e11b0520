"""Making packages: what goes in, same input same bytes, and that failures leave nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import zipfile
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncsup.config import PatchLimits as Limits
from asyncsup.errors import PatchBuildError
from asyncsup.patch import build
from asyncsup.patch.archive import scan
from asyncsup.patch.build import build_patch, build_prototype_patch
from asyncsup.patch.manifest import FileChange, Kind, Manifest, Op, Requires
from asyncsup.patch.package import open_package
from asyncsup.patch.prototype import with_root_name

Tree = dict[str, bytes]

OLD: Tree = {
    "job.json": b'{"job": 1}',
    "libs/lib.txt": b"gone tomorrow",
    "same.txt": b"unchanged",
    "apiv2/def.py": b"print(1)\n" * 100,
}
NEW: Tree = {
    "job.json": b'{"job": 2}',
    "rest/res.json": b'{"new": true}',
    "same.txt": b"unchanged",
    "apiv2/def.py": b"print(2)\n" * 100,
}


def write(root: Path, tree: Tree) -> Path:
    root.mkdir(parents=True)
    for path, content in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
        (root / path).chmod(0o644)
    return root


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def no_time_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(build.ENV_CREATED, raising=False)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write(tmp_path / "old", OLD)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return write(tmp_path / "new", NEW)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "patch.zip"


def make(*, old: Path | None, new: Path, output: Path, **keys: Any) -> Manifest:
    return build_patch(
        **{
            "old": old,
            "new": new,
            "output": output,
            "name": "pricing-rules",
            "version": "2.3.0",
            "build": 300,
            "kind": Kind.WARM,
            "targets": ["pricer"],
            "regions": ["us-east-1"],
            **keys,
        }
    )


def refuse(code: str, *, output: Path, **keys: Any) -> PatchBuildError:
    with pytest.raises(PatchBuildError) as caught:
        make(output=output, **keys)
    assert caught.value.error_code == code
    assert list(output.parent.iterdir()) == []
    return caught.value


def contents(path: Path) -> Tree:
    """What the package puts in place, by path; also proves that it opens and is what it says."""
    found = {}
    with open_package(path, limits=Limits(package_size=1 << 40)) as package:
        package.verify()
        for change in package.manifest.files:
            if change.op is not Op.DELETED:
                with tempfile.TemporaryFile(buffering=0) as file:
                    package.extract(change, file.fileno())
                    file.seek(0)
                    found[change.path] = file.read()
    return found


# --- what goes in -------------------------------------------------------------------------------------------


def test_difference_of_two_folders_becomes_a_package(old: Path, new: Path, output: Path) -> None:
    manifest = make(
        old=old,
        new=new,
        output=output,
        created=datetime(2026, 11, 22, 10, tzinfo=UTC),
        expires=datetime(2027, 2, 22, tzinfo=UTC),
        requires=Requires(build_min=290, build_max=299),
        build_floor=250,
        downgrade=True,
        probation=10,
        notes="why",
    )
    assert manifest.files == (
        FileChange(
            path="apiv2/def.py",
            op=Op.MODIFIED,
            sha256=sha(NEW["apiv2/def.py"]),
            size=900,
            base_sha256=sha(OLD["apiv2/def.py"]),
        ),
        FileChange(
            path="job.json",
            op=Op.MODIFIED,
            sha256=sha(NEW["job.json"]),
            size=10,
            base_sha256=sha(OLD["job.json"]),
        ),
        FileChange(path="libs/lib.txt", op=Op.DELETED, base_sha256=sha(OLD["libs/lib.txt"])),
        FileChange(path="rest/res.json", op=Op.NEW, sha256=sha(NEW["rest/res.json"]), size=13),
    )
    with open_package(output) as package:
        assert package.manifest == manifest
        assert package.manifest.probation == 10.0
        assert package.manifest.requires == Requires(build_min=290, build_max=299)
    assert contents(output) == {path: NEW[path] for path in ("job.json", "rest/res.json", "apiv2/def.py")}


def test_without_an_old_folder_everything_is_new(new: Path, output: Path) -> None:
    manifest = make(old=None, new=new, output=output)
    assert {change.op for change in manifest.files} == {Op.NEW}
    assert contents(output) == NEW


def test_permissions_are_content(old: Path, new: Path, output: Path) -> None:
    (new / "same.txt").chmod(0o755)
    (new / "rest/res.json").chmod(0o600)
    (old / "job.json").chmod(0o600)
    (new / "job.json").chmod(0o600)
    modes = {change.path: change.mode for change in make(old=old, new=new, output=output).files}
    assert modes == {
        "same.txt": 0o755,
        "rest/res.json": 0o600,
        "job.json": None,  # as it was
        "apiv2/def.py": None,
        "libs/lib.txt": None,
    }


def test_progress_counts_every_byte_that_is_read(old: Path, new: Path, output: Path) -> None:
    done: list[int] = []
    make(old=old, new=new, output=output, progress=done.append)
    packed = sum(len(NEW[path]) for path in ("job.json", "rest/res.json", "apiv2/def.py"))
    assert sum(done) == sum(map(len, OLD.values())) + sum(map(len, NEW.values())) + packed


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"exclude": ("rest/*", "lib.txt", "*.py")}, {"job.json"}),
        ({"include": ("*.json",)}, {"job.json", "rest/res.json"}),
        ({"include": ("*.json",), "exclude": ("rest",)}, {"job.json"}),
        ({"include": ("rest/*",)}, {"rest/res.json"}),
        ({"include": ("libs/*",)}, {"libs/lib.txt"}),
        ({"include": ("[jx]ob.????",)}, {"job.json"}),
    ],
)
def test_patterns_choose_what_is_compared(
    old: Path, new: Path, output: Path, patterns: dict[str, tuple[str, ...]], expected: set[str]
) -> None:
    manifest = make(old=old, new=new, output=output, **patterns)
    assert {change.path for change in manifest.files} == expected


def test_own_files_and_excluded_links_are_left_out(new: Path, output: Path) -> None:
    write(new / ".asyncsup", {"state.db": b"x"})
    (new / "link").symlink_to("job.json")
    make(old=None, new=new, output=output, exclude=["link"])
    assert contents(output) == NEW


def test_names_in_any_script_are_packed_and_marked_as_utf8(tmp_path: Path, output: Path) -> None:
    tree = {"rés/Ünïcode 日本.txt": b"x", "plain": b"y"}
    make(old=None, new=write(tmp_path / "n", tree), output=output)
    assert contents(output) == tree
    with zipfile.ZipFile(output) as reader:
        assert set(reader.namelist()) == {"manifest.json", *(f"files/{path}" for path in tree)}


@pytest.mark.parametrize(
    ("content", "method"),
    [
        (b"", zipfile.ZIP_STORED),
        (b"x", zipfile.ZIP_STORED),
        (os.urandom(100_000), zipfile.ZIP_STORED),
        (b"text " * 100, zipfile.ZIP_DEFLATED),
        (os.urandom(100_000) + b"text " * 1_000_000, zipfile.ZIP_DEFLATED),
        # Deflates 1000 to 1, which readers refuse.
        (bytes(5 << 20), zipfile.ZIP_STORED),
    ],
    ids=["empty", "one byte", "random", "text", "random and text", "zeros"],
)
def test_content_is_stored_or_deflated_whichever_is_right(
    tmp_path: Path, output: Path, content: bytes, method: int
) -> None:
    make(old=None, new=write(tmp_path / "n", {"x": content}), output=output)
    with zipfile.ZipFile(output) as reader:
        info = reader.getinfo("files/x")
        assert info.compress_type == method
        assert info.compress_size <= info.file_size
    open_package(output).close()
    assert contents(output) == {"x": content}


def test_other_tools_read_the_package(old: Path, new: Path, output: Path, tmp_path: Path) -> None:
    make(old=old, new=new, output=output)
    subprocess.run(["unzip", "-q", output, "-d", tmp_path / "unzipped"], check=True)
    for path, content in contents(output).items():
        unpacked = tmp_path / "unzipped/files" / path
        assert unpacked.read_bytes() == content
        assert unpacked.stat().st_mode & 0o777 == 0o644
    with zipfile.ZipFile(output) as reader:
        assert reader.testzip() is None
        assert reader.namelist()[0] == "manifest.json"


# --- reproducible -------------------------------------------------------------------------------------------


def test_same_input_gives_the_same_bytes(tmp_path: Path, old: Path, new: Path, output: Path) -> None:
    make(old=old, new=new, output=output)
    first = output.read_bytes()
    # Another folder, made in another order at another time.
    again_old = write(tmp_path / "again/a", dict(reversed(OLD.items())))
    again_new = write(tmp_path / "again/b", dict(reversed(NEW.items())))
    for file in again_new.rglob("*"):
        os.utime(file, (1, 1))
    make(old=again_old, new=again_new, output=output)
    assert output.read_bytes() == first


def test_time_comes_from_the_environment_of_reproducible_builds(
    new: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(old=None, new=new, output=output).created is None
    monkeypatch.setenv(build.ENV_CREATED, "1763805600")
    assert make(old=None, new=new, output=output).created == datetime(2025, 11, 22, 10, tzinfo=UTC)
    explicit = datetime(2026, 1, 1, tzinfo=UTC)
    assert make(old=None, new=new, output=output, created=explicit).created == explicit


@pytest.mark.parametrize("text", ["now", "1e9", "99999999999999999999"])
def test_time_in_the_environment_that_is_none_is_refused(
    new: Path, output: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(build.ENV_CREATED, text)
    refuse("build.environment", old=None, new=new, output=output)


# --- what is refused ----------------------------------------------------------------------------------------


def test_equal_folders_are_nothing_to_patch(new: Path, output: Path) -> None:
    assert "nothing to patch" in refuse("build.empty", old=new, new=new, output=output).message


def test_empty_folder_is_nothing_to_patch(tmp_path: Path, output: Path) -> None:
    refuse("build.empty", old=None, new=write(tmp_path / "empty", {}), output=output)


@pytest.mark.parametrize("side", ["old", "new"])
def test_links_and_devices_are_refused(old: Path, new: Path, output: Path, side: str) -> None:
    strange = {"old": old, "new": new}[side] / "libs" / "strange"
    strange.parent.mkdir(exist_ok=True)
    strange.symlink_to("lib.txt")
    error = refuse("build.file_type", old=old, new=new, output=output)
    assert str(strange) in error.message
    assert "symbolic link" in error.message
    assert "exclude it" in error.message
    strange.unlink()
    strange.symlink_to("/state/current/web/libs/strange")
    error = refuse("build.file_type", old=old, new=new, output=output)
    assert "a link that patches of web have made" in error.message
    assert "--from-generation current -t web" in error.message
    strange.unlink()
    strange.symlink_to(old)  # a folder behind it
    refuse("build.file_type", old=old, new=new, output=output)
    strange.unlink()
    os.mkfifo(strange)
    refuse("build.file_type", old=old, new=new, output=output)


def test_setuid_file_is_refused(new: Path, output: Path) -> None:
    (new / "job.json").chmod(0o4755)
    refuse("build.file_type", old=None, new=new, output=output)


def test_folder_that_is_missing_is_refused(tmp_path: Path, new: Path, output: Path) -> None:
    refuse("build.folder", old=None, new=tmp_path / "nowhere", output=output)
    refuse("build.folder", old=tmp_path / "nowhere", new=new, output=output)


@pytest.mark.parametrize("name", ["a\\b", "e\u0301", "x.", "CON", "new\nline", "a\u202eb"])
def test_name_that_no_package_may_hold_is_refused(new: Path, output: Path, name: str) -> None:
    (new / name).write_bytes(b"x")
    error = refuse("build.path", old=None, new=new, output=output)
    assert len(error.details["problems"]) == 1
    assert error.message.isprintable()


def test_name_that_is_not_utf8_is_refused(new: Path, output: Path) -> None:
    (new / os.fsdecode(b"caf\xe9")).write_bytes(b"x")
    refuse("build.path", old=None, new=new, output=output)


def test_odd_name_that_does_not_change_hinders_nothing(old: Path, new: Path, output: Path) -> None:
    for folder in (old, new):
        (folder / "CON").write_bytes(b"x")
    make(old=old, new=new, output=output)


def test_file_that_becomes_a_folder_is_refused(old: Path, new: Path, output: Path) -> None:
    write(new / "libs", {"lib.txt/inside": b"x"})
    assert "two patches" in refuse("build.path_conflict", old=old, new=new, output=output).message


def test_name_that_changes_its_case_is_refused(old: Path, new: Path, output: Path) -> None:
    (new / "job.json").rename(new / "Job.json")
    refuse("build.path_conflict", old=old, new=new, output=output)


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "with space"},
        {"version": ""},
        {"build": -1},
        {"targets": []},
        {"regions": []},
        {"requires": Requires(build_min=2, build_max=1)},
        {"notes": "\x1b[2J"},
        {"notes": "\ud800"},
        {"probation": float("nan")},
        {"expires": datetime(2026, 1, 1)},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_manifest_that_would_be_refused_is_not_written(new: Path, output: Path, keys: dict[str, Any]) -> None:
    refuse("build.manifest", old=None, new=new, output=output, **keys)


def test_package_that_readers_would_refuse_is_not_written(
    new: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refuse("build.limits", old=None, new=new, output=output, limits=Limits(files=3))
    assert "5 entries, the limit is 3" in error.message
    assert ".part" not in error.message


def test_package_inside_the_folder_it_is_made_of_is_refused(old: Path, new: Path) -> None:
    for folder in (old, new):
        with pytest.raises(PatchBuildError) as caught:
            make(old=old, new=new, output=folder / "rest" / "patch.zip")
        assert caught.value.error_code == "build.output"


def test_file_that_changes_meanwhile_is_refused(new: Path, output: Path) -> None:
    calls: list[int] = []

    def rewrite(count: int) -> None:
        """Of the same size, so that only the content tells."""
        calls.append(count)
        (new / "job.json").write_bytes(b'{"job": %d}' % (len(calls) % 10))

    refuse("build.changed", old=None, new=new, output=output, progress=rewrite)


def test_file_that_grows_meanwhile_is_refused(new: Path, output: Path) -> None:
    def grow(count: int) -> None:
        with (new / "same.txt").open("ab") as file:
            file.write(b"more")

    refuse("build.changed", old=None, new=new, output=output, progress=grow)


# --- written whole or not at all ----------------------------------------------------------------------------


def test_package_that_was_there_stays_when_building_fails(new: Path, output: Path) -> None:
    output.write_bytes(b"the one before")
    seen: list[list[str]] = []

    def fail(count: int) -> None:
        names = sorted(entry.name for entry in output.parent.iterdir())
        seen.append(names)
        if len(names) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(old=None, new=new, output=output, progress=fail)
    assert output.read_bytes() == b"the one before"
    assert list(output.parent.iterdir()) == [output]
    # While it was written it did not look like a package to anyone who watches the folder.
    assert len(seen[-1]) == 2
    assert [name for name in seen[-1] if name.endswith(".zip")] == ["patch.zip"]


def test_package_that_was_there_is_replaced(old: Path, new: Path, output: Path) -> None:
    output.write_bytes(b"the one before")
    make(old=old, new=new, output=output)
    assert list(output.parent.iterdir()) == [output]
    assert contents(output)


def test_missing_output_folder_is_an_error_of_the_system(new: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make(old=None, new=new, output=tmp_path / "nowhere" / "patch.zip")


# --- large --------------------------------------------------------------------------------------------------


def test_zip64_is_used_where_a_size_demands_it() -> None:
    """The writer's own ZIP64, at sizes that nobody has to write: a sparse file, and nothing deflated."""
    size = (1 << 32) + 10

    with tempfile.TemporaryFile() as file:
        writer = build._ArchiveWriter(file)
        writer.add("small", 5, lambda: iter([memoryview(b"small")]))
        offset = file.tell()
        header = writer._local("huge", 0, 0, size, size)
        file.write(header)
        file.seek(size, os.SEEK_CUR)
        writer._record("huge", 0, 0, size, size, offset=offset)
        writer.add("behind", 5, lambda: iter([memoryview(b"small")]))
        writer.finish()
        total = file.seek(0, os.SEEK_END)
        file.flush()
        entries = scan(
            file.fileno(), total, Limits(package_size=1 << 40, file_size=1 << 40, total_size=1 << 40)
        )
        assert [(entry.name, entry.size) for entry in entries] == [
            ("small", 5),
            ("huge", size),
            ("behind", 5),
        ]
        with zipfile.ZipFile(file) as reader:
            assert reader.read("behind") == b"small"
            assert reader.getinfo("huge").file_size == size


def test_many_entries_need_zip64() -> None:
    with tempfile.TemporaryFile() as file:
        writer = build._ArchiveWriter(file)
        for index in range(65_536):
            writer.add_folder(f"d{index}/")
        writer.finish()
        total = file.tell()
        file.flush()
        assert len(scan(file.fileno(), total, Limits(files=70_000))) == 65_536


# --- anything goes round ------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b/c", "b/d", "e/f/g", "h"])
TREES = st.dictionaries(NAMES, st.binary(max_size=60), max_size=5)


@given(before=TREES, after=TREES)
@settings(max_examples=60, deadline=None)
def test_old_folder_and_package_give_the_new_folder(before: Tree, after: Tree) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        old, new = write(root / "old", before), write(root / "new", after)
        if before == after:
            with pytest.raises(PatchBuildError):
                make(old=old, new=new, output=root / "p.zip")
            return
        manifest = make(old=old, new=new, output=root / "p.zip")
        result = {**before, **contents(root / "p.zip")}
        for change in manifest.files:
            assert (change.path in before) == (change.op is not Op.NEW)
            if change.op is not Op.NEW:
                assert change.base_sha256 == sha(before[change.path])
            if change.op is Op.DELETED:
                del result[change.path]
        assert result == after


# --- the prototype's layout ---------------------------------------------------------------------------------


def test_prototype_package_is_as_its_author_made_them(output: Path) -> None:
    crc32 = build_prototype_patch(
        output=output,
        region="us-east-1",
        build=300,
        warm=True,
        new={"/work/rest/res.json": b"new", "/work/a/shared": b"same", "/work/b/shared": b"same"},
        modified={"/work/job.json": b"changed" * 50},
        deleted=["/work/libs/lib.txt"],
    )
    assert crc32 == zlib.crc32(output.read_bytes())
    with zipfile.ZipFile(output) as reader:
        assert reader.testzip() is None
        assert set(reader.namelist()) == {
            "patch/",
            "patch/del/",
            "patch/mod/",
            "patch/new/",
            "patch/manifest.json",
            "patch/mod/job.json",
            "patch/new/res.json",
            "patch/new/shared",
        }
        assert {info.create_system for info in reader.infolist()} == {0}
    with open_package(output, crc32=crc32) as package:
        assert package.format == "prototype"
        manifest = with_root_name(package.manifest, "work")
        assert (manifest.kind, manifest.build, manifest.regions) == (Kind.WARM, 300, ("us-east-1",))
        assert [(change.path, change.op) for change in manifest.files] == [
            ("libs/lib.txt", Op.DELETED),
            ("job.json", Op.MODIFIED),
            ("rest/res.json", Op.NEW),
            ("a/shared", Op.NEW),
            ("b/shared", Op.NEW),
        ]


def test_cold_prototype_package_does_not_say_justres(output: Path) -> None:
    build_prototype_patch(output=output, region="India", build=1, warm=False, new={"/app.py": b"x"})
    with open_package(output) as package:
        assert b"justres" not in package.manifest_bytes
        assert package.manifest.kind is Kind.COLD
        assert package.manifest.files[0].path == "app.py"


def test_prototype_package_is_reproducible(output: Path) -> None:
    packages = set()
    for _ in range(2):
        build_prototype_patch(output=output, region="r", build=1, warm=True, new={"/b": b"1", "/a": b"2"})
        packages.add(output.read_bytes())
    assert len(packages) == 1


def test_prototype_layout_cannot_hold_two_contents_of_one_name(output: Path) -> None:
    with pytest.raises(PatchBuildError) as caught:
        build_prototype_patch(output=output, region="r", build=1, warm=True, new={"/a/x": b"1", "/b/x": b"2"})
    assert caught.value.error_code == "build.path_conflict"
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    "keys", [{"new": {"/../x": b""}}, {"new": {"/x": b""}, "build": -1}, {"new": {}}, {"new": {"/a/": b""}}]
)
def test_prototype_package_that_would_be_refused_is_not_written(output: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(PatchBuildError) as caught:
        build_prototype_patch(**{"output": output, "region": "r", "build": 1, "warm": True, **keys})
    assert caught.value.error_code == "build.manifest"
    assert list(output.parent.iterdir()) == []


# --- the same input, the same bytes -------------------------------------------------------------------------


def copied(
    tree: Tree, folder: Path, *, umask: int = 0o022, backwards: bool = False, mtime: int = 10**9
) -> Path:
    """The same files as another checkout of them may have them."""
    before = os.umask(umask)
    try:
        folder.mkdir()
        for path, content in sorted(tree.items(), reverse=backwards):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
            os.utime(folder / path, (mtime, mtime))
    finally:
        os.umask(before)
    return folder


def made(folder: Path, output: Path, **keys: Any) -> bytes:
    make(old=None, new=folder, output=output, **keys)
    return output.read_bytes()


def test_times_order_and_the_umask_of_the_build_change_no_byte(tmp_path: Path) -> None:
    first = made(copied(NEW, tmp_path / "a"), tmp_path / "a.zip")
    before = os.umask(0o077)
    try:
        other = copied(NEW, tmp_path / "b", backwards=True, mtime=5 * 10**8)
        assert made(other, tmp_path / "b.zip") == first
    finally:
        os.umask(before)


def test_permission_bits_are_content_unless_they_are_made_normal(tmp_path: Path) -> None:
    one, two = (copied(NEW, tmp_path / f"{umask:o}", umask=umask) for umask in (0o022, 0o077))
    for folder in (one, two):
        (folder / "job.json").chmod(0o755 & ~(0o077 if folder is two else 0o022))
    assert made(one, tmp_path / "1.zip") != made(two, tmp_path / "2.zip")
    normal = made(one, tmp_path / "1.zip", normal_modes=True)
    assert normal == made(two, tmp_path / "2.zip", normal_modes=True)
    with open_package(tmp_path / "2.zip") as package:
        modes = {change.path: change.mode for change in package.manifest.files}
        assert modes["job.json"] == 0o755
        assert set(modes.values()) == {None, 0o755}


def test_another_zlib_changes_bytes_but_not_what_is_signed_and_none_when_stored(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [tmp_path / name for name in ("1.zip", "2.zip", "3.zip", "4.zip")]
    ours, ours_stored = made(new, outputs[0]), made(new, outputs[1], store=True)
    real = zlib.compressobj

    def other(*arguments: Any) -> Any:
        return (
            real(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY) if len(arguments) == 3 else real(*arguments)
        )

    monkeypatch.setattr(zlib, "compressobj", other)
    assert made(new, outputs[2]) != ours
    assert made(new, outputs[3], store=True) == ours_stored
    with open_package(outputs[0]) as first, open_package(outputs[2]) as second:
        assert first.manifest_bytes == second.manifest_bytes
        second.verify()
