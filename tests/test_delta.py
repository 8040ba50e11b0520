"""Files that come as differences: making them, reading them, and everything that may be wrong with one."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from conftest import Serve
from hypothesis import given, settings
from hypothesis import strategies as st
from requirements import require_program
from store_kit import Bench, begin, benches, seen
from zip_forge import Part, forge, manifest_part

from asyncsup.config import PatchLimits
from asyncsup.errors import PatchBuildError, PatchError, PatchMalformedError, PatchRefusedError, RemoteError
from asyncsup.patch import delta
from asyncsup.patch.build import build_patch
from asyncsup.patch.facts import Layout
from asyncsup.patch.manifest import Delta, FileChange, Kind, Manifest, Op, parse_manifest
from asyncsup.patch.package import Package, open_package
from asyncsup.patch.plan import Found, Presence, judge

both_layouts = pytest.mark.parametrize("layout", list(Layout))
LARGEST = 1 << 20
NOISE = random.Random(1)
OLD = NOISE.randbytes(60_000)
NEW = OLD[:20_000] + b"inserted" + OLD[20_000:50_000] + b"!" + OLD[50_001:]
MIB = 1 << 20


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def rebuilt(raw: bytes, base: bytes, size: int, largest: int = LARGEST) -> bytes:
    return b"".join(bytes(piece) for piece in delta.rebuild(raw, base, size, largest=largest))


def refused(raw: bytes, base: bytes, size: int, largest: int = LARGEST) -> str:
    with pytest.raises(PatchMalformedError) as caught:
        rebuilt(raw, base, size, largest)
    assert caught.value.error_code == "delta.invalid"
    return caught.value.message


# --- the format ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "content"),
    [(OLD, NEW), (b"", NEW), (OLD, b""), (b"", b""), (OLD, OLD), (b"x", b"y"), (OLD, NEW + bytes(300_000))],
    ids=["edited", "of nothing", "to nothing", "empty", "same", "tiny", "grown"],
)
def test_a_delta_makes_the_new_content_of_the_old(base: bytes, content: bytes) -> None:
    raw = delta.make(base, content)
    assert rebuilt(raw, base, len(content)) == content


def test_a_delta_of_a_file_larger_than_zstds_usual_tables_is_small() -> None:
    base = random.Random(2).randbytes(6 * MIB)
    content = base[: 3 * MIB] + b"in the middle" + base[3 * MIB :]
    raw = delta.make(base, content)
    assert len(raw) < 5_000
    assert rebuilt(raw, base, len(content), largest=8 * MIB) == content


def test_what_the_zstd_command_makes_is_read_and_the_other_way_round(tmp_path: Path) -> None:
    require_program("zstd")
    for name, content in (("old", OLD), ("new", NEW), ("ours", delta.make(OLD, NEW))):
        (tmp_path / name).write_bytes(content)
    for arguments in (
        ["--patch-from=old", "new", "-o", "theirs"],
        ["-d", "--patch-from=old", "ours", "-o", "o"],
    ):
        subprocess.run(["zstd", "-q", *arguments], cwd=tmp_path, check=True)
    assert rebuilt((tmp_path / "theirs").read_bytes(), OLD, len(NEW)) == NEW
    assert (tmp_path / "o").read_bytes() == NEW


@given(base=st.binary(max_size=2000), content=st.binary(max_size=2000), edits=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_any_two_contents(base: bytes, content: bytes, edits: int) -> None:
    new = base[: len(base) // (edits + 1)] + content + base[len(base) // (edits + 1) :]
    assert rebuilt(delta.make(base, new), base, len(new)) == new


# --- what may be wrong with one -----------------------------------------------------------------------------


def frame(declared: int, *blocks: bytes, window: int = 10) -> bytes:
    """A zstd frame as it is never made: any content size, any window (2 to the power of ``window``)."""
    return (
        b"\x28\xb5\x2f\xfd\x80" + bytes([(window - 10) << 3]) + struct.pack("<I", declared) + b"".join(blocks)
    )


def block(kind: int, size: int, content: bytes, *, last: bool = False) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + content


RAW, RLE = 0, 1


def test_the_forged_frames_are_right_but_for_what_is_wrong_with_them() -> None:
    assert rebuilt(frame(4, block(RAW, 4, b"data", last=True)), OLD, 4) == b"data"


def test_a_bomb_is_cut_off_at_what_it_declares() -> None:
    """Four bytes of a frame make 128 KiB; nothing beyond the declared size is ever made."""
    bomb = frame(1000, *[block(RLE, 128 << 10, b"x", last=n == 9999) for n in range(10_000)], window=17)
    yielded = 0
    with pytest.raises(PatchMalformedError) as caught:
        for piece in delta.rebuild(bomb, OLD, 1000, largest=LARGEST):
            yielded += len(piece)
    assert caught.value.error_code == "delta.invalid"
    assert yielded <= 1000


def test_a_frame_that_declares_another_size_than_the_manifest_is_refused_unread() -> None:
    raw = delta.make(OLD, NEW)
    for size in (0, len(NEW) - 1, len(NEW) + 1, 1 << 40):
        assert "its frame says" in refused(raw, OLD, size)
    without = zstandard.ZstdCompressor(write_content_size=False).compress(NEW)
    assert "its frame says" in refused(without, OLD, len(NEW))


def test_a_window_above_the_limit_is_refused_before_it_is_allocated() -> None:
    huge = frame(4, block(RAW, 4, b"data", last=True), window=31)
    assert "window 2147483648" in refused(huge, OLD, 4)
    assert rebuilt(frame(4, block(RAW, 4, b"data", last=True), window=20), OLD, 4) == b"data"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x28\xb5\x2f\xfd",
        b"not zstd at all",
        b"\x50\x2a\x4d\x18\x04\0\0\0skip",
        delta.make(OLD, NEW)[:-1],
        delta.make(OLD, NEW)[:20],
        frame(4, block(3, 4, b"data", last=True)),
        frame(4, block(RAW, 3, b"dat", last=True)),
        frame(4, block(RAW, 5, b"data!", last=True)),
    ],
    ids=[
        "empty",
        "magic only",
        "other",
        "skippable",
        "cut",
        "cut early",
        "reserved block",
        "less",
        "more",
    ],
)
def test_what_is_no_whole_frame_is_refused(raw: bytes) -> None:
    refused(raw, OLD, 4 if raw[4:5] == b"\x80" else len(NEW))


def test_a_frame_that_asks_for_a_numbered_dictionary_is_refused() -> None:
    numbered = zstandard.ZstdCompressionDict(b"\x37\xa4\x30\xec" + OLD[:2000])
    del numbered
    raw = b"\x28\xb5\x2f\xfd\x81\x00" + b"\x07" + struct.pack("<I", 4) + block(RAW, 4, b"data", last=True)
    assert "dictionary 7" in refused(raw, OLD, 4)


VALID = delta.make(OLD, NEW)


@given(
    changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
@settings(max_examples=300, deadline=None)
def test_a_damaged_delta_is_refused_or_makes_what_it_declares(
    changes: list[tuple[int, int]], cut: int
) -> None:
    raw = bytearray(VALID)
    for at, value in changes:
        raw[at] = value
    try:
        made = rebuilt(bytes(raw[: len(raw) - cut]), OLD, len(NEW))
    except PatchMalformedError as error:
        assert error.error_code == "delta.invalid"
    else:
        assert len(made) == len(NEW)


def test_a_wrong_base_makes_garbage_without_an_error_which_is_why_its_digest_is_checked() -> None:
    assert rebuilt(VALID, bytes(reversed(OLD)), len(NEW)) != NEW


# --- in a package -------------------------------------------------------------------------------------------


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


def written(root: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def built(folder: Path, old: dict[str, bytes], new: dict[str, bytes], **more: Any) -> Package:
    output = folder / "delta.zip"
    arguments: dict[str, Any] = {
        "old": written(folder / "was", old), "new": written(folder / "is", new), "output": output,
        "name": "n", "version": "1", "build": 300, "kind": Kind.WARM, "targets": ["web"],
        "regions": ["local"], "delta": True, **more,
    }  # fmt: skip
    build_patch(**arguments)
    return open_package(output)


def forged(
    path: Path, raw: bytes, *, content: bytes = NEW, limits: PatchLimits | None = None, **keys: Any
) -> Package:
    """A package with one delta, of `OLD`; ``keys`` replace what the manifest says of the file."""
    change = {
        "path": "data.bin", "op": "modified", "sha256": sha(content), "size": len(content),
        "base_sha256": sha(OLD),
        "delta": {"format": "zstd-patch", "base_sha256": sha(OLD), "sha256": sha(raw), "size": len(raw)},
        **keys,
    }  # fmt: skip
    path.write_bytes(forge(manifest_part(files=[change]), Part(name="deltas/data.bin", data=raw, method=0)))
    return open_package(path, limits=limits or PatchLimits())


def rebuild(package: Package, base: bytes, folder: Path) -> bytes:
    (folder / "base").write_bytes(base)
    with (folder / "base").open("rb") as old, (folder / "out").open("wb", buffering=0) as out:
        package.rebuild(package.manifest.files[0], old.fileno(), out.fileno())
    return (folder / "out").read_bytes()


def test_build_takes_a_delta_only_where_it_is_smaller(tmp_path: Path) -> None:
    old = {
        "large.bin": OLD,
        "other.bin": OLD,
        "tiny.txt": b"old",
        "text.txt": b"line\n" * 10_000,
        "gone": b"x",
    }
    new = {
        "large.bin": NEW, "other.bin": NOISE.randbytes(50_000), "tiny.txt": b"new", "fresh.bin": NEW,
        "text.txt": b"word\n" * 10_000,
    }  # fmt: skip
    with built(tmp_path, old, new) as package:
        package.verify()
        changes = {change.path: change for change in package.manifest.files}
        assert {path for path, change in changes.items() if change.delta is not None} <= {
            "large.bin",
            "text.txt",
        }
        large = changes["large.bin"]
        assert (large.sha256, large.size, large.base_sha256) == (sha(NEW), len(NEW), sha(OLD))
        assert large.delta is not None
        assert large.delta.base_sha256 == sha(OLD)
        assert large.delta.size < 1000
        assert package.size < len(NEW) + 60_000
    with built(tmp_path, old, new, limits=PatchLimits(delta_size=len(NEW) - 1)) as package:
        assert all(change.path != "large.bin" or change.delta is None for change in package.manifest.files)


def test_the_same_input_gives_the_same_bytes_with_deltas_too(tmp_path: Path) -> None:
    ids = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with built(tmp_path / name, {"data.bin": OLD}, {"data.bin": NEW}) as package:
            ids.append(package.id)
    assert ids[0] == ids[1]


def test_build_without_zstandard_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "available", lambda: False)
    with pytest.raises(PatchBuildError) as caught:
        built(tmp_path, {"data.bin": OLD}, {"data.bin": NEW})
    assert caught.value.error_code == "build.delta"
    assert 'pip install "asyncsup[delta]"' in caught.value.message


@both_layouts
def test_a_patch_of_deltas_is_applied_and_taken_back(
    layout: Layout, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    b = bench(layout)
    (b.root / "rules/big.bin").write_bytes(OLD)
    with built(tmp_path, {"rules/big.bin": OLD}, {"rules/big.bin": NEW}) as patch:
        assert patch.manifest.files[0].delta is not None
        txn = begin(b.store, patch)
        b.store.stage(txn, "web", patch)
        assert (b.root / "rules/big.bin").read_bytes() == OLD
        b.store.switch(txn)
        assert (b.root / "rules/big.bin").read_bytes() == NEW
        b.store.switch_back(txn)
        assert (b.root / "rules/big.bin").read_bytes() == OLD
        b.store.abort(txn)


@both_layouts
def test_a_delta_to_another_file_is_refused_before_anything_is_staged(
    layout: Layout, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    b = bench(layout)
    (b.root / "data.bin").write_bytes(OLD + b"changed")
    before = seen(b.root)
    with built(tmp_path, {"data.bin": OLD}, {"data.bin": NEW}) as patch:
        for policy in ("refuse", "overwrite"):
            txn = begin(b.store, patch)
            with pytest.raises(PatchRefusedError) as caught:
                b.store.stage(txn, "web", patch, policy=policy)
            assert caught.value.error_code == "gate.base"
            b.store.abort(txn)
            b.store.finish(txn, verdict="refused")
    assert seen(b.root) == before
    assert not list((b.base / "state/staging").iterdir())


def test_what_is_there_already_needs_no_delta(tmp_path: Path) -> None:
    with forged(tmp_path / "p.zip", VALID) as package:
        assert rebuild(package, NEW, tmp_path) == NEW
        assert rebuild(package, OLD, tmp_path) == NEW


def outcome(make: Callable[[], Package], base: bytes, folder: Path) -> str:
    with pytest.raises(PatchError) as caught, make() as package:
        package.verify()
        rebuild(package, base, folder)
    return caught.value.error_code


@pytest.mark.parametrize(
    ("raw", "keys", "base", "code"),
    [
        (VALID, {}, OLD + b"!", "gate.base"),
        (VALID, {"sha256": sha(b"another")}, OLD, "digest.sha256"),
        (VALID, {"size": len(NEW) + 1}, OLD, "delta.invalid"),
        (VALID[:-3], {}, OLD, "delta.invalid"),
        (b"not a delta", {}, OLD, "delta.invalid"),
        (frame(len(NEW), window=31), {}, OLD, "delta.invalid"),
    ],
    ids=["wrong base", "wrong result", "wrong size", "cut", "no zstd", "window"],
)
def test_each_fault_of_a_delta_has_its_verdict(
    raw: bytes, keys: dict[str, Any], base: bytes, code: str, tmp_path: Path
) -> None:
    assert outcome(lambda: forged(tmp_path / "p.zip", raw, **keys), base, tmp_path) == code


def test_the_deltas_own_digest_is_checked_before_it_is_read(tmp_path: Path) -> None:
    lying = {"format": "zstd-patch", "base_sha256": sha(OLD), "sha256": sha(b"other"), "size": len(VALID)}
    assert outcome(lambda: forged(tmp_path / "p.zip", VALID, delta=lying), OLD, tmp_path) == "digest.sha256"


def test_what_deltas_make_is_limited_like_what_files_hold(tmp_path: Path) -> None:
    bomb = delta.make(OLD, bytes(64 * MIB))
    big: dict[str, Any] = {"size": 64 * MIB, "sha256": sha(bytes(64 * MIB))}

    def limited(**limits: int) -> str:
        return outcome(
            lambda: forged(tmp_path / "p.zip", bomb, limits=PatchLimits(**limits), **big), OLD, tmp_path
        )

    assert limited(delta_size=MIB) == "delta.size"
    assert limited(file_size=MIB, ratio=100_000) == "zip.file_size"
    assert limited(total_size=MIB, ratio=100_000) == "zip.total_size"
    assert limited() == "zip.ratio"
    shrunk = delta.make(OLD, b"x")
    assert outcome(
        lambda: forged(tmp_path / "p.zip", shrunk, content=b"x", limits=PatchLimits(delta_size=100)),
        OLD, tmp_path,
    ) == "delta.size"  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"delta": {"format": "bsdiff"}}, "must be 'zstd-patch'"),
        ({"delta": {"sha256": None}}, "64 lower-case"),
        ({"delta": {"size": -1}}, "size"),
        ({"delta": {"level": 3}}, "unknown key"),
        ({"delta": {"base_sha256": sha(b"x")}}, "once more"),
        ({"base_sha256": None}, "base_sha256"),
        ({"missing_ok": True}, "does not go with missing_ok"),
        ({"op": "new"}, "does not go with op 'new'"),
    ],
)
def test_a_delta_in_the_manifest_has_to_be_right(change: dict[str, Any], problem: str) -> None:
    whole: dict[str, Any] = {
        "path": "data.bin", "op": "modified", "sha256": sha(NEW), "size": len(NEW), "base_sha256": sha(OLD),
        "delta": {"format": "zstd-patch", "base_sha256": sha(OLD), "sha256": sha(VALID), "size": len(VALID)},
    }  # fmt: skip
    parse_manifest(manifest_part(files=[whole]).data)
    merged = {**whole, **change, "delta": {**whole["delta"], **change.get("delta", {})}}
    with pytest.raises(PatchMalformedError) as caught:
        parse_manifest(manifest_part(files=[merged]).data)
    assert problem in orjson.dumps(caught.value.details["problems"]).decode()


def test_a_file_of_a_delta_that_cannot_be_overwritten_can_be_kept() -> None:
    change = FileChange(
        path="a", op=Op.MODIFIED, sha256="1" * 64, size=3, base_sha256="2" * 64,
        delta=Delta(base_sha256="2" * 64, sha256="3" * 64, size=2),
    )  # fmt: skip
    changed = Found(presence=Presence.ORDINARY, sha256="4" * 64)
    plan = judge(change, changed, policy="overwrite")
    assert (plan.decision, plan.choices) == ("refuse", ("keep",))
    assert "cannot be overwritten" in plan.note
    assert judge(change, changed, policy="keep").decision == "keep"
    for digest in ("1" * 64, "2" * 64):
        assert judge(change, Found(presence=Presence.ORDINARY, sha256=digest)).error is None


def test_a_supervisor_without_zstandard_refuses_at_the_gate_and_touches_nothing(
    serve: Serve, tmp_path: Path
) -> None:
    with built(tmp_path, {"data.bin": OLD}, {"data.bin": NEW}) as package:
        path = package.path
    (tmp_path / "sitecustomize.py").write_text('import sys\nsys.modules["zstandard"] = None\n')
    (serve.folder / "root").mkdir()
    (serve.folder / "root/data.bin").write_bytes(OLD)
    text = '[target.web]\ncommand = "sleep 1000"\nautostart = false\nroot = "root"\n[patch]\ntrust = "none"\n'
    serve.environ = {"PYTHONPATH": str(tmp_path)}
    with serve.start(text) as client:
        plan = client.call("patch.plan", path=str(path))
        assert plan["targets"][0]["refused"]["code"] == "gate.delta"
        with pytest.raises(RemoteError) as caught:
            client.call("patch.apply", path=str(path))
        assert caught.value.error_code == "gate.delta"
        assert 'pip install "asyncsup[delta]"' in caught.value.message
    assert serve.stop() == 0
    assert not (serve.folder / "root/data.bin").is_symlink()
    serve.environ = {}
    with serve.start() as client:
        assert client.call("patch.apply", path=str(path))["verdict"] == "committed"
    assert (serve.folder / "root/data.bin").read_bytes() == NEW


def test_a_plan_tries_what_a_delta_makes_of_the_file_that_is_there(serve: Serve, tmp_path: Path) -> None:
    root = serve.folder / "pricer"
    root.mkdir()
    (root / "data.bin").write_bytes(OLD)
    text = (
        '[supervisor]\nregion = "us-east-1"\n[patch]\ntrust = "none"\n'
        '[target.pricer]\ncommand = "sleep 1000"\nautostart = false\nroot = "pricer"\n'
    )
    faults: list[tuple[bytes, dict[str, Any], str]] = [
        (VALID, {"sha256": sha(b"another")}, "digest.sha256"),
        (VALID[:-3], {}, "delta.invalid"),
    ]
    with serve.start(text) as client:
        for raw, keys, code in faults:
            with forged(tmp_path / "p.zip", raw, **keys) as package:
                path = str(package.path)
            plan = client.call("patch.plan", path=path)
            with pytest.raises(RemoteError) as caught:
                client.call("patch.apply", path=path)
            assert caught.value.error_code == code
            assert (plan["code"], plan["reason"]) == (code, caught.value.message)
            assert (plan["verdict"], plan["contents"]["ok"], plan["exit_status"]) == ("refused", False, 21)
        with forged(tmp_path / "p.zip", VALID) as package:
            path = str(package.path)
        assert client.call("patch.plan", path=path)["verdict"] == "apply"
    assert (root / "data.bin").read_bytes() == OLD


def test_a_manifest_with_a_delta_reads_back(tmp_path: Path) -> None:
    with forged(tmp_path / "p.zip", VALID) as package:
        manifest: Manifest = package.manifest
        assert manifest.files[0].delta == Delta(base_sha256=sha(OLD), sha256=sha(VALID), size=len(VALID))
