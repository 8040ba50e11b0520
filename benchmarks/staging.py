"""Verify and stage a package, beside `sha256sum`, `unzip` and `sync` of the same file."""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from pathlib import Path

from rig import folder, median, row

from asyncsup.config import PatchLimits
from asyncsup.patch.build import build_patch
from asyncsup.patch.facts import Layout, PatchInfo, TargetRoot
from asyncsup.patch.manifest import Kind
from asyncsup.patch.package import open_package
from asyncsup.patch.store import Store

LIMITS = PatchLimits(package_size=1 << 40, file_size=1 << 40, total_size=1 << 40)
MIB = 1 << 20


def one_file(home: Path, mib: int, *, compressible: bool) -> Path:
    noise = random.Random(1)
    words = [noise.randbytes(6).hex().encode() for _ in range(5000)]
    (home / "new").mkdir()
    with (home / "new" / "large.bin").open("wb") as file:
        for _ in range(mib):
            text = b" ".join(noise.choices(words, k=MIB // 13 + 1))[:MIB] if compressible else b""
            file.write(text or noise.randbytes(MIB))
    return built(home, store=not compressible)


def many_files(home: Path, count: int) -> Path:
    noise = random.Random(1)
    words = [noise.randbytes(4).hex().encode() for _ in range(2000)]
    for number in range(count):
        parent = home / "new" / f"folder-{number // 100}"
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"file-{number}.txt").write_bytes(b" ".join(noise.choices(words, k=456))[:4096])
    return built(home, store=False)


def built(home: Path, *, store: bool) -> Path:
    build_patch(
        old=None, new=home / "new", output=home / "patch.zip", name="bench", version="1", build=1,
        kind=Kind.WARM, targets=["t"], regions=["local"], store=store, limits=LIMITS,
    )  # fmt: skip
    return home / "patch.zip"


def floor(home: Path, package: Path, turn: int) -> float:
    out = home / f"unzipped-{turn}"
    began = time.monotonic()
    subprocess.run(["sha256sum", package], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["unzip", "-q", package, "-d", out], check=True)
    subprocess.run(["sync", "-f", out], check=True)
    return time.monotonic() - began


def ours(home: Path, package: Path, turn: int, layout: Layout) -> float:
    """What an apply does up to the switch, its gates' look at the files included."""
    place = home / f"{layout.value}-{turn}"
    (place / "root").mkdir(parents=True)
    store = Store.open(place / "state")
    try:
        store.register([TargetRoot(name="t", root=place / "root", layout=layout)])
        store.recover()
        subprocess.run(["sync", "-f", place], check=True)
        began = time.monotonic()
        with open_package(package, limits=LIMITS) as patch:
            manifest = patch.manifest
            store.preview.content_matches("t", manifest)
            store.preview.plan("t", manifest)
            info = PatchInfo(
                id=patch.id, name=manifest.name, version="1", build=manifest.build, kind=manifest.kind.value
            )
            txn = store.begin(action="apply", patch=info, targets=["t"], asked_by="bench")
            store.stage(txn, "t", patch)
        return time.monotonic() - began
    finally:
        store.close()


def measure(what: str, home: Path, package: Path, rounds: int) -> None:
    # Nothing is removed between the rounds: ext4 is slow to give away inodes that have just been freed.
    floors: list[float] = []
    staged: dict[Layout, list[float]] = {layout: [] for layout in Layout}
    for turn in range(rounds):
        floors.append(floor(home, package, turn))
        for layout, times in staged.items():
            times.append(ours(home, package, turn, layout))
    for layout, times in staged.items():
        row(f"{what}, {layout.value}", median(times), "s", median(floors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for compressible in (False, True):
        with folder() as home:
            package = one_file(home, args.mib, compressible=compressible)
            measure(f"{args.mib} MiB, {'deflated' if compressible else 'stored'}", home, package, args.rounds)
    with folder() as home:
        measure(f"{args.files} files of 4 KiB", home, many_files(home, args.files), args.rounds)


if __name__ == "__main__":
    main()
