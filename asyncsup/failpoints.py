"""Named points at which a test, or an operator who wants to see recovery at work, can make the process fail.

``ASYNCSUP_FAILPOINT="store.switch.renamed:kill,store.commit.recorded:error"`` in the environment. Actions:

========= ==========================================================================================
kill      SIGKILL to this process, as a crash or the OOM killer would
error     raise `OSError` (EIO), as a failing disk would
hang      go no further: a thread blocks, a step of a transaction waits; for an hour
trace     write the point's name to stderr and go on; ``*:trace`` names every point that is passed
========= ==========================================================================================

``NAME:ACTION:N`` acts at the N-th time the point is passed. Several entries for one point act in their order.

``ASYNCSUP_FAILPOINT=@FILE`` reads the same from a file each time a point is passed; so what is to fail can be
chosen while the process runs. A file that is not there asks for nothing. To replace the file (by a rename)
begins to count anew, and lets go of whatever hangs.

A point of the store is passed when something is done (``store.stage.synced``), those of a transaction are
passed before the step (``transaction.switch``, ``undo.switching``). What is cut off, fails or hangs anywhere
must be seen to do no harm, so every step gets a point, and the tests fail them all: see
docs/design/0010-failpoints.md. Without the variable a point costs one look-up.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

VARIABLE: Final = "ASYNCSUP_FAILPOINT"
_HANG_SECONDS: Final = 3600.0
_LOOK_SECONDS: Final = 0.01
"""How often what hangs looks whether it is let go."""


class _Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for; ``version`` tells a file from the one that replaces it."""

    version: object
    text: str


_lock = threading.Lock()
_passed: Counter[tuple[str, str]] = Counter()
_counted: object = None
"""The version of the wish for which `_passed` counts."""


def failpoint(name: str) -> None:
    """Do what the environment asks for at this point; usually nothing. What hangs is the calling thread.

    Raises:
        OSError: the action is ``error``.
        ValueError: the variable is malformed; a fault that is not injected must not look like a test passed.
    """
    wish = _wish()
    if wish is None:
        return
    until = time.monotonic() + _HANG_SECONDS
    for _ in _faults(name, wish):
        while _wish() == wish and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)


async def step_failpoint(name: str) -> None:
    """As `failpoint`, for a step on the event loop: what hangs is this step and nobody else, until it is
    cancelled."""
    wish = _wish()
    if wish is None:
        return
    until = time.monotonic() + _HANG_SECONDS
    for _ in _faults(name, wish):
        while _wish() == wish and time.monotonic() < until:  # noqa: ASYNC110 - a file wakes nobody
            await asyncio.sleep(_LOOK_SECONDS)


def _wish() -> _Wish | None:
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    if not text.startswith("@"):
        return _Wish(version=text, text=text)
    try:
        with Path(text[1:]).open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            return _Wish(version=(status.st_ino, status.st_mtime_ns), text=file.read().strip())
    except FileNotFoundError:
        return _Wish(version=None, text="")


def _faults(name: str, wish: _Wish) -> Iterator[None]:
    """Act as asked for at a point; yields where the caller is to hang."""
    for entry in filter(None, wish.text.split(",")):
        point, _, rest = entry.strip().partition(":")
        action, _, count = rest.partition(":")
        if action not in {"kill", "error", "hang", "trace"} or (count and not count.isdecimal()):
            raise ValueError(f"{VARIABLE}: {entry!r} is not NAME:kill|error|hang|trace[:N]")
        if point not in {name, "*"}:
            continue
        if count and _count(entry, name, wish) != int(count):
            continue
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "error":
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} (failpoint {name})")
        elif action == "hang":
            yield
        else:
            sys.stderr.write(f"{name}\n")
            sys.stderr.flush()


def _count(entry: str, name: str, wish: _Wish) -> int:
    """The how-manieth time this is that an entry's point is passed."""
    global _counted  # noqa: PLW0603 - the counts belong to the process, as the points do
    with _lock:
        if wish.version != _counted:
            _passed.clear()
            _counted = wish.version
        _passed[entry, name] += 1
        return _passed[entry, name]
