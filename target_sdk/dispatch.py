"""Where the handlers of a threaded program run: where it calls `run_pending`, or in a thread of their own.

Always one at a time and in the order in which the supervisor asked; `loop.py` has the same for asyncio.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from target_sdk.patching import Call, Outcome, StoppingError

HANDLER_GRACE: Final = 1.0
"""Seconds for which leaving the target waits for a handler that is still running."""

logger = logging.getLogger("target_sdk")

Finish = Callable[[Call, Outcome], None]


class PendingDispatcher:
    """Handlers run where the program calls `run_pending`."""

    def __init__(self, finish: Finish) -> None:
        self._finish = finish
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()
        self._runner: int | None = None
        self._closed = False
        self._last_run: float | None = None

    def submit(self, call: Call) -> None:
        """Queue a call. Called on the I/O thread."""
        with self._changed:
            if self._closed:
                self._finish(call, Outcome(error=StoppingError()))
                return
            self._calls.append(call)
            if self._last_run is None:
                logger.warning(
                    "the supervisor asks for %r, but run_pending() was never called: it is answered there",
                    call.method,
                )
            self._changed.notify_all()

    def run_pending(self, timeout: float | None) -> int:
        """Run what waits, or wait for it; return how many handlers were run.

        Args:
            timeout: how long to wait while there is nothing to do (seconds; None: for ever).
        """
        with self._changed:
            if self._runner == threading.get_ident():
                raise RuntimeError("run_pending() was called from within a handler")
            self._last_run = time.monotonic()
            was_closed = self._closed
            self._changed.wait_for(lambda: self._ready() or self._closed is not was_closed, timeout)
            if not self._ready():
                return 0
            self._runner = threading.get_ident()
        count = 0
        try:
            while (call := self._next()) is not None:
                count += 1
                self._run(call)
        finally:
            with self._changed:
                self._runner = None
                self._changed.notify_all()
        return count

    def close(self) -> None:
        """Answer whoever still waits, and wake up whoever waits in `run_pending`.

        A handler that is running (in another thread) gets `HANDLER_GRACE` seconds to end.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._calls:
                self._finish(self._calls.popleft(), Outcome(error=StoppingError()))
            if self._runner != threading.get_ident():
                self._changed.wait_for(lambda: self._runner is None, HANDLER_GRACE)

    def _ready(self) -> bool:
        return bool(self._calls) and self._runner is None

    def _next(self) -> Call | None:
        with self._changed:
            return self._calls.popleft() if self._calls else None

    def _run(self, call: Call) -> None:
        assert call.handler is not None
        started = time.monotonic()
        try:
            value = call.handler(call.argument)
            if inspect.iscoroutine(value):
                value.close()
                raise TypeError("an async handler needs `async with target`")  # noqa: TRY301
        except BaseException as error:
            self._finish(call, failed(call, error, started))
            if not isinstance(error, Exception):
                raise
        else:
            self._finish(call, Outcome(value=value, took=time.monotonic() - started))


class ThreadDispatcher(PendingDispatcher):
    """Handlers run in a thread of their own, beside the program's."""

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish)
        self._last_run = time.monotonic()
        threading.Thread(target=self._serve, name="target-sdk-handlers", daemon=True).start()

    def _serve(self) -> None:
        while not self._closed:
            try:
                self.run_pending(None)
            except BaseException as error:
                # `sys.exit()` in a handler must not leave the supervisor without anybody to ask. It is
                # answered as a failure; ending the program is for the program's own threads.
                logger.warning("a handler ended with %r", error)


def failed(call: Call, error: BaseException, started: float) -> Outcome:
    if not isinstance(error, StoppingError):
        logger.error("the handler for %r failed", call.method, exc_info=error)
    return Outcome(error=error, took=time.monotonic() - started)
