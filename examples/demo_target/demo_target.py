"""The demo target: works on the job that `work/job.json` names, and takes up another one without a restart.

    python demo_target.py [SECONDS_PER_STEP]

Under asyncsup a warm patch of `job.json` makes it resume with the new job, in the same process; a cold patch
replaces this file, and the program comes back as its next version.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from target_sdk import Patch, Target

VERSION = "1.0"
HERE = Path(__file__).absolute().parent

target = Target(root=HERE)
job = ""
steps = 0


def load_job() -> None:
    global job, steps
    with target.snapshot() as files:
        # The root is this folder, or only `work/` where nothing but the resources is to be patched.
        path = "work/job.json" if files.exists("work/job.json") else "job.json"
        found = files.json(path)
    job, steps = found["job"], found["steps"]
    target.status(f"v{VERSION} working on '{job}'")


@target.on_reload
def reload(patch: Patch) -> None:
    load_job()
    say(f"resumed with job '{job}' (build {patch.build}{', rolled back' if patch.rollback else ''})")


def say(text: str) -> None:
    print(f"demo target v{VERSION} pid={os.getpid()} {text}", flush=True)


async def main(seconds_per_step: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    load_job()
    async with target:
        target.ready()
        step, at = 0, ""
        while not stop.is_set():
            step = 1 if job != at or step >= steps else step + 1
            at = job
            say(f"working on job '{job}' step {step}")
            try:
                async with asyncio.timeout(seconds_per_step):
                    await stop.wait()
            except TimeoutError:
                pass
        say("stopping")


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0))
