"""Thousands of starts and crashes, as a day of bad luck brings them: nothing piles up in the supervisor.

By default 2,000 of them, after as many as it takes to fill what is kept of the past; ``ASYNCSUP_TESTS=all``
makes it 20,000.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from conftest import Serve, children_of, wait_for

from asyncsup.client import ControlClient

STARTS = 20_000 if os.environ.get("ASYNCSUP_TESTS") == "all" else 2_000
WARM_UP = 6_000
"""Starts until the supervisor keeps as many events of the past as it ever does."""
MEMORY_MARGIN_KIB = 512

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
    """How large a supervisor is; ``memory`` in KiB."""

    descriptors: int
    tasks: int
    children: int
    memory: int


def starts(client: ControlClient) -> int:
    return sum(i["restarts"] for t in client.call("status")["targets"] for i in t["instances"])


def size(client: ControlClient, pid: int) -> Size:
    memory = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert memory is not None
    return Size(
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        tasks=client.call("supervisor.info")["tasks"],
        children=len(children_of(pid)),
        memory=int(memory[1]),
    )


def test_nothing_piles_up(serve: Serve) -> None:
    with serve.start(SETTINGS) as client:
        pid = client.call("supervisor.info")["pid"]

        def resting() -> Size:
            """With everything stopped but `calm`: what is left does not depend on the moment."""
            others = ["exit", "fail", "kill", "family", "talk", "hooked", "mute"]
            client.call("stop", {"names": others}, timeout=60)
            wait_for(lambda: len(children_of(pid)) == 1, "the last hook to end")

            def rests() -> Size | None:
                found = size(client, pid)
                return found if all(size(client, pid) == found for _ in range(5)) else None

            rest: Size = wait_for(rests, "the supervisor to rest")
            return rest

        names = {"names": ["all"], "wait": False}
        wait_for(lambda: starts(client) >= WARM_UP, "the first starts", timeout=300, every=0.2)
        before, done = resting(), starts(client)
        client.call("start", names)
        wait_for(lambda: starts(client) - done >= STARTS, "all the others", timeout=1800, every=0.2)
        after = resting()
        assert after[:3] == before[:3]
        assert after.memory <= before.memory + MEMORY_MARGIN_KIB
        assert client.call("status", {"names": ["calm"]})["targets"][0]["instances"][0]["restarts"] == 0
