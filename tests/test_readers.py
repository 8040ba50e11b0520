"""Programs that read their files without a pause while they are patched again and again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Serve, wait_for
from store_kit import package, write_tree
from told import Tell

from asyncsup.client import ControlClient

PROGRAM = Path(__file__).parent / "programs" / "reader.py"
FILES = [f"rules/{number}.txt" for number in range(20)]
INSTANCES = {"over": 2, "tree": 1}
PATCHES = 40


def said(client: ControlClient) -> dict[str, dict[str, int]]:
    """What every instance has counted."""
    return {
        instance["name"]: {
            name: int(count)
            for name, _, count in (word.partition("=") for word in instance["status_text"].split())
        }
        for target in client.call("status")["targets"]
        for instance in target["instances"]
    }


@pytest.mark.timeout(300)
def test_who_reads_after_its_reload_finds_the_new_build_and_who_pins_finds_one_build_at_any_time(
    serve: Serve, tell: Tell
) -> None:
    command = json.dumps([sys.executable, str(PROGRAM)])
    text = ['[patch]\ntrust = "none"\nprobation = "0s"\nack_timeout = "60s"\n']
    for name, count in INSTANCES.items():
        write_tree(serve.folder / name, dict.fromkeys(FILES, b"build 0"))
        layout = "overlay" if name == "over" else "tree"
        text.append(
            f'[target.{name}]\ncommand = {command}\nprotocol = "sdk"\nroot = "{name}"\nlayout = "{layout}"\n'
            f'instances = {count}\nstart_timeout = "60s"\n'
        )
    with serve.start("".join(text)) as client:
        client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
        pids = [i["pid"] for target in client.call("status")["targets"] for i in target["instances"]]
        for build in range(1, PATCHES + 1):
            changed = dict.fromkeys(FILES, b"build %d" % build)
            with package(serve.folder, build, modified=changed, targets=INSTANCES) as patch:
                report = client.call("patch.apply", path=str(patch.path))
            # An instance that found anything else than the new build would have refused it.
            assert report["verdict"] == "committed"
        wait_for(
            lambda: all(counts.get("reloads") == PATCHES for counts in said(client).values()),
            "every instance to say what it has read",
        )
        counts = said(client)
        after = [i["pid"] for target in client.call("status")["targets"] for i in target["instances"]]
    assert after == pids
    for name, found in sorted(counts.items()):
        tell(f"{PATCHES} patches: {name}, {found}")
    assert len(counts) == sum(INSTANCES.values())
    for found in counts.values():
        assert found["pinned_mixes"] == 0
        assert found["passes"] > PATCHES
    assert any(found["plain_mixes"] for found in counts.values()), "the control: nothing is proved without"
