"""A target without the SDK that costs next to nothing to start (``python -S -E light.py``). It speaks
sd_notify, and behaves, or misbehaves, as the file `behaviour.json` in its working folder says, read anew each
time.

Keys: "start" is ok, die, mute (not ready as long as it says so) or late-die (ends shortly after it was
ready); "reload" is ok, never or die. "instance" and "version" say whom the rest is for; all, when they are
missing; with "once" it is for whoever comes first, once. It is told by SIGHUP, and says by STATUS what the
files below its root are, then READY.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = "one"


def behaviour(what: str) -> str:
    try:
        with open("behaviour.json", encoding="utf-8") as file:  # noqa: PTH123 - pathlib takes long to import
            chosen = json.load(file)
    except FileNotFoundError:
        return ""
    for name, mine in (("instance", os.environ["ASYNCSUP_INSTANCE"]), ("version", VERSION)):
        if chosen.get(name, mine) != mine:
            return ""
    wanted = str(chosen.get(what, ""))
    if wanted and chosen.get("once"):
        try:
            os.unlink("behaviour.json")  # noqa: PTH108
        except FileNotFoundError:
            return ""  # another instance was quicker
    return wanted


def content() -> Iterator[str]:
    root = os.environ["ASYNCSUP_ROOT"]
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        try:
            with open(f"{root}/{name}", encoding="utf-8") as file:  # noqa: PTH123
                yield f"{name}={file.read().strip()}"
        except FileNotFoundError:
            continue


def tell(*lines: str) -> None:
    notifications.send("\n".join(lines).encode())


def say(*lines: str) -> None:
    tell(f"STATUS={VERSION} {' '.join(content())}", *lines)


def misbehave(how: str) -> None:
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)


notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notifications.connect(os.environ["NOTIFY_SOCKET"])
signals = {signal.SIGHUP, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
misbehave(behaviour("start"))
say()
while (start := behaviour("start")) == "mute":
    if signal.sigtimedwait({signal.SIGTERM}, 0.02):
        raise SystemExit
# Of a start nothing is read after this: what is written from then on is for the next one.
tell("READY=1")
if start == "late-die":
    time.sleep(0.1)
    raise SystemExit(9)
while signal.sigwait(signals) != signal.SIGTERM:
    wanted = behaviour("reload")
    misbehave(wanted)
    if wanted != "never":
        say("READY=1")
