"""Following what goes on, in `logs` and `events`: until the supervisor ends, and over its crashes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from asyncsup.cli.session import Session
from asyncsup.endpoint import check_reachable
from asyncsup.errors import AsyncsupError, ShuttingDownError, SupervisorUnreachableError

RETRY_SECONDS: Final = 0.5
"""How often a follower looks whether a supervisor that went away is back."""


def follow(session: Session, step: Callable[[], bool]) -> None:
    """Take steps until one says no, the reader goes or the supervisor ends. A crashed one is waited for."""
    out, away = session.out, False
    while not out.closed:
        try:
            if away:
                check_reachable(session.client.endpoint)
                out.note("the supervisor is back")
                away = False
            if not step():
                return
        except SupervisorUnreachableError:
            if not away:
                out.note("the supervisor went away; waiting for it to come back (Ctrl-C ends this)")
                away = True
            time.sleep(RETRY_SECONDS)
        except AsyncsupError as error:
            if error.error_code != ShuttingDownError.code:
                raise
            out.note("the supervisor is ending")
            return
