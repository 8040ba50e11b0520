"""Descriptors that a program is started with, as systemd passes them: see sd_listen_fds(3).

They have the numbers from 3 on, and a name each. LISTEN_PID is the pid of the program, which is known only
once it is there: whoever spawns it sets that variable (`SpawnSpec.pid_variables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

FIRST: Final = 3
LISTEN_PID: Final = "LISTEN_PID"
LISTEN_FDS: Final = "LISTEN_FDS"
LISTEN_FDNAMES: Final = "LISTEN_FDNAMES"


def environment(names: Sequence[str]) -> dict[str, str]:
    """The variables, but for LISTEN_PID, that tell a program of descriptors `FIRST`, `FIRST` + 1 ..."""
    return {LISTEN_FDS: str(len(names)), LISTEN_FDNAMES: ":".join(names)} if names else {}
