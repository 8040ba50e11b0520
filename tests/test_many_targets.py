"""A hundred targets at once, each with the SDK, and one patch that reaches them all."""

from __future__ import annotations

import json
import sys
import time

from conftest import Serve
from told import Tell

from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

TARGETS = 100

# As small as a target with the SDK can be: a plain program that handles what comes in, on its main thread.
PROGRAM = """
from target_sdk import Target
target = Target()
def load(patch=None):
    with target.snapshot() as files:
        target.status(files.read_text("data.txt"))
target.on_reload(load)
with target:
    load()
    target.ready()
    while True:
        target.run_pending(timeout=None)
"""


def test_a_hundred_targets_start_and_acknowledge_one_warm_patch(serve: Serve, tell: Tell) -> None:
    names = [f"t{number:03d}" for number in range(TARGETS)]
    (serve.folder / "program.py").write_text(PROGRAM)
    lines = [
        '[patch]\ntrust = "none"\nprobation = "0s"\nack_timeout = "60s"\n[defaults]\nprotocol = "sdk"\n'
        f'start_timeout = "110s"\ncommand = {json.dumps([sys.executable, "program.py"])}\n'
    ]
    for age, content in (("old", "old"), ("new", "new"), *((name, "old") for name in names)):
        (serve.folder / age).mkdir()
        (serve.folder / age / "data.txt").write_text(content)
    lines += [f'[target.{name}]\nroot = "{name}"\n' for name in names]
    package = serve.folder / "patch.zip"
    build_patch(
        old=serve.folder / "old", new=serve.folder / "new", output=package, name="all", version="1", build=1,
        kind=Kind.WARM, targets=names, regions=["local"],
    )  # fmt: skip

    began = time.monotonic()
    client = serve.start("\n".join(lines))
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 110})
    started = time.monotonic()
    before = {i["name"]: i["pid"] for t in client.call("status")["targets"] for i in t["instances"]}
    assert len(before) == TARGETS

    report = client.call("patch.apply", path=str(package))
    told = [i for entry in report["targets"] for i in entry["instances"]]
    assert report["verdict"] == "committed"
    assert [(i["told_by"], i["reload"]) for i in told] == [("sdk", "ok")] * TARGETS
    assert {i["name"]: i["pid_after"] for i in told} == before
    after = client.call("status")["targets"]
    assert {t["build"] for t in after} == {1}
    assert {i["restarts"] for t in after for i in t["instances"]} == {0}
    for name in (names[0], names[-1]):
        assert (serve.folder / name / "data.txt").read_text() == "new"
    steps = {step["step"]: step["took"] for step in report["steps"] if step["took"] is not None}
    slowest = max(i["reload_took"] for i in told)
    tell(
        f"{TARGETS} targets: ready after {started - began:.1f} s; patched in {report['took']:.2f} s, "
        f"switch {steps['switch'] * 1e3:.1f} ms, last acknowledgement after {slowest * 1e3:.0f} ms"
    )
    client.close()
