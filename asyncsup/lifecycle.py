"""The life of one instance: states, events, and the one table that says what follows what.

Events arrive in any order from outside: the operator, the kernel, the clock, the program itself. The table
is the whole answer. An event already carries its decision (`restart.py` has read the exit status before it
becomes `ENDED`, `CRASHED`, `RESPAWN` or `GAVE_UP`), so no cell needs an ``if``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from asyncsup.errors import IllegalTransitionError


class State(StrEnum):
    STOPPED = "stopped"
    """Not running because it was never started or somebody stopped it."""
    WAITING = "waiting"
    """To be started as soon as what it depends on is ready."""
    STARTING = "starting"
    """Spawned, not ready yet."""
    RUNNING = "running"
    """Ready."""
    RELOADING = "reloading"
    """Ready, and taking up changed resources."""
    STOPPING = "stopping"
    """Asked to end; some process of its group is still there."""
    BACKOFF = "backoff"
    """Ended too early; to be started again after a delay."""
    EXITED = "exited"
    """Ended as expected; not to be started again by itself."""
    FAILED = "failed"
    """Ended badly and given up; only an operator starts it again."""
    LOST = "lost"
    """An earlier supervisor started it, and there is a process that may be it, or may not: it is left alone
    until it ends or an operator decides."""


class Event(StrEnum):
    START = "start"
    WAIT = "wait"
    READY = "ready"
    RELOAD = "reload"
    RELOADED = "reloaded"
    STOP = "stop"
    GONE = "gone"
    """The last process of the group has ended, after a `STOP`."""
    ENDED = "ended"
    """The program ended and its policy is content with that."""
    CRASHED = "crashed"
    """The program ended (or could not be spawned) and is to be tried again after a delay."""
    RESPAWN = "respawn"
    """The program ended after it had run well; it is started again at once."""
    GAVE_UP = "gave_up"
    """The program ended and its policy or start limit forbids another try."""
    BACKOFF_ELAPSED = "backoff_elapsed"
    LOST = "lost"
    """A process that an earlier supervisor had started cannot be told from another."""


S, E = State, Event

_CHILD_ENDED: Final[Mapping[Event, State]] = {
    E.ENDED: S.EXITED,
    E.CRASHED: S.BACKOFF,
    E.RESPAWN: S.STARTING,
    E.GAVE_UP: S.FAILED,
}
_DOWN: Final[Mapping[Event, State]] = {E.START: S.STARTING, E.WAIT: S.WAITING, E.STOP: S.STOPPED}

TRANSITIONS: Final[Mapping[State, Mapping[Event, State]]] = {
    S.STOPPED: {E.START: S.STARTING, E.WAIT: S.WAITING},
    S.WAITING: {E.START: S.STARTING, E.STOP: S.STOPPED},
    S.STARTING: {E.READY: S.RUNNING, E.STOP: S.STOPPING, E.LOST: S.LOST, **_CHILD_ENDED},
    S.RUNNING: {E.RELOAD: S.RELOADING, E.STOP: S.STOPPING, E.LOST: S.LOST, **_CHILD_ENDED},
    S.RELOADING: {E.RELOADED: S.RUNNING, E.STOP: S.STOPPING, E.LOST: S.LOST, **_CHILD_ENDED},
    S.STOPPING: {E.GONE: S.STOPPED, E.LOST: S.LOST},
    S.BACKOFF: {E.BACKOFF_ELAPSED: S.STARTING, **_DOWN},
    S.EXITED: {**_DOWN, E.GAVE_UP: S.FAILED},
    S.FAILED: _DOWN,
    S.LOST: {**_DOWN, **_CHILD_ENDED},
}

ALIVE: Final = frozenset({S.STARTING, S.RUNNING, S.RELOADING, S.STOPPING})
"""States in which there is a process."""

READY: Final = frozenset({S.RUNNING, S.RELOADING})
"""States in which the program said that it can do its work."""


def next_state(state: State, event: Event) -> State:
    """Look up one cell.

    Raises:
        IllegalTransitionError: the state has no cell for the event; nothing changed.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransitionError(f"{event.value!r} means nothing in state {state.value!r}") from None


def accepts(state: State, event: Event) -> bool:
    """Whether the table has a cell for the event: a caller asks before it acts on a request."""
    return event in TRANSITIONS[state]
