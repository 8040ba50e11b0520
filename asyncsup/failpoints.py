"""Named points at which a test, or an operator who wants to see recovery at work, can make the process fail.

``ASYNCSUP_FAILPOINT="store.switch.renamed:kill,store.commit.recorded:error"`` in the environment. Actions:

========= ==========================================================================================
kill      SIGKILL to this process, as a crash or the OOM killer would
error     raise `OSError` (EIO), as a failing disk would
hang      block the calling thread for an hour
trace     write the point's name to stderr and go on; ``*:trace`` names every point that is passed
========= ==========================================================================================

``NAME:ACTION:N`` acts at the N-th time the point is passed. Without the variable a point costs one look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections import Counter
from typing import Final

VARIABLE: Final = "ASYNCSUP_FAILPOINT"
_HANG_SECONDS: Final = 3600.0

_passed: Counter[tuple[str, str]] = Counter()


def failpoint(name: str) -> None:
    """Do what the environment asks for at this point; usually nothing.

    Raises:
        OSError: the action is ``error``.
        ValueError: the variable is malformed; a fault that is not injected must not look like a test passed.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    for entry in wanted.split(","):
        point, _, rest = entry.strip().partition(":")
        action, _, count = rest.partition(":")
        if action not in {"kill", "error", "hang", "trace"} or (count and not count.isdecimal()):
            raise ValueError(f"{VARIABLE}: {entry!r} is not NAME:kill|error|hang|trace[:N]")
        if point not in {name, "*"}:
            continue
        key = (entry, name)
        _passed[key] += 1
        if not count or _passed[key] == int(count):
            _act(action, name)


def _act(action: str, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "error":
        raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} (failpoint {name})")
    elif action == "hang":
        time.sleep(_HANG_SECONDS)
    else:
        sys.stderr.write(f"{name}\n")
        sys.stderr.flush()
