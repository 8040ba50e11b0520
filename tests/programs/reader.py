"""A target that reads all its files again and again, by plain paths and by snapshots, and says what it saw.

At each reload it reads them by plain paths once more: each must be of the build that it was told of, or the
reload fails.
"""

from __future__ import annotations

from pathlib import Path

from target_sdk import Patch, Target

target = Target()
counts = dict.fromkeys(("reloads", "passes", "pinned_mixes", "plain_mixes"), 0)


def names() -> list[str]:
    return [f"rules/{number}.txt" for number in range(20)]


def plain(root: Path) -> set[str]:
    return {(root / name).read_text() for name in names()}


def pinned() -> set[str]:
    with target.snapshot() as files:
        return {files.read_text(name) for name in names()}


@target.on_reload
def reload(patch: Patch) -> None:
    seen = plain(patch.root)
    if seen != {f"build {patch.build}"}:
        raise ValueError(f"told of build {patch.build}, and read {sorted(seen)}")
    counts["reloads"] += 1
    target.status(" ".join(f"{name}={count}" for name, count in counts.items()))


with target:
    target.ready()
    while True:
        target.run_pending(timeout=0)
        counts["passes"] += 1
        counts["pinned_mixes"] += len(pinned()) > 1
        counts["plain_mixes"] += len(plain(target.root)) > 1
