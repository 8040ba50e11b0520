"""Warm patch fan-out, and the switch against the size of the tree."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rig import folder, row, supervisor

from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

PROGRAM = """
from target_sdk import Target
target = Target()
with target:
    target.ready()
    while True:
        target.run_pending(timeout=None)
"""


def fan_out(home: Path, count: int) -> None:
    """One warm patch over `count` instances of one target: switch to the last acknowledgement."""
    (home / "program.py").write_text(PROGRAM)
    package = small_patch(home, 1, files=1)
    text = (
        '[patch]\ntrust = "none"\nprobation = 0\nack_timeout = "60s"\n'
        f'[target.t]\nroot = "root"\nprotocol = "sdk"\nstart_timeout = "10m"\ninstances = {count}\n'
        f"command = {json.dumps([sys.executable, 'program.py'])}\n"
    )
    with supervisor(home, text) as (client, _):
        client.call("wait", {"names": ["t"], "for": "ready", "timeout": 600})
        report = client.call("patch.apply", path=str(package))
        told = report["targets"][0]["instances"]
        row(f"last acknowledgement of {count}", max(i["reload_took"] for i in told) * 1e3, "ms")
        steps = {step["step"]: step["took"] for step in report["steps"]}
        row(f"switch, {count} instances", steps["switch"] * 1e3, "ms")


def switch(home: Path, files: int, layout: str) -> None:
    """The switch and the staging of one changed file in a tree of `files`."""
    package = small_patch(home, files, files=files)
    text = (
        '[patch]\ntrust = "none"\nprobation = 0\n[target.t]\ncommand = "sleep 3600"\nmin_uptime = 0\n'
        f'root = "root"\nlayout = "{layout}"\n'
    )
    with supervisor(home, text) as (client, _):
        client.call("wait", {"names": ["t"], "for": "ready", "timeout": 60})
        began = time.monotonic()
        report = client.call("patch.apply", path=str(package), timeout=600)
        took = time.monotonic() - began
        steps = {step["step"]: step["took"] for step in report["steps"]}
        row(f"{layout}: switch, tree of {files}", steps["switch"] * 1e3, "ms")
        row(f"{layout}: stage 1 file, tree of {files}", steps["stage"] * 1e3, "ms")
        row(f"{layout}: whole apply, tree of {files}", took * 1e3, "ms")


def small_patch(home: Path, build: int, *, files: int) -> Path:
    for name in ("root", "old", "new"):
        (home / name).mkdir()
    for number in range(files):
        (home / "root" / f"file-{number}").write_text("content")
    for name, text in (("old", "content"), ("new", "changed")):
        (home / name / "file-0").write_text(text)
    output = home / "patch.zip"
    build_patch(
        old=home / "old", new=home / "new", output=output, name="bench", version="1", build=build,
        kind=Kind.WARM, targets=["t"], regions=["local"],
    )  # fmt: skip
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--files", type=int, default=10_000)
    args = parser.parse_args()
    for count in sorted({1, 10, args.instances}):
        with folder() as home:
            fan_out(home, count)
    for layout in ("overlay", "tree"):
        for files in sorted({10, args.files}):
            with folder() as home:
                switch(home, files, layout)


if __name__ == "__main__":
    main()
