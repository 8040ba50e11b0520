"""Twenty cold patches and some broken builds under every kind of load: nobody's request is lost.

What is patched, and how, is `benchmarks/cold_patches.py`'s: its figures and this test are about the same.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import Serve, free_port, wait_for

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from cold_patches import FAULTS, START_SECONDS, Fault, Patched  # noqa: E402
from load import Load  # noqa: E402

PATCHES = 20
EVERY = 5
"""After so many good builds comes a broken one."""


def went_on(loads: dict[str, Load], seen: dict[str, int]) -> bool:
    return all(len(load.results.samples) >= seen[name] + 3 for name, load in loads.items())


@pytest.mark.timeout(600)
def test_cold_patches_and_broken_builds_lose_no_request(serve: Serve) -> None:
    service = Patched(serve.folder, port=free_port())
    place = f"127.0.0.1:{service.port}"
    patient = service.settings.replace(f'"{START_SECONDS}s"', '"25s"')
    changes: list[Fault | None] = [None] * PATCHES
    for number, fault in enumerate(FAULTS, 1):
        changes.insert(number * EVERY + number - 1, fault)
    with (
        serve.start(patient) as control,
        Load(f"http://{place}/", rate=20, timeout=60) as new,
        Load(f"http://{place}/", mode="keep-alive", rate=20, connections=5, timeout=60) as kept,
        Load(f"http://{place}/slow", rate=10, timeout=60) as slow,
        Load(f"ws://{place}/echo", mode="websocket", rate=20, connections=5, timeout=60) as websockets,
    ):
        loads = {"new": new, "keep-alive": kept, "slow": slow, "websocket": websockets}
        control.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        for change in changes:
            seen = {name: len(load.results.samples) for name, load in loads.items()}
            service.change(control, change)()
            wait_for(partial(went_on, loads, seen), "requests in every mode")
    for name, load in loads.items():
        assert load.results.between().failed == 0, (name, load.results.between())
