"""A patch on the screen while it happens: steps and progress from the event stream, then the report.

Shared by the command line and the console.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from asyncsup.client import ControlClient, Event, EventStream
from asyncsup.errors import RemoteError, SupervisorUnreachableError, TimeoutExpiredError
from asyncsup.render import duration, step_line, waiting_line
from asyncsup.terminal import Output

OPERATIONS: Final = {"patch.apply": "patch", "patch.rollback": "rollback"}
"""What each is called in the queues of its targets."""
QUERY_SECONDS: Final = 10.0
"""How long a supervisor may take to say whom one waits for."""
UNDO_SECONDS: Final = 120.0
"""How long to watch a cancelled transaction being undone; a supervisor bounds its own steps well below."""


def call_live(
    client: ControlClient,
    out: Output,
    method: str,
    params: Mapping[str, Any],
    *,
    timeout: float | None = None,
) -> Any:
    """Call ``patch.apply`` or ``patch.rollback`` and show what it does as it does it.

    Cancelled, by Ctrl-C or by the time-out, it stays until the supervisor has put things back (a second
    Ctrl-C does not wait for that), and raises then.

    Raises:
        what `ControlClient.call` raises.
    """
    with client.subscribe() as events:
        view = _View(out)

        def on_slow() -> bool:
            return say_what_takes_so_long(client, out, queued=OPERATIONS[method]) or view.has_begun

        try:
            return client.call(
                method,
                params,
                timeout=timeout,
                events=events,
                on_event=view.show,
                on_slow=on_slow if out.is_live else None,
            )
        except (KeyboardInterrupt, TimeoutExpiredError) as error:
            why = (
                "interrupted" if isinstance(error, KeyboardInterrupt) else f"not done in {duration(timeout)}"
            )
            view.watch_undo(events, why)
            raise
        finally:
            view.finish(events)


def say_what_takes_so_long(
    client: ControlClient,
    out: Output,
    *,
    names: Sequence[str] | None = None,
    queued: str | None = None,
    ends: str = "gives up",
) -> bool:
    """Say what somebody waits for who has asked for something; whether there was something to say.

    Args:
        names: of the targets that it is done to; None for all.
        queued: see `waiting_line`.
        ends: what Ctrl-C does.
    """
    try:
        value = client.call("status", names=names, timeout=QUERY_SECONDS)
    except (RemoteError, TimeoutExpiredError):
        return False  # it is not what was asked for
    line = waiting_line(value, queued=queued)
    if line:
        out.note(f"waiting: {line}; Ctrl-C {ends}")
    return bool(line)


class _View:
    """Draws the events of one transaction.

    Its number is not known before the report is there, so the first transaction that moves is taken for it;
    steps of others say whose they are.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._txn: object = None
        self._verdict: str | None = None

    @property
    def has_begun(self) -> bool:
        return self._txn is not None

    def show(self, event: Event) -> None:
        txn = event.data.get("txn")
        if txn is None:
            return
        if self._txn is None:
            self._txn = txn
        if event.type == "patch.step":
            whose = "" if txn == self._txn else f"(transaction {txn}) "
            self._out.lines([f"  {whose}{step_line(event.data, ink=self._out.ink)}"])
        elif txn == self._txn and event.type == "patch.progress":
            self._out.bar(int(event.data.get("done") or 0), int(event.data.get("total") or 0))
        elif txn == self._txn and event.type == "patch.ended":
            self._verdict = str(event.data.get("verdict"))

    def watch_undo(self, events: EventStream, why: str) -> None:
        for event in events.catch_up():
            self.show(event)
        if self._txn is None:
            self._out.note(f"{why}; cancelled before anything was changed")
            return
        if self._verdict is None:
            self._out.note(f"{why}; cancelled, waiting until the supervisor has put things back")
        deadline = time.monotonic() + UNDO_SECONDS
        while self._verdict is None and time.monotonic() < deadline:
            try:
                step = events.read(timeout=deadline - time.monotonic())
            except SupervisorUnreachableError:
                # Perhaps of the events alone; if there is no supervisor any more, this says so.
                for event in events.catch_up():
                    self.show(event)
                continue
            if step is not None:
                self.show(step)
        ended = self._verdict or "still going on"
        self._out.note(f"transaction {self._txn}: {ended} (`asyncsup patch show {self._txn}`)")

    def finish(self, events: EventStream) -> None:
        """Show what happened between the last event that came by itself and the report."""
        self._out.clear_bar()
        try:
            for event in events.catch_up():
                self.show(event)
        except SupervisorUnreachableError:
            pass  # whoever called hears of that from the call itself
        self._out.clear_bar()
