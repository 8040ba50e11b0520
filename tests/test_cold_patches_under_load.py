"""Twenty cold patches and some broken builds under every kind of load: nobody's request is lost. A build that
dies in its probation takes with it what it has in its hands, and nothing else.

What the first test patches, and how, is `benchmarks/cold_patches.py`'s: its figures and that test are about
the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import Asked, Serve, free_port, wait_for
from test_overlap import LONG_PROBATION, Town

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from cold_patches import DEADLY, FAULTS, START_SECONDS, Fault, Patched  # noqa: E402
from load import Load, Outcome  # noqa: E402

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
    for number, fault in enumerate((fault for fault in FAULTS if fault not in DEADLY), 1):
        changes.insert(number * EVERY + number - 1, fault)
    with serve.start(patient) as control:
        with (
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
        # What these cost under a load is counted below.
        for fault in DEADLY:
            service.change(control, fault)()
    for name, load in loads.items():
        assert load.results.between().failed == 0, (name, load.results.between())


class Mortal(Town):
    """A service that keeps an account of what it has in its hands, and dies with it in a probation."""

    readiness = 'ready.log = "^up"'

    def __init__(self, serve: Serve) -> None:
        super().__init__(serve, program="mortal.py")

    def start(
        self,
        more: str = "start_timeout = '60s'\nrestart = 'never'",
        patch: str = "",
        *,
        layout: str = "overlay",
    ) -> None:
        """Who has died is not started again, only to be ended with what it has in its hands by then."""
        super().start(more, patch, layout=layout)

    def account(self, pid: int) -> tuple[int, int]:
        """How many connections a process holds (or held when it died), and how many requests it answered."""
        held, answered = struct.unpack("@II", (self.folder / f"account-{pid}").read_bytes())
        return held, answered

    def dies(self, version: str, mode: str, death: Callable[[int], object]) -> int:
        """Have a build serve, and die in its probation; returns how many connections it held then.

        Args:
            death: of the process with that pid.
        """
        (old,) = self.pids
        path = self.patch(version, mode, probation=LONG_PROBATION)
        asked = Asked(self.serve.endpoint, "patch.apply", path=path)
        wait_for(lambda: [o["role"] for o in self.target["others"]] == ["standby"], "it to count")
        (new,) = self.pids
        wait_for(lambda: self.account(new)[1] >= 3, "answers of it")
        death(new)
        assert asked.error("patch.rolled_back").details["cause"] == "patch.probation_failed"
        self.wait_alone()
        assert self.pids == [old]
        assert self.target["build"] == 0
        return self.account(new)[0]


@pytest.mark.parametrize("mode", ["exit", "kill"])
def test_a_build_that_dies_in_its_probation_with_nothing_in_its_hands_costs_nothing(
    serve: Serve, mode: str
) -> None:
    with contextlib.closing(Mortal(serve)) as service:
        service.start()
        fall = service.folder / "fall"
        with Load(f"http://127.0.0.1:{service.address[1]}/", rate=50, timeout=60) as load:
            for version in ("v2", "v3", "v4"):
                assert service.dies(version, mode, lambda _: fall.touch()) == 0
                fall.unlink()
                seen = {"new": len(load.results.samples)}
                wait_for(partial(went_on, {"new": load}, seen), "requests of the old one")
        assert load.results.between().failed == 0, load.results.between()


def test_a_build_that_is_killed_in_its_probation_costs_no_more_than_it_has_in_its_hands(serve: Serve) -> None:
    with contextlib.closing(Mortal(serve)) as service:
        service.start()
        place = f"http://127.0.0.1:{service.address[1]}"
        with (
            Load(f"{place}/", rate=50, timeout=60) as new,
            Load(f"{place}/slow", rate=25, timeout=60) as slow,
            contextlib.ExitStack() as stack,
        ):
            loads = {"new": new, "slow": slow}

            def death(pid: int) -> None:
                """When it has kept connections as well; those of before stay with the old one."""
                kept = Load(f"{place}/", mode="keep-alive", rate=25, connections=5, timeout=60)
                loads[f"keep-alive {len(loads)}"] = stack.enter_context(kept)
                wait_for(lambda: len(kept.results.samples) > 10, "requests on kept connections")
                os.kill(pid, signal.SIGKILL)

            held = 0
            for version in ("v2", "v3", "v4", "v5", "v6"):
                held += service.dies(version, "ok", death)
                seen = {name: len(load.results.samples) for name, load in loads.items()}
                wait_for(partial(went_on, loads, seen), "requests of the old one")
        found = {name: load.results.between() for name, load in loads.items()}
        assert sum(summary.failed for summary in found.values()) <= held, found
        # Lost in its hands, and not for want of somebody who takes them.
        ends = {Outcome.OK, Outcome.RESET, Outcome.CLOSED, Outcome.STALE, Outcome.TRUNCATED}
        assert {name for summary in found.values() for name in summary.outcomes} <= ends, found
