"""The life of a supervisor's process: with a keeper or without, and how it gives way to another one.

A supervisor is replaced by ending without stopping anything, as in a crash, only on purpose: the next one
takes everything back. Before that the new program was asked whether it would start at all (`successor.py`).
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Sequence

import anyio

from asyncsup import keeper, own_log
from asyncsup.child import raise_descriptor_limit, usual_descriptor_limit
from asyncsup.config import Config
from asyncsup.errors import AsyncsupError
from asyncsup.keeper_link import KeeperLink, launch
from asyncsup.successor import Successor, own_command


def serve(load: Callable[[], Config], *, channel: int | None, keeper_wanted: bool) -> int:
    """Be a supervisor until told to stop; returns the exit status.

    Args:
        load: reads the configuration.
        channel: the descriptor a keeper has given us; None if it was not a keeper that started us.
        keeper_wanted: without one, become one, and go on in a child.
    """
    if os.getpid() == 1:
        # The kernel drops what PID 1 has no handler for; blocked, it waits until there is one.
        signal.pthread_sigmask(signal.SIG_BLOCK, keeper.PASSED_ON)
    if channel is not None:
        # The keeper may hold more for us than fits into the limit it has started us with.
        raise_descriptor_limit()
        link = KeeperLink(socket.socket(fileno=channel))
        # The keeper has had it as well, and passes it on when the instances can be stopped.
        _ignore(keeper.ENDING)
    else:
        link = KeeperLink(launch(own_command()) if keeper_wanted else None)
        if os.getpid() != 1:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, keeper.PASSED_ON)
    try:
        status, successor = _run(load(), link)
    except AsyncsupError as error:
        link.end(error.exit_status)
        raise
    if successor is None:
        link.end(status)
        return status
    if link.pid is None:
        # Its handlers are gone, and those of the next one not there yet.
        _ignore(keeper.PASSED_ON)
        usual_descriptor_limit()
        os.execv(successor.command[0], list(successor.command))
    link.replace(successor.python, successor.keeper, successor.command)
    return 0


def _run(config: Config, link: KeeperLink) -> tuple[int, Successor | None]:
    from asyncsup.supervisor import Supervisor  # noqa: PLC0415 - most of the start-up; the keeper goes first

    # Modules and classes stay: no collection has to look at them again.
    gc.freeze()
    gc.enable()

    own_log.begin(config.supervisor.log_level)
    supervisor = Supervisor(config, link)
    status = anyio.run(supervisor.run, backend="asyncio")
    return status, supervisor.successor


def _ignore(signals: Sequence[signal.Signals]) -> None:
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
