"""A target that behaves, or misbehaves, as the file `behaviour.json` in its working folder says, read anew
each time.

Keys: "prepare" is go, wait, refuse, never, die or raise; "reload" is ok, fail, never, die or regret (the
first instance takes it up, and then says that it has failed); "start" is ok, die, done (ends with success
before it is ready), mute (not ready as long as it says so), late-die (ends shortly after it was ready),
uneven (the first instance does so once; no other is ready before it was started again) or picky (not ready,
and ends as soon as it sees new files; ready after that, on old ones); "stop" is ok or never. "build" is what
it claims at its hello. "instance" and "version" say whom the rest is for; all, when they are missing; with
"once" it is for whoever comes first, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from target_sdk import Patch, PrepareAnswer, Target, not_allowed, wait

VERSION = "one"


def behaviour(what: str) -> str:
    try:
        chosen: dict[str, Any] = json.loads(Path("behaviour.json").read_text())
    except FileNotFoundError:
        return ""
    for name, mine in (("instance", os.environ.get("ASYNCSUP_INSTANCE")), ("version", VERSION)):
        if chosen.get(name, mine) != mine:
            return ""
    wanted = str(chosen.get(what, ""))
    if wanted and chosen.get("once"):
        try:
            Path("behaviour.json").unlink()
        except FileNotFoundError:
            return ""  # another instance was quicker
    return wanted


claimed = behaviour("build")
target = Target(build=int(claimed) if claimed else None)


def say(build: int | None) -> None:
    """Tell what the files say, read as one build."""
    with target.snapshot() as files:
        names = sorted(name for name in ("a.txt", "b.txt", "sub/c.txt") if files.exists(name))
        content = " ".join(f"{name}={files.read_text(name).strip()}" for name in names)
    target.status(f"{VERSION} build={build} {content}")


def old_files() -> bool:
    return Path(os.environ["ASYNCSUP_ROOT"], "a.txt").read_text() == "old-a"


@target.on_prepare
async def prepare(patch: Patch) -> PrepareAnswer | None:
    match behaviour("prepare"):
        case "wait":
            return wait(0.05, "in the middle of something")
        case "refuse":
            return not_allowed("closed today")
        case "raise":
            raise ValueError("confused")
        case "never":
            await asyncio.sleep(3600)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
    return None


@target.on_reload
async def reload(patch: Patch) -> None:
    what = behaviour("reload")
    if not patch.rollback:
        if what == "fail":
            raise ValueError("these files are no good")
        if what == "never":
            await asyncio.sleep(3600)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "regret" and str(target.instance).endswith(":0"):
            asyncio.get_running_loop().call_later(0.05, target.failed, "these files turn out to be no good")
    say(patch.build)


@target.on_abort
def abort(patch: Patch) -> None:
    print(f"aborted {patch.id}", flush=True)


async def main() -> None:
    if behaviour("start") in {"die", "done"}:
        raise SystemExit(9 if behaviour("start") == "die" else 0)
    done = asyncio.Event()

    def stop() -> None:
        if behaviour("stop") != "never":
            done.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    async with target:
        say(target.build)
        while behaviour("start") == "mute":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), 0.02)
                return
        fallen = Path("fallen")
        while behaviour("start") == "picky" and not (old_files() and fallen.exists()):
            if not old_files():
                fallen.touch()
                raise SystemExit(9)
            await asyncio.sleep(0.02)
        uneven, first = behaviour("start") == "uneven", str(target.instance).endswith(":0")
        if uneven and first and fallen.exists():
            Path("risen").touch()
        while uneven and not first and not Path("risen").exists():
            await asyncio.sleep(0.02)
        # Of a start nothing is read after `ready`: what is written from then on is for the next one.
        late = behaviour("start") == "late-die"
        target.ready()
        if late or (uneven and first and not fallen.exists()):
            await asyncio.sleep(0.1)
            fallen.touch()
            raise SystemExit(9)
        await done.wait()


asyncio.run(main())
