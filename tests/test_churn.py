"""Thousands of starts and crashes, as a day of bad luck brings them: nothing piles up in the supervisor or in
its keeper.

By default 2,000 of them, after as many as it takes to fill what is kept of the past; ``ASYNCSUP_TESTS=all``
makes it 20,000.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from chance import EVERYTHING
from conftest import Serve, children_of, wait_for

from asyncsup.client import ControlClient

STARTS = 20_000 if EVERYTHING else 2_000
WARM_UP = 6_000
"""Starts until the supervisor keeps as many events of the past as it ever does."""
MEMORY_MARGIN_KIB = 512
KEEPER_MARGIN_KIB = 128
"""It has nothing to remember of a life that has ended, and hardly allocates at all."""

# They end with success, with a failure, by a signal, before they are ready, or leave a grandchild behind.
SETTINGS = """
[defaults]
restart = "always"
restart_delay = "0s"
min_uptime = "0s"
start_limit_interval = "0s"
stop_timeout = "2s"
[target.exit]
command = ["true"]
instances = 2
[target.fail]
command = ["false"]
instances = 2
[target.kill]
command = ["sh", "-c", "kill -9 $$"]
[target.family]
command = ["sh", "-c", "sleep 600 & exec true"]
[target.talk]
command = ["sh", "-c", "echo one; echo two >&2; exit 3"]
log.format = "timestamp"
log.stderr = "separate"
log.max_size = "8KiB"
log.max_files = 2
[target.hooked]
command = ["true"]
hooks.pre_start = ["true"]
hooks.post_stop = ["true"]
[target.mute]
command = ["true"]
protocol = "notify"
[target.calm]
command = ["sleep", "600"]
"""


class Size(NamedTuple):
    """How large the two are; ``memory`` in KiB."""

    descriptors: int
    tasks: int
    children: int
    keeper_descriptors: int
    keeper_children: int
    memory: int
    keeper_memory: int


def starts(client: ControlClient) -> int:
    return sum(i["restarts"] for t in client.call("status")["targets"] for i in t["instances"])


def descriptors_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def memory_of(pid: int) -> int:
    """What is its own, in KiB."""
    # Not from `status`, which some kernels only count roughly.
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def size(client: ControlClient, supervisor: int, keeper: int) -> Size:
    return Size(
        descriptors=descriptors_of(supervisor),
        tasks=client.call("supervisor.info")["tasks"],
        children=len(children_of(supervisor)),
        keeper_descriptors=descriptors_of(keeper),
        keeper_children=len(children_of(keeper)),
        memory=memory_of(supervisor),
        keeper_memory=memory_of(keeper),
    )


@pytest.mark.timeout(3600)
def test_nothing_piles_up(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    with serve.start(SETTINGS) as client:
        pid = client.call("supervisor.info")["pid"]
        assert serve.process is not None
        keeper = serve.process.pid
        assert keeper != pid

        def resting() -> Size:
            """With everything stopped but `calm`: what is left does not depend on the moment."""
            others = ["exit", "fail", "kill", "family", "talk", "hooked", "mute"]
            client.call("stop", {"names": others}, timeout=60)
            wait_for(lambda: len(children_of(pid)) == 1, "the last hook to end")
            # Of the grandchildren, who are its own once their parent has ended.
            wait_for(lambda: children_of(keeper) == [pid], "the keeper to reap the last one")

            def rests() -> Size | None:
                found = size(client, pid, keeper)
                return found if all(size(client, pid, keeper) == found for _ in range(5)) else None

            rest: Size = wait_for(rests, "the supervisor to rest")
            return rest

        names = {"names": ["all"], "wait": False}
        wait_for(lambda: starts(client) >= WARM_UP, "the first starts", timeout=1800, every=0.2)
        before, done = resting(), starts(client)
        client.call("start", names)
        wait_for(lambda: starts(client) - done >= STARTS, "all the others", timeout=1800, every=0.2)
        after = resting()
        with capsys.disabled():
            print(f"\nafter {done} starts: {before}\nand {STARTS} more: {after}")
        assert after[:5] == before[:5]
        assert after.memory <= before.memory + MEMORY_MARGIN_KIB
        assert after.keeper_memory <= before.keeper_memory + KEEPER_MARGIN_KIB
        assert client.call("status", {"names": ["calm"]})["targets"][0]["instances"][0]["restarts"] == 0
